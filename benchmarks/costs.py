"""What the operators do on a GPU, counted without one: `python -m benchmarks.costs`.

Each operator runs its GPU path on meta tensors, which have shapes and no memory; Triton's kernels are written down
instead of launched. Counted are

    products   matrix products (M, N, K) by dtype, and their FLOPs; those that a Triton kernel makes in itself
    bytes      read and written by everything else: each tensor that an operation or a kernel is given, once
    launches   operations on the device, views not counted (a sort or a nonzero is one, though it launches several)
    waits      how often the host must know a number that the device has
    peak       memory at its highest, the inputs not counted
    variants   compiled kernels over ten batches of different lengths

and from them a roofline for one H200: each product at 790 TFLOP/s or 4.2 TB/s, whichever is slower, and all other bytes
at 4.2 TB/s, beside the bare products (the floor). These times are PREDICTIONS: nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrpt_kernels import linear_logprobs, linear_policy_loss
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.triton import (
    backward_dkv,
    backward_dq,
    key_blocks,
    mass_forward,
    operators,
    query_list,
)
from mmrpt_kernels.attention.triton import forward as attention_forward
from mmrpt_kernels.divergence import fused as divergence
from mmrpt_kernels.divergence import triton_backward, triton_forward
from mmrpt_kernels.divergence.fused import Pair
from mmrpt_kernels.lm_head import gemm, row_softmax_triton
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import fused as logprobs_fused
from mmrpt_kernels.policy_loss import fused as loss_fused
from mmrpt_kernels.policy_loss import scale_gradients_triton
from mmrpt_kernels.testing.aot import recorded_launches

__all__ = ["CASES", "Costs", "Shape", "count", "table"]

TFLOPS, TBYTES = 790e12, 4.2e12  # one H200, bfloat16 with float32 sums, and its memory
ATTENTION = (attention_forward, backward_dq, backward_dkv, key_blocks, query_list, mass_forward)
KERNELS = (row_softmax_triton, triton_forward, triton_backward, scale_gradients_triton, *ATTENTION)
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "addmv", "addmv_", "mv")
ATTENTION_PRODUCTS = {"_forward": 2, "_backward_dq": 3, "_backward_dkv": 4}
FREE = ("detach", "alias", "lift_fresh", "scalar_tensor")  # views, and constants that stay on the host
HOST_READS = [getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__")]
# Of these tensors a kernel reads next to nothing: of a gradient whose factor is 1, as loss.backward() brings it, and of
# logits of which it wants the target's alone.
HARDLY_READ = {"_scale_kernel": {"grad"}, "_join": {"raw_p", "raw_q"}}


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size, vocabulary; which share of the tokens learns; whether the head has a bias."""

    tokens: int = 8192
    hidden: int = 3584
    vocab: int = 152_064
    keep: float = 1.0
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def kept(self) -> int:
        return math.ceil(self.keep * self.tokens)


@dataclass
class Costs:
    """Counts of one call, forward and backward."""

    products: list[tuple[int, int, int, str]] = field(default_factory=list)  # M, N, K, dtype
    product_bytes: list[int] = field(default_factory=list)
    kernel_flops: int = 0  # of products inside kernels: attention's
    other_bytes: int = 0
    launches: int = 0
    waits: int = 0
    peak_bytes: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)  # bytes

    @property
    def flops(self) -> int:
        return sum(2 * m * n * k for m, n, k, _ in self.products) + self.kernel_flops

    def seconds(self) -> float:
        """The roofline's prediction for one H200."""
        products = sum(map(_product_seconds, self.products, self.product_bytes))
        return products + self.kernel_flops / TFLOPS + self.other_bytes / TBYTES

    def add(self, name: str, moved: int) -> None:
        self.launches += 1
        self.other_bytes += moved
        self.by_operation[name] = self.by_operation.get(name, 0) + moved


def _product_seconds(product: tuple[int, int, int, str], moved: int) -> float:
    m, n, k, dtype = product
    rate = TFLOPS if dtype in ("bfloat16", "float16") else TFLOPS / 8
    return max(2 * m * n * k / rate, moved / TBYTES)


