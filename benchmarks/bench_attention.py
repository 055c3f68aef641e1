"""Attention with visual mass against eager attention that returns its weights, and against attention without a mass.

    pytest benchmarks/bench_attention.py [--quick] [--device cpu|cuda] [--threads 2] [--budget 600]

Image tokens stand before the text, as in a VLM's prompt; masses are asked for in all rows, except by "text rows" (the
rows behind the image). "forward" cases score; "train" cases add the backward pass of out and mass together; "decode"
cases have 1 or 16 new rows over a long cache. On a GPU the cases are text towers of Qwen2.5-VL (3b, 7b, 32b) and
Qwen3-VL (8b); with --quick those that the goals speak of, which are judged below the tables (see `goals`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.goals import CaseRows, Goals, ratio
from benchmarks.harness import Case, Contender, report
from benchmarks.heads import OURS, compiled_per_shape, no_compiler
from mmrpt_kernels import attention_with_visual_mass, visual_mass

FIRST_IMAGE_TOKEN = 8  # behind a short system prompt

Results = dict[str, torch.Tensor]


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, S, Hkv, D) -> (B, heads, S, D)."""
    return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)


def eager(q, k, v, key_weights) -> Results:
    """As transformers' eager attention: weights (B, Hq, T, S) in memory, softmax in float32; the mass from them."""
    num_rows, heads, dim = q.shape[1:]
    scores = q.transpose(1, 2) @ _repeated(k, heads).mT * dim**-0.5
    later = torch.ones(num_rows, k.shape[1], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - num_rows)
    scores = scores + torch.zeros_like(later, dtype=q.dtype).masked_fill(later, torch.finfo(q.dtype).min)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    out = (weights @ _repeated(v, heads)).transpose(1, 2).contiguous()
    mass = (weights @ key_weights.to(q.dtype)[:, None, :, None])[..., 0]
    return {"out": out, "mass": mass}


def ours(q, k, v, key_weights, *, backend: str, mass: bool = True) -> Results:
    """`mass` False: no group of weights at all."""
    weights = key_weights if mass else key_weights[..., None][..., :0]
    found = attention_with_visual_mass(q, k, v, weights, backend=backend)
    return {"out": found.out, "mass": found.mass} if mass else {"out": found.out}


def sdpa_and_text_rows(q, k, v, key_weights) -> Results:
    """Another attention's lse, then the mass of the rows behind the image alone."""
    num_rows = q.shape[1]
    none = key_weights[..., None][..., :0]
    found = attention_with_visual_mass(q, k, v, none, backend="sdpa+mass")
    behind = (torch.cumsum(key_weights, 1) == key_weights.sum(1, keepdim=True)) & ~key_weights
    mass = visual_mass(q, k, found.lse.detach(), key_weights, query_mask=behind[:, -num_rows:])
    return {"out": found.out, "mass": mass}


def sdpa(q, k, v, key_weights, *, kernel: SDPBackend | None = None) -> Results:
    """No mass at all; `kernel` None: SDPA's own choice."""
    num_rows, num_keys = q.shape[1], k.shape[1]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    bias = causal_lower_right(num_rows, num_keys) if num_rows not in (1, num_keys) else None
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=bias, is_causal=num_rows == num_keys > 1, enable_gqa=q.shape[2] != k.shape[2]
        )
    return {"out": out.transpose(1, 2)}


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled_per_shape(flex_attention)


