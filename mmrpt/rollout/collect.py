"""One sampling round: prompts in, scored groups out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrpt.advantage import group_advantages
from mmrpt.corpus import seed_of
from mmrpt.objective import response_logps
from mmrpt.perception import image_share, score_tokens
from mmrpt.policy import Policy
from mmrpt.rewards import RewardFunction, combine_rewards
from mmrpt.rollout.generate import generate
from mmrpt.rollout.prompts import restore_prompts, restore_text
from mmrpt.settings import RolloutSettings, Settings
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import Generation, Group, MaskedSample, Pixels, Rollout, SamplingRound

Reference = Callable[[], AbstractContextManager[Policy]]  # `with reference() as other:` gives the policy of rl.kl_coef


@dataclass(frozen=True)
class _Kept:
    """The P groups of n responses that have a signal, before their tokens are scored."""

    samples: list[MaskedSample]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    pixels: Pixels
    logps: Tensor  # (P * n, T), as sampled
    hidden: Tensor | None  # (R, T, H) of all R rollouts
    rows: list[int]  # P * n of them


def collect_round(
    policy: Policy,
    samples: Sequence[MaskedSample],
    images: Mapping[str, Image.Image],
    settings: Settings,
    seed: int,
    reference: Reference | None = None,
    *,
    custom: Mapping[str, RewardFunction] | None = None,
) -> SamplingRound:
    """Samples a group for each masked caption, rewards it and, where it has a signal, scores its tokens.

    Depends on the weights of `policy` and of `reference` (for `rl.kl_coef`), the arguments and `seed` alone. `custom`:
    the functions of `reward.custom`.
    """
    n, watch = settings.rollout.group_size, Stopwatch()
    with watch.part("sampling"):
        shown = [images[s.example_id] for s in samples]
        prompts, pixels = restore_prompts(policy, samples, shown, settings.prompts)
        generation = generate(
            policy,
            prompts,
            pixels,
            range(len(samples)),
            group_size=n,
            max_new_tokens=settings.rollout.max_new_tokens,
            temperature=settings.rollout.temperature,
            top_p=settings.rollout.top_p,
            generator=torch.Generator(policy.device).manual_seed(seed),
            batch_size=settings.rollout.batch_size,
            keep_hidden=needs_perturbed_view(settings) and hidden_fits(policy, settings.rollout),
        )
        rollouts = _rollouts(policy, samples, generation, n)
    with watch.part("reward"):
        columns = _columns(samples, rollouts, settings)
        completions = [r.completion for r in rollouts]
        totals, terms = combine_rewards(settings.reward.weights(), completions, custom, **columns)
    rewards = torch.tensor(totals, device=generation.logps.device).view(len(samples), n)
    accuracy = rewards.new_tensor(terms["exact"]).view(len(samples), n).mean(-1)
    limits = {"min_accuracy": settings.rl.min_accuracy, "max_accuracy": settings.rl.max_accuracy}
    advantages, signal = group_advantages(rewards, accuracy, **limits, kind=settings.rl.advantage)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(-1).mean().item(),
        "accuracy": accuracy.mean().item(),
        "format": sum(terms["format"]) / len(rollouts),
        "groups_kept": signal.float().mean().item(),
        "groups_too_hard": (accuracy < limits["min_accuracy"]).float().mean().item(),
        "groups_too_easy": (accuracy > limits["max_accuracy"]).float().mean().item(),
        "response_length": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        "finished": generation.finished.float().mean().item(),
        **_term_means(terms),
    }
    chosen = signal.nonzero()[:, 0].tolist()
    if not chosen:
        return SamplingRound([], rollouts, totals, metrics, watch.seconds)
    rows = [i * n + j for i in chosen for j in range(n)]
    kept = _Kept(
        [samples[i] for i in chosen],
        [prompts[i] for i in chosen],
        [[list(generation.token_ids[i * n + j]) for j in range(n)] for i in chosen],
        pixels.select(chosen),
        generation.logps[rows],
        generation.hidden,
        rows,
    )
    with watch.part("perception"):
        fields = _token_fields(policy, reference, kept, settings, seed)
    gains = fields.pop("gains")
    if settings.reward.visual:
        right = rewards.new_tensor(terms["exact"]).view(len(samples), n)[chosen]
        visual = right * image_share(gains).view(-1, n)
        rewards[chosen] += settings.reward.visual * visual
        advantages[chosen], _ = group_advantages(rewards[chosen], kind=settings.rl.advantage)
        totals = rewards.flatten().tolist()
        metrics |= {"reward": rewards.mean().item(), "reward_std": rewards.std(-1).mean().item()}
        metrics["reward/visual"] = visual.mean().item()
    groups = _groups(kept, fields, rewards[chosen], advantages[chosen])
    return SamplingRound(groups, rollouts, totals, metrics, watch.seconds)


def needs_perturbed_view(settings: Settings) -> bool:
    """Whether responses are also read with patches of their images blackened."""
    return settings.perception.enabled or settings.reward.visual > 0


def hidden_fits(policy: Policy, rollout: RolloutSettings) -> bool:
    """Whether a round's hidden states are kept for the perception pass: by the longest it can be, before it is."""
    tokens = rollout.prompts * rollout.group_size * rollout.max_new_tokens
    weight = policy.head_weight
    return tokens * weight.shape[1] * weight.element_size() <= rollout.keep_hidden_mb << 20


