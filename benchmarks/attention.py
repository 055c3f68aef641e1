"""Attention with visual mass against eager attention that returns its weights, and against attention without a mass.

    python -m benchmarks.attention [--quick] [--device cpu|cuda] [--threads 2]

Image tokens stand before the text, as in a VLM's prompt; masses are asked for in all rows, except by "text rows" (the
rows behind the image). "forward" cases score; "train" cases add the backward pass of out and mass together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Case, Contender
from benchmarks.logprobs import no_compiler
from mmrpt_kernels import backends
from mmrpt_kernels.attention import attention_with_visual_mass, visual_mass

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


def ours(q, k, v, key_weights, *, backend: str) -> Results:
    found = attention_with_visual_mass(q, k, v, key_weights, backend=backend)
    return {"out": found.out, "mass": found.mass}


def sdpa(q, k, v, key_weights) -> Results:
    """No mass at all."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
    return {"out": out.transpose(1, 2)}


def sdpa_with_mass(q, k, v, key_weights, *, text_rows: bool = False) -> Results:
    """Another attention's own lse, then one product over the visual keys."""
    heads = q.shape[2]
    heads_first = (q.transpose(1, 2), _repeated(k, heads), _repeated(v, heads))
    aten = torch.ops.aten
    fused = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if q.device.type == "cpu"
        else aten._scaled_dot_product_flash_attention
    )
    out, lse, *_ = fused(*heads_first, 0.0, True)
    wanted = None
    if text_rows:
        wanted = (torch.cumsum(key_weights, 1) == key_weights.sum(1, keepdim=True)) & ~key_weights
    return {"out": out.transpose(1, 2), "mass": visual_mass(q, k, lse, key_weights, query_mask=wanted)}


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(num_rows: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, num_rows, num_rows, device=device)


def flex(q, k, v, key_weights) -> Results:
    """FlexAttention without a mass."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    blocks = _causal_blocks(q.shape[1], q.device)
    out = _flex()(*heads_first, block_mask=blocks, enable_gqa=q.shape[2] != k.shape[2])
    return {"out": out.transpose(1, 2)}


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
        "q": normal(batch, length, heads, dim).requires_grad_(train),
        "k": normal(batch, length, heads_kv, dim).requires_grad_(train),
        "v": normal(batch, length, heads_kv, dim).requires_grad_(train),
        "key_weights": image.expand(batch, -1).contiguous(),
        "dout": normal(batch, length, heads, dim) * dim**-0.5,
        "dmass": normal(batch, heads, length),
    }
    return made


def case(
    name: str,
    batch: int,
    length: int,
    heads: int,
    heads_kv: int,
    dim: int,
    visual: float,
    dtype: torch.dtype,
    *,
    train: bool = False,
    quick: bool = True,
) -> Case:
    """FLOPs of causal attention alone: 2 B H T^2 D forward (half of two full products), backward 2.5 times that."""
    sizes = {"batch": batch, "heads": heads, "heads_kv": heads_kv, "dim": dim, "visual": visual, "train": train}
    params = {"B": batch, "T": length, "Hq": heads, "Hkv": heads_kv, "D": dim, "visual": visual}
    return Case(
        name,
        params | {"dtype": str(dtype).removeprefix("torch."), "train": train},
        partial(make_inputs, length=length, dtype=dtype, **sizes),
        gate_inputs=partial(make_inputs, length=min(length, 512), dtype=dtype, **sizes),
        # dS subtracts delta from dP, and s - lse is exponentiated: both of about this size.
        floor=8.0 if train else 1.0,
        flops=2.0 * batch * heads * length**2 * dim * (3.5 if train else 1.0),
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case("forward-2k", 1, 2048, 8, 8, 64, 0.5, torch.float32),
            case("train-1k", 1, 1024, 8, 8, 64, 0.5, torch.float32, train=True),
            case("forward-gqa", 2, 1024, 12, 2, 128, 0.5, torch.float32, quick=False),
            case("forward-batch", 16, 256, 8, 4, 32, 0.25, torch.float32, quick=False),
        ]
    bf16 = torch.bfloat16
    return [
        case("forward-3b-4k", 2, 4096, 16, 2, 128, 0.5, bf16),
        case("forward-7b-8k", 1, 8192, 28, 4, 128, 0.25, bf16),
        case("train-7b-4k", 1, 4096, 28, 4, 128, 0.5, bf16, train=True),
        case("forward-32b-8k", 1, 8192, 40, 8, 128, 0.5, bf16, quick=False),
    ]


def main(argv=None) -> int:
    args = harness.parse_args("attention", argv)
    compiled = torch.compile(eager, dynamic=False)
    without_mass = ("out",)
    names = [
        row.backend
        for row in backends.TABLE
        if row.op == "attention"
        and row.backend != "reference"
        and args.device.type in (row.devices or (args.device.type,))
    ]
    contenders = [
        Contender("eager with weights", forward_or_both(eager), baseline=True),
        Contender("eager with weights, compiled", forward_or_both(compiled), peer=True, skip=no_compiler(args.device)),
        Contender("SDPA (no mass)", forward_or_both(sdpa), peer=True, compare=without_mass),
        Contender(
            "FlexAttention (no mass)",
            forward_or_both(flex),
            peer=True,
            compare=without_mass,
            skip=no_compiler(args.device),
        ),
        *(Contender(name, forward_or_both(partial(ours, backend=name))) for name in names),
        Contender("SDPA + visual_mass", forward_or_both(sdpa_with_mass)),
        Contender(
            "SDPA + visual_mass, text rows",
            forward_or_both(partial(sdpa_with_mass, text_rows=True)),
            compare=without_mass,
        ),
    ]
    return harness.run("attention", cases(args.device), contenders, args)


if __name__ == "__main__":
    raise SystemExit(main())
