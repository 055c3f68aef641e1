"""Log-probabilities of target tokens: linear_logprobs against materialised logits and other fused heads.

    python -m benchmarks.logprobs [--quick] [--device cpu|cuda]

"score" cases are a forward pass alone with entropies (old and reference log-probs of a rollout). "train" cases add the
backward; in "train-*-keep40" a trainer's loss has zero gradient in 60 % of the tokens (VPPO's filter).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Case, Contender
from mmrpt_kernels import LogProbs, linear_logprobs
from mmrpt_kernels.common.head import statistics_dtype


def missing(*modules: str) -> str | None:
    """Why a peer cannot run: the first of its modules that cannot be imported, or None."""
    for name in modules:
        try:
            __import__(name)
        except (ImportError, RuntimeError) as error:
            return f"{name}: {error}"
    return None


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run for `device`, or None."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


def compiled_per_shape(fn: Callable) -> Callable:
    """`fn` compiled anew for every case and gate: past the default limit of 8 it would run uncompiled in silence."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(fn, dynamic=False)


def eager(hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    """What a trainer writes without the operator: all logits, softmax in float32."""
    log_probs = torch.log_softmax(F.linear(hidden, weight).to(statistics_dtype(hidden)), -1)
    logps = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return LogProbs(logps, -(log_probs.exp() * log_probs).sum(-1) if entropy else None)


def ours(hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    return linear_logprobs(hidden, weight, targets, return_entropy=entropy, backend="portable")


def trl(hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    """TRL's GRPO head, called as its trainer does."""
    from trl.trainer import utils

    rows = utils._ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None,
        targets.reshape(-1),
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",) if entropy else (),
    )
    return LogProbs(rows[0].view(targets.shape), rows[1].view(targets.shape) if entropy else None)


def cut_cross_entropy(hidden, weight, targets, factors=None, *, entropy: bool = False) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return LogProbs(-linear_cross_entropy(hidden, weight, targets, reduction="none"), None)


def forward_or_both(fn: Callable[..., LogProbs]) -> Callable[..., Any]:
    """Without gradients: logps and entropy. With: d of sum(factors * logps), as a policy loss asks for it."""
    train = harness.with_backward(
        partial(fn, entropy=False), ("hidden", "weight"), lambda out, inputs: (out.logps * inputs["factors"]).sum()
    )

    def call(**inputs: Any) -> Any:
        return train(**inputs) if inputs["weight"].requires_grad else fn(**inputs)

    return call


def make_inputs(
    device: torch.device, *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, train: bool, keep: float
) -> dict[str, Any]:
    """Logits of standard deviation 3; factors (rows,) are zero in 1 - keep of the rows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    factors = normal(rows) / rows
    factors[torch.randperm(rows, generator=generator, device=device)[round(keep * rows) :]] = 0.0
    return {
        "hidden": normal(rows, hidden).to(dtype).requires_grad_(train),
        "weight": (normal(vocab, hidden) * (3.0 / hidden**0.5)).to(dtype).requires_grad_(train),
        "targets": torch.randint(vocab, (rows,), generator=generator, device=device),
        "factors": factors,
    }


def case(name: str, rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, keep=None, quick=True) -> Case:
    """`keep` None: forward alone. Products count 2 N H V each: one forward, two more for the rows with a gradient."""
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "train": keep is not None, "keep": keep or 1.0}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params,
        partial(make_inputs, rows=rows, **sizes),
        gate_inputs=partial(make_inputs, rows=min(rows, 64), **sizes),
        floor=20.0,  # the size of the logits that log-probabilities subtract
        flops=2.0 * rows * hidden * vocab * (1 if keep is None else 1 + 2 * keep),
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case("score-tiny", 2048, 128, 1024, torch.float32),
            case("score-32k", 1024, 512, 32_000, torch.float32),
            case("train-32k", 1024, 512, 32_000, torch.float32, keep=1.0),
            case("train-32k-keep40", 1024, 512, 32_000, torch.float32, keep=0.4),
            case("score-32k-bf16", 1024, 512, 32_000, torch.bfloat16, quick=False),
            case("train-152k-keep40", 256, 256, 151_936, torch.float32, keep=0.4, quick=False),
        ]
    return [
        case("score-3b", 8192, 2048, 151_936, torch.bfloat16),
        case("train-3b", 8192, 2048, 151_936, torch.bfloat16, keep=1.0),
        case("train-3b-keep40", 8192, 2048, 151_936, torch.bfloat16, keep=0.4),
        case("score-7b", 8192, 3584, 152_064, torch.bfloat16, quick=False),
    ]


def main(argv=None) -> int:
    args = harness.parse_args("logprobs", argv)
    compiled = compiled_per_shape(eager)
    logps_only = ("logps", "value", "d_hidden", "d_weight")
    contenders = [
        Contender("eager", forward_or_both(eager), baseline=True),
        Contender("eager, compiled", forward_or_both(compiled), peer=True, skip=no_compiler(args.device)),
        Contender("portable", forward_or_both(ours)),
        Contender("TRL", forward_or_both(trl), peer=True, skip=missing("trl.trainer.utils")),
        Contender(
            "cut-cross-entropy (no entropy)",
            forward_or_both(cut_cross_entropy),
            peer=True,
            skip=missing("cut_cross_entropy") or (None if args.device.type == "cuda" else "its kernels need a GPU"),
            compare=logps_only,
        ),
    ]
    return harness.run("logprobs", cases(args.device), contenders, args)


if __name__ == "__main__":
    raise SystemExit(main())
