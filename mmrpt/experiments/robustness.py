"""What later supervised training on few, biased or partly wrong pairs leaves of what a model could do before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmrpt.experiments.arms import Arm, Experiment, Rows
from mmrpt.experiments.controls import CONTROLS

if TYPE_CHECKING:
    from mmrpt.engines.run import Run
    from mmrpt.types import MaskedSample, PairSource

PAIRS = 300
STEPS = 60  # of warmup.batch_size rows: 3.2 times all pairs with the default of 16
WRONG = 0.3
CLEAN, BIASED, NOISY = "clean pairs", "biased pairs", "30 % wrong answers"


@dataclass(frozen=True)
class TunedArm(Arm):
    pairs: str = ""  # what the model is trained on further; "": nothing


def tuned_answers(run: Run, arm: TunedArm) -> tuple[Rows, Rows] | None:
    """The held-out questions, answered by the arm's model after STEPS more supervised steps on its pairs."""
    if not arm.pairs:
        return None
    from mmrpt.held_out import evaluate_policy, held_out_questions

    run.load(arm.model)
    tune(run, *tuning_samples(run, arm.pairs))
    return evaluate_policy(run.policy, arm.model, held_out_questions(run.sources.held_out, run.settings), run.settings)


def tuning_samples(run: Run, pairs: str) -> tuple[PairSource, list[MaskedSample]]:
    """PAIRS fresh training pairs of another seed of the world, and a masked sample of each, kinds of word in turn.

    BIASED: each object has its usual colour. NOISY: WRONG of the answers are those of other samples of their kind.
    """
    from mmrpt.held_out import held_out_samples
    from mmrpt.sources import open_sources

    settings, demo = run.settings, run.settings.demo
    world = replace(demo.world, seed=demo.world.seed + settings.seed + 1)
    world = replace(world, language_bias=1.0) if pairs == BIASED else world
    source = open_sources(replace(settings, demo=replace(demo, world=world, size=PAIRS))).train
    samples = held_out_samples(source, PAIRS, mask=settings.prompts.mask, seed=settings.seed)
    return source, with_wrong_answers(samples, WRONG, settings.seed) if pairs == NOISY else samples


def with_wrong_answers(samples: Sequence[MaskedSample], share: float, seed: int) -> list[MaskedSample]:
    """The samples, a `share` of them with the answer to another of their kind, drawn among answers that differ."""
    import numpy as np

    from mmrpt.corpus import seed_of

    rng = np.random.default_rng(seed_of(seed, "wrong answers"))
    found = list(samples)
    for i in rng.choice(len(found), size=round(share * len(found)), replace=False):
        own = samples[i]
        others = [s.answer for s in samples if s.kind == own.kind and s.answer != own.answer]
        if not others:
            raise ValueError(f"all {own.kind} samples have the answer {own.answer!r}: none is wrong for another.")
        found[i] = replace(own, answer=others[rng.integers(len(others))])
    return found


def tune(run: Run, source: PairSource, samples: Sequence[MaskedSample]) -> None:
    """Trains the run's policy to give the samples' answers: STEPS steps with RL's optimiser."""
    from mmrpt.captions import masked_batch
    from mmrpt.corpus import items_at
    from mmrpt.objective import supervised_backward
    from mmrpt.optimiser import Optimiser

    settings, size = run.settings, run.settings.warmup.batch_size
    run.policy.model.train()
    optimiser = Optimiser(run.policy.model, settings.rl.optimiser)
    for step in range(STEPS):
        chosen = [samples[i] for i in items_at(step * size, size, len(samples), settings.seed, "tuning")]
        rows = masked_batch(run.policy, chosen, [source.image(s.example_id) for s in chosen], settings.prompts)
        supervised_backward(run.policy, rows, settings.model.batch_tokens)
        optimiser.step(step, STEPS)


MODELS = {"warm start": "warmup", "RL": "rl", "captions": "captions_seconds", "supervised masks": "supervised_masks"}
BEFORE = tuple(TunedArm(name, model=model) for name, model in MODELS.items())
AFTER = tuple(
    TunedArm(f"{arm.name} then {pairs}", model=arm.model, against=arm.name, pairs=pairs)
    for pairs in (CLEAN, BIASED, NOISY)
    for arm in BEFORE
)

ROBUSTNESS = Experiment(
    name="robustness",
    question="Does RL make a model robust in later supervised training on few, biased or partly wrong pairs?",
    base=CONTROLS.base,
    arms=(*BEFORE, *AFTER),
    baseline="warm start",
    answer=tuned_answers,
    compared=tuple(
        (f"RL then {pairs}", f"{name} then {pairs}")
        for pairs in (CLEAN, BIASED, NOISY)
        for name in MODELS
        if name != "RL"
    ),
)
