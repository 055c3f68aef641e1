"""The clipped policy loss, forward and backward: linear_policy_loss against materialised logits and other fused heads.

    python -m benchmarks.policy_loss [--quick] [--device cpu|cuda] [--threads 2] [--only 7b]

Every case is one training step of the head: loss, d hidden and d weight ("frozen": d hidden alone, as with LoRA).
"keep40" is VPPO's filter: 40 % of the tokens have a policy term, and no term of the loss runs over the others;
"keep100" has no filter. The same loss is built by "eager" from full logits and log_softmax, by the heads of others
(TRL, verl, cut-cross-entropy) from per-token log-probs, and by Liger from its own fused GRPO loss. Ours compute what
has a gradient; "statistics" also log-probs and entropies of all other response tokens.

"bare products" is the floor: the matrix products that the mathematics needs on the tokens kept, in the inputs' dtype,
all at once where memory allows, and nothing else. Goals on an H200: within 1.10 of it at keep100 and for a frozen head,
within 1.25 at keep40; at least 1.3 and 2.4 times faster than the fastest peer; at most half of its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Case, Contender
from benchmarks.logprobs import (
    compiled_per_shape,
    cut_cross_entropy,
    eager,
    missing,
    no_compiler,
    ours,
    ours_everywhere,
    products,
    trl,
    verl,
)
from mmrpt_kernels import LogProbs, linear_logprobs, linear_policy_loss, linear_token_loss

SEQUENCES = 8
Head = Callable[..., LogProbs]


def loss_from_logps(head: Head, hidden, weight, targets, advantages, response_mask, perception_mask, old_logps):
    """The loss as a trainer writes it: per-token log-probs of all tokens, then the surrogate over (B, T)."""
    logps = head(hidden, weight, targets, entropy=False).logps
    ratio = (logps - old_logps).exp()
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * perception_mask * response_mask).sum() / response_mask.sum()


def fused(backend: str, *, return_statistics: bool = False, **inputs: Any) -> torch.Tensor:
    return linear_policy_loss(**inputs, return_statistics=return_statistics, backend=backend).loss


def token_loss(
    backend: str, hidden, weight, targets, advantages, response_mask, perception_mask, old_logps
) -> torch.Tensor:
    """The same loss brought as a user's own function."""
    old, by_token = old_logps.reshape(-1), advantages[:, None].expand(targets.shape).reshape(-1)

    def clipped(logps, _entropy, rows):
        ratio = (logps - old[rows]).exp()
        return -torch.min(ratio * by_token[rows], ratio.clamp(0.8, 1.2) * by_token[rows])

    mask = response_mask & perception_mask
    total = linear_token_loss(hidden, weight, targets, clipped, active_mask=mask, use_entropy=False, backend=backend)
    return total / response_mask.sum()


