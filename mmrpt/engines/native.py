"""The whole method in one process, in the order of the pipeline. Each phase leaves its result on disk; a phase whose
result is there is read back instead of run again, and one that was cut off goes on from its last checkpoint.

    pairs -> warm start -> dependency scores -> masked samples -> RL -> controls -> evaluation -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmrpt.captions import caption_batch, masked_batch
from mmrpt.checkpoint import load_state
from mmrpt.corpus import ImageCache, items_at, iter_jsonl, read_jsonl, seed_of, write_json, write_jsonl
from mmrpt.engines.dry_run import tell_memory
from mmrpt.engines.phase import Phase
from mmrpt.engines.rl_step import fill_buffer, train_on_groups
from mmrpt.engines.run import Run
from mmrpt.held_out import evaluate_policy, held_out_questions
from mmrpt.masking.build import masked_at_random
from mmrpt.masking.forward import PolicyModel
from mmrpt.masking.pipeline import score_corpus
from mmrpt.masking.select import MASKED, SCORES, SUMMARY, select_masks
from mmrpt.masking.shards import Shards
from mmrpt.objective import supervised_backward
from mmrpt.perturbation import BlankedPairs
from mmrpt.report.images import write_images
from mmrpt.report.statistics import roc_auc
from mmrpt.report.step_log import log_step
from mmrpt.rollout.buffer import GroupBuffer
from mmrpt.settings import TIMED_CONTROLS, OptimiserSettings, Settings
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import Batch, MaskedSample, PairSource
from mmrpt.validation import Validation
from mmrpt.world.grounding import grounded_backward, names_of
from mmrpt.world.warm_start import Lesson, VisionPretraining, lesson_at

Answered = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # rows and answers of a model, of `evaluate_policy`


def train(run: Run) -> Path:
    """Runs every phase that is not done yet and returns the path of the report."""
    tell_memory(run.settings, sum(p.numel() for p in run.policy.model.parameters()), run.policy.device)
    warm_start(run)
    with run.folder.timed("scoring"):
        samples = mask(run)
    with run.folder.timed("rl"):
        reinforce(run, samples)
    train_controls(run, samples)
    with run.folder.timed("evaluation"):
        evaluate(run)
    return report(run)


def warm_start(run: Run) -> None:
    """What every model of the run begins with."""
    for name, phase in (("vision_pretraining", pretrain_vision), ("warmup", warm_up)):
        with run.folder.timed(name):
            phase(run)


def pretrain_vision(run: Run) -> None:
    """The vision tower's own training, where the model starts from scratch."""
    demo = run.settings.demo
    optimiser = OptimiserSettings(lr=demo.vision_lr, final_fraction=0.05)
    task = VisionPretraining(run.policy, run.sources.train, run.settings)

    def backward(step: int) -> float:
        loss = task.loss(step)
        loss.backward()
        return loss.item()

    descend(run, "vision_pretraining", demo.vision_steps, optimiser, backward)


def warm_up(run: Run) -> None:
    """Caption training. Short on purpose: it teaches the answer's form, and leaves room for RL."""
    settings = run.settings

    def backward(step: int) -> float:
        lesson = lesson_at(step, settings, run.sources)
        items = lesson_items(run, lesson, step * lesson.batch_size)
        rows = supervised_rows(run, "warmup", step, lesson, items)
        if settings.demo.grounding and run.sources.world is not None:
            names = [names_of(lesson.source, lesson.source[i]) for i in items]
            return grounded_backward(run.policy, rows, names, settings.model.batch_tokens, settings.demo.grounding)
        return supervised_backward(run.policy, rows, settings.model.batch_tokens)

    descend(run, "warmup", settings.warmup.steps, settings.warmup.optimiser, backward)


def mask(run: Run, part: int = 0, parts: int = 1, wait: Callable[[], Any] = lambda: None) -> list[MaskedSample]:
    """Masked samples of the training captions, whose sentences are scored under the warm start.

    Of several processes each scores its part; the first selects, when `wait` says that all are as far.
    """
    rows = run.sources.rows
    shards = Shards(run.folder / "scores", run.settings.captions_to_score(len(rows)))
    if not (run.folder / SUMMARY).exists():
        run.load("warmup")
        model = PolicyModel(run.policy)
        with run.policy.autocast():
            score_corpus(model, rows, shards, run.settings, part, parts)
            wait()
            if part == 0:
                select_masks(model, rows, shards, run.settings, run.folder.path, run.sources.rejected)
    wait()
    if part == 0:
        shards.remove()
    return [MaskedSample(**row) for row in read_jsonl(run.folder / MASKED)]


