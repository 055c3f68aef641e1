"""The clipped policy loss, forward and backward: linear_policy_loss against materialised logits and other fused heads.

    python -m benchmarks.policy_loss [--quick] [--device cpu|cuda] [--threads 2]

Every case is one training step of the head: loss, d hidden and d weight. "keep40" is VPPO's filter: 40 % of the tokens
have a policy term, and no term of the loss runs over the others; "keep100" has no filter. The same loss is built by
"eager" from full logits and log_softmax, by the heads of others (TRL, cut-cross-entropy) from per-token log-probs, and
by Liger from its own fused GRPO loss. "portable" computes what has a gradient; "portable, statistics" also log-probs
and entropies of all other response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Case, Contender
from benchmarks.logprobs import compiled_per_shape, cut_cross_entropy, eager, missing, no_compiler, ours, trl
from mmrpt_kernels import LogProbs, linear_logprobs, linear_policy_loss, linear_token_loss

SEQUENCES = 8
Head = Callable[..., LogProbs]


def loss_from_logps(head: Head, hidden, weight, targets, advantages, response_mask, perception_mask, old_logps):
    """The loss as a trainer writes it: per-token log-probs of all tokens, then the surrogate over (B, T)."""
    logps = head(hidden, weight, targets, entropy=False).logps
    ratio = (logps - old_logps).exp()
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * perception_mask * response_mask).sum() / response_mask.sum()


def fused(*, return_statistics: bool, **inputs: Any) -> torch.Tensor:
    return linear_policy_loss(**inputs, return_statistics=return_statistics, backend="portable").loss


def token_loss(hidden, weight, targets, advantages, response_mask, perception_mask, old_logps) -> torch.Tensor:
    """The same loss brought as a user's own function."""
    old, by_token = old_logps.reshape(-1), advantages[:, None].expand(targets.shape).reshape(-1)

    def clipped(logps, _entropy, rows):
        ratio = (logps - old[rows]).exp()
        return -torch.min(ratio * by_token[rows], ratio.clamp(0.8, 1.2) * by_token[rows])

    mask = response_mask & perception_mask
    total = linear_token_loss(hidden, weight, targets, clipped, active_mask=mask, use_entropy=False, backend="portable")
    return total / response_mask.sum()


def liger(hidden, weight, targets, advantages, response_mask, perception_mask, old_logps) -> torch.Tensor:
    """Liger's fused linear GRPO; its mask is the filter, its divisor the response's length."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    mask = (response_mask & perception_mask).to(hidden.dtype)
    return loss(
        hidden,
        weight,
        targets,
        mask,
        advantages,
        old_per_token_logps=old_logps,
        num_items_in_batch=response_mask.sum(),
    )[0]


def make_inputs(
    device: torch.device, *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, keep: float
) -> dict[str, Any]:
    """Logits of standard deviation 3, log-ratios of standard deviation 0.1, ceil(keep * T) tokens kept a sequence."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (SEQUENCES, rows // SEQUENCES)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    made = {"hidden": normal(*shape, hidden), "weight": normal(vocab, hidden) * (3.0 / hidden**0.5)}
    made = {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}
    targets = torch.randint(vocab, shape, generator=generator, device=device)
    with torch.no_grad():
        own = linear_logprobs(made["hidden"], made["weight"], targets).logps
    order = torch.rand(shape, generator=generator, device=device).argsort(1).argsort(1)
    return made | {
        "targets": targets,
        "advantages": normal(SEQUENCES),
        "response_mask": torch.ones(shape, dtype=torch.bool, device=device),
        "perception_mask": order < -int(-keep * shape[1] // 1),
        "old_logps": own + 0.1 * normal(*shape),
    }


def case(
    name: str, rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, keep: float, gate_rows=64, quick=True
) -> Case:
    """Three products of 2 N H V each on the tokens kept: what the mathematics needs."""
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "keep": keep}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params,
        partial(make_inputs, rows=rows, **sizes),
        gate_inputs=partial(make_inputs, rows=min(rows, gate_rows), **sizes),
        floor=20.0,  # the size of the log-probabilities whose difference is the ratio's exponent
        flops=6.0 * rows * hidden * vocab * keep,
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case("32k-keep40", 1024, 512, 32_000, torch.float32, keep=0.4),
            case("32k-keep100", 1024, 512, 32_000, torch.float32, keep=1.0),
            case("tiny-keep40", 2048, 128, 1024, torch.float32, keep=0.4),
            case("152k-keep40", 256, 256, 151_936, torch.float32, keep=0.4, quick=False),
            case("32k-keep40-bf16", 1024, 512, 32_000, torch.bfloat16, keep=0.4, quick=False),
        ]
    return [
        case("3b-keep40", 8192, 2048, 151_936, torch.bfloat16, keep=0.4),
        case("3b-keep100", 8192, 2048, 151_936, torch.bfloat16, keep=1.0),
        case("7b-keep40", 8192, 3584, 152_064, torch.bfloat16, keep=0.4, quick=False),
        case("7b-keep100", 8192, 3584, 152_064, torch.bfloat16, keep=1.0, quick=False),
    ]


def main(argv=None) -> int:
    args = harness.parse_args("policy_loss", argv)
    on_gpu = None if args.device.type == "cuda" else "its kernels need a GPU"

    def step(fn: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        return harness.with_backward(fn, ("hidden", "weight"), lambda out, inputs: out)

    plain = partial(loss_from_logps, eager)
    compiled = compiled_per_shape(plain)
    contenders = [
        Contender("eager", step(plain), baseline=True),
        Contender("eager, compiled", step(compiled), peer=True, skip=no_compiler(args.device)),
        Contender("portable", step(partial(fused, return_statistics=False))),
        Contender("portable, statistics", step(partial(fused, return_statistics=True))),
        Contender("linear_token_loss", step(token_loss)),
        Contender("linear_logprobs + autograd", step(partial(loss_from_logps, ours))),
        Contender("TRL", step(partial(loss_from_logps, trl)), peer=True, skip=missing("trl.trainer.utils")),
        Contender("Liger GRPO", step(liger), peer=True, skip=missing("liger_kernel.chunked_loss")),
        Contender(
            "cut-cross-entropy",
            step(partial(loss_from_logps, cut_cross_entropy)),
            peer=True,
            skip=missing("cut_cross_entropy") or on_gpu,
        ),
    ]
    return harness.run("policy_loss", cases(args.device), contenders, args)


if __name__ == "__main__":
    raise SystemExit(main())
