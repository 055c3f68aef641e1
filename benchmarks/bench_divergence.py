"""Full-vocabulary divergence of two views: linear_token_divergence against materialised logits and other fused heads.

    pytest benchmarks/bench_divergence.py [--quick] [--device cpu|cuda]

"score" cases are the trainer's use: token perception of a rollout, forward only, KL with both entropies and the sampled
tokens' log-probabilities. "train" cases differentiate the KL in both views and the head (PAPO and its kin). "distil"
cases differentiate it in the first view and the head alone, the second held fixed, which is all that TRL's and Liger's
heads do; what a peer cannot do its row says. "bias" cases add one to both views' logits, as the trainer always does.

"bare products" is the floor: the matrix products that the mathematics needs (two forward, two more for each view that
learns), in the inputs' dtype, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Case, Contender, report
from benchmarks.heads import (
    draw_bias,
    eager_compiled,
    eager_logits,
    in_dtype_of,
    missing,
    needs_gpu,
    no_bias,
    no_compiler,
)
from mmrpt_kernels import TokenDivergence, linear_token_divergence

Divergence = Callable[..., TokenDivergence]


def second_head(hidden_p: torch.Tensor, hidden_q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The second view's weight: held fixed where the view is and the first learns."""
    return weight if hidden_q.requires_grad == hidden_p.requires_grad else weight.detach()


def eager(hidden_p, hidden_q, weight, targets, bias, kind="kl") -> TokenDivergence:
    """What a trainer writes without the operator: both views' logits, softmax in float32."""
    pairs = ((hidden_p, weight), (hidden_q, second_head(hidden_p, hidden_q, weight)))
    lp, lq = (torch.log_softmax(eager_logits(h, w, bias), -1) for h, w in pairs)
    p, q = lp.exp(), lq.exp()
    columns = {"kl": lambda: (p * (lp - lq)).sum(-1), "js": lambda: jensen_shannon(lp, lq, p, q)}
    kinds = (kind,) if isinstance(kind, str) else kind
    divergence = torch.stack([columns[one]() for one in kinds], -1)
    on_targets = [x.gather(-1, targets[:, None])[:, 0] for x in (lp, lq)]
    divergence = divergence[:, 0] if isinstance(kind, str) else divergence
    return TokenDivergence(divergence, *on_targets, -(p * lp).sum(-1), -(q * lq).sum(-1))


def jensen_shannon(lp, lq, p, q):
    log_mean = ((p + q) / 2).log()
    return ((p * (lp - log_mean)).sum(-1) + (q * (lq - log_mean)).sum(-1)) / 2


def ours(hidden_p, hidden_q, weight, targets, bias, kind="kl", *, backend: str) -> TokenDivergence:
    head_q = second_head(hidden_p, hidden_q, weight)
    options = {"targets": targets, "kind": kind, "weight_q": None if head_q is weight else head_q, "bias": bias}
    return linear_token_divergence(hidden_p, hidden_q, weight, **options, backend=backend)


# What the peers call it: the first view is the student, beta = 1 the divergence KL(student || teacher).
BETAS = {"kl": 1.0, "js": 0.5}


def trl(hidden_p, hidden_q, weight, targets, bias, kind="kl") -> TokenDivergence:
    """TRL's head of its distillation trainers: divergence and the student's entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if kind not in BETAS or hidden_q.requires_grad:
        raise NotImplementedError("TRL's head has one kind at a time and a gradient in the student alone")
    head_q, bias = second_head(hidden_p, hidden_q, weight), in_dtype_of(weight, bias)
    found = ChunkedDivergenceFunction.apply(hidden_p, weight, bias, hidden_q, head_q, bias, BETAS[kind])
    return TokenDivergence(found[0], None, None, found[1], None)


def student_alone(hidden_p, hidden_q, kind) -> None:
    if kind not in BETAS or hidden_q.requires_grad or not hidden_p.requires_grad:
        raise NotImplementedError("Liger's heads train the student on one mean: no values per token")


def liger(hidden_p, hidden_q, weight, targets, bias, kind="kl") -> TokenDivergence:
    """Liger's fused linear JSD, a Triton kernel in chunks; a mean over rows."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    student_alone(hidden_p, hidden_q, kind)
    no_bias("Liger's fused JSD", bias)
    loss = LigerFusedLinearJSD(jsd_beta=BETAS[kind], accum_dtype=torch.float32)
    return TokenDivergence(loss(hidden_p, weight, hidden_q, weight.detach(), None), None, None, None, None)


