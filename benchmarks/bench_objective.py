"""The trainer's own path: perception weights, then the clipped loss of `mmrpt.objective` and its backward pass.

    pytest benchmarks/bench_objective.py [--quick] [--device cpu|cuda]

One micro-batch of reinforcement behind the model's forward pass, with the trainer's default settings: responses of
unequal length, 40 % of their tokens kept by perception scores, advantages scaled by trajectory, clipping of 0.2 and
0.28 with the dual clip, the bias that rules out ids that must not be sampled; d hidden and d weight. "trainer" calls
`mmrpt.perception.shape_and_filter` and `mmrpt.objective.policy_loss`; "eager" writes the same out from full logits, the
heads of others from log-probs of all response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Contender, report, with_backward
from benchmarks.heads import Head, eager, eager_compiled, gate_rows, head_peers, missing, products
from mmrpt_kernels import linear_logprobs, perception_weights
from mmrpt_kernels.testing import draw_head

PROMPT = 16  # tokens before a response
SUPPRESSED = 8  # ids that must not be sampled: the first of the vocabulary


@dataclass(frozen=True)
class HeldPolicy:
    """What `mmrpt.objective` asks of a policy, its forward pass done."""

    states: torch.Tensor
    head_weight: torch.Tensor
    bias: torch.Tensor

    def hidden(self, batch: Any) -> torch.Tensor:
        return self.states

    def sampling_bias(self) -> torch.Tensor:
        return self.bias

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def trainer(hidden, weight, bias, ids, response_mask, scores, advantages, old_logps, tokens) -> torch.Tensor:
    from mmrpt.objective import policy_loss
    from mmrpt.perception import shape_and_filter
    from mmrpt.settings import Settings
    from mmrpt.types import Batch, PolicyTargets

    settings = Settings()
    batch = Batch(ids, torch.ones_like(ids), response_mask, None, None)
    options = {"keep_ratio": settings.perception.keep_ratio, "min_weight": settings.perception.min_weight}
    weights = shape_and_filter(scores, response_mask[:, PROMPT:], **options)
    targets = PolicyTargets(advantages, old_logps, weights.perception_mask, weights.trajectory_weights)
    step = {"normalizer": float(tokens), "temperature": settings.rollout.temperature}
    return policy_loss(HeldPolicy(hidden, weight, bias), batch, targets, settings.rl, **step).loss


def from_logps(
    head: Head, hidden, weight, bias, ids, response_mask, scores, advantages, old_logps, tokens
) -> torch.Tensor:
    """The same from log-probs of all tokens: VPPO's loss with clip 0.2 and 0.28, dual clip 3."""
    mask = response_mask[:, PROMPT:]
    kept, scale = perception_weights(scores, mask, keep_ratio=0.4, min_weight=0.9, backend="reference")
    logps = head(hidden[:, PROMPT - 1 : -1], weight, ids[:, PROMPT:], bias, entropy=False).logps
    ratio, advantage = (logps - old_logps).exp(), (scale * advantages)[:, None]
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    surrogate = torch.where(advantage < 0, torch.max(surrogate, 3.0 * advantage), surrogate)
    return -(surrogate * kept).sum() / tokens


def floor(hidden, weight, response_mask, scores, **_: Any) -> dict[str, torch.Tensor]:
    """Three products on as many tokens as are kept."""
    mask = response_mask[:, PROMPT:]
    count = sum(math.ceil(0.4 * length) for length in mask.sum(-1).tolist())
    return products(hidden.detach().flatten(0, 1)[:count], weight, trains=True)


def make_inputs(
    device: torch.device, *, responses: int, width: int, hidden: int, vocab: int, dtype: torch.dtype, logits: str
) -> dict[str, Any]:
    """Responses of half to all of `width` tokens. Log-ratios are within 0.1, and 0.5, -0.5 or 1.5 for three tokens in
    ten: all clips take part, and rounding of logits moves no token across one."""
    length = PROMPT + width
    drawn = draw_head(logits, responses * length, hidden, vocab, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    states, weight = drawn.hidden.view(responses, length, hidden), drawn.weight.clone()
    ids = drawn.targets.view(responses, length).clamp_min(SUPPRESSED)
    bias = torch.zeros(vocab, device=device)
    bias[:SUPPRESSED] = -1e4  # as Policy.sampling_bias
    lengths = PROMPT + (width * (0.5 + 0.5 * uniform(responses))).ceil()
    position = torch.arange(length, device=device)
    response_mask = (position >= PROMPT) & (position < lengths[:, None])
    with torch.no_grad():
        own = linear_logprobs(states[:, PROMPT - 1 : -1], weight, ids[:, PROMPT:], bias=bias).logps
    far, near = uniform(responses, width), uniform(responses, width)
    log_ratio = torch.where(far < 0.3, (near - 0.5).sign() * 0.5, (near - 0.5) * 0.2).where(far > 0.1, 1.5)
    return {
        "hidden": states.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias,
        "ids": ids,
        "response_mask": response_mask,
        "scores": uniform(responses, width).pow(8),  # few tokens lean on the image
        "advantages": torch.randn(responses, generator=generator, device=device),
        "old_logps": (own - log_ratio) * response_mask[:, PROMPT:],
        "tokens": int(response_mask.sum()),
    }


def case(
    name: str, rows: tuple[int, int], head: tuple[int, int], dtype: torch.dtype, *, logits: str, quick: bool = True
) -> Case:
    """rows: responses and the width of the longest; head: H, V. FLOPs of three products on the tokens kept."""
    (responses, width), (hidden, vocab) = rows, head
    inputs = partial(make_inputs, width=width, hidden=hidden, vocab=vocab, dtype=dtype, logits=logits)
    few = min(responses, max(4, gate_rows(logits) // width))
    params = {"responses": responses, "width": width, "H": hidden, "V": vocab}
    return Case(
        name,
        params | {"dtype": str(dtype).removeprefix("torch."), "keep": 0.4, "logits": logits, "bias": True},
        partial(inputs, responses=responses),
        gate_inputs=partial(inputs, responses=few),
        floor=20.0,  # the size of the log-probabilities whose difference is the ratio's exponent
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    full, half = torch.float32, torch.bfloat16
    if device.type == "cpu":
        return [
            case("demo", (96, 28), (128, 2048), full, logits="trained"),  # 12 groups of 8, the drawn world's model
            case("8k", (8, 128), (512, 8192), full, logits="trained"),
            case("32k", (8, 128), (512, 32_000), full, logits="flat", quick=False),
            case("8k-bf16", (8, 128), (512, 8192), half, logits="trained", quick=False),
        ]
    return [
        case("7b-8k", (16, 512), (3584, 152_064), half, logits="flat"),
        case("7b-8k-trained", (16, 512), (3584, 152_064), half, logits="trained"),
        case("3b-8k-trained", (64, 128), (2048, 151_936), half, logits="trained", quick=False),
    ]


def step(fn: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    return with_backward(fn, ("hidden", "weight"), lambda out, _: out)


def contenders(device: torch.device) -> list[Contender]:
    def with_head(head: Head) -> Callable[..., Any]:
        return step(partial(from_logps, head))

    return [
        Contender("eager", with_head(eager), "baseline"),
        Contender("bare products", floor, "floor"),
        Contender("trainer", step(trainer), skip=missing("mmrpt.objective")),
        *eager_compiled(device, partial(from_logps, eager), step),
        *head_peers(device, with_head),
    ]


def test_objective(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
