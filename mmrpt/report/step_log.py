"""The rows an RL step writes: metrics, a few completions with their tokens, and perception."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrpt.perception import PerceptionWeights
from mmrpt.policy import Policy
from mmrpt.run_folder import RunFolder
from mmrpt.types import Group, MaskedSample, SamplingRound

GROUPS_SHOWN_PER_STEP = 2
PERCEPTION_TOKENS_PER_STEP = 400


def log_step(
    log: RunFolder,
    step: int,
    groups: Sequence[Group],
    *,
    weights: PerceptionWeights | None,
    rounds: Sequence[SamplingRound],
    metrics: dict[str, Any],
    seconds: Mapping[str, float],
    samples: Sequence[MaskedSample],
    policy: Policy,
    phase: str = "rl",
) -> None:
    """Writes the step's row to metrics.jsonl and, for RL but no control, rows to perception.jsonl and samples.jsonl.

    rounds: those sampled for the step; seconds: of its parts besides those rounds.
    """
    row = dict(metrics)
    for name in dict.fromkeys(name for r in rounds for name in r.metrics):
        values = [r.metrics[name] for r in rounds if name in r.metrics]  # a reward term may apply to none of a round
        row[name] = sum(values) / len(values)
    seconds = dict(seconds)
    for part, value in (item for r in rounds for item in r.seconds.items()):
        seconds[part] = seconds.get(part, 0.0) + value
    row |= {f"seconds_{part}": round(value, 4) for part, value in sorted(seconds.items())}
    row |= {"rounds": len(rounds), "groups": len(groups)}
    if weights is not None:
        trajectories = [
            scores[: len(ids)] for g in groups for scores, ids in zip(g.perception.tolist(), g.responses, strict=True)
        ]
        values = [value for scores in trajectories for value in scores]
        row["kept_token_rate"] = int(weights.perception_mask.sum()) / len(values)
        row["perception_mean"] = sum(values) / len(values)
        row["trajectory_weight_min"] = float(weights.trajectory_weights.min())
        row["trajectory_weight_max"] = float(weights.trajectory_weights.max())
        part = values[:: max(1, len(values) // PERCEPTION_TOKENS_PER_STEP)]
        means = [sum(scores) / len(scores) for scores in trajectories]
        if phase == "rl":
            scores = {"token_scores": _short(part), "trajectory_scores": _short(means)}
            log.write("perception.jsonl", {"step": step, **scores})
    log.metrics(phase, step, **row)
    if phase != "rl":
        return
    wanted = {g.sample_id for g in groups[:GROUPS_SHOWN_PER_STEP]}
    by_id = {s.id: s for s in samples if s.id in wanted}
    first = 0  # row of the group's first response among all of the step
    for group in groups[:GROUPS_SHOWN_PER_STEP]:
        order = group.rewards.argsort(descending=True, stable=True).tolist()
        for j in (order[0], order[-1]):  # the contrast is what the step learns from
            kept = None if weights is None else weights.perception_mask[first + j, : len(group.responses[j])].tolist()
            log.write("samples.jsonl", {"step": step, **_completion(policy, by_id[group.sample_id], group, j, kept)})
        first += len(group.responses)


def _completion(policy: Policy, sample: MaskedSample, group: Group, j: int, kept: list[bool] | None) -> dict[str, Any]:
    ids, tokenizer = group.responses[j], policy.tokenizer
    return {
        "sample_id": sample.id,
        "example_id": sample.example_id,
        "masked_caption": sample.masked_caption,
        "answer": sample.answer,
        "completion": tokenizer.decode([t for t in ids if t != policy.eos_token_id]),
        "reward": float(group.rewards[j]),
        "advantage": float(group.advantages[j]),
        "tokens": [tokenizer.decode([t]) for t in ids],
        "perception": [round(v, 5) for v in group.perception[j, : len(ids)].tolist()],
        "kept": kept,
    }


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