def _columns(samples: Sequence[MaskedSample], rollouts: Sequence[Rollout], settings: Settings) -> dict[str, list[Any]]:
    """What reward functions get besides the completions, an entry for each (`mmrpt.rewards.custom.COLUMNS`)."""
    of = [samples[r.group] for r in rollouts]
    return {
        "prompts": [restore_text(s, settings.prompts) for s in of],
        "completion_ids": [list(r.token_ids) for r in rollouts],
        **{name: [getattr(s, name) for s in of] for name in ("id", "answer", "example_id", "masked_caption")},
    }


def _term_means(terms: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """The mean of each term over the completions that it applies to; a term that applies to none is absent."""
    applied = {name: [v for v in values if v is not None] for name, values in terms.items()}
    return {f"reward/{name}": float(sum(values) / len(values)) for name, values in applied.items() if values}


def _rollouts(policy: Policy, samples: Sequence[MaskedSample], generation: Generation, n: int) -> list[Rollout]:
    finished = generation.finished.tolist()
    texts = [
        policy.tokenizer.decode([t for t in ids if t != policy.eos_token_id], skip_special_tokens=False)
        for ids in generation.token_ids
    ]
    return [
        Rollout(samples[row // n].id, row // n, texts[row], ids, finished[row])
        for row, ids in enumerate(generation.token_ids)
    ]


def _groups(kept: _Kept, fields: Mapping[str, Tensor], rewards: Tensor, advantages: Tensor) -> list[Group]:
    """One `Group` for each kept prompt, its per-token fields cut to its longest response."""
    groups = []
    for i, (sample, prompt, responses) in enumerate(zip(kept.samples, kept.prompts, kept.responses, strict=True)):
        rows, width = slice(i * len(responses), (i + 1) * len(responses)), max(map(len, responses))
        own = {name: values[rows, :width].clone() for name, values in fields.items()}
        scored = {"rewards": rewards[i].clone(), "advantages": advantages[i].clone()}
        groups.append(Group(sample.id, sample.example_id, prompt, responses, **own, **scored))
    return groups


def _token_fields(
    policy: Policy, reference: Reference | None, kept: _Kept, settings: Settings, seed: int
) -> dict[str, Tensor]:
    """The per-token fields of `Group`, (P * n, T) each: those that the settings ask for, and "gains" of the image."""
    fields = {"logps": kept.logps, **{name: torch.zeros_like(kept.logps) for name in ("perception", "gains")}}
    temperature, models = settings.rollout.temperature, {}
    if settings.rl.kl_coef:
        if reference is None:
            raise ValueError(
                f"rl.kl_coef is {settings.rl.kl_coef}, but no reference policy was given: expected the warm start, "
                "which the divergence is measured to."
            )
        models["ref_logps"] = reference
    if settings.rl.max_importance is not None:
        models["trainer_logps"] = partial(nullcontext, policy)
    if not (models or needs_perturbed_view(settings)):
        return fields
    fields |= {name: torch.zeros_like(kept.logps) for name in models}
    inputs = kept.prompts, kept.responses, kept.pixels.select, settings.model.batch_tokens
    for part, batch in policy.group_batches(*inputs):
        found = {}
        for name, opened in models.items():
            with opened() as model:
                found[name] = response_logps(model, batch, temperature=temperature)
        if needs_perturbed_view(settings):
            hidden = None if kept.hidden is None else kept.hidden[kept.rows[part.rows]]
            seeds = [seed_of(seed, kept.samples[i].id) for i in part.prompts]
            seen = score_tokens(policy, batch, hidden, seeds, settings.perception, temperature)
            found |= {"perception": seen.scores, "gains": seen.gains}
        for name, values in found.items():
            fields[name][part.rows, : values.shape[1]] = values
    return fields