def reinforce(
    run: Run,
    samples: list[MaskedSample],
    name: str = "rl",
    *,
    settings: Settings | None = None,
    pairs: PairSource | None = None,
) -> None:
    """Group-relative reinforcement of the warm start on the masked samples.

    A control has a `name` of its own and is not validated; `settings` and `pairs`, whose images are shown, are the
    run's where none are given.
    """
    settings = settings or run.settings
    images = run.images if pairs is None else ImageCache(pairs, settings.data.cache_mb << 20)
    phase = Phase(run, name, settings.rl.steps, settings.rl.optimiser)
    reference = run.frozen("warmup") if settings.rl.kl_coef and not phase.done else None
    buffer = GroupBuffer.from_state(phase.state.get("buffer", []), run.policy.device)
    done = {"round": phase.state.get("round", 0)}
    validation = Validation(run.policy, run.sources.validation if name == "rl" else None, run.folder, settings)
    validation.settle(phase.total if phase.done else phase.state["step"])
    for step in phase.steps(lambda: {"buffer": buffer.state(), **done}, validation.settle):
        with phase.timed():
            sampling = fill_buffer(
                run.policy, buffer, samples, images, settings, done["round"], reference, custom=run.rewards
            )
            rounds, watch = list(sampling), Stopwatch()
            done["round"] += len(rounds)
            groups = buffer.take(settings.rl.groups_per_step)
            with watch.part("captions"):
                captions = later_captions(run, step, pairs) if settings.rl.caption_weight else None
            metrics, weights = train_on_groups(
                run.policy, phase.optimiser, groups, images, settings, step, captions, watch=watch
            )
        validation.after(step, watch)
        log_step(
            run.folder,
            step,
            groups,
            weights=weights,
            rounds=rounds,
            metrics=metrics,
            seconds=watch.seconds,
            samples=samples,
            policy=run.policy,
            phase=name,
        )
        phase.note(step, groups=len(groups), skipped=metrics["skipped"])
        phase.bar.set_postfix(reward=f"{rounds[-1].metrics['reward']:.2f}" if rounds else "-")
    validation.settle(phase.total)
    if validation.rows:
        print(validation.summary(), flush=True)


def train_controls(run: Run, samples: list[MaskedSample]) -> None:
    """Every control that the settings name."""
    for phase in run.settings.control.phases:
        with run.folder.timed(phase):
            train_control(run, phase, samples)


def train_control(run: Run, phase: str, samples: list[MaskedSample]) -> None:
    """The warm start trained on in another way: what reinforcement has to beat, or what one of its parts brings."""
    settings = run.settings
    if phase == "rl_blanked":
        reinforce(run, samples, phase, pairs=BlankedPairs(run.sources.train))
    elif phase == "rl_random_masks":
        reinforce(run, random_samples(run, samples), phase)
    elif phase == "grpo":
        reinforce(
            run, samples, phase, settings=replace(settings, perception=replace(settings.perception, enabled=False))
        )
    else:
        rows = partial(masked_rows, run, samples) if phase == "supervised_masks" else partial(later_captions, run)
        descend(
            run,
            phase,
            settings.rl.steps,
            settings.rl.optimiser,
            lambda step: supervised_backward(run.policy, rows(step), settings.model.batch_tokens),
            seconds=seconds_of_rl(run) if phase in TIMED_CONTROLS else None,
        )


def random_samples(run: Run, samples: list[MaskedSample]) -> list[MaskedSample]:
    """As many random spans of the samples' captions: what the control on random masks trains on."""
    settings = run.settings
    chosen = {"mask": settings.prompts.mask, "drop_repeated": settings.masking.drop_repeated}
    return masked_at_random(samples, seed=settings.seed, **chosen)


def seconds_of_rl(run: Run) -> float:
    """Seconds of training in the steps of RL, without validation and without steps that a kill undid."""
    folder = run.folder.checkpoints / "rl"
    return load_state(folder)["spent"] if folder.exists() else 0.0


def descend(
    run: Run,
    name: str,
    steps: int,
    optimiser: OptimiserSettings,
    backward: Callable[[int], float],
    *,
    seconds: float | None = None,
) -> None:
    """A phase of gradient descent; `backward(step)` adds the step's gradients and returns its loss. With `seconds` it
    ends when they are spent, whatever `steps` are."""
    frozen = run.settings.demo.vision_frozen_steps if name == "warmup" else 0
    phase = Phase(run, name, steps, optimiser, seconds=seconds, vision_frozen_steps=frozen)
    for step in phase.steps():
        with phase.timed():
            loss = backward(step)
            metrics = phase.optimiser.step(step, phase.expected(step))
        run.folder.metrics(name, step, loss=loss, **metrics)
        phase.note(step, skipped=metrics["skipped"])
        phase.bar.set_postfix(loss=f"{loss:.3f}")


