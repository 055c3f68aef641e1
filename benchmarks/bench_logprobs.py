"""Log-probabilities of target tokens: linear_logprobs against materialised logits and other fused heads.

    pytest benchmarks/bench_logprobs.py [--quick] [--device cpu|cuda] [--only train]

"score" cases are a forward pass alone with entropies (old and reference log-probs of a rollout). "train" cases are the
supervised step: the mean cross-entropy of the rows kept, d hidden and d weight. Ours computes it from log-probs of all
rows whose gradient is zero in the others (as a trainer with VPPO's filter asks for it), and as "token loss" from the
rows kept alone; cross-entropy heads get the others' labels as ignore_index. "bias" cases add one to the logits, as
mmrpt's trainer always does. Logits are flat (normal, standard deviation 3) but for "trained", a briefly trained head
(`mmrpt_kernels.testing.draw_head`), where it pays to leave words without probability out of the gradient:
cut-cross-entropy does, and ours with skip_below.

"bare products" is the floor: the matrix products that the mathematics needs, in the inputs' dtype, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.goals import CaseRows, Goals
from benchmarks.harness import Case, Contender, report
from benchmarks.heads import (
    IGNORED,
    OURS,
    draw_bias,
    eager,
    eager_compiled,
    gate_rows,
    head_peers,
    in_dtype_of,
    missing,
    needs_gpu,
    no_bias,
    ours,
    products,
    words_left_out,
)
from mmrpt_kernels import LogProbs, linear_token_loss
from mmrpt_kernels.testing import draw_head

PRECISION = 1e-5  # log-probabilities against float64 given the same inputs, whatever their dtype


def labels_of(targets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Targets as cross-entropy heads want them: the rows left out carry ignore_index."""
    return targets.masked_fill(factors == 0, IGNORED)


def token_loss(skip_below, hidden, weight, targets, bias, factors) -> torch.Tensor:
    def cross_entropy(logps, _entropy, rows):
        return factors[rows] * logps

    options = {"use_entropy": False, "skip_below": skip_below, "bias": bias}
    return linear_token_loss(hidden, weight, labels_of(targets, factors), cross_entropy, **options)


def liger_ce(hidden, weight, targets, bias, factors) -> torch.Tensor:
    """Liger's fused linear cross-entropy, its weight gradient gathered in float32 as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return loss(weight, hidden, labels_of(targets, factors), in_dtype_of(weight, bias))


def quack_ce(hidden, weight, targets, bias, factors) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    no_bias("quack", bias)
    return chunked_linear_cross_entropy(hidden, weight, labels_of(targets, factors))


def cut_ce(hidden, weight, targets, bias, factors) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels_of(targets, factors), bias=in_dtype_of(weight, bias))


def floor(hidden, weight, factors, **_: Any) -> dict[str, torch.Tensor]:
    """One product on all rows to score; three on the rows kept to train."""
    learns = weight.requires_grad
    return products(hidden.detach()[factors != 0] if learns else hidden, weight, learns, learns)


def forward_or_both(fn: Callable[..., LogProbs]) -> Callable[..., Any]:
    """Without gradients: logps and entropy. With: the mean cross-entropy of the rows kept, from all log-probs."""

    def loss(factors, **inputs: Any) -> torch.Tensor:
        return (fn(**inputs, entropy=False).logps * factors).sum()

    def call(**inputs: Any) -> Any:
        if inputs["weight"].requires_grad:
            return training_alone(loss)(**inputs)
        return fn(**{name: value for name, value in inputs.items() if name != "factors"})

    return call


def training_alone(fn: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A cross-entropy that gives no log-probs: it trains, and cannot score (`scoring`)."""
    return harness.with_backward(fn, ("hidden", "weight"), lambda out, inputs: out)


def scoring(case: Case) -> str | None:
    """Why a cross-entropy cannot run the case."""
    return "gives the mean loss alone, no log-probs to score with" if case.params["keep"] is None else None


