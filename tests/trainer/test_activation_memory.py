"""Memory of a training step against plain PyTorch, by counting: prompts computed once, logits never held.

A vocabulary of 8,192 words over 32 features, a prompt of 256 tokens, n = 8 responses of 16: for plain PyTorch, a row
for each response with the prompt repeated, the logits are most of the memory, as they are for a real model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import held_bytes, peak_bytes
from mmrpt.corpus import ImageCache
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.objective import policy_loss
from mmrpt.settings import PerceptionSettings, RLSettings, RolloutSettings, Settings
from mmrpt.types import Group, PolicyTargets
from tests.trainer.conftest import TINY, ColourPairs, forward_inputs, make_policy

CPU = torch.device("cpu")
VOCAB, RESPONSES, PROMPT, WIDTH, KEEP = 8192, 8, 256, 16, 0.4
WORD = 300  # of the first 300 ids some are markers
ALONE, SHARED = RESPONSES * (PROMPT + WIDTH), PROMPT + RESPONSES * WIDTH  # tokens that a forward pass computes
FLOAT = 4  # bytes
MARGIN = 1.1  # the vision tower, positions, (N, W) fields of the loss


@pytest.fixture(scope="module")
def policy():
    policy = make_policy()
    policy.model.resize_token_embeddings(VOCAB, mean_resizing=False)
    return policy


def group_of(policy, pairs, prompt: int = PROMPT) -> Group:
    generator = torch.Generator().manual_seed(0)
    ids = policy.encode_prompt("describe", 4)
    responses = torch.randint(WORD, VOCAB, (RESPONSES, WIDTH), generator=generator).tolist()
    fields = torch.rand(2, RESPONSES, WIDTH, generator=generator) - torch.tensor([9.0, 0.0])[:, None, None]
    advantages = torch.randn(RESPONSES, generator=generator)
    return Group("0", pairs[0].id, ids + [WORD] * (prompt - len(ids)), responses, *fields, advantages, advantages)


def plain_inputs(policy, pairs, group: Group):
    pixels = policy.pixels([pairs.image(group.example_id)])
    batch = policy.batch([group.prompt] * RESPONSES, group.responses, pixels, [0] * RESPONSES)
    return forward_inputs(policy, batch)


def plain_loss(policy, pairs, group: Group) -> torch.Tensor:
    """Of all tokens, as who writes logits and log_softmax out has it; the filter multiplies."""
    inputs = plain_inputs(policy, pairs, group)
    log_probs = policy.model(**inputs).logits[:, :-1].log_softmax(-1)
    logps = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[:, -WIDTH:, 0]
    return -((logps - group.logps).exp() * group.advantages[:, None] * (group.perception < KEEP)).mean()


def trainer_loss(policy, pairs, group: Group, share: bool = True) -> torch.Tensor:
    pixels = policy.pixels([pairs.image(group.example_id)])
    batch = policy.group_batch([group.prompt], [group.responses], pixels, [0], share=share)
    targets = PolicyTargets(group.advantages, group.logps, group.perception < KEEP, None)
    return policy_loss(policy, batch, targets, RLSettings(), normalizer=1.0, temperature=1.0).loss


@pytest.fixture(scope="module")
def token_bytes(policy) -> float:
    """What the decoder's layers keep of a token for their backward pass, rows alone: the slope over the prompt."""

    def kept(prompt: int) -> int:
        inputs = plain_inputs(policy, ColourPairs(), group_of(policy, ColourPairs(), prompt))
        return held_bytes(lambda: policy.model.model(**inputs).last_hidden_state, CPU)

    return (kept(2 * PROMPT) - kept(PROMPT)) / (RESPONSES * PROMPT)


def counted(token_bytes: float) -> tuple[float, float]:
    """Bytes that plain PyTorch and the trainer hold between forward and backward pass.

    Plain: the layers' and the log-probs of every token. Trainer: the layers' of a prompt read once, the mask of a
    shared row as each layer's attention keeps it, and the head's gradient, which is made in the forward pass.
    """
    mask = TINY.layers * SHARED**2 * FLOAT
    return ALONE * (token_bytes + VOCAB * FLOAT), SHARED * token_bytes + mask + VOCAB * TINY.hidden_size * FLOAT


def test_what_is_held_for_the_backward_pass(policy, pairs, token_bytes):
    plain, ours = counted(token_bytes)
    group = group_of(policy, pairs)
    held_plain = held_bytes(lambda: plain_loss(policy, pairs, group), CPU)
    held_ours = held_bytes(lambda: trainer_loss(policy, pairs, group), CPU)
    assert plain <= held_plain <= MARGIN * plain, "this is what plain PyTorch holds"
    assert held_ours <= MARGIN * ours, (held_ours, ours)
    assert held_plain / held_ours >= plain / ours / MARGIN > 15
    assert held_bytes(lambda: trainer_loss(policy, pairs, group, share=False), CPU) > 2 * MARGIN * ours


class Clears:
    """In the optimiser's place."""

    def __init__(self, policy):
        self.policy = policy

    def step(self, step: int, steps: int) -> dict[str, float | bool]:
        self.policy.model.zero_grad(set_to_none=True)
        return {"lr": 0.0, "grad_norm": 0.0, "skipped": False}


def test_the_peak_of_a_step(policy, pairs, token_bytes):
    """Plain PyTorch's backward pass holds the log-probs, their gradient and that of the logits; the trainer's step,
    besides what it keeps, logits and exponentials of the tokens that learn, and the gradients of the weights."""
    group = group_of(policy, pairs)
    settings = Settings(
        rollout=RolloutSettings(group_size=RESPONSES), perception=PerceptionSettings(keep_ratio=KEEP, min_weight=1.0)
    )
    clears, images = Clears(policy), ImageCache(pairs, 1 << 20)

    def plain_step() -> None:
        plain_loss(policy, pairs, group).backward()
        clears.step(0, 1)

    def step() -> None:
        train_on_groups(policy, clears, [group], images, settings, step=1)

    learning = RESPONSES * -int(-KEEP * WIDTH // 1)
    weights = sum(p.numel() for p in policy.model.parameters()) * FLOAT
    limit = counted(token_bytes)[1] + 2 * learning * VOCAB * FLOAT + weights
    expected = ALONE * (token_bytes + 3 * VOCAB * FLOAT)
    peaks = [peak(call) for call in (plain_step, step)]
    assert expected * (1 - 1 / PROMPT) <= peaks[0] <= MARGIN * expected
    assert peaks[1] <= MARGIN * limit, (peaks, limit)
    assert peaks[0] / peaks[1] >= expected / limit / MARGIN > 15


def peak(call: Callable[[], None]) -> int:
    call()  # what is made once is not the step's
    return peak_bytes(call, CPU)
