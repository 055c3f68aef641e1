"""Log-probabilities of target tokens: linear_logprobs against materialised logits and other fused heads.

    python -m benchmarks.logprobs [--quick] [--device cpu|cuda] [--only train]

"score" cases are a forward pass alone with entropies (old and reference log-probs of a rollout). "train" cases are the
supervised step: the mean cross-entropy of the rows kept, d hidden and d weight. Ours computes it from log-probs of all
rows whose gradient is zero in the others (as a trainer with VPPO's filter asks for it), and as "token loss" from the
rows kept alone; cross-entropy heads get the others' labels as ignore_index. Logits are flat (normal, standard
deviation 3) but for "trained", a briefly trained head (`mmrpt_kernels.testing.draw_head`), where it pays to leave
words without probability out of the gradient: cut-cross-entropy does, and ours with skip_below ("left out").

"bare products" is the floor: the matrix products that the mathematics needs, in the inputs' dtype, and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.goals import Goals, cases_of
from benchmarks.harness import Case, Contender
from mmrpt_kernels import LogProbs, backends, linear_logprobs, linear_token_loss
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.testing import draw_head, kept_words

IGNORED = -100
AUTO_SHARE = 2.0**-8  # skip_below="auto" of bfloat16
PRECISION = 1e-5  # log-probabilities against float64 given the same inputs, whatever their dtype


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


def compiled_per_shape(fn: Callable, *, auto_chunker: bool = False) -> Callable:
    """`fn` compiled anew for every case and gate: past the default limit of 8 it would run uncompiled in silence.

    auto_chunker: Inductor cuts the head into chunks of rows by itself, where it can (`no_auto_chunker`).
    """
    torch._dynamo.config.recompile_limit = 64
    chunks = auto_chunker and no_auto_chunker() is None
    return torch.compile(fn, dynamic=False, options={"auto_chunker.enable": True} if chunks else None)


def no_auto_chunker() -> str | None:
    """Why Inductor cannot cut the head into chunks, or None: an option it does not know raises where it is named."""
    from torch._inductor import config

    return None if hasattr(config, "auto_chunker") else f"torch {torch.__version__} has no auto-chunker"


def ours_everywhere(op: str, device: torch.device) -> list[str]:
    """Our backends that can be chosen for bfloat16 calls on `device`, fastest first by the table; no definitions and no
    interpreters."""
    served = []
    for row in backends.TABLE:
        fits = row.op == op and (not row.devices or device.type in row.devices) and not row.missing
        on_gpu = device.type == "cuda" or not row.by_name  # by name on a CPU: what tests alone use
        if fits and on_gpu and row.backend != "reference":
            served.append(row.backend)
    return served


def first_compiled(device: torch.device) -> Callable[[Case], str | None]:
    """Why torch.compile does not run a case: on a GPU it is compiled for the cases of --quick alone, since two shapes a
    case, the gate's and its own, take longer to compile than all else takes to run."""
    why = no_compiler(device)

    def skip(case: Case) -> str | None:
        return why or ("compiled for the cases of --quick alone" if device.type == "cuda" and not case.quick else None)

    return skip


def words_left_out(name: str, call: Callable[[float | str], Callable[..., Any]]) -> list[Contender]:
    """call(skip_below), ours, as two contenders: "auto" in half precision, where the error rule holds; and the share
    that "auto" is there asked for by number for wider inputs, for which "auto" is exact: its error is only reported."""

    def facts(fn: Callable[..., Any], **inputs: Any) -> dict[str, float]:
        with kept_words() as shares:
            fn(**inputs)
        return {"words kept": sum(shares) / len(shares)} if shares else {}

    def skip(half: bool) -> Callable[[Case], str | None]:
        def why(case: Case) -> str | None:
            if not case.params["learn"]:
                return "there is no gradient"
            if (case.params["dtype"] in ("bfloat16", "float16")) != half:
                return "exact for float32 inputs" if half else "the same as auto"
            return None

        return why

    auto, asked = call("auto"), call(AUTO_SHARE)
    return [
        Contender(f"{name}, auto left out", auto, skip=skip(True), facts=partial(facts, auto)),
        Contender(f"{name}, 2^-8 left out", asked, skip=skip(False), facts=partial(facts, asked), approximate=True),
    ]