@cache
def _causal_blocks(num_rows: int, num_keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    shift = num_keys - num_rows
    return create_block_mask(lambda b, h, i, j: i + shift >= j, None, None, num_rows, num_keys, device=device)


def flex(q, k, v, key_weights) -> Results:
    """FlexAttention without a mass."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    blocks = _causal_blocks(q.shape[1], k.shape[1], q.device)
    out = _flex()(*heads_first, block_mask=blocks, enable_gqa=q.shape[2] != k.shape[2])
    return {"out": out.transpose(1, 2)}


def flash_attn(q, k, v, key_weights, *, module: str) -> Results:
    """A flash-attn package's own function, without a mass."""
    out = importlib.import_module(module).flash_attn_func(q, k, v, causal=True)
    return {"out": out[0] if isinstance(out, tuple) else out}


def column_sums(q, k, v, key_weights, *, module: str) -> Results:
    """What each key receives from all rows: a pass of the same products, without out. Heads are repeated for it."""
    heads_first = (q.transpose(1, 2).contiguous(), _repeated(k, q.shape[2]).contiguous())
    if module == "flash_colreduce":
        return {"columns": importlib.import_module(module).flash_colreduce(*heads_first, "sum", is_causal=True)}
    return {"columns": importlib.import_module(module).flash_colsum(*heads_first, is_causal=True)}


def forward_or_both(fn: Callable[..., Results]) -> Callable[..., Results]:
    """out and mass; where q asks for gradients also those of sum(dout * out) + sum(dmass * mass)."""

    def call(dout, dmass, **inputs: torch.Tensor) -> Results:
        results = fn(**inputs)
        if not inputs["q"].requires_grad:
            return results
        total = (results["out"] * dout).sum()
        if "mass" in results:
            total = total + (results["mass"] * dmass).sum()
        names = ("q", "k", "v")
        gradients = torch.autograd.grad(total, [inputs[name] for name in names])
        return results | {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}

    return call


def make_inputs(
    device: torch.device,
    *,
    batch: int,
    rows: int,
    length: int,
    heads: int,
    heads_kv: int,
    dim: int,
    visual: float,
    dtype: torch.dtype,
    train: bool,
) -> dict[str, Any]:
    """Scores of standard deviation 1; `visual` of the keys are image tokens, from FIRST_IMAGE_TOKEN on."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    position = torch.arange(length, device=device)
    image = (position >= FIRST_IMAGE_TOKEN) & (position < FIRST_IMAGE_TOKEN + round(visual * length))
    made = {
        "q": normal(batch, rows, heads, dim).requires_grad_(train),
        "k": normal(batch, length, heads_kv, dim).requires_grad_(train),
        "v": normal(batch, length, heads_kv, dim).requires_grad_(train),
        "key_weights": image.expand(batch, -1).contiguous(),
        "dout": normal(batch, rows, heads, dim) * dim**-0.5,
        "dmass": normal(batch, heads, rows),
    }
    return made


def case(
    name: str,
    batch: int,
    length: int,
    tower: tuple[int, int, int],
    visual: float,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    train: bool = False,
    quick: bool = False,
) -> Case:
    """FLOPs of attention alone: 2 B H T^2 D forward (half of two full products; all of them for a few rows over a
    cache), backward 2.5 times that. tower: query heads, key heads, head size. rows: new rows, None = all."""
    heads, heads_kv, dim = tower
    sizes = {"batch": batch, "heads": heads, "heads_kv": heads_kv, "dim": dim, "visual": visual, "train": train}
    params = {"B": batch, "T": rows or length, "S": length, "Hq": heads, "Hkv": heads_kv, "D": dim, "visual": visual}
    small = min(length, 512)
    pairs = length * (length / 2 if rows is None else rows)
    return Case(
        name,
        params | {"dtype": str(dtype).removeprefix("torch."), "train": train},
        partial(make_inputs, rows=rows or length, length=length, dtype=dtype, **sizes),
        gate_inputs=partial(make_inputs, rows=rows or small, length=small, dtype=dtype, **sizes),
        # dS subtracts delta from dP, and s - lse is exponentiated: both of about this size.
        floor=8.0 if train else 1.0,
        flops=4.0 * batch * heads * pairs * dim * (3.5 if train else 1.0),
        quick=quick,
    )


QWEN_3B, QWEN_7B, QWEN_32B, QWEN3_8B = (16, 2, 128), (28, 4, 128), (40, 8, 128), (32, 8, 128)
K = 1024


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        fp32 = {"dtype": torch.float32}
        return [
            case("forward-2k", 1, 2048, (8, 8, 64), 0.5, quick=True, **fp32),
            case("train-1k", 1, 1024, (8, 8, 64), 0.5, train=True, quick=True, **fp32),
            case("forward-gqa", 2, 1024, (12, 2, 128), 0.5, **fp32),
            case("forward-batch", 16, 256, (8, 4, 32), 0.25, quick=True, **fp32),
        ]
    # Those that the goals speak of come first: a budget that runs out leaves the others.
    return [
        case("forward-7b-8k", 1, 8 * K, QWEN_7B, 0.25, quick=True),
        case("train-7b-8k", 1, 8 * K, QWEN_7B, 0.25, train=True, quick=True),
        case("forward-7b-16k", 1, 16 * K, QWEN_7B, 0.125, quick=True),
        case("decode-7b-1x8k", 4, 8 * K, QWEN_7B, 0.25, rows=1, quick=True),
        case("train-7b-16k", 1, 16 * K, QWEN_7B, 0.125, train=True),
        case("decode-7b-16x8k", 4, 8 * K, QWEN_7B, 0.25, rows=16),
        case("decode-7b-1x32k", 4, 32 * K, QWEN_7B, 0.25, rows=1),
        case("decode-7b-16x32k", 4, 32 * K, QWEN_7B, 0.25, rows=16),
        case("forward-3b-2k", 4, 2 * K, QWEN_3B, 0.5),
        case("train-3b-4k", 2, 4 * K, QWEN_3B, 0.5, train=True),
        case("forward-8b-8k", 1, 8 * K, QWEN3_8B, 0.5),
        case("train-8b-4k", 2, 4 * K, QWEN3_8B, 0.75, train=True),
        case("forward-32b-8k", 1, 8 * K, QWEN_32B, 0.75),
        case("forward-7b-32k", 1, 32 * K, QWEN_7B, 0.5),
    ]


def absent(module: str) -> str | None:
    """Why a package cannot take part, None where it is installed."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def needs_square(what: str) -> Callable[[Case], str | None]:
    """For contenders that have no causal mask of a few rows over a longer cache."""

    def why(case: Case) -> str | None:
        rows, keys = case.params["T"], case.params["S"]
        return None if rows in (1, keys) else f"{what} aligns causality with the first key, not the last"

    return why


def columns_skip(module: str) -> Callable[[Case], str | None]:
    """The packages of per-key sums: no gradients, and flash-colsum's causal pass takes one sample."""

    def why(case: Case) -> str | None:
        if case.params["train"]:
            return f"{module} has no backward pass"
        if module == "flash_colsum" and case.params["B"] > 1:
            return "flash_colsum's causal pass takes one sample"
        return absent(module)

    return why


def without_mass(device: torch.device) -> list[Contender]:
    """Attention of others, which knows of no mass: how fast is fast."""
    made = {"FlexAttention": (flex, no_compiler(device))}
    if device.type == "cpu":
        made["SDPA"] = (sdpa, None)
    else:
        made["SDPA flash"] = (partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION), None)
        made["SDPA cuDNN"] = (partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION), needs_square("cuDNN"))
        for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
            made[name] = (partial(flash_attn, module=module), absent(module))
    return [
        Contender(f"{name} (no mass)", forward_or_both(fn), "peer", compare=("out",), skip=skip)
        for name, (fn, skip) in made.items()
    ]