def liger(hidden, weight, targets, advantages, response_mask, perception_mask, old_logps) -> torch.Tensor:
    """Liger's fused linear GRPO; its mask is the filter, its divisor the response's length. Compiled where it can be,
    as its users run it."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    compiled = no_compiler(hidden.device) is None
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="dapo")
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


def floor(hidden, weight, perception_mask, **_: Any) -> dict[str, torch.Tensor]:
    """Two or three products on the tokens kept."""
    return products(hidden.detach()[perception_mask], weight, weight.requires_grad)


def make_inputs(
    device: torch.device, *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, keep: float, frozen: bool
) -> dict[str, Any]:
    """Logits of standard deviation 3, log-ratios of standard deviation 0.1, ceil(keep * T) tokens kept a sequence."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (SEQUENCES, rows // SEQUENCES)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    made = {"hidden": normal(*shape, hidden), "weight": normal(vocab, hidden) * (3.0 / hidden**0.5)}
    made = {name: tensor.to(dtype).requires_grad_(name == "hidden" or not frozen) for name, tensor in made.items()}
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
    name: str, rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, keep: float, frozen=False, quick=True
) -> Case:
    """Three (frozen: two) products of 2 N H V each on the tokens kept: what the mathematics needs."""
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "keep": keep, "frozen": frozen}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params | {"frozen": frozen},
        partial(make_inputs, rows=rows, **sizes),
        gate_inputs=partial(make_inputs, rows=min(rows, 64), **sizes),
        floor=20.0,  # the size of the log-probabilities whose difference is the ratio's exponent
        flops=(4.0 if frozen else 6.0) * rows * hidden * vocab * keep,
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
    # Heads of Qwen2.5-VL 3B and 7B, of Llama 3 8B's vocabulary at 5120 (a 32B's width).
    half = torch.bfloat16
    return [
        case("7b-8k-keep40", 8192, 3584, 152_064, half, keep=0.4),
        case("7b-8k-keep100", 8192, 3584, 152_064, half, keep=1.0),
        case("3b-8k-keep40", 8192, 2048, 151_936, half, keep=0.4),
        case("7b-8k-frozen", 8192, 3584, 152_064, half, keep=1.0, frozen=True, quick=False),
        case("3b-8k-keep100", 8192, 2048, 151_936, half, keep=1.0, quick=False),
        case("7b-8k-keep20", 8192, 3584, 152_064, half, keep=0.2, quick=False),
        case("32b-8k-keep40", 8192, 5120, 128_256, half, keep=0.4, quick=False),
        case("7b-4k-keep40", 4096, 3584, 152_064, half, keep=0.4, quick=False),
        case("7b-16k-keep40", 16_384, 3584, 152_064, half, keep=0.4, quick=False),
        case("7b-64k-keep40", 65_536, 3584, 152_064, half, keep=0.4, quick=False),
    ]


def step(fn: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Loss and gradients; of hidden alone where the head is frozen."""
    both = harness.with_backward(fn, ("hidden", "weight"), lambda out, inputs: out)
    alone = harness.with_backward(fn, ("hidden",), lambda out, inputs: out)

    def call(**inputs: Any) -> Any:
        return both(**inputs) if inputs["weight"].requires_grad else alone(**inputs)

    return call


def main(argv=None) -> int:
    args = harness.parse_args("policy_loss", argv)
    on_gpu = None if args.device.type == "cuda" else "its kernels need a GPU"
    plain = partial(loss_from_logps, eager)
    contenders = [
        Contender("eager", step(plain), baseline=True),
        Contender("bare products", floor, floor=True),
        *(
            contender
            for backend in ours_everywhere("policy_loss", args.device)
            for contender in (
                Contender(backend, step(partial(fused, backend))),
                Contender(f"{backend}, statistics", step(partial(fused, backend, return_statistics=True))),
            )
        ),
        Contender("linear_token_loss", step(partial(token_loss, None))),
        Contender("linear_logprobs + autograd", step(partial(loss_from_logps, partial(ours, None)))),
        Contender("eager, compiled", step(compiled_per_shape(plain)), peer=True, skip=no_compiler(args.device)),
        Contender(
            "eager, auto-chunked",
            step(compiled_per_shape(plain, auto_chunker=True)),
            peer=True,
            skip=no_compiler(args.device) or on_gpu,
        ),
        Contender("TRL", step(partial(loss_from_logps, trl)), peer=True, skip=missing("trl.trainer.utils")),
        Contender("Liger GRPO", step(liger), peer=True, skip=missing("liger_kernel.chunked_loss")),
        Contender("verl", step(partial(loss_from_logps, verl)), peer=True, skip=on_gpu or missing("verl.utils.kernel")),
        Contender(
            "cut-cross-entropy",
            step(partial(loss_from_logps, cut_cross_entropy)),
            peer=True,
            skip=on_gpu or missing("cut_cross_entropy"),
        ),
    ]
    return harness.run("policy_loss", cases(args.device), contenders, args)


if __name__ == "__main__":
    raise SystemExit(main())
