"""The whole method, in the order of the pipeline. Each phase leaves its result on disk; a phase whose result is there
is read back instead of run again, and a phase that was cut off goes on from its last checkpoint.

    pairs -> sight -> warm-up -> dependency scores -> masked samples -> reinforcement -> control -> evaluation -> report
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmrpt.checkpoint import drop_older, latest_checkpoint, load_checkpoint, save_checkpoint
from mmrpt.data.images import seed_of
from mmrpt.data.jsonl import read_jsonl, write_jsonl
from mmrpt.evaluate import evaluate_policy, held_out_samples
from mmrpt.gallery import write_gallery
from mmrpt.masking import build_masked_samples, choose_threshold, score_sentences, subtract_position_baseline
from mmrpt.metrics import roc_auc
from mmrpt.objective import supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.policy import Policy
from mmrpt.reinforce import ImageCache, fill_buffer, train_on_groups
from mmrpt.rollout.group import GroupBuffer
from mmrpt.runlog import RunLog, environment, write_json
from mmrpt.samplelog import log_step
from mmrpt.settings import OptimiserSettings, Settings, SettingsError
from mmrpt.sight import rarity, sight_loss
from mmrpt.sources import Sources, open_sources
from mmrpt.supervised import items_at, lesson_of, supervised_batch
from mmrpt.types import Batch, MaskedSample, SentenceScore
from mmrpt.world.tiny_vlm import build_tiny_vlm

IMAGES_FOR_START = 128  # that the tiny model's vision tower starts from
CAPTIONS_FOR_RARITY = 1_000
TOKENS_PER_CAPTION = 256  # that scoring reckons with


def check_device(device: str) -> None:
    """Raises SettingsError for a device that torch does not know or that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device is {device!r}, which cannot be used here ({reason}): try device=cpu.") from error


