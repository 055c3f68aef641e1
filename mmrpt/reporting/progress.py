"""How far a run came and how long it took."""

from __future__ import annotations

import math

from mmrpt.reporting.markdown import escape, table
from mmrpt.reporting.measured import Evaluation
from mmrpt.reporting.runfiles import PHASES, RunFiles, flatten, number

PHASE_NAMES = {
    "sight": "vision tower",
    "warmup": "caption warm-up",
    "scoring": "dependency scores and masking",
    "rl": "reinforcement",
    "control": "caption-trained control",
    "evaluation": "evaluation",
}
TIMED_AS = {"rl": "reinforcement"}  # the name under which a phase's seconds are kept, where it differs


def planned_steps(files: RunFiles) -> dict[str, int]:
    """Steps that the settings ask of each phase; a phase whose number is not in them is left out."""
    config = flatten(files.document("config.yaml"))
    names = {"sight": "demo.vision_steps", "warmup": "warmup.steps", "rl": "rl.steps"}
    asked = {phase: config.get(name) for phase, name in names.items()}
    asked["sight"] = asked["sight"] or None  # 0: there is no such phase
    asked["control"] = asked["rl"] if config.get("control.enabled", True) else None
    return {phase: steps for phase, steps in asked.items() if isinstance(steps, int)}


def is_finished(files: RunFiles, evaluation: Evaluation) -> bool:
    """The reinforced model was evaluated, the last thing a run does (the control too, where one was asked for)."""
    wanted = {"reinforced"} | ({"caption"} if "control" in planned_steps(files) else set())
    return wanted <= set(evaluation.models())


def state(files: RunFiles, evaluation: Evaluation) -> str:
    """One sentence: finished, or how far the run came."""
    if is_finished(files, evaluation):
        return "The run is finished."
    done, planned = steps_done(files), planned_steps(files)
    if not done:
        return "**The run is not finished**: no step of training is recorded yet."
    done |= {phase: planned[phase] for phase in phases_done(files) if phase in planned}
    phase = list(done)[-1]
    of = f" of {planned[phase]}" if phase in planned else ""
    return (
        f"**The run is not finished**: {PHASE_NAMES[phase]} came to step {done[phase]}{of}. What follows is what was "
        "measured so far; run the same command again with `--resume` and it goes on from its last checkpoint."
    )


def phase_seconds(files: RunFiles) -> dict[str, float]:
    """Seconds per phase, of seconds.json (kept while the run goes on) or else of evaluation.json."""
    seconds = files.document("evaluation.json").get("seconds") or files.document("seconds.json")
    return {str(name): number(seconds, name) for name in seconds} if isinstance(seconds, dict) else {}


def steps_done(files: RunFiles) -> dict[str, int]:
    """Steps of each phase that has begun: one more than the last step in metrics.jsonl, which counts from 0."""
    return {phase: int(rows[-1]["step"]) + 1 for phase in PHASES if (rows := files.phase(phase))}


def phases_done(files: RunFiles) -> set[str]:
    """Phases whose final weights are there: checkpoints/<phase>, as against checkpoints/<phase>-<step>."""
    return {phase for phase in PHASES if (files.folder / "checkpoints" / phase).is_dir()}


def total_seconds(seconds: dict[str, float]) -> float:
    """The whole run: the entry "total" where the trainer wrote one, else the sum of the phases; NaN for none."""
    if not seconds:
        return math.nan
    return seconds.get("total", sum(seconds.values()))


def run_table(files: RunFiles) -> str:
    """Phases with their steps and time, and the counts of the stages between them."""
    done, planned, seconds = steps_done(files), planned_steps(files), phase_seconds(files)
    complete = {phase: planned[phase] for phase in phases_done(files) if phase in planned}
    others = set(seconds) - set(TIMED_AS.values()) - {"total"}
    rows = []
    for phase in dict.fromkeys([*PHASE_NAMES, *sorted(others)]):
        took = seconds.get(TIMED_AS.get(phase, phase), seconds.get(phase, math.nan))
        if not (phase in done or phase in planned or math.isfinite(took)):
            continue
        count = complete.get(phase, done.get(phase, 0))
        steps = f"{count} of {planned[phase]}" if phase in planned else str(count or "")
        rows.append([PHASE_NAMES.get(phase, escape(phase)), steps, duration(took)])
    total = total_seconds(seconds)
    if math.isfinite(total):
        rows.append(["**whole run**", "", f"**{duration(total)}**"])
    return table(["phase", "steps", "time"], rows, right=(1, 2)) if rows else "No phase is recorded yet."


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
