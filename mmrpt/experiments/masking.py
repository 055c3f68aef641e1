"""What hides the spans: attention on the image, exact KL, attention on the text, chance, or the truth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmrpt.experiments.arms import QUESTIONS, Arm, Experiment
from mmrpt.experiments.controls import CONTROLS

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

# The default masks have a run that has random ones too; it is the run of the controls.
SHARED = CONTROLS.base[1:]


def masks(run: Run, arm: Arm) -> dict[str, Any]:
    """How many samples the arm trained on, how many of them need the image, and how well scores told which do."""
    if arm.model == "warmup":
        return {}
    from mmrpt.corpus import read_jsonl
    from mmrpt.engines.native import random_samples
    from mmrpt.masking.build import truth_of
    from mmrpt.masking.select import MASKED
    from mmrpt.types import MaskedSample

    samples = [MaskedSample(**row) for row in read_jsonl(run.folder / MASKED)]
    needed = [bool(sample.needs_image) for sample in samples]
    if arm.model == "rl_random_masks":
        rows, samples = run.sources.rows, random_samples(run, samples)
        scored = map(rows.__getitem__, range(run.settings.captions_to_score(len(rows))))
        truth = {example.id: example.words for example in scored}
        words = [truth_of(truth[sample.example_id], sample.start, sample.end) for sample in samples]
        needed = [word is not None and word.needs_image for word in words]
    found = {"masked samples": len(samples), "share that needs the image": sum(needed) / len(needed)}
    if arm.model == "rl" and run.settings.masking.signal != "truth":  # which knows what the AUC asks
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        found |= {"AUC of sentences": evaluation["dependency_auc"], "AUC of tokens": evaluation["token_auc"]}
    return found


def _signal(name: str, *settings: str) -> Arm:
    return Arm(name, (*settings, "control.kinds=[]"))


MASKING = Experiment(
    name="masking",
    question="Does it matter what hides the spans: attention on the image, exact KL, the text, chance or the truth?",
    base=(QUESTIONS,),
    arms=(
        Arm("warm start", SHARED, model="warmup"),
        Arm("attention on the image", SHARED),
        _signal("exact KL", "masking.signal=kl"),
        _signal("exact KL without baseline", "masking.signal=kl", "masking.baseline=none"),
        _signal("attention on the text", "masking.signal=text_mass"),
        Arm("random words", SHARED, model="rl_random_masks"),
        _signal("words that need the image by truth", "masking.signal=truth"),
    ),
    baseline="random words",
    method="attention on the image",
    measure=masks,
    by_kind=True,
)