def masked_rows(run: Run, samples: list[MaskedSample], step: int) -> Batch:
    """Masked samples in the order that RL visits them, with their spans as wanted answers."""
    size = run.settings.warmup.batch_size
    chosen = [samples[i] for i in items_at(step * size, size, len(samples), run.settings.seed, "rl")]
    return masked_batch(run.policy, chosen, [run.images(s.example_id) for s in chosen], run.settings.prompts)


def later_captions(run: Run, step: int, pairs: PairSource | None = None) -> Batch:
    """Captions past those of the warm-up: what controls train on, and RL too where it mixes them. `pairs`: in the
    place of the run's."""
    warmup = run.settings.warmup
    lesson = Lesson("captions", run.sources.train if pairs is None else pairs, warmup.batch_size)
    items = lesson_items(run, lesson, (warmup.steps + step) * warmup.batch_size)
    return supervised_rows(run, "control", step, lesson, items)


def supervised_rows(run: Run, phase: str, step: int, lesson: Lesson, items: list[int]) -> Batch:
    """The rows of a step, of these items of the lesson, drawn from the phase and the step."""
    settings = run.settings
    return caption_batch(
        run.policy,
        lesson.source,
        items,
        settings.prompts,
        restore_fraction=settings.warmup.restore_fraction if lesson.restore else 0.0,
        seed=seed_of(settings.seed, phase, step),
        cut=lesson.cut,
    )


def lesson_items(run: Run, lesson: Lesson, first: int) -> list[int]:
    """A step's items of the lesson: `first` and on in its own order."""
    return items_at(first, lesson.batch_size, len(lesson.source), run.settings.seed, "supervised", lesson.name)


def evaluate(run: Run) -> dict[str, Any]:
    """Accuracy of every model on every held-out set and condition, and the AUCs of sentence and token scores."""
    path, settings = run.folder / "evaluation.json", run.settings
    if path.exists():
        return json.loads(path.read_text())
    sets = held_out_questions(run.sources.held_out, settings)
    found: list[Answered] = []
    with tqdm(total=3 * len(sets) * len(models(run)), desc="evaluate", unit="set") as bar:
        for phase in models(run):
            run.load(phase)
            found.append(
                evaluate_policy(run.policy, phase, sets, settings, bar.update, sampled=settings.evaluation.sampled)
            )
    return write_evaluation(run, found)


def models(run: Run) -> list[str]:
    """The phases whose models are evaluated."""
    return ["warmup", "rl", *run.settings.control.phases]


def write_evaluation(run: Run, found: Sequence[Answered]) -> dict[str, Any]:
    """Writes and returns evaluation.json, of the rows and answers of each model, and what lies beside it."""
    path, settings = run.folder / "evaluation.json", run.settings
    rows = [row for new, _ in found for row in new]
    write_jsonl(run.folder / "answers.jsonl", [answer for _, new in found for answer in new])
    patches = {"patch_size": settings.perception.patch_size, "probability": settings.perception.probability}
    perturbed = partial(run.policy.perturbed_picture, **patches)
    write_images(run.folder.path, run.sources.train, run.sources.held_out, perturbed)
    result = {"rows": rows, **_aucs(iter_jsonl(run.folder / SCORES))}
    write_json(path, result)
    return result


def _aucs(rows: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """AUCs of the scores of sentences and of tokens, over those whose truth is known; None without both classes."""
    scored: dict[str, list[tuple[bool, float]]] = {"dependency_auc": [], "token_auc": []}
    for row in rows:
        tokens = zip(row.get("token_needs_image", ()), row["token_scores"], strict=False)
        scored["dependency_auc"] += [(row["needs_image"], row["score"])] if row["needs_image"] is not None else []
        scored["token_auc"] += [one for one in tokens if one[0] is not None]
    both = {name: known if len({truth for truth, _ in known}) == 2 else [] for name, known in scored.items()}
    return {name: roc_auc(*map(list, zip(*known, strict=True))) if known else None for name, known in both.items()}


def report(run: Run) -> Path:
    """Plots and report.md from the files of the run."""
    from mmrpt.report.page import write_report  # matplotlib is slow to import, and a run may be cut off before it

    run.folder.close()
    return write_report(run.folder.path)