def contenders(device: torch.device) -> list[Contender]:
    kernels = OURS[device.type][0]
    square, plain = needs_square("sdpa+mass"), partial(ours, backend=kernels, mass=False)
    compiled, text_rows = forward_or_both(compiled_per_shape(eager)), forward_or_both(sdpa_and_text_rows)
    made = [
        Contender("eager with weights", forward_or_both(eager), "baseline"),
        Contender("eager with weights, compiled", compiled, "peer", skip=no_compiler(device)),
        *without_mass(device),
        Contender(f"{kernels} (no mass)", forward_or_both(plain), compare=("out",), variant=True),
        Contender(kernels, forward_or_both(partial(ours, backend=kernels))),
        Contender("sdpa+mass", forward_or_both(partial(ours, backend="sdpa+mass")), skip=square),
        Contender("SDPA + visual_mass, text rows", text_rows, compare=("out",), skip=square, variant=True),
    ]
    if device.type != "cpu":
        for module in ("flash_colreduce", "flash_colsum"):
            fn, skip = forward_or_both(partial(column_sums, module=module)), columns_skip(module)
            made.append(Contender(f"{module} (per key)", fn, "peer", compare=(), skip=skip, variant=True))
    return made


def goals(cases: list[CaseRows], device: str) -> list[dict[str, Any]]:
    """What the kernels are to reach on a GPU, from the medians of each case that timed what it takes."""
    if device == "cpu":
        return []
    found, peaks = Goals(), {}
    for case in cases:
        name, time = case.name, partial(case.of, what="seconds")
        limit = 1.05 if case.params["train"] else 1.03
        with_mass = ratio(time("triton"), time("triton (no mass)"))
        found.at_most("time with mass / without, our kernels", name, with_mass, limit)
        best = time(case.fastest(lambda name, row: name in ("triton", "sdpa+mass")))
        rival = time(case.fastest(lambda name, row: name.endswith("(no mass)")))
        found.at_least("fastest attention's time / best with mass", name, ratio(rival, best), 0.94)
        text = time("SDPA + visual_mass, text rows")
        found.at_least("fastest attention's time / mass of text rows", name, ratio(rival, text), 0.94)
        if case.params["T"] >= 8 * K:
            found.at_least("eager's time / best with mass", name, ratio(time("eager with weights"), best), 20)
        worst = case.error_ratio("triton", "eager with weights")
        found.at_most("largest error / eager's, our kernels", name, worst, 1.5)
        peaks[name] = case.of("triton", "peak_bytes")
    growth = ratio(peaks.get("forward-7b-16k"), peaks.get("forward-7b-8k"))
    found.at_most("memory at 16k tokens / at 8k, our kernels", "forward-7b", growth, 2.2)
    return found.rows


def test_attention(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
