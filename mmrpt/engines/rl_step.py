"""The reinforcement phase: rounds of rollouts fill a buffer of groups with signal; a full buffer is one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from mmrpt.corpus import ImageCache, items_at, seed_of
from mmrpt.objective import importance_weights, loss_normalizer, policy_loss, supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.perception import PerceptionWeights, shape_and_filter
from mmrpt.policy import Policy
from mmrpt.rewards import RewardFunction
from mmrpt.rollout.buffer import GroupBuffer, stack_rows
from mmrpt.rollout.collect import collect_round
from mmrpt.settings import RLSettings, Settings
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import Batch, Group, MaskedSample, PolicyTargets, SamplingRound

# Statistics that need no log-prob of a token without gradient.
OF_ANY_STEP = ("tokens", "kept_fraction", "clip_fraction_low", "clip_fraction_high")


def fill_buffer(
    policy: Policy,
    buffer: GroupBuffer,
    samples: Sequence[MaskedSample],
    images: ImageCache,
    settings: Settings,
    first_round: int,
    reference: Policy | None = None,
    *,
    custom: Mapping[str, RewardFunction] | None = None,
) -> Iterator[SamplingRound]:
    """Samples rounds until the buffer holds a step's groups or `rl.max_rounds` are spent; yields each round.

    None where enough groups wait already: a round more than a step uses would make the waiting ones ever older.
    """
    size = settings.rollout.prompts
    for number in range(first_round, first_round + settings.rl.max_rounds):
        if len(buffer) >= settings.rl.groups_per_step:
            return
        items = items_at(number * size, size, len(samples), settings.seed, "rl")
        chosen = [samples[i] for i in items]
        outcome = collect_round(
            policy,
            chosen,
            images.many([s.example_id for s in chosen]),
            settings,
            seed=seed_of(settings.seed, "round", number),
            reference=reference,
            custom=custom,
        )
        buffer.add(outcome.groups)
        yield outcome


def train_on_groups(
    policy: Policy,
    optimiser: Optimiser,
    groups: Sequence[Group],
    images: ImageCache,
    settings: Settings,
    step: int,
    captions: Batch | None = None,
    *,
    watch: Stopwatch | None = None,
) -> tuple[dict[str, Any], PerceptionWeights | None]:
    """One optimiser step. Perception statistics run over all groups; micro-batches only bound the memory.

    Every `rl.statistics_every` steps the metrics cover all response tokens; in between, those alone that need no
    log-prob of a token without gradient. With `captions`, their supervised loss times `rl.caption_weight` is part of
    the step, and all of it where there is no group. `watch` takes the seconds of "update" and "captions".
    """
    watch = watch or Stopwatch()
    with watch.part("update"):
        loss, totals, weights = _backward(policy, list(groups), images, settings, step)
    if captions is not None:
        with watch.part("captions"):
            caption_loss = supervised_loss(policy, captions)
            (settings.rl.caption_weight * caption_loss).backward()
            totals["caption_loss"] = caption_loss.item()
    with watch.part("update"):
        norms = optimiser.step(step, settings.rl.steps)
    return {"loss": loss, **totals, **norms}, weights


def _backward(
    policy: Policy, groups: list[Group], images: ImageCache, settings: Settings, step: int
) -> tuple[float, dict[str, float], PerceptionWeights | None]:
    """Adds the gradients of the groups' loss; (loss, statistics, weights)."""
    n = settings.rollout.group_size
    weights = _perception_weights(groups, settings)
    normalizer = loss_normalizer(
        settings.rl,
        tokens=sum(g.response_tokens for g in groups),
        responses=n * len(groups),
        max_new_tokens=settings.rollout.max_new_tokens,
    )
    per_micro = max(1, settings.rl.micro_batch // n)
    whole = step % settings.rl.statistics_every == 0
    totals: dict[str, float] = {}
    loss_value = 0.0
    for start in range(0, len(groups), per_micro):
        part = groups[start : start + per_micro]
        rows = slice(start * n, (start + len(part)) * n)
        targets = _targets(part, weights, rows, settings.rl)
        result = policy_loss(
            policy,
            _batch(policy, part, images.many([g.example_id for g in part])),
            targets,
            settings.rl,
            normalizer=normalizer,
            temperature=settings.rollout.temperature,
            statistics=whole,
        )
        result.loss.backward()
        loss_value += result.loss.item()
        tokens = sum(g.response_tokens for g in part)
        statistics = result.statistics
        if whole:
            # Both are 0 past a row's end. A gap before any step was taken is a fault of the sampler or of the forward.
            gap = (result.logps - stack_rows(part, "logps")[:, : result.logps.shape[1]]).abs().sum() / tokens
            statistics = {**statistics, "rollout_logp_gap": gap}
        else:
            statistics = {name: statistics[name] for name in OF_ANY_STEP}
        _add_statistics(totals, statistics, tokens / sum(g.response_tokens for g in groups))
    return loss_value, totals, weights


def _add_statistics(totals: dict[str, float], statistics: Mapping[str, torch.Tensor], share: float) -> None:
    """Joins a micro-batch's statistics to the step's: counts add up, the largest is the largest of all, and means are
    weighted by response tokens (for the clip fractions, whose tokens are the kept ones, that is all but exact)."""
    for name, tensor in statistics.items():
        value = float(tensor)
        if name in ("max_logp", "ratio_max"):
            totals[name] = max(totals.get(name, value), value)
        else:
            totals[name] = totals.get(name, 0.0) + (value if name == "tokens" else share * value)


def _perception_weights(groups: list[Group], settings: Settings) -> PerceptionWeights | None:
    if not groups or not settings.perception.enabled:
        return None
    return shape_and_filter(
        stack_rows(groups, "perception"),
        response_mask_of(groups),
        keep_ratio=settings.perception.keep_ratio,
        min_weight=settings.perception.min_weight,
        max_weight=settings.perception.max_weight,
    )


def response_mask_of(groups: list[Group]) -> torch.Tensor:
    """(R, T) bool: where the rows of the groups' per-token fields hold tokens."""
    lengths = torch.tensor([len(r) for g in groups for r in g.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask.to(groups[0].perception.device)


def _batch(policy: Policy, groups: list[Group], images: Mapping[str, Image.Image]) -> Batch:
    pixels = policy.pixels([images[g.example_id] for g in groups])
    return policy.group_batch([g.prompt for g in groups], [g.responses for g in groups], pixels, range(len(groups)))


def _targets(groups: list[Group], weights: PerceptionWeights | None, rows: slice, rl: RLSettings) -> PolicyTargets:
    old, sampler_weights = stack_rows(groups, "logps"), None
    if rl.max_importance is not None:  # the trainer's own ratio is clipped; the sampler's difference is weighed apart
        sampled, old = old, stack_rows(groups, "trainer_logps")
        sampler_weights = importance_weights(old, sampled, rl.max_importance)
    return PolicyTargets(
        advantages=torch.cat([g.advantages for g in groups]),
        old_logps=old,
        perception_mask=None if weights is None else weights.perception_mask[rows],
        trajectory_weights=None if weights is None else weights.trajectory_weights[rows],
        ref_logps=stack_rows(groups, "ref_logps") if rl.kl_coef else None,
        sampler_weights=sampler_weights,
    )