class Trainer:
    """One run in one folder. `run()` does everything that is not done yet."""

    def __init__(self, settings: Settings) -> None:
        check_device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.folder = settings.run_dir
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.sources: Sources = open_sources(settings)
        self.images = ImageCache(self.sources.train)
        self.log = RunLog(self.folder)
        self.policy = self._start_policy()
        write_json(self.folder / "environment.json", environment())

    def run(self) -> Path:
        """Runs every phase in order and returns the path of the report."""
        if self.settings.demo.vision_steps:
            with self._timed("sight"):
                self.sight()
        with self._timed("warmup"):
            self.warmup()
        with self._timed("scoring"):
            samples = self.mask(self.score())
        with self._timed("reinforcement"):
            self.reinforce(samples)
        with self._timed("control"):
            self.control()
        with self._timed("evaluation"):
            self.evaluate()
        return self.report()

    # ---------------------------------------------------------------- phases

    def sight(self) -> None:
        """The vision tower's own training, where the model starts from scratch."""
        options = self.settings.demo
        source, size = self.sources.train, options.vision_batch_size

        @cache  # only where a step is left to do: a resumed run has often none
        def weights() -> torch.Tensor:
            return rarity(self.policy, (source[i].caption for i in range(min(CAPTIONS_FOR_RARITY, len(source)))))

        def loss_of(step: int) -> torch.Tensor:
            items = items_at(step * size, size, len(source), self.settings.seed, "sight")
            examples = [source[i] for i in items]
            pixels = self.policy.pixels([source.image(e.id) for e in examples])
            return sight_loss(self.policy, pixels, [e.caption for e in examples], weights())

        optimiser = OptimiserSettings(lr=options.vision_lr, final_fraction=0.05)
        self._train("sight", options.vision_steps, optimiser, loss_of, after=None)

    def warmup(self) -> None:
        """Caption training from the start model; stops well below what the model could learn."""
        options = self.settings.warmup
        self._train(
            "warmup",
            options.steps,
            options.optimiser,
            lambda step: supervised_loss(self.policy, self._supervised_batch("warmup", step, 0)),
            after="sight" if self.settings.demo.vision_steps else None,
            vision_frozen_steps=self.settings.demo.vision_frozen_steps,
        )

    def score(self) -> list[SentenceScore]:
        """Dependency scores of the training captions under the warm start; one line a sentence in scores.jsonl."""
        path, options = self.folder / "scores.jsonl", self.settings.masking
        if path.exists():
            return [_score_from_json(row) for row in read_jsonl(path)]
        source = self.sources.train
        count = self.settings.captions_to_score(len(source))
        size = max(1, options.batch_tokens // TOKENS_PER_CAPTION)
        scores: list[SentenceScore] = []
        self._load("warmup")
        for start in tqdm(range(0, count, size), desc="score captions", unit="batch"):
            examples = [source[i] for i in range(start, min(start + size, count))]
            scores += score_sentences(
                self.policy,
                examples,
                [self.images(e.id) for e in examples],
                instruction=self.settings.prompts.describe,
                layers=options.layers,
                attention_row=options.attention_row,
            )
        if options.baseline == "position":
            scores = subtract_position_baseline(scores)
        captions = {source[i].id: source[i].caption for i in range(count)}
        write_jsonl(path, ({**asdict(s), "text": captions[s.example_id][s.start : s.end]} for s in scores))
        return scores

    def mask(self, scores: list[SentenceScore]) -> list[MaskedSample]:
        """Masked samples of the captions whose sentences pass the threshold; one line each in masked.jsonl."""
        path, options = self.folder / "masked.jsonl", self.settings.masking
        if path.exists():
            return [MaskedSample(**row) for row in read_jsonl(path)]
        threshold = choose_threshold([s.score for s in scores], options.threshold)
        by_example: dict[str, list[SentenceScore]] = {}
        for score in scores:
            by_example.setdefault(score.example_id, []).append(score)
        samples: list[MaskedSample] = []
        used: Counter[str] | None = Counter() if options.balance_word_classes else None
        for index in range(self.settings.captions_to_score(len(self.sources.train))):
            example = self.sources.train[index]
            samples += build_masked_samples(
                example,
                by_example.get(example.id, []),
                threshold,
                mask=self.settings.prompts.mask,
                spans_per_caption=options.spans_per_caption,
                max_span_words=options.max_span_words,
                used=used,
            )
        if not samples:
            raise RuntimeError(
                f"no sentence of {len(by_example)} captions passed the threshold {threshold:.3f}: look at "
                "scores.jsonl, and set masking.threshold=quantile:0.5 or raise masking.captions."
            )
        write_json(self.folder / "masking.json", _masking_summary(scores, samples, threshold, options.threshold))
        write_jsonl(path, (s.to_json() for s in samples))
        return samples

    def reinforce(self, samples: list[MaskedSample]) -> None:
        """Group-relative reinforcement of the warm start on the masked samples."""
        settings, phase = self.settings, "rl"
        start, state, optimiser = self._open_phase(phase, "warmup", settings.rl.optimiser)
        if start is None:
            return
        buffer = GroupBuffer.from_state(state.get("buffer", []))
        number = state.get("round", 0)
        bar = tqdm(
            range(start, settings.rl.steps), desc="reinforce", unit="step", initial=start, total=settings.rl.steps
        )
        for step in bar:
            rounds = list(fill_buffer(self.policy, buffer, samples, self.images, settings, number))
            number += len(rounds)
            groups = buffer.take(settings.rl.groups_per_step)
            if groups:
                captions = self._later_captions(step) if settings.rl.caption_weight else None
                metrics, weights = train_on_groups(
                    self.policy, optimiser, groups, self.images, settings, step, captions
                )
                log_step(self.log, self.policy, samples, step, groups, weights, rounds, metrics)
                bar.set_postfix(reward=f"{rounds[-1].metrics['reward']:.2f}" if rounds else "-")
            if (step + 1) % settings.checkpoint_every == 0:
                extra = {"buffer": buffer.state(), "round": number}
                self._save_partial(phase, step + 1, optimiser, extra)
        self._finish_phase(phase, settings.rl.steps)

    def control(self) -> None:
        """The warm start trained on with captions for as many optimiser steps: what reinforcement has to beat."""
        settings = self.settings
        if settings.control.enabled:
            self._train(
                "control",
                settings.rl.steps,
                settings.rl.optimiser,
                lambda step: supervised_loss(self.policy, self._later_captions(step)),
                after="warmup",
            )

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of every model on every held-out set and condition, and the AUC of the dependency scores."""
        path, settings = self.folder / "evaluation.json", self.settings
        if path.exists():
            return json.loads(path.read_text())
        sets = {
            name: (
                source,
                held_out_samples(source, settings.evaluation.samples, mask=settings.prompts.mask, seed=settings.seed),
            )
            for name, source in self.sources.held_out.items()
        }
        models = {"warm": "warmup", "reinforced": "rl"} | ({"caption": "control"} if settings.control.enabled else {})
        rows: list[dict[str, Any]] = []
        answers: list[dict[str, Any]] = []
        with tqdm(total=3 * len(sets) * len(models), desc="evaluate", unit="set") as bar:
            for name, phase in models.items():
                self._load(phase)
                new_rows, new_answers = evaluate_policy(self.policy, name, sets, settings, bar.update)
                rows, answers = rows + new_rows, answers + new_answers
        write_jsonl(self.folder / "answers.jsonl", answers)
        write_gallery(self.folder, self.sources, settings)
        scores = [s for s in self.score() if s.needs_image is not None]
        auc = roc_auc([s.needs_image for s in scores], [s.score for s in scores]) if scores else None
        result = {"rows": rows, "dependency_auc": auc, "seconds": {}}
        write_json(path, result)
        return result

    def report(self) -> Path:
        """Plots and report.md from the files of the run."""
        from mmrpt.report import write_report  # matplotlib is slow to import, and a run may be cut off before it

        self.log.close()
        self._write_seconds()
        return write_report(self.folder)

    # ---------------------------------------------------------------- what the phases share

    def _train(
        self,
        phase: str,
        steps: int,
        optimiser_settings: OptimiserSettings,
        loss_of: Callable[[int], torch.Tensor],
        *,
        after: str | None,
        vision_frozen_steps: int = 0,
    ) -> None:
        """A phase of gradient descent on `loss_of(step)`, from where the phase `after` ended."""
        start, _, optimiser = self._open_phase(phase, after, optimiser_settings, vision_frozen_steps)
        if start is None:
            return
        bar = tqdm(range(start, steps), desc=phase, unit="step", initial=start, total=steps)
        for step in bar:
            loss = loss_of(step)
            loss.backward()
            metrics = optimiser.step(step, steps)
            self.log.metrics(phase, step, loss=loss.item(), **metrics)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % self.settings.checkpoint_every == 0:
                self._save_partial(phase, step + 1, optimiser, {})
        self._finish_phase(phase, steps)

    def _supervised_batch(self, phase: str, step: int, first_item: int) -> Batch:
        settings, warmup, demo = self.settings, self.settings.warmup, self.settings.demo
        lesson = "captions"
        if phase == "warmup":
            lesson = lesson_of(step, steps=warmup.steps, sentence_steps=demo.sentence_steps, seed=settings.seed)
        sentences = lesson != "captions"
        source = self.sources.first if lesson == "first sentences" else self.sources.train
        size = demo.sentence_batch_size if sentences else warmup.batch_size
        items = items_at(first_item + step * size, size, len(source), settings.seed, "supervised", lesson)
        return supervised_batch(
            self.policy,
            source,
            items,
            settings.prompts,
            restore_fraction=warmup.restore_fraction,
            seed=seed_of(settings.seed, phase, step),
            sentences={"first sentences": 1, "sentences": 3, "captions": 0}[lesson],
        )

    def _later_captions(self, step: int) -> Batch:
        """Captions past those of the warm-up: what the control trains on, and reinforcement too where it mixes them."""
        warmup = self.settings.warmup
        return self._supervised_batch("control", step, warmup.steps * warmup.batch_size)

    def _open_phase(
        self,
        phase: str,
        previous: str | None,
        optimiser_settings: OptimiserSettings,
        vision_frozen_steps: int = 0,
    ) -> tuple[int | None, dict[str, Any], Optimiser | None]:
        """(first step, saved state, optimiser) of a phase; (None, {}, None) when it is done already."""
        if (self.checkpoints / phase).exists():
            drop_older(self.checkpoints, phase, keep=None)  # still there after a kill between the end and its clean-up
            return None, {}, None
        partial = latest_checkpoint(self.checkpoints, phase)
        if partial is not None:
            state = load_checkpoint(partial, self.policy)
        else:
            state = {"step": 0}
            if previous is not None:
                self._load(previous)
        self.policy.model.train()
        optimiser = Optimiser(self.policy.model, optimiser_settings, vision_frozen_steps=vision_frozen_steps)
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
        self.log.rewind(phase, state["step"])
        return state["step"], state, optimiser

    def _save_partial(self, phase: str, step: int, optimiser: Optimiser, extra: dict[str, Any]) -> None:
        folder = self.checkpoints / f"{phase}-{step}"
        save_checkpoint(folder, self.policy, {"step": step, "optimiser": optimiser.state_dict(), **extra})
        drop_older(self.checkpoints, phase, keep=folder)

    def _finish_phase(self, phase: str, steps: int) -> None:
        save_checkpoint(self.checkpoints / phase, self.policy, {"step": steps})
        drop_older(self.checkpoints, phase, keep=None)

    def _load(self, phase: str) -> None:
        load_checkpoint(self.checkpoints / phase, self.policy)

    def _start_policy(self) -> Policy:
        model = self.settings.model
        if model.path is not None:
            policy = Policy.load(model.path, dtype=getattr(torch, model.dtype), device=self.settings.device)
        else:
            source = self.sources.train
            images = [self.images(source[i].id) for i in range(min(IMAGES_FOR_START, len(source)))]
            tiny, seed = self.settings.demo.tiny, self.settings.seed
            policy = build_tiny_vlm(tiny, self.sources.texts(), seed=seed, images=images)
            policy.model.to(self.settings.device)
        if model.gradient_checkpointing:
            # Renamed in transformers 5.24, which warns of the old name. What transformers 4 does by default loses the
            # gradients of blocks whose input needs none.
            renamed = getattr(policy.model, "activation_checkpointing_enable", None)
            (renamed or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
        return policy

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds a phase's wall time to seconds.json, over every call that worked on it."""
        path = self.folder / "seconds.json"
        seconds = json.loads(path.read_text()) if path.exists() else {}
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - start, 2)
            write_json(path, seconds)

    def _write_seconds(self) -> None:
        path = self.folder / "evaluation.json"
        result = json.loads(path.read_text())
        result["seconds"] = json.loads((self.folder / "seconds.json").read_text())
        write_json(path, result)


def _score_from_json(row: dict[str, Any]) -> SentenceScore:
    row = {k: v for k, v in row.items() if k != "text"}
    row["token_spans"] = tuple(tuple(span) for span in row["token_spans"])
    return SentenceScore(**{**row, "token_masses": tuple(row["token_masses"])})


def _masking_summary(
    scores: list[SentenceScore], samples: list[MaskedSample], threshold: float, method: str
) -> dict[str, Any]:
    known = [s for s in samples if s.needs_image is not None]
    return {
        "threshold": threshold,
        "method": method,
        "sentences": len(scores),
        "dependent": sum(s.score >= threshold for s in scores),
        "samples": len(samples),
        "samples_needing_image": sum(bool(s.needs_image) for s in known) / len(known) if known else None,
    }
