"""One whole step of reinforcement, sampling left out: a model of Qwen2.5's 0.5B shape, ours against plain PyTorch.

    python -m benchmarks step                              long on a CPU, and so only when named
    python -m benchmarks step --device cuda --budget 900   heads and layers of Qwen2.5-VL 3B and 7B, 16 x 4k tokens
    pytest benchmarks/bench_step.py --quick                a small model: a check that all runs

The weights are random: Qwen2.5-VL's classes in the text sizes of Qwen2.5-0.5B with a small vision tower ("layers 4": of
its 24, so that the head dominates). A group of responses answers a prompt with an image. Timed are log-probs under the
image and the KL to a blackened one for each token, the gradient of the clipped loss on the 40 % of the tokens that
VPPO keeps, and the optimiser, whose rate is too small to move a weight. Seconds by part stand in the notes, medians
over the rounds.

"eager" is plain PyTorch as a trainer without the operators: a row for each response, prompt and image repeated, the
model's own forward, logits and log_softmax (R, T, V) in float32; the filter multiplies the loss. The others add one
thing after another: the head on response tokens alone ("TRL": with its chunked head), prompts computed once and shared
("shared prompts"), the fused head, and the filter ("trainer"). "states of the rollout": the sampler has left hidden
states and log-probs, as the trainer's own does, and the clean view is not computed again. bfloat16: float32 weights
under autocast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.bench_divergence import trl as trl_divergence
from benchmarks.bench_policy_loss import clipped
from benchmarks.goals import CaseRows, Goals, ratio
from benchmarks.harness import Case, Contender, report
from benchmarks.heads import eager_logits, missing, rounding_float32, trl
from benchmarks.steps import Held, MeasuredOptimiser, Shape, Step, Targets, micro_batches
from mmrpt.batching import MicroBatch, response_slices
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.perception import token_perception
from mmrpt.settings import PerceptionSettings, RolloutSettings, Settings
from mmrpt.types import Batch, Group, PixelBatch
from mmrpt_kernels import linear_logprobs, perception_weights

KEEP = 0.4
NORM = "gradient norm"
NO_STATISTICS = 1  # a step between those that log statistics of all tokens


@dataclass(frozen=True)
class Tokens:
    """A way to the log-probs of the response tokens (n,) of some rows, with a gradient; and without one to their KL and
    log-probs under both views."""

    logps: Callable[[Held, slice, PixelBatch], torch.Tensor]
    views: Callable[[Held, slice], tuple[torch.Tensor, torch.Tensor]]
    shared: bool = False  # all responses in one forward pass

    def rows(self, here: Held) -> Iterator[slice]:
        return iter([slice(None)]) if self.shared else micro_batches(here)

    @torch.no_grad()
    def all_views(self, here: Held) -> tuple[torch.Tensor, torch.Tensor]:
        parts = zip(*(self.views(here, rows) for rows in self.rows(here)), strict=True)
        return tuple(placed(here, torch.cat(part)) for part in parts)

    def update(self, here: Held, targets: Targets, optimiser: MeasuredOptimiser) -> float:
        """The clipped loss, whose filter multiplies it; its gradient; a step of the optimiser."""
        kept, scale = perception_weights(
            targets.scores, here.mask, keep_ratio=KEEP, min_weight=0.9, backend="reference"
        )
        advantages = (scale * targets.advantages)[:, None].expand(here.mask.shape)
        total = 0.0
        for rows in self.rows(here):
            mask = here.mask[rows]
            logps = self.logps(here, rows, here.pixels)
            losses = clipped(logps, targets.old_logps[rows][mask], advantages[rows][mask]) * kept[rows][mask]
            loss = losses.sum() / here.mask.sum()
            loss.backward()
            total += loss.item()
        optimiser.step(NO_STATISTICS, 1)
        return total


def placed(here: Held, tokens: torch.Tensor) -> torch.Tensor:
    """(N, W) of the response tokens (n,), 0 past a row's end."""
    return tokens.new_zeros(here.mask.shape).masked_scatter(here.mask, tokens)


