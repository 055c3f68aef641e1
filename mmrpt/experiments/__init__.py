"""Claims tested by whole runs: each experiment is a list of arms (settings and a model of the run), every arm at every
seed, answered by one table. `python -m mmrpt.experiments` lists them, docs/experiments/ holds a page for each.
"""
