"""What a reinforcement step leaves behind for people: metrics, a few completions with their tokens, and perception."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrpt.perception import PerceptionWeights
from mmrpt.policy import Policy
from mmrpt.rollout.collect import Round
from mmrpt.rollout.group import Group
from mmrpt.run_folder import RunFolder
from mmrpt.types import MaskedSample

COMPLETIONS_PER_STEP = 2
PERCEPTION_TOKENS_PER_STEP = 400


def log_step(
    log: RunFolder,
    policy: Policy,
    samples: Sequence[MaskedSample],
    step: int,
    groups: Sequence[Group],
    weights: PerceptionWeights | None,
    rounds: Sequence[Round],
    metrics: dict[str, Any],
) -> None:
    """Writes the step's rows to metrics.jsonl, samples.jsonl and perception.jsonl."""
    row = dict(metrics)
    for name in rounds[0].metrics if rounds else ():
        row[name] = sum(r.metrics[name] for r in rounds) / len(rounds)
    row["rounds"], row["groups"] = len(rounds), len(groups)
    tokens = [s for g in groups for s, r in zip(g.perception.tolist(), g.responses, strict=True)]
    lengths = [len(r) for g in groups for r in g.responses]
    values = [value for scores, length in zip(tokens, lengths, strict=True) for value in scores[:length]]
    if weights is not None:
        row["kept_token_rate"] = int(weights.perception_mask.sum()) / sum(lengths)
        row["perception_mean"] = sum(values) / len(values)
        row["trajectory_weight_min"] = float(weights.trajectory_weights.min())
        row["trajectory_weight_max"] = float(weights.trajectory_weights.max())
        stride = max(1, len(values) // PERCEPTION_TOKENS_PER_STEP)
        trajectories = [sum(s[:n]) / n for s, n in zip(tokens, lengths, strict=True)]
        log.write(
            "perception.jsonl",
            {
                "step": step,
                "token_scores": [float(f"{v:.4g}") for v in values[::stride]],
                "trajectory_scores": [float(f"{v:.4g}") for v in trajectories],
            },
        )
    log.metrics("rl", step, **row)
    by_id = _lookup(samples, groups)
    for group in groups[:COMPLETIONS_PER_STEP]:
        _log_completion(log, policy, by_id[group.sample_id], step, group, groups, weights)


def _lookup(samples: Sequence[MaskedSample], groups: Sequence[Group]) -> dict[str, MaskedSample]:
    wanted = {g.sample_id for g in groups[:COMPLETIONS_PER_STEP]}
    return {s.id: s for s in samples if s.id in wanted}


def _log_completion(
    log: RunFolder,
    policy: Policy,
    sample: MaskedSample,
    step: int,
    group: Group,
    groups: Sequence[Group],
    weights: PerceptionWeights | None,
) -> None:
    """The group's best and worst rollout: the contrast is what the step learns from."""
    first = next(i for i, g in enumerate(groups) if g is group) * len(group.responses)
    order = group.rewards.argsort(descending=True, stable=True).tolist()
    for j in (order[0], order[-1]):
        ids = group.responses[j]
        text = policy.tokenizer.decode([t for t in ids if t != policy.eos_token_id])
        kept = None if weights is None else weights.perception_mask[first + j, : len(ids)].tolist()
        log.write(
            "samples.jsonl",
            {
                "step": step,
                "sample_id": sample.id,
                "example_id": sample.example_id,
                "masked_caption": sample.masked_caption,
                "answer": sample.answer,
                "completion": text,
                "reward": float(group.rewards[j]),
                "advantage": float(group.advantages[j]),
                "tokens": [policy.tokenizer.decode([t]) for t in ids],
                "perception": [round(v, 5) for v in group.perception[j, : len(ids)].tolist()],
                "kept": kept,
            },
        )
