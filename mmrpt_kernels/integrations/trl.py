"""TRL's fused lm head replaced by `linear_logprobs`, for every trainer of TRL that has one: GRPO, RLOO, SFT, DPO, KTO.

    from mmrpt_kernels.integrations.trl import enable_fused_head
    enable_fused_head()                     # before training; disable_fused_head() undoes it
    GRPOTrainer(...).train()                # FSDP2 with an untied head: first unshard_head(trainer.model)

Same numbers, and a backward pass that does no work for tokens whose gradient is exactly zero: zero advantages and
filtered tokens cost nothing there. TRL looks its head up at each call in one attribute of `trl.trainer.utils`; that
attribute is replaced, after version, signature and results on a tiny case were compared with what this adapter knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from mmrpt_kernels.common.autocast import cast_for_autocast, without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.integrations.guards import SelfCheck, UnsupportedError, check_parameters, check_version
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.chunk_sizes import chunk_rows
from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits
from mmrpt_kernels.logprobs import linear_logprobs

__all__ = ["Head", "HeadCall", "disable_fused_head", "enable_fused_head", "fused_head", "replaced_head", "unshard_head"]

VERSIONS = ("1.16", "2")
ATTRIBUTE = "_ChunkedLogProbFunction"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# A target of log-probability above this has more than half of the mass: no other word can be ahead of it.
SURELY_FIRST = math.log(0.5) + 1e-3
# A logit is held up to five times over where log(sum p^2) is asked for.
LOGIT_COPIES = 5
# log-probs, entropy, log(sum p^2), mean logit, whether the target is the first of the largest logits; None: not asked
Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class HeadCall(NamedTuple):
    """What TRL passes to its head, under its names and in its order."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor  # (N,) int64
    temperature: float
    chunk_size: int  # width of TRL's tiles; ours are rows, from a memory budget
    final_logit_softcapping: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = OUTPUTS

    def options(self) -> HeadOptions:
        return HeadOptions(float(self.temperature), float(self.final_logit_softcapping or 0.0), float(self.logit_scale))


class Head:
    """A function of a HeadCall in the place of TRL's autograd function, which is called as `.apply(...)`."""

    def __init__(self, serve: Callable[[HeadCall], Results]) -> None:
        self._serve = serve

    def apply(self, *arguments) -> Results:
        call = HeadCall(*arguments)
        if hasattr(call.weight, "ds_id"):
            raise UnsupportedError(
                "lm head: got a parameter that DeepSpeed ZeRO-3 shards, expected a whole one: the backward pass would "
                "find it empty; use ZeRO-2 or FSDP2, or train without the adapter"
            )
        if any(t is not None and _comes_from_shards(t) for t in (call.weight, call.bias)):
            raise UnsupportedError(
                "lm head: got a weight gathered by DTensor.full_tensor(), whose gradient would be each rank's own and "
                "never be summed over the ranks, expected one that FSDP2 itself has gathered; call "
                "mmrpt_kernels.integrations.trl.unshard_head(trainer.model) before trainer.train()"
            )
        return self._serve(call)


def enable_fused_head(*, self_check: bool = True, backend: str | None = None) -> None:
    """Let TRL's trainers compute log-probabilities by `linear_logprobs`, from now on in this process.

    Args:
        self_check: compare the first batch with plain PyTorch (a few rows; see `guards.SelfCheck`).
        backend: of `linear_logprobs`, see mmrpt_kernels.backends.

    Raises:
        UnsupportedError: TRL is missing, or not a release whose head this adapter knows.
    """
    setattr(_known_utils(), ATTRIBUTE, _make_head(self_check, backend))


def disable_fused_head() -> None:
    """Give TRL its own head back."""
    from trl.kernels import ChunkedLogProbFunction

    setattr(_known_utils(), ATTRIBUTE, ChunkedLogProbFunction)


@contextmanager
def fused_head(*, self_check: bool = True, backend: str | None = None) -> Iterator[None]:
    """`enable_fused_head` inside the block; afterwards the head is what it was before."""
    with replaced_head(_make_head(self_check, backend)):
        yield


@contextmanager
def replaced_head(head: Head) -> Iterator[None]:
    """Inside the block TRL's trainers call `head`. Raises UnsupportedError for an unknown TRL."""
    utils = _known_utils()
    before = getattr(utils, ATTRIBUTE)
    setattr(utils, ATTRIBUTE, head)
    try:
        yield
    finally:
        setattr(utils, ATTRIBUTE, before)


def unshard_head(model: torch.nn.Module) -> RemovableHandle:
    """Let FSDP2 gather the head of `model` before each forward pass. Without FSDP2 nothing happens.

    FSDP2 gathers parameters when their module is called. TRL's fused forward reads the head's weight without calling
    the head: one that FSDP2 shards apart from the model's last norm (accelerate does so for untied heads of
    vision-language models) is still a DTensor then, TRL takes its `full_tensor()`, and no rank's gradient is ever
    summed with the others'. Give it the model that the trainer calls: `unshard_head(trainer.model)`.
    """
    return model.register_forward_pre_hook(_unshard)


def _unshard(model: torch.nn.Module, _) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def _comes_from_shards(tensor: torch.Tensor) -> bool:
    """Whether the gradient of `tensor` goes to a DTensor. A parameter, also one that FSDP2 has gathered, is a leaf."""
    nodes = {tensor.grad_fn} - {None}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if isinstance(getattr(node, "variable", None), DTensor):
            return True
        new = {below for below, _ in node.next_functions} - {None} - seen
        nodes |= new
        seen |= new
    return False


