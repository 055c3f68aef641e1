"""Dependency scores of captions: a forward pass that records visual mass, against eager attention weights.

    pytest benchmarks/bench_masking.py [--quick] [--device cpu|cuda]

The text tower of a VLM reads one row: a short system prompt, an image's tokens (three quarters of the row) and the
caption. Of the upper half of the layers the attention mass on image and caption is asked for, heads averaged: what
`mmrpt.masking.score` needs of a pass. "eager weights" takes it from `output_attentions=True`; "plain forward" scores
nothing. Rows are captions: captions a second are one over the seconds of a row.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2Model

from benchmarks.goals import CaseRows, Goals, ratio
from benchmarks.harness import Case, Contender, report
from mmrpt_kernels.integrations.transformers import enable_visual_mass, record_visual_mass

SYSTEM = 16  # tokens before the image
GOAL_CASE = "t2048"

Results = dict[str, torch.Tensor]


@cache
def tower(layers: int, hidden: int, eager: bool, dtype: torch.dtype, device: torch.device) -> Qwen2Model:
    """A random Qwen2 text model (heads of 64, four query heads a key head), the same weights for every contender."""
    heads = hidden // 64
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        attn_implementation="eager" if eager else "sdpa",
    )
    torch.manual_seed(0)
    model = Qwen2Model(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # peaked attention, as a trained model's
            parameter.data.mul_(4)
    model = model.to(device, dtype)
    return model if eager else enable_visual_mass(model)


def recorded_layers(layers: int) -> list[int]:
    return list(range(layers // 2, layers))


def share(masses: torch.Tensor) -> torch.Tensor:
    """(B, T): mass(V) / (mass(V) + mass(T)), averaged over layers, of masses (L, B, T, 2)."""
    total = masses.sum(-1)
    return torch.where(total > 0, masses[..., 0] / total.clamp_min(1e-12), 0.0).mean(0)


@torch.no_grad()
def recorded(embeds: torch.Tensor, groups: torch.Tensor, layers: int) -> Results:
    model = tower(layers, embeds.shape[-1], False, embeds.dtype, embeds.device)
    of = recorded_layers(layers)
    with record_visual_mass(model, key_weights=groups, layers=of, head_reduction="mean") as record:
        hidden = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return {"share": share(record.stacked()), "hidden": hidden}


@torch.no_grad()
def eager_weights(embeds: torch.Tensor, groups: torch.Tensor, layers: int) -> Results:
    model = tower(layers, embeds.shape[-1], True, embeds.dtype, embeds.device)
    out = model(inputs_embeds=embeds, use_cache=False, output_attentions=True)
    masses = [out.attentions[i].mean(1) @ groups.to(embeds.dtype) for i in recorded_layers(layers)]
    return {"share": share(torch.stack(masses)), "hidden": out.last_hidden_state}


@torch.no_grad()
def plain(embeds: torch.Tensor, groups: torch.Tensor, layers: int) -> Results:
    model = tower(layers, embeds.shape[-1], False, embeds.dtype, embeds.device)
    return {"hidden": model(inputs_embeds=embeds, use_cache=False).last_hidden_state}


def make_inputs(
    device: torch.device, *, tokens: int, layers: int, hidden: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    embeds = torch.randn(1, tokens, hidden, generator=generator, device=device).to(dtype)
    place = torch.arange(tokens, device=device)
    end = SYSTEM + 3 * tokens // 4
    groups = torch.stack(((place >= SYSTEM) & (place < end), place >= end), -1)[None]
    return {"embeds": embeds, "groups": groups, "layers": layers}


def case(name: str, tokens: int, layers: int, hidden: int, *, dtype: torch.dtype, quick: bool) -> Case:
    inputs = partial(make_inputs, layers=layers, hidden=hidden, dtype=dtype)
    params = {"T": tokens, "layers": layers, "H": hidden, "dtype": str(dtype).removeprefix("torch.")}
    few = min(tokens, 512)
    return Case(name, params, partial(inputs, tokens=tokens), gate_inputs=partial(inputs, tokens=few), quick=quick)


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        sizes = {"layers": 8, "hidden": 512, "dtype": torch.float32}
        return [case(f"t{tokens}", tokens, **sizes, quick=tokens == 1024) for tokens in (1024, 2048, 4096)]
    sizes = {"layers": 36, "hidden": 2048, "dtype": torch.bfloat16}
    return [case(f"t{tokens}", tokens, **sizes, quick=tokens == 2048) for tokens in (1024, 2048, 4096)]


def contenders(device: torch.device) -> list[Contender]:
    return [
        Contender("eager weights", eager_weights, "baseline"),
        Contender("plain forward", plain, "floor", compare=()),
        Contender("recorded", recorded),
    ]


def goals(cases: list[CaseRows], device: str) -> list[dict[str, Any]]:
    found = Goals()
    for one in cases:
        found.at_most("masking over a plain forward pass", one.name, one.of("recorded", "of_floor"), 1.05)
        if one.name == GOAL_CASE:
            found.at_least("speed over eager weights", one.name, one.of("recorded", "speedup"), 4.0)
            memory = ratio(one.of("recorded", "peak_bytes"), one.baseline.get("peak_bytes"))
            found.at_most("memory over eager weights", one.name, memory, 1.0)
    return found.rows


def test_masking(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
