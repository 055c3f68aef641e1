"""One sampling round: prompts in, scored groups out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from mmrpt.advantage import group_advantages
from mmrpt.data.images import blacken_patches, seed_of
from mmrpt.perception import token_perception
from mmrpt.policy import Policy
from mmrpt.rewards import combine_rewards
from mmrpt.rewards.exact import is_exact
from mmrpt.rollout.generate import Generation, generate
from mmrpt.rollout.group import Group
from mmrpt.rollout.prompts import restore_prompts
from mmrpt.settings import Settings
from mmrpt.types import MaskedSample, Rollout


@dataclass(frozen=True)
class Round:
    """`groups` have signal; `rollouts` and `rewards` are all that was sampled, in order; `metrics` their means."""

    groups: list[Group]
    rollouts: list[Rollout]
    rewards: list[float]
    metrics: dict[str, float]


def collect_round(
    policy: Policy, samples: Sequence[MaskedSample], images: Mapping[str, Image.Image], settings: Settings, seed: int
) -> Round:
    """Samples a group for each masked caption, rewards it and, where rewards differ, scores its tokens' perception.

    Depends on the policy's weights, its arguments and `seed` alone.
    """
    pixels = policy.pixels([images[s.example_id] for s in samples])
    prompts = restore_prompts(policy, samples, pixels, settings.prompts)
    n = settings.rollout.group_size
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
    )
    rollouts = _rollouts(policy, samples, generation, n)
    texts = [r.completion for r in rollouts]
    answers = [s.answer for s in samples for _ in range(n)]
    totals, terms = combine_rewards(asdict(settings.reward), texts, answer=answers)
    rewards = torch.tensor(totals, device=generation.logps.device).view(len(samples), n)
    advantages, signal = group_advantages(rewards, kind=settings.rl.advantage)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(-1).mean().item(),
        "accuracy": sum(map(is_exact, texts, answers)) / len(texts),
        "format": sum(terms["format"]) / len(texts),
        "groups_kept": signal.float().mean().item(),
        "response_length": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        "finished": generation.finished.float().mean().item(),
    }
    kept = signal.nonzero()[:, 0].tolist()
    perception = _perception(policy, samples, prompts, images, generation, kept, settings, seed)
    groups = []
    for position, i in enumerate(kept):
        rows = slice(i * n, (i + 1) * n)
        responses = [list(r.token_ids) for r in rollouts[rows]]
        width = max(map(len, responses))
        groups.append(
            Group(
                samples[i].id,
                samples[i].example_id,
                prompts[i],
                responses,
                generation.logps[rows, :width].clone(),
                perception[position * n : (position + 1) * n, :width].clone(),
                rewards[i].clone(),
                advantages[i].clone(),
            )
        )
    return Round(groups, rollouts, totals, metrics)


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


def _perception(
    policy: Policy,
    samples: Sequence[MaskedSample],
    prompts: Sequence[Sequence[int]],
    images: Mapping[str, Image.Image],
    generation: Generation,
    kept: Sequence[int],
    settings: Settings,
    seed: int,
) -> torch.Tensor:
    """(len(kept) * n, T) token perception of the groups with signal; zeros when perception is switched off."""
    n, options = settings.rollout.group_size, settings.perception
    rows = [i * n + j for i in kept for j in range(n)]
    if not rows or not options.enabled:
        return torch.zeros(len(rows), generation.logps.shape[1], device=generation.logps.device)
    perturbed = policy.pixels(
        [
            blacken_patches(
                images[samples[i].example_id],
                seed=seed_of(seed, samples[i].id),
                patch_size=options.patch_size,
                probability=options.probability,
            )
            for i in kept
        ]
    )
    scores = token_perception(
        policy,
        [prompts[i] for i in kept],
        [generation.token_ids[i * n : (i + 1) * n] for i in kept],
        perturbed,
        range(len(kept)),
        generation.hidden[rows],
        kind=options.kind,
        temperature=settings.rollout.temperature,
    )
    return torch.nn.functional.pad(scores, (0, generation.logps.shape[1] - scores.shape[1]))