def _make_head(self_check: bool, backend: str | None) -> Head:
    check = SelfCheck(self_check)

    def serve(call: HeadCall) -> Results:
        unknown = set(call.outputs) - {"log_probs", *OUTPUTS}
        if unknown:
            raise UnsupportedError(f"outputs: got {sorted(unknown)}, expected some of {OUTPUTS}: an unknown TRL")
        options = call.options()
        found = linear_logprobs(
            call.hidden,
            call.weight,
            call.targets,
            bias=call.bias,
            **options._asdict(),
            ignore_index=-1,  # TRL has dropped or clamped the ignored rows before
            return_entropy="entropy" in call.outputs,
            backend=backend,
        )
        check(call.hidden, call.weight, call.targets, call.bias, options, found)
        others = _other_outputs(call, found.logps)
        return found.logps, found.entropy, *(others.get(name) for name in OUTPUTS[1:])

    return Head(serve)


@torch.no_grad()
def _other_outputs(call: HeadCall, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What TRL reports beside log-prob and entropy, (N,) each, without gradient: only what is asked for.

    The mean logit is a product with the head's mean row, unless there is a soft cap. Logits are made again
    for the rest, and where only `is_top1` is wanted, for rows alone whose target might not be the first.
    """
    wanted = set(call.outputs) & set(OUTPUTS[1:])
    if not wanted:
        return {}
    hidden, weight, bias = cast_for_autocast(call.hidden, call.weight, call.bias)
    options, found = call.options(), {}
    if "mean_logits" in wanted and options.softcap == 0.0:
        wanted.remove("mean_logits")
        found["mean_logits"] = _mean_logits(hidden, weight, bias, options)
        if not wanted:
            return found
    decided = logps > SURELY_FIRST if wanted == {"is_top1"} else torch.zeros_like(logps, dtype=torch.bool)
    rows = (~decided).nonzero().squeeze(-1)
    for name in wanted:
        found[name] = decided.clone() if name == "is_top1" else torch.zeros_like(logps)
    dtype = statistics_dtype(hidden, weight, bias)
    for chunk in rows.split(max(1, chunk_rows(rows.numel(), weight, dtype, views=LOGIT_COPIES).logits)):
        for name, values in _row_outputs(hidden[chunk], weight, bias, call.targets[chunk], options, wanted).items():
            found[name][chunk] = values
    return found


@without_autocast
def _mean_logits(hidden, weight, bias, options: HeadOptions) -> torch.Tensor:
    dtype = statistics_dtype(hidden)
    mean = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
    mean = mean if bias is None else mean + bias.mean(dtype=dtype)
    return mean * options.slope


@without_autocast
def _row_outputs(hidden, weight, bias, targets, options: HeadOptions, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The wanted outputs of a chunk of rows: hidden (n, H), targets (n,)."""
    raw = gemm.logits(hidden, weight)
    z = transform_logits(raw if bias is None else raw.add_(bias), options, inplace=True)
    found = {}
    if "is_top1" in wanted:
        found["is_top1"] = z.argmax(-1) == targets  # the first of equals, as TRL has it
    if "mean_logits" in wanted:
        found["mean_logits"] = z.mean(-1)
    if "log_sum_sq_probs" in wanted:
        found["log_sum_sq_probs"] = torch.logsumexp(2 * torch.log_softmax(z, -1), -1)
    return found


# ---- is this a TRL that the adapter knows? ----


def _known_utils() -> ModuleType:
    """The module that holds the attribute to replace. Raises UnsupportedError for an unknown TRL."""
    version = check_version("trl", *VERSIONS)
    from trl.trainer import utils

    fused = getattr(utils, "add_fused_lm_head", None)
    if not hasattr(utils, ATTRIBUTE) or fused is None or ATTRIBUTE not in _names_used(fused.__code__):
        raise UnsupportedError(
            f"trl {version}: its fused head no longer calls trl.trainer.utils.{ATTRIBUTE}, expected the head of "
            "TRL 1.16; install that release, or train without the adapter"
        )
    from trl.kernels import ChunkedLogProbFunction

    check_parameters(ChunkedLogProbFunction.forward, ("ctx", *HeadCall._fields), f"trl {version}: its fused head")
    _check_results(ChunkedLogProbFunction, version)
    return utils


def _names_used(code: CodeType) -> set[str]:
    """Global and attribute names that a function and those it defines look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_used(constant)
    return names


def _check_results(theirs, version: str) -> None:
    """TRL's head means what ours means: all five results and the gradients on a tiny case, on the CPU."""
    for name, own, other in zip(
        ("log-probs", *OUTPUTS, "d hidden", "d weight", "d bias"),
        _tiny_case(_make_head(False, "reference")),
        _tiny_case(theirs),
        strict=True,
    ):
        if own.shape != other.shape or not torch.allclose(own.double(), other.double(), rtol=1e-4, atol=1e-4):
            raise UnsupportedError(
                f"trl {version}: its fused head gives {name} {other.tolist()} on a tiny case, expected {own.tolist()}: "
                "it computes something else than TRL 1.16; install that release, or train without the adapter"
            )


@torch.enable_grad()
def _tiny_case(head) -> list[torch.Tensor]:
    """Results and gradients for 5 tokens, 7 words and every option, always in float32 on the CPU."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 4), (7, 4), (7,))
        leaves = [torch.randn(shape, generator=generator, dtype=torch.float32).requires_grad_() for shape in shapes]
        targets = torch.tensor([0, 6, 3, 2, 5])
        results = head.apply(*leaves, targets, 0.7, 3, 4.0, 1.5, OUTPUTS)
        loss = (results[0] * torch.arange(5)).sum() + 0.3 * results[1].square().sum()
        return [result.detach() for result in results] + list(torch.autograd.grad(loss, leaves))