def make_inputs(
    device: torch.device,
    *,
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    train: bool,
    keep: float,
    logits: str,
    bias: bool,
) -> dict[str, Any]:
    """logits: a kind of `draw_head`; factors (rows,), by which log-probs enter the loss: -1 / kept, or 0."""
    drawn = draw_head(logits, rows, hidden, vocab, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    kept = round(keep * rows)
    factors = torch.full((rows,), -1.0 / kept, device=device)
    factors[torch.randperm(rows, generator=generator, device=device)[kept:]] = 0.0
    return {
        "hidden": drawn.hidden.requires_grad_(train),
        "weight": drawn.weight.clone().requires_grad_(train),
        "targets": drawn.targets,
        "bias": draw_bias(vocab, device) if bias else None,
        "factors": factors,
    }


def case(
    name: str,
    head: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    keep: float | None = None,
    logits: str = "flat",
    bias: bool = False,
    quick: bool = True,
) -> Case:
    """A Case of N, H, V; `keep` None: forward alone. What the mathematics needs, 2 N H V a product: one, or three for
    the rows kept."""
    rows, hidden, vocab = head
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "train": keep is not None, "keep": keep or 1.0}
    inputs = partial(make_inputs, **sizes, logits=logits, bias=bias)
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params | {"learn": keep is not None, "logits": logits, "bias": bias},
        partial(inputs, rows=rows),
        gate_inputs=partial(inputs, rows=min(rows, gate_rows(logits))),
        floor=20.0,  # the size of the logits that log-probabilities subtract
        flops=2.0 * rows * hidden * vocab * (1 if keep is None else 3 * keep),
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    full, half = torch.float32, torch.bfloat16
    if device.type == "cpu":
        large, small, later = (1024, 512, 32_000), (1024, 512, 8192), {"quick": False}
        return [
            case("score-tiny", (2048, 128, 1024), full),
            case("score-32k", large, full),
            case("train-32k", large, full, keep=1.0),
            case("train-32k-keep40", large, full, keep=0.4),
            case("score-32k-bias", large, full, bias=True, **later),
            case("train-32k-keep40-bias", large, full, keep=0.4, bias=True, **later),
            case("score-32k-bf16", large, half, **later),
            case("train-152k-keep40", (256, 256, 151_936), full, keep=0.4, **later),
            case("train-8k-trained", small, full, keep=1.0, logits="trained", **later),
            case("train-8k-trained-bf16", small, half, keep=1.0, logits="trained", **later),
        ]
    seven, three, wide, later = (3584, 152_064), (2048, 151_936), (5120, 128_256), {"quick": False}
    return [
        case("score-7b-8k", (8192, *seven), half),
        case("train-7b-8k", (8192, *seven), half, keep=1.0),
        case("train-7b-8k-keep40", (8192, *seven), half, keep=0.4),
        case("train-7b-8k-keep40-bias", (8192, *seven), half, keep=0.4, bias=True, **later),
        case("train-7b-8k-trained", (8192, *seven), half, keep=1.0, logits="trained", **later),
        case("score-7b-64k", (65_536, *seven), half, **later),
        case("train-3b-8k", (8192, *three), half, keep=1.0, **later),
        case("train-32b-8k", (8192, *wide), half, keep=1.0, **later),
        case("train-7b-16k-keep20", (16_384, *seven), half, keep=0.2, **later),
        case("score-3b-8k", (8192, *three), half, **later),
        case("score-32b-4k", (4096, *wide), half, **later),
    ]


def goals(cases: list[CaseRows], device: str) -> list[dict[str, Any]]:
    """The precision contract of what scores, as far as it was measured here."""
    found = Goals()
    for case in cases:
        for name in () if case.params["learn"] else ("cuda", "triton", "portable"):
            error = (case.of(name, "absolute_errors") or {}).get("logps")
            found.at_most(f"largest error of a log-probability, {name}", case.name, error, PRECISION)
    return found.rows


def contenders(device: torch.device) -> list[Contender]:
    def cross_entropy(name: str, fn: Callable, *needs: str) -> Contender:
        return Contender(name, training_alone(fn), "peer", skip=needs_gpu(device) or missing(*needs) or scoring)

    return [
        Contender("eager", forward_or_both(eager), "baseline"),
        Contender("bare products", floor, "floor"),
        *(Contender(backend, forward_or_both(partial(ours, backend))) for backend in OURS[device.type]),
        Contender("linear_token_loss", training_alone(partial(token_loss, None)), skip=scoring),
        *words_left_out("linear_token_loss", lambda share: training_alone(partial(token_loss, share))),
        *eager_compiled(device, eager, forward_or_both),
        *head_peers(device, forward_or_both),
        cross_entropy("Liger CE", liger_ce, "liger_kernel.transformers"),
        cross_entropy("quack CE", quack_ce, "quack.linear_cross_entropy"),
        cross_entropy("cut-cross-entropy", cut_ce, "cut_cross_entropy"),
    ]


def test_logprobs(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
