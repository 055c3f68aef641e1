"""The reinforcement phase: rounds of rollouts fill a buffer of groups with signal; a full buffer is one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mmrpt.corpus import ImageCache, items_at, seed_of
from mmrpt.objective import importance_weights, loss_normalizer, policy_loss, supervised_backward
from mmrpt.optimiser import Optimiser
from mmrpt.perception import PerceptionWeights, shape_and_filter
from mmrpt.policy import Policy
from mmrpt.rewards import RewardFunction
from mmrpt.rollout.buffer import GroupBuffer, stack_rows
from mmrpt.rollout.collect import Reference, collect_round
from mmrpt.settings import RLSettings, Settings
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import Batch, Group, MaskedSample, Pixels, PolicyTargets, SamplingRound

# Statistics that need no log-prob of a token without gradient.
OF_ANY_STEP = ("tokens", "kept_fraction", "clip_fraction_low", "clip_fraction_high")


def fill_buffer(
    policy: Policy,
    buffer: GroupBuffer,
    samples: Sequence[MaskedSample],
    images: ImageCache,
    settings: Settings,
    first_round: int,
    reference: Reference | None = None,
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
            totals["caption_loss"] = supervised_backward(
                policy, captions, settings.model.batch_tokens, settings.rl.caption_weight
            )
    with watch.part("update"):
        norms = optimiser.step(step, settings.rl.steps)
    return {"loss": loss, **totals, **norms}, weights


def _backward(
    policy: Policy, groups: list[Group], images: ImageCache, settings: Settings, step: int
) -> tuple[float, dict[str, float], PerceptionWeights | None]:
    """Adds the gradients of the groups' loss; (loss, statistics, weights)."""
    if not groups:
        return 0.0, {}, None
    weights = _perception_weights(groups, settings)
    targets, sampled = _targets(groups, weights, settings.rl), stack_rows(groups, "logps")
    lengths = [len(r) for g in groups for r in g.responses]
    learning = _learning_tokens(groups, targets)
    normalizer = loss_normalizer(
        settings.rl,
        tokens=sum(lengths),
        responses=len(lengths),
        max_new_tokens=settings.rollout.max_new_tokens,
    )
    whole = step % settings.rl.statistics_every == 0
    totals: dict[str, float] = {}
    loss_value = 0.0

    def pixels(chosen: list[int]) -> Pixels:
        names = [groups[i].example_id for i in chosen]
        shown = images.many(names)
        return policy.pixels([shown[name] for name in names])

    inputs = [g.prompt for g in groups], [g.responses for g in groups], pixels, settings.model.batch_tokens
    for part, batch in policy.group_batches(*inputs):
        result = policy_loss(
            policy,
            batch,
            targets.select(part.rows),
            settings.rl,
            normalizer=normalizer,
            temperature=settings.rollout.temperature,
            statistics=whole,
        )
        result.loss.backward()
        loss_value += result.loss.item()
        tokens = sum(lengths[part.rows])
        statistics = result.statistics
        if whole:
            # Both are 0 past a row's end. A gap before any step was taken is a fault of the sampler or of the forward.
            gap = (result.logps - sampled[part.rows, : result.logps.shape[1]]).abs().sum() / tokens
            statistics = {**statistics, "rollout_logp_gap": gap}
        else:
            statistics = {name: statistics[name] for name in OF_ANY_STEP}
        shares = tokens / sum(lengths), sum(learning[part.rows]) / max(1, sum(learning))
        _add_statistics(totals, statistics, *shares)
    return loss_value, totals, weights


def _learning_tokens(groups: list[Group], targets: PolicyTargets) -> list[int]:
    """Of each response, the tokens that a clip can reach: those that the filter keeps, of an advantage other than 0."""
    mask = response_mask_of(groups) if targets.perception_mask is None else targets.perception_mask
    advantages = targets.advantages
    if targets.trajectory_weights is not None:
        advantages = advantages * targets.trajectory_weights
    return (mask & (advantages != 0)[:, None]).sum(-1).tolist()


def _add_statistics(
    totals: dict[str, float], statistics: Mapping[str, torch.Tensor], share: float, learning_share: float
) -> None:
    """Joins a micro-batch's statistics to the step's: counts add up, the largest is the largest of all, and means are
    weighted by the micro-batch's share of the tokens that they run over."""
    for name, tensor in statistics.items():
        value = float(tensor)
        if name in ("max_logp", "ratio_max"):
            totals[name] = max(totals.get(name, value), value)
        else:
            weight = {"tokens": 1.0, "clip_fraction_low": learning_share, "clip_fraction_high": learning_share}
            totals[name] = totals.get(name, 0.0) + weight.get(name, share) * value


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


def _targets(groups: list[Group], weights: PerceptionWeights | None, rl: RLSettings) -> PolicyTargets:
    old, sampler_weights = stack_rows(groups, "logps"), None
    if rl.max_importance is not None:  # the trainer's own ratio is clipped; the sampler's difference is weighed apart
        sampled, old = old, stack_rows(groups, "trainer_logps")
        sampler_weights = importance_weights(old, sampled, rl.max_importance)
    return PolicyTargets(
        advantages=torch.cat([g.advantages for g in groups]),
        old_logps=old,
        perception_mask=None if weights is None else weights.perception_mask,
        trajectory_weights=None if weights is None else weights.trajectory_weights,
        ref_logps=stack_rows(groups, "ref_logps") if rl.kl_coef else None,
        sampler_weights=sampler_weights,
    )