def liger_chunked(hidden_p, hidden_q, weight, targets, bias, kind="kl") -> TokenDivergence:
    """Liger's distillation loss in chunked PyTorch, without its cross-entropy; a mean over rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student_alone(hidden_p, hidden_q, kind)
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": BETAS[kind]}
    loss = LigerFusedLinearJSDLoss(**options, compiled=no_compiler(hidden_p.device) is None)
    bias = in_dtype_of(weight, bias)
    value = loss(hidden_p, weight, hidden_q, weight.detach(), targets, bias, bias)
    return TokenDivergence(value, None, None, None, None)


@torch.no_grad()
def bare_products(hidden_p, hidden_q, weight, **_: Any) -> dict[str, torch.Tensor]:
    """The floor; the logits stand for their gradient."""
    for hidden in (hidden_p, hidden_q):
        logits = hidden @ weight.t()
        if hidden.requires_grad:
            logits @ weight
            logits.t() @ hidden
    return {}


def forward_or_both(fn: Divergence) -> Callable[..., Any]:
    """Forward alone where no input requires gradients; else the mean divergence and the gradients of those that do.

    Both call their first result "divergence", so that a peer with fewer results can name what is compared.
    """

    def call(**inputs: Any) -> Any:
        learn = [name for name in ("hidden_p", "hidden_q", "weight") if inputs[name].requires_grad]
        if not learn:
            return fn(**inputs)
        found = harness.with_backward(fn, learn, lambda out, _: out.divergence.mean())(**inputs)
        return {"divergence": found.pop("value"), **found}

    return call


def make_inputs(
    device: torch.device,
    *,
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    learn: tuple[str, ...] = (),
    kind: str | tuple[str, ...] = "kl",
    bias: bool = False,
) -> dict[str, Any]:
    """Logits of standard deviation 3; the second view differs from the first by a tenth."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_p = normal(rows, hidden)
    hidden_q = hidden_p + 0.1 * normal(rows, hidden)
    weight = normal(vocab, hidden) * (3.0 / hidden**0.5)
    made = {"hidden_p": hidden_p, "hidden_q": hidden_q, "weight": weight}
    made = {name: tensor.to(dtype).requires_grad_(name in learn) for name, tensor in made.items()}
    made["targets"] = torch.randint(vocab, (rows,), generator=generator, device=device)
    return made | {"bias": draw_bias(vocab, device) if bias else None, "kind": kind}


BOTH, FIRST = ("hidden_p", "hidden_q", "weight"), ("hidden_p", "weight")


def case(
    name: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    learn: tuple[str, ...] = (),
    kind: str | tuple[str, ...] = "kl",
    bias: bool = False,
    quick: bool = True,
) -> Case:
    """A Case of sizes (N, H, V); products count 2 N H V each: two forward, and two for each view that learns."""
    rows, hidden, vocab = sizes
    settings = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "learn": learn, "kind": kind, "bias": bias}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch.")}
    params |= {"kind": kind if isinstance(kind, str) else "+".join(kind), "learn": list(learn), "bias": bias}
    views = sum(name.startswith("hidden") for name in learn)
    return Case(
        name,
        params,
        partial(make_inputs, rows=rows, **settings),
        gate_inputs=partial(make_inputs, rows=min(rows, 64), **settings),
        floor=20.0,  # log-probabilities of this size are what divergences subtract
        flops=2.0 * rows * hidden * vocab * (2 + 2 * views),
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        full = torch.float32
        return [
            case("score-tiny", (2048, 128, 1024), full),
            case("score-32k", (1024, 512, 32_000), full),
            case("score-32k-kl-js", (1024, 512, 32_000), full, kind=("kl", "js"), quick=False),
            case("score-32k-bias", (1024, 512, 32_000), full, bias=True),
            case("train-32k", (1024, 512, 32_000), full, learn=BOTH),
            case("distil-32k", (1024, 512, 32_000), full, learn=FIRST),
            case("score-152k", (256, 256, 151_936), full, quick=False),
        ]
    half = torch.bfloat16
    return [
        case("score-3b", (8192, 2048, 151_936), half),
        case("train-3b", (4096, 2048, 151_936), half, learn=BOTH),
        case("distil-3b", (4096, 2048, 151_936), half, learn=FIRST),
        case("distil-3b-js", (4096, 2048, 151_936), half, learn=FIRST, kind="js", quick=False),
        case("score-3b-kl-js", (8192, 2048, 151_936), half, kind=("kl", "js"), quick=False),
        case("score-7b", (8192, 3584, 152_064), half, quick=False),
        case("score-7b-bias", (8192, 3584, 152_064), half, bias=True, quick=False),
        case("train-14b-128k", (4096, 5120, 128_256), half, learn=BOTH, quick=False),
        case("score-7b-64k", (65_536, 3584, 152_064), half, quick=False),
    ]


def contenders(device: torch.device) -> list[Contender]:
    no_liger, gradients = missing("liger_kernel"), ("divergence", "d_hidden_p", "d_weight")
    backends = ("portable",) if device.type == "cpu" else ("triton", "portable")

    def peer(name: str, fn: Divergence, skip: str | None, compare: tuple[str, ...]) -> Contender:
        return Contender(name, forward_or_both(fn), "peer", skip=skip, compare=compare)

    return [
        Contender("eager", forward_or_both(eager), "baseline"),
        Contender("bare products", bare_products, "floor"),
        *(Contender(backend, forward_or_both(partial(ours, backend=backend))) for backend in backends),
        *eager_compiled(device, eager, forward_or_both),
        peer("TRL", trl, missing("trl.kernels.chunked_divergence"), ("entropy_p", *gradients)),
        peer("Liger fused JSD", liger, no_liger or needs_gpu(device), gradients),
        peer("Liger chunked JSD", liger_chunked, no_liger, gradients),
    ]


def test_divergence(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
