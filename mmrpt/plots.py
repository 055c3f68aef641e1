"""Draw a run: PNGs in runs/<name>/plots/ from the files the trainer wrote.

    python -m mmrpt.plots runs/demo

Every `plot_x(run_dir)` returns the file it wrote, or None when the run holds no data for it (yet).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmrpt.reporting.bars import plot_heldout_accuracy
from mmrpt.reporting.curves import plot_kept_rate, plot_loss, plot_reward, plot_stability
from mmrpt.reporting.distributions import plot_dependency, plot_token_perception, plot_trajectory_perception

__all__ = [
    "PLOTS",
    "Plot",
    "draw_all",
    "plot_dependency",
    "plot_heldout_accuracy",
    "plot_kept_rate",
    "plot_loss",
    "plot_reward",
    "plot_stability",
    "plot_token_perception",
    "plot_trajectory_perception",
]


class Plot(NamedTuple):
    """A plot, how to read it in one line, and what it is drawn from."""

    draw: Callable[[Path | str], Path | None]
    reading: str
    needs: str


PLOTS: dict[str, Plot] = {
    "heldout_accuracy": Plot(
        plot_heldout_accuracy,
        "Seeing shows as a gap between the first group of bars and the other two: a model that guesses from the words "
        "is as good with the image blanked or swapped. Whiskers are 95 % intervals.",
        "evaluation.json",
    ),
    "reward": Plot(
        plot_reward,
        "Each faint point is one step's rollouts on training captions; the strong line is their moving average.",
        "metrics.jsonl, phase rl",
    ),
    "dependency": Plot(
        plot_dependency,
        "The further apart the two colours, the better attention alone tells which sentences need the image; "
        "sentences right of the dashed line were masked.",
        "scores.jsonl",
    ),
    "token_perception": Plot(
        plot_token_perception,
        "Left: most tokens hardly change when the image is damaged. Right: the higher the curve bends above the "
        "dashed line, the fewer tokens carry the perception.",
        "perception.jsonl, token_scores",
    ),
    "trajectory_perception": Plot(
        plot_trajectory_perception,
        "Responses to the right looked more; their advantage is scaled up, that of the others down.",
        "perception.jsonl, trajectory_scores",
    ),
    "kept_rate": Plot(
        plot_kept_rate,
        "Tokens outside the kept share get no policy gradient (rounding up per response lifts it above keep_ratio); "
        "groups whose rollouts all earned the same teach nothing and are dropped.",
        "metrics.jsonl, phase rl, kept_token_rate",
    ),
    "loss": Plot(
        plot_loss,
        "The warm-up stops before its ceiling; the control goes on with captions alone for as many steps as "
        "reinforcement, so that more training alone is not mistaken for its effect.",
        "metrics.jsonl, phases warmup and control",
    ),
    "stability": Plot(
        plot_stability,
        "A healthy run keeps entropy above zero, gradient norms flat, few clipped tokens, and a policy close to the "
        "one that sampled.",
        "metrics.jsonl, phase rl",
    ),
}


def draw_all(run_dir: Path | str) -> list[Path]:
    """Draw every plot the run has data for, in the order of `PLOTS`."""
    return [path for plot in PLOTS.values() if (path := plot.draw(run_dir)) is not None]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmrpt.plots", description="Draw the plots of a run folder.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    run = parser.parse_args(arguments).run
    if not run.is_dir():
        parser.error(f"{run} is not a folder: pass a run folder, such as runs/demo")
    drawn = {path.stem: path for path in draw_all(run)}
    for name, plot in PLOTS.items():
        print(drawn.get(name, f"not drawn: {name} (no data in {plot.needs})"))


if __name__ == "__main__":
    main()
