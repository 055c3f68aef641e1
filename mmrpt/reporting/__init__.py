"""What plots.py and report.py share: reading a run folder, the measured numbers, the look of plots, Markdown."""
