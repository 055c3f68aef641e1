"""What the benchmarks of the lm head share: eager's head, ours, the heads of others, the bare products.

A head is called as head(hidden (..., H), weight (V, H), targets (...), bias (V,) or None, entropy=bool) -> LogProbs. A
peer that does not do what a case asks for raises NotImplementedError and is listed as skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Contender
from mmrpt_kernels import LogProbs, linear_logprobs
from mmrpt_kernels.testing import kept_words

Head = Callable[..., LogProbs]
Skip = str | Callable[[Case], str | None] | None
IGNORED = -100
AUTO_SHARE = 2.0**-8  # skip_below="auto" of bfloat16
# Our backends by device, the one that backend=None chooses first.
OURS = {"cpu": ("portable",), "cuda": ("triton", "cuda", "portable")}


def missing(*modules: str) -> str | None:
    """Why a peer cannot run: the first of its modules that cannot be imported, or None."""
    for name in modules:
        try:
            __import__(name)
        except (ImportError, RuntimeError) as error:
            return f"{name}: {error}"
    return None


def needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "its kernels need a GPU"


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


def eager_compiled(device: torch.device, fn: Callable, wrap: Callable[[Callable], Callable]) -> list[Contender]:
    """Eager's `fn` compiled, and compiled with Inductor's auto-chunker; each in `wrap`.

    On a GPU for the cases of --quick alone, since two shapes a case, the gate's and its own, take longer to compile
    than all else takes to run.
    """

    def skip(case: Case) -> str | None:
        few = device.type == "cuda" and not case.quick
        return no_compiler(device) or ("compiled for the cases of --quick alone" if few else None)

    chunked = wrap(compiled_per_shape(fn, auto_chunker=True))
    return [
        Contender("eager, compiled", wrap(compiled_per_shape(fn)), "peer", skip=skip),
        Contender("eager, auto-chunked", chunked, "peer", skip=needs_gpu(device) or no_auto_chunker() or skip),
    ]


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
        Contender(f"{name}, skip_below=auto", auto, skip=skip(True), facts=partial(facts, auto)),
        Contender(f"{name}, skip_below=2^-8", asked, skip=skip(False), facts=partial(facts, asked), approximate=True),
    ]


def rounding_float32(fn: Callable[..., Any]) -> Callable[..., Any]:
    """With the process-wide setting that lets float32 products on a CPU round their inputs, a user's to make: the
    logits of bfloat16 inputs stay what they were."""

    def call(*args: Any, **inputs: Any) -> Any:
        products = torch.backends.mkldnn.matmul
        before, products.fp32_precision = products.fp32_precision, "bf16"
        try:
            return fn(*args, **inputs)
        finally:
            products.fp32_precision = before

    return call


def gate_rows(logits: str) -> int:
    """Rows that the gate compares: what may be left out shows in many."""
    return 64 if logits == "flat" else 1024


def draw_bias(vocab: int, device: torch.device) -> torch.Tensor:
    """(V,) float32, normal, of values that bfloat16 holds too: peers that round it lose nothing."""
    generator = torch.Generator(device).manual_seed(2)
    return torch.randn(vocab, generator=generator, device=device).bfloat16().float()


def in_dtype_of(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.to(weight.dtype)


def no_bias(who: str, bias: torch.Tensor | None) -> None:
    if bias is not None:
        raise NotImplementedError(f"{who} takes no bias")


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


def eager_logits(hidden, weight, bias=None) -> torch.Tensor:
    """(..., V) float32, float64 for float64 inputs."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits + bias


def eager(hidden, weight, targets, bias=None, *, entropy: bool = True) -> LogProbs:
    """What a trainer writes without the operator: all logits, softmax in float32."""
    log_probs = torch.log_softmax(eager_logits(hidden, weight, bias), -1)
    logps = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return LogProbs(logps, -(log_probs.exp() * log_probs).sum(-1) if entropy else None)


def ours(backend: str | None, hidden, weight, targets, bias=None, *, entropy: bool = True) -> LogProbs:
    return linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=entropy, backend=backend)


def trl(hidden, weight, targets, bias=None, *, entropy: bool = True) -> LogProbs:
    """TRL's GRPO head, called as its trainer does."""
    from trl.trainer import utils

    rows = utils._ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        in_dtype_of(weight, bias),
        targets.reshape(-1),
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",) if entropy else (),
    )
    return LogProbs(rows[0].view(targets.shape), rows[1].view(targets.shape) if entropy else None)


def verl(hidden, weight, targets, bias=None, *, entropy: bool = True) -> LogProbs:
    """verl's Triton head; it always computes the entropy."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    no_bias("verl's head", bias)
    logps, entropies = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    return LogProbs(logps.view(targets.shape), entropies.view(targets.shape) if entropy else None)


def liger_scaled(hidden, weight, targets, bias=None, *, entropy: bool = True) -> LogProbs:
    """Liger's fused linear scaled cross-entropy by token: native kernels on Hopper, chunked PyTorch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    no_bias("Liger's scaled cross-entropy", bias)
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
    found = LigerFusedLinearScaledCrossEntropyFunction.apply(*rows, 1.0, IGNORED, 1, entropy)
    losses, entropies = found if entropy else (found, None)
    return LogProbs(-losses.view(targets.shape), entropies.view(targets.shape) if entropy else None)


def cut_cross_entropy(hidden, weight, targets, bias=None, *, entropy: bool = False) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    bias = in_dtype_of(weight, bias)
    return LogProbs(-linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none"), None)


def head_peers(device: torch.device, wrap: Callable[[Head], Callable]) -> list[Contender]:
    """The heads of others that give log-probs and entropies, each in `wrap`."""
    return [
        Contender("TRL", wrap(trl), "peer", skip=missing("trl.trainer.utils")),
        Contender("Liger scaled CE", wrap(liger_scaled), "peer", skip=missing("liger_kernel.ops")),
        Contender("verl", wrap(verl), "peer", skip=needs_gpu(device) or missing("verl.utils.kernel")),
    ]