def products(hidden: torch.Tensor, weight: torch.Tensor, trains: bool, learns: bool = True) -> dict[str, torch.Tensor]:
    """The floor: logits (n, V) of the rows that count, and with `learns` d hidden (n, H), with `trains` d weight (V, H)
    from a gradient of their shape, each one product in the inputs' dtype. Rows that do not fit at once: in chunks."""
    made, weight = {}, weight.detach()
    for rows in hidden.split(16_384):
        logits = rows @ weight.t()
        if learns:
            made["d_hidden"] = logits @ weight
        if trains:
            grad = logits.t() @ rows
            made["d_weight"] = grad if "d_weight" not in made else made["d_weight"].add_(grad)
    return made or {"logits": logits}


def eager(hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    """What a trainer writes without the operator: all logits, softmax in float32."""
    log_probs = torch.log_softmax(F.linear(hidden, weight).to(statistics_dtype(hidden)), -1)
    logps = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return LogProbs(logps, -(log_probs.exp() * log_probs).sum(-1) if entropy else None)


def ours(backend: str | None, hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    return linear_logprobs(hidden, weight, targets, return_entropy=entropy, backend=backend)


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


def verl(hidden, weight, targets, factors=None, *, entropy: bool = True) -> LogProbs:
    """verl's Triton head; it always computes the entropy."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, entropies = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    return LogProbs(logps.view(targets.shape), entropies.view(targets.shape) if entropy else None)


def cut_cross_entropy(hidden, weight, targets, factors=None, *, entropy: bool = False) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return LogProbs(-linear_cross_entropy(hidden, weight, targets, reduction="none"), None)


def labels_of(targets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Targets as cross-entropy heads want them: the rows left out carry ignore_index."""
    return targets.masked_fill(factors == 0, IGNORED)


def token_loss(skip_below, hidden, weight, targets, factors) -> torch.Tensor:
    def cross_entropy(logps, _entropy, rows):
        return factors[rows] * logps

    options = {"use_entropy": False, "skip_below": skip_below}
    return linear_token_loss(hidden, weight, labels_of(targets, factors), cross_entropy, **options)


def liger_ce(hidden, weight, targets, factors) -> torch.Tensor:
    """Liger's fused linear cross-entropy, its weight gradient gathered in float32 as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, hidden, labels_of(targets, factors))


def quack_ce(hidden, weight, targets, factors) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels_of(targets, factors))


def cut_ce(hidden, weight, targets, factors) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels_of(targets, factors))


def floor(hidden, weight, targets, factors) -> dict[str, torch.Tensor]:
    """One product on all rows to score; three on the rows kept to train."""
    learns = weight.requires_grad
    return products(hidden.detach()[factors != 0] if learns else hidden, weight, learns, learns)


def forward_or_both(fn: Callable[..., LogProbs]) -> Callable[..., Any]:
    """Without gradients: logps and entropy. With: the mean cross-entropy of the rows kept, from all log-probs."""
    train = harness.with_backward(
        partial(fn, entropy=False), ("hidden", "weight"), lambda out, inputs: (out.logps * inputs["factors"]).sum()
    )

    def call(**inputs: Any) -> Any:
        return train(**inputs) if inputs["weight"].requires_grad else fn(**inputs)

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
        "factors": factors,
    }


def case(
    name: str, rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, keep=None, logits="flat", quick=True
) -> Case:
    """`keep` None: forward alone. What the mathematics needs, 2 N H V a product: one, or three for the rows kept."""
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "train": keep is not None, "keep": keep or 1.0}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params | {"learn": keep is not None, "logits": logits},
        partial(make_inputs, rows=rows, logits=logits, **sizes),
        gate_inputs=partial(make_inputs, rows=min(rows, gate_rows(logits)), logits=logits, **sizes),
        floor=20.0,  # the size of the logits that log-probabilities subtract
        flops=2.0 * rows * hidden * vocab * (1 if keep is None else 3 * keep),
        quick=quick,
    )


def gate_rows(logits: str) -> int:
    """Rows that the gate compares: what may be left out shows in many."""
    return 64 if logits == "flat" else 1024


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case("score-tiny", 2048, 128, 1024, torch.float32),
            case("score-32k", 1024, 512, 32_000, torch.float32),
            case("train-32k", 1024, 512, 32_000, torch.float32, keep=1.0),
            case("train-32k-keep40", 1024, 512, 32_000, torch.float32, keep=0.4),
            case("score-32k-bf16", 1024, 512, 32_000, torch.bfloat16, quick=False),
            case("train-152k-keep40", 256, 256, 151_936, torch.float32, keep=0.4, quick=False),
            case("train-8k-trained", 1024, 512, 8192, torch.float32, keep=1.0, logits="trained", quick=False),
            case("train-8k-trained-bf16", 1024, 512, 8192, torch.bfloat16, keep=1.0, logits="trained", quick=False),
        ]
    half = torch.bfloat16
    return [
        case("score-7b-8k", 8192, 3584, 152_064, half),
        case("train-7b-8k", 8192, 3584, 152_064, half, keep=1.0),
        case("train-7b-8k-keep40", 8192, 3584, 152_064, half, keep=0.4),
        case("train-7b-8k-trained", 8192, 3584, 152_064, half, keep=1.0, logits="trained", quick=False),
        case("score-7b-64k", 65_536, 3584, 152_064, half, quick=False),
        case("train-3b-8k", 8192, 2048, 151_936, half, keep=1.0, quick=False),
        case("train-32b-8k", 8192, 5120, 128_256, half, keep=1.0, quick=False),
        case("train-7b-16k-keep20", 16_384, 3584, 152_064, half, keep=0.2, quick=False),
        case("score-3b-8k", 8192, 2048, 151_936, half, quick=False),
        case("score-32b-4k", 4096, 5120, 128_256, half, quick=False),
    ]


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The precision contract of what scores, as far as it was measured here."""
    found = Goals()
    for case in cases_of(record):
        for name in () if case.params["learn"] else ("cuda", "triton", "portable"):
            error = (case.of(name, "absolute_errors") or {}).get("logps")
            found.at_most(f"largest error of a log-probability, {name}", case.name, error, PRECISION)
    return found.rows


def main(argv=None) -> int:
    args = harness.parse_args("logprobs", argv)
    on_gpu = None if args.device.type == "cuda" else "its kernels need a GPU"

    def cross_entropy(name: str, fn: Callable, *needs: str) -> Contender:
        return Contender(name, training_alone(fn), peer=True, skip=on_gpu or missing(*needs) or scoring)

    compiled = first_compiled(args.device)
    chunked = forward_or_both(compiled_per_shape(eager, auto_chunker=True))
    contenders = [
        Contender("eager", forward_or_both(eager), baseline=True),
        Contender("bare products", floor, floor=True),
        *(
            Contender(backend, forward_or_both(partial(ours, backend)))
            for backend in ours_everywhere("logprobs", args.device)
        ),
        Contender("linear_token_loss", training_alone(partial(token_loss, None)), skip=scoring),
        *words_left_out("linear_token_loss", lambda share: training_alone(partial(token_loss, share))),
        Contender("eager, compiled", forward_or_both(compiled_per_shape(eager)), peer=True, skip=compiled),
        Contender("eager, auto-chunked", chunked, peer=True, skip=on_gpu or no_auto_chunker() or compiled),
        Contender("TRL", forward_or_both(trl), peer=True, skip=missing("trl.trainer.utils")),
        Contender("verl", forward_or_both(verl), peer=True, skip=on_gpu or missing("verl.utils.kernel")),
        cross_entropy("Liger CE", liger_ce, "liger_kernel.transformers"),
        cross_entropy("quack CE", quack_ce, "quack.linear_cross_entropy"),
        cross_entropy("cut-cross-entropy", cut_ce, "cut_cross_entropy"),
    ]
    return harness.run("logprobs", cases(args.device), contenders, args, goals=goals)


if __name__ == "__main__":
    raise SystemExit(main())