def _attention_flops(kernel: str, given: dict) -> int:
    """Of the products that an attention kernel makes in itself, causal: q k^T, and with it p v, dout v^T, dS k, dS^T q,
    P^T dout. The mass kernel's are those of the keys that have a weight, of which it is not told: none are counted."""
    if kernel not in ATTENTION_PRODUCTS:
        return 0
    pairs = given["q"].shape[0] * given["heads"] * given["num_rows"] * given["num_keys"] // 2
    return ATTENTION_PRODUCTS[kernel] * 2 * pairs * given["DIM"]


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Counting(TorchDispatchMode):
    """Adds every operation on meta tensors to `costs`."""

    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.costs, self.live = costs, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in storages]
        in_place = function._schema.is_mutable
        if name in PRODUCTS:
            self.product(args, kwargs, given, made)
        elif not name.startswith(("empty", "new_empty")) and name not in FREE and (fresh or in_place):
            self.costs.add(name, _bytes(given) + _bytes(fresh if not in_place else args[:1]))
        self.remember(fresh)
        return result

    def product(self, args, kwargs, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        left, right = [t for t in args if isinstance(t, torch.Tensor)][-2:]
        n = right.shape[1] if right.dim() == 2 else 1
        dtype = str(left.dtype).removeprefix("torch.")
        moved = _bytes(given) + _bytes(made)
        self.costs.launches += 1
        if n == 1 or left.shape[0] == 1:  # a matrix-vector product moves bytes
            self.costs.add("matrix_vector", moved)
            self.costs.launches -= 1
            return
        self.costs.products.append((left.shape[0], n, left.shape[1], dtype))
        self.costs.product_bytes.append(moved)

    def remember(self, fresh: list[torch.Tensor]) -> None:
        """Memory in use: storages that something still holds."""
        for tensor in fresh:
            storage = tensor.untyped_storage()
            self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.costs.peak_bytes = max(self.costs.peak_bytes, sum(size for _, size in self.live.values()))


class AsOnGpu(TorchFunctionMode):
    """Meta tensors that say they are on a GPU, and answers to what the host waits for."""

    def __init__(self, costs: Costs, kept: int) -> None:
        super().__init__()
        self.costs, self.kept = costs, kept

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if function in (torch.Tensor.nonzero, torch.nonzero):
            self.costs.waits += 1
            self.costs.add("nonzero", _bytes(args))
            return torch.arange(self.kept, device="meta")[:, None]
        if function in HOST_READS:
            raise AssertionError(f"{function.__name__}: the GPU path waits for the device")
        if torch.device(kwargs.get("device") or "meta").type == "cuda":
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_gpu(costs: Costs, kept: int) -> Iterator[None]:
    """AsOnGpu, in backward passes too: autograd runs them with function modes switched off."""

    def inside(function: Callable) -> Callable:
        def called(*args, **kwargs):
            with AsOnGpu(costs, kept):
                return function(*args, **kwargs)

        return called

    passes = ((logprobs_fused, "backward"), (loss_fused, "scale_saved_gradients"))
    with contextlib.ExitStack() as stack:
        for module, name in passes:
            stack.enter_context(mock.patch.object(module, name, inside(getattr(module, name))))
        stack.enter_context(AsOnGpu(costs, kept))
        yield


@contextlib.contextmanager
def written_down(costs: Costs, modules: tuple[ModuleType, ...] = KERNELS) -> Iterator[None]:
    """Triton's kernels add what they are given to `costs` instead of running."""

    class Kernel:
        def __init__(self, name: str, names: list[str]) -> None:
            self.name, self.names = name, names

        def __getitem__(self, grid):
            return self.launch

        @property
        def arg_names(self) -> list[str]:
            return self.names

        def launch(self, *positional, **named) -> None:
            given = dict(zip(self.names, positional, strict=False)) | named
            skipped = HARDLY_READ.get(self.name, ())
            read = [t for n, t in given.items() if isinstance(t, torch.Tensor) and n not in skipped]
            costs.add(self.name, _bytes(read))
            costs.kernel_flops += _attention_flops(self.name, given)

    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if hasattr(value, "arg_names") and hasattr(value, "fn") and value.fn.__module__ == module.__name__:
                    stack.enter_context(mock.patch.object(module, name, Kernel(name, value.arg_names)))
        yield


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """What asks a real device, answered for one."""
    with (
        mock.patch.object(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(gemm, "_adds_wide", lambda *_: True),
    ):
        yield


def count(step: Callable[[Shape], None], shape: Shape) -> Costs:
    """Costs of one forward and backward pass. step: calls the operator and its backward."""
    costs, given = Costs(), inputs(shape)
    with no_device(), written_down(costs), on_gpu(costs, shape.kept), Counting(costs):
        step(shape, **given)
    return costs


def inputs(shape: Shape) -> dict[str, torch.Tensor | None]:
    """hidden (1, N, H), weight (V, H), bias (V,); (1, N): targets, response, and the mask of the tokens that learn."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    leaves = {"hidden": empty(1, shape.tokens, shape.hidden), "weight": empty(shape.vocab, shape.hidden)}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    return {
        **leaves,
        "bias": empty(shape.vocab, dtype=torch.float32) if shape.bias else None,
        "targets": empty(1, shape.tokens, dtype=torch.int64),
        "mask": empty(1, shape.tokens, dtype=torch.bool),
        "response": empty(1, shape.tokens, dtype=torch.bool),
    }


def policy_loss(shape: Shape, hidden, weight, bias, targets, mask, response) -> None:
    """The clipped policy loss, forward and backward."""
    advantages, old = (targets.new_empty(size, dtype=torch.float32) for size in ((1,), targets.shape))
    out = linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages,
        response_mask=response,
        perception_mask=mask,
        old_logps=old,
        bias=bias,
        backend="triton",
    )
    torch.autograd.backward(out.loss)


def logprobs(shape: Shape, hidden, weight, bias, targets, **masks) -> None:
    """Log-probabilities, forward and backward."""
    out = linear_logprobs(hidden, weight, targets, bias=bias, backend="triton")
    torch.autograd.backward(out.logps, torch.empty_like(out.logps))


def logprobs_forward(shape: Shape, hidden, weight, bias, targets, **masks) -> None:
    """Log-probabilities without gradients: what scoring costs."""
    with torch.no_grad():
        linear_logprobs(hidden, weight, targets, bias=bias, backend="triton")


def divergence_forward(shape: Shape, hidden, weight, bias, targets, **masks) -> None:
    """The divergence of two views, without gradients: VPPO's perception scores."""
    hidden = hidden.detach().flatten(0, 1)
    views = (hidden, torch.empty_like(hidden), weight.detach(), None, bias)
    divergence.forward(Pair(*views, None, ("kl",), HeadOptions(), LoopOptions("triton")))


def attention(shape: Shape, *, backward: bool, **_inputs) -> None:
    """Causal attention with the mass of boolean weights: 28 query heads and 4 key heads of 128, on `tokens` tokens."""
    q, k, v, dout = (torch.empty(1, shape.tokens, n, 128, dtype=shape.dtype, device="meta") for n in (28, 4, 4, 28))
    weights = torch.empty(1, shape.tokens, 1, dtype=torch.bool, device="meta")
    call = (Masks(), AttentionOptions(-1, 0, 128**-0.5, 0.0))
    results = operators.attend(q, k, v, weights, *call)
    if backward:
        operators.backward((q, k, v, weights), results, (dout, torch.empty_like(results[1]), None), *call)


CASES: dict[str, tuple[Callable, Shape, int]] = {  # and how many products of (kept, H, V) the floor has
    "policy loss, keep 100 %": (policy_loss, Shape(), 3),
    "policy loss, keep 100 %, bias": (policy_loss, Shape(bias=True), 3),
    "policy loss, keep 40 %": (policy_loss, Shape(keep=0.4), 3),
    "log-probs, forward and backward": (logprobs, Shape(), 3),
    "log-probs, forward": (logprobs_forward, Shape(), 1),
    "divergence kl, forward": (divergence_forward, Shape(), 2),
}


ATTENTION_CASES: dict[str, tuple[Callable, int]] = {  # and the floor's products, each of all pairs below the diagonal
    "attention with mass, forward": (functools.partial(attention, backward=False), 2),
    "attention with mass, forward and backward": (functools.partial(attention, backward=True), 7),
}


def floor_seconds(shape: Shape, products: int) -> float:
    """The bare products of the tokens that learn."""
    return products * 2 * shape.kept * shape.hidden * shape.vocab / TFLOPS


def variants(step: Callable, shape: Shape, lengths: int = 10) -> int:
    """Compiled kernels over batches of `lengths` different lengths."""
    specs: set[str] = set()
    for number in range(lengths):
        one = Shape(shape.tokens - 37 * number, shape.hidden, shape.vocab, shape.keep, shape.bias, shape.dtype)
        with no_device(), recorded_launches(*KERNELS, arch=90) as launches, on_gpu(Costs(), one.kept):
            step(one, **inputs(one))
        specs |= {f"{spec.title} {spec.signature}" for spec in launches}
    return len(specs)


def table() -> str:
    """All cases as text."""
    lines = []
    for name, (step, shape, products) in CASES.items():
        logits, costs = shape.kept * shape.vocab, count(step, shape)
        size = f"{costs.flops / (2 * shape.hidden * logits):.2f} of {shape.kept} rows"
        moved = f"{costs.other_bytes / logits:.1f} B/logit"
        lines.append(_line(name, costs, size, moved, variants(step, shape), floor_seconds(shape, products)))
    for name, (step, products) in ATTENTION_CASES.items():
        shape, costs = Shape(), count(step, Shape())
        one = 2 * 28 * shape.tokens**2 // 2 * 128  # q k^T below the diagonal
        size, moved = f"{costs.flops / one:.0f} of T^2 / 2", f"{costs.other_bytes / 1e9:.2f} GB"
        lines.append(_line(name, costs, size, moved, variants(step, shape), products * one / TFLOPS))
    names = ("case", "products", "moved besides", "launches", "waits", "peak GB", "variants", "floor ms", "roofline ms")
    widths = [max(len(line[i]) for line in (names, *lines)) for i in range(len(names))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (names, *lines)]
    note = f"H {Shape.hidden}, V {Shape.vocab}, N or T {Shape.tokens}, 28 query and 4 key heads of 128, bfloat16."
    prediction = "Times are predictions: nothing ran on a GPU."
    return "\n".join([*("  ".join(line).rstrip() for line in padded), note, prediction])


def _line(name: str, costs: Costs, size: str, moved: str, kernels: int, floor: float) -> tuple[str, ...]:
    peak, predicted = f"{costs.peak_bytes / 1e9:.1f}", costs.seconds()
    times = (f"{1e3 * floor:.2f}", f"{1e3 * predicted:.2f} ({predicted / floor:.2f}x)")
    return name, size, moved, str(costs.launches), str(costs.waits), peak, str(kernels), *times


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__.split("\n")[0]).parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