def from_log_probs(log_probs: Callable[..., Any], **options: Any) -> Tokens:
    """log_probs(here, rows, pixels) -> log-probs (..., V), the ids (...) they predict, and the places (...) that count,
    None for all."""

    def chosen(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        return values if places is None else values[places]

    def logps(here: Held, rows: slice, pixels: PixelBatch) -> torch.Tensor:
        table, ids, places = log_probs(here, rows, pixels)
        return chosen(table.gather(-1, ids[..., None])[..., 0], places)

    def views(here: Held, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        p, ids, places = log_probs(here, rows, here.pixels)
        q = log_probs(here, rows, here.blackened)[0]
        divergence = (p.exp() * (p - q)).sum(-1)
        return chosen(divergence, places), chosen(p.gather(-1, ids[..., None])[..., 0], places)

    return Tokens(logps, views, **options)


# ---------------------------------------------------------------- a row for each response


def row_inputs(here: Held, rows: slice, pixels: PixelBatch) -> dict[str, torch.Tensor]:
    """What the model's own forward pass takes; the image of a prompt once for each of its responses."""
    index = [i for i, group in enumerate(here.responses) for _ in group]
    batch = here.policy.batch([here.prompts[i] for i in index], here.flat, pixels, index)
    ids, images = batch.input_ids[rows], pixels.select(index[rows])
    inputs = {"input_ids": ids, "attention_mask": batch.attention_mask[rows]}
    inputs |= {"pixel_values": images.pixel_values, "image_grid_thw": images.grid_thw}
    if "mm_token_type_ids" in inspect.signature(here.policy.model.model.forward).parameters:  # from transformers 5
        inputs["mm_token_type_ids"] = (ids == here.policy.image_token_id).int()
    return inputs


def row_log_probs(here: Held, rows: slice, pixels: PixelBatch, *, whole: bool) -> tuple[torch.Tensor, ...]:
    """whole: of the whole row, prompt and image too; else of the responses, padded to the longest."""
    inputs = row_inputs(here, rows, pixels)
    with here.policy.autocast():
        logits = here.policy.model(**inputs, logits_to_keep=0 if whole else here.shape.width + 1).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = inputs["input_ids"][:, -logits.shape[1] :]
    places = torch.nn.functional.pad(here.mask[rows], (logits.shape[1] - here.shape.width, 0))
    return logits.log_softmax(-1), ids, places


def row_states(here: Held, rows: slice, pixels: PixelBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, H) of the response tokens and their ids (n,)."""
    inputs, mask = row_inputs(here, rows, pixels), here.mask[rows]
    with here.policy.autocast():
        states = here.policy.model.model(**inputs).last_hidden_state
    width = here.shape.width
    return states[:, -width - 1 : -1][mask], inputs["input_ids"][:, -width:][mask]


def trl_logps(here: Held, rows: slice, pixels: PixelBatch) -> torch.Tensor:
    states, ids = row_states(here, rows, pixels)
    with here.policy.autocast():
        return trl(states, here.policy.head_weight, ids, entropy=False).logps


def trl_views(here: Held, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's head of its distillation trainers; TRL itself has no KL of two views."""
    (clean, ids), (blackened, _) = (row_states(here, rows, pixels) for pixels in (here.pixels, here.blackened))
    weight = here.policy.head_weight
    with here.policy.autocast():
        divergence = trl_divergence(clean, blackened, weight, ids, None).divergence
        return divergence, trl(clean, weight, ids, entropy=False).logps


# ---------------------------------------------------------------- shared prompts, and the trainer


def passes(here: Held) -> Iterator[tuple[MicroBatch, Batch]]:
    """The trainer's forward passes: a group's responses behind their prompt."""
    budget = Settings().model.batch_tokens
    return here.policy.group_batches(here.prompts, here.responses, here.pixels.select, budget)


def shared_log_probs(here: Held, rows: slice, pixels: PixelBatch) -> tuple[torch.Tensor, torch.Tensor, None]:
    index = range(len(here.prompts))
    batch = here.policy.group_batch(here.prompts, here.responses, pixels, index, share=True)
    states, ids, mask = response_slices(here.policy.hidden(batch), batch)
    with here.policy.autocast():
        logits = eager_logits(states[mask], here.policy.head_weight)
    return logits.log_softmax(-1), ids[mask], None


def clean_view(here: Held, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (R, T, H) and log-probs (R, T) of the responses of a pass under the image."""
    states, ids, mask = response_slices(here.policy.hidden(batch), batch)
    with here.policy.autocast():
        found = linear_logprobs(states[mask], here.policy.head_weight, ids[mask], bias=here.policy.sampling_bias())
    return states, found.logps.new_zeros(mask.shape).masked_scatter(mask, found.logps)


@torch.no_grad()
def trainer_views(here: Held, *, of_rollout: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """of_rollout: the clean view is there, from a call before."""
    clean, divergence = here.of_rollout if of_rollout else [], torch.zeros(here.mask.shape, device=here.mask.device)
    logps = divergence.clone()
    for number, (part, batch) in enumerate(passes(here)):
        if number == len(clean):
            clean.append(clean_view(here, batch))
        states, own = clean[number]
        scores = token_perception(here.policy, batch, here.blackened.select(part.prompts), states).scores
        divergence[part.rows, : scores.shape[1]], logps[part.rows, : own.shape[1]] = scores, own
    return divergence, logps


def trainer_update(here: Held, targets: Targets, optimiser: MeasuredOptimiser, *, keep: float = KEEP) -> float:
    settings = Settings(
        perception=PerceptionSettings(keep_ratio=keep), rollout=RolloutSettings(group_size=here.shape.responses)
    )
    groups = []
    for i, (prompt, responses) in enumerate(zip(here.prompts, here.responses, strict=True)):
        rows = slice(i * len(responses), (i + 1) * len(responses))
        fields = targets.old_logps[rows], targets.scores[rows], torch.zeros(len(responses)), targets.advantages[rows]
        groups.append(Group(str(i), str(i), prompt, responses, *fields))
    metrics, _ = train_on_groups(here.policy, optimiser, groups, here.images, settings, NO_STATISTICS)
    return metrics["loss"]


# ---------------------------------------------------------------- cases and contenders

SMALL = Shape(64, 2, 2, 1, 96, 1056, vision=(1, 32, 2, 48), side=56, prompts=2, responses=3, width=12, rows=4)
HALF_B = {"hidden": 896, "heads": 14, "kv_heads": 2, "intermediate": 4864, "vocab": 151_936}
TOWER = (32, 1280, 16, 3420)  # Qwen2.5-VL's own


def make_inputs(device: torch.device, *, shape: Shape, dtype: torch.dtype, gradients: bool = False) -> dict[str, Any]:
    """Log-ratios of the policy to the one that sampled are within 0.1: no token is clipped."""
    generator, size = torch.Generator(device).manual_seed(1), (shape.prompts * shape.responses, shape.width)
    drawn = torch.rand(2, *size, generator=generator, device=device)
    advantages = torch.randn(size[0], generator=generator, device=device).bfloat16().to(dtype)
    rows = {"scores": drawn[0], "log_ratio": 0.2 * drawn[1] - 0.1}
    return {"shape": shape, "advantages": advantages, **rows, "gradients": gradients}


def case(name: str, shape: Shape, dtype: torch.dtype, *, quick: bool = False) -> Case:
    """The gate compares a small model's scores, loss and gradients; the large one's norm stands in the notes."""
    params = shape.params() | {"dtype": str(dtype).removeprefix("torch."), "keep": KEEP}
    gate = partial(make_inputs, shape=SMALL, dtype=dtype, gradients=True)
    # The floor is the size of the log-probabilities whose difference is the ratio's exponent, and the KL's terms.
    return Case(name, params, partial(make_inputs, shape=shape, dtype=dtype), gate_inputs=gate, floor=20.0, quick=quick)


def cases(device: torch.device) -> list[Case]:
    full, half = torch.float32, torch.bfloat16
    if device.type == "cpu":
        few = Shape(layers=4, rows=4, **HALF_B)
        all_layers = Shape(layers=24, responses=4, rows=4, adamw=False, **HALF_B)
        return [
            case("small", Shape(128, 2, 4, 2, 352, 8192, vision=(1, 64, 2, 96), width=32), full, quick=True),
            case("small-bf16", Shape(128, 2, 4, 2, 352, 8192, vision=(1, 64, 2, 96), width=32), half, quick=True),
            case("layers4", few, full),
            case("layers4-bf16", few, half),
            case("layers24", all_layers, full),
            case("layers24-bf16", all_layers, half),
        ]
    # 1,024 image tokens and responses of up to 3,000. AdamW's state of 7B would not fit beside float32 weights.
    long = {"vision": TOWER, "side": 896, "prompts": 2, "width": 3000, "rows": 2, "checkpointing": True}
    three = Shape(2048, 36, 16, 2, 11_008, 151_936, **long)
    seven = Shape(3584, 28, 28, 4, 18_944, 152_064, adamw=False, **long)
    return [case("small-bf16", SMALL, half, quick=True), case("3b", three, half), case("7b", seven, half)]


def goals(cases: list[CaseRows], device: str) -> list[dict[str, Any]]:
    found = Goals()
    for one in cases:
        norm, eager_norm = (one.rows.get(name, {}).get("facts", {}).get(NORM) for name in ("trainer", "eager"))
        if norm is not None and eager_norm is not None:
            off = abs(norm / eager_norm - 1)
            found.at_most(
                "gradient norm off eager's", one.name, off, 1e-4 if one.params["dtype"] == "float32" else 0.02
            )
        if one.name.startswith("small"):
            continue
        if device == "cpu":
            limit = 1.5 if one.params["layers"] <= 4 else 1.0
            found.at_least("eager's time / trainer", one.name, one.of("trainer", "speedup"), limit)
        else:
            faster = ratio(one.of("TRL", "seconds"), one.of("trainer", "seconds"))
            memory = ratio(one.of("trainer", "peak_bytes"), one.of("TRL", "peak_bytes"))
            found.at_least("TRL's time / trainer", one.name, faster, 1.5)
            found.at_most("memory / TRL's, trainer", one.name, memory, 0.6)
    return found.rows


def contenders(device: torch.device) -> list[Contender]:
    def step(way: Tokens) -> Step:
        return Step(way.all_views, way.update)

    def contender(name: str, fn: Step, kind: str = "ours", **options: Any) -> Contender:
        return Contender(name, fn, kind, facts=fn.facts, **options)

    def slow(case: Case) -> str | None:
        return "slower than eager on a CPU" if device.type == "cpu" and not case.quick else None

    def long(case: Case) -> str | None:
        return "in the case layers4" if case.name.startswith("layers24") else None

    def not_half(case: Case) -> str | None:
        half = device.type == "cpu" and case.params["dtype"] == "bfloat16"
        return None if half else "for bfloat16 on a CPU"

    rows = {whole: from_log_probs(partial(row_log_probs, whole=whole)) for whole in (True, False)}
    trainer = Step(trainer_views, trainer_update)
    rounding = Step(rounding_float32(trainer_views), rounding_float32(trainer_update))
    no_filter = Step(trainer_views, partial(trainer_update, keep=1.0))
    of_rollout = Step(partial(trainer_views, of_rollout=True), trainer_update)
    return [
        contender("eager", step(rows[True]), "baseline"),
        contender("eager, head on response tokens", step(rows[False]), "peer", skip=long),
        contender("TRL", step(Tokens(trl_logps, trl_views)), "peer", skip=missing("trl.trainer.utils") or slow),
        contender("shared prompts", step(from_log_probs(shared_log_probs, shared=True)), skip=long),
        contender("shared prompts, fused head", no_filter, skip=long, compare=("kl", "logps")),
        contender("trainer", trainer),
        contender("trainer, states of the rollout", of_rollout, skip=long, variant=True),
        contender("trainer, float32 rounds to bfloat16", rounding, skip=not_half, variant=True),
    ]


def test_step(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
