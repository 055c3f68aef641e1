"""One list of hostile cases per operator family; tests and benchmarks draw their tensors from here."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class HeadCase(NamedTuple):
    """A shape for the lm-head operators (logprobs, policy_loss, divergence)."""

    name: str
    rows: int
    hidden: int
    vocab: int
    logit_size: float = 3.0  # standard deviation of the logits
    bias: bool = False
    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    chunk_size: int | None = None
    ignored: str = "some"  # targets equal to ignore_index: "none", "some" or "all"


HEAD_CASES = (
    HeadCase("one_row", 1, 8, 33),
    HeadCase("no_rows", 0, 8, 33),
    HeadCase("prime_vocab", 37, 16, 1009, chunk_size=5),
    HeadCase("one_word", 5, 4, 1),
    HeadCase("qwen_vocab", 6, 4, 151_936),
    HeadCase("all_ignored", 7, 8, 50, ignored="all"),
    HeadCase("none_ignored_odd_hidden", 19, 13, 257, ignored="none", chunk_size=4),
    HeadCase("huge_logits", 17, 16, 101, logit_size=1e4),
    HeadCase("tiny_logits", 17, 16, 101, logit_size=1e-6),
    HeadCase("bias_and_temperature", 23, 8, 130, bias=True, temperature=0.7, chunk_size=7),
    HeadCase("softcap_and_scale", 23, 8, 130, bias=True, softcap=5.0, logit_scale=1.7, temperature=1.3),
)


def head_inputs(
    case: HeadCase, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor | None]:
    """hidden (rows, H), hidden_q (rows, H) close to hidden as a second view, weight (V, H), bias (V,) or None,
    targets (rows,) int64 with -100 where ignored. No gradients asked for yet."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(case.rows, case.hidden)
    hidden_q = hidden + 0.3 * normal(case.rows, case.hidden)
    weight = normal(case.vocab, case.hidden) * (case.logit_size / math.sqrt(case.hidden))
    targets = torch.randint(case.vocab, (case.rows,), generator=generator)
    if case.ignored == "some":
        targets[torch.rand(case.rows, generator=generator) < 0.3] = -100
    elif case.ignored == "all":
        targets[:] = -100
    made = {
        "hidden": hidden.to(device, dtype),
        "hidden_q": hidden_q.to(device, dtype),
        "weight": weight.to(device, dtype),
        "bias": normal(case.vocab).to(device, dtype) if case.bias else None,
    }
    return made | {"targets": targets.to(device)}


def on_a_grid(tensor: torch.Tensor, size: float = 1.0) -> torch.Tensor:
    """Multiples of a power of two, about size / 8.

    Sums of their products are exact in whatever order they are added, while they have no more bits than a float: BLAS
    promises equal bits for equal rows, or on two machines, of no other numbers.
    """
    step = 2.0 ** math.floor(math.log2(size / 8))
    return (tensor / step).round() * step


class AttentionCase(NamedTuple):
    """A shape for the attention operators."""

    name: str
    batch: int
    q_len: int
    k_len: int
    heads_q: int
    heads_kv: int
    dim: int
    dim_v: int | None = None  # None: as dim
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    groups: int = 0  # 0: key_weights (B, S); otherwise (B, S, groups)
    weights: str = "bool"  # "bool", "float", "none_visual", "all_visual"
    padding: str = "none"  # "none", "left", "right", "one_row_empty"
    score_size: float = 1.0  # standard deviation of the scaled scores


ATTENTION_CASES = (
    AttentionCase("one_token", 1, 1, 1, 1, 1, 8),
    AttentionCase("plain", 2, 37, 37, 4, 4, 16),
    AttentionCase("grouped_heads", 2, 33, 33, 6, 2, 16),
    AttentionCase("decode", 2, 1, 65, 4, 2, 16),
    AttentionCase("suffix", 2, 9, 50, 4, 2, 16),
    AttentionCase("more_queries_than_keys", 1, 21, 13, 2, 1, 8),
    AttentionCase("not_causal", 2, 19, 31, 4, 4, 16, causal=False),
    AttentionCase("value_dim", 2, 17, 17, 2, 2, 24, dim_v=40),
    AttentionCase("window", 1, 70, 70, 2, 2, 8, window_size=(16, 0)),
    AttentionCase("two_sided_window", 1, 40, 40, 2, 2, 8, causal=False, window_size=(5, 7)),
    AttentionCase("softcap", 2, 29, 29, 2, 2, 8, softcap=2.5, score_size=4.0),
    AttentionCase("three_groups", 2, 26, 26, 4, 2, 16, groups=3),
    AttentionCase("float_weights", 2, 26, 26, 4, 2, 16, weights="float"),
    AttentionCase("float_groups", 1, 23, 23, 2, 2, 8, groups=2, weights="float"),
    AttentionCase("nothing_visual", 2, 18, 18, 2, 2, 8, weights="none_visual"),
    AttentionCase("everything_visual", 2, 18, 18, 2, 2, 8, weights="all_visual"),
    AttentionCase("left_padding", 3, 30, 30, 4, 2, 16, padding="left"),
    AttentionCase("right_padding", 3, 30, 30, 4, 2, 16, padding="right"),
    AttentionCase("an_empty_sample", 3, 15, 15, 2, 2, 8, padding="one_row_empty"),
    AttentionCase("peaked", 1, 64, 64, 2, 2, 16, score_size=40.0),
    AttentionCase("odd_sizes", 1, 131, 131, 3, 1, 20),
)


def _key_padding(case: AttentionCase) -> torch.Tensor | None:
    """(B, S) bool, True = may be attended; sample b lacks about b / (B + 1) of its keys."""
    if case.padding == "none":
        return None
    mask = torch.ones(case.batch, case.k_len, dtype=torch.bool)
    if case.padding == "one_row_empty":
        mask[-1] = False
        return mask
    for b in range(case.batch):
        missing = (b * case.k_len) // (case.batch + 1)
        if missing and case.padding == "left":
            mask[b, :missing] = False
        elif missing:
            mask[b, -missing:] = False
    return mask


def _key_weights(case: AttentionCase, generator: torch.Generator) -> torch.Tensor:
    shape = (case.batch, case.k_len) + ((case.groups,) if case.groups else ())
    if case.weights == "float":
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 0.5
    if case.weights == "none_visual":
        return torch.zeros(shape, dtype=torch.bool)
    if case.weights == "all_visual":
        return torch.ones(shape, dtype=torch.bool)
    return torch.rand(shape, generator=generator) < 0.4


def attention_inputs(
    case: AttentionCase, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor | None]:
    """q (B, T, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), key_weights (B, S[, G]) bool or `dtype`,
    key_padding_mask (B, S) bool or None. No gradients asked for yet."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(case.batch, case.q_len, case.heads_q, case.dim) * case.score_size
    k = normal(case.batch, case.k_len, case.heads_kv, case.dim)
    v = normal(case.batch, case.k_len, case.heads_kv, case.dim_v or case.dim)
    weights = _key_weights(case, generator)
    padding = _key_padding(case)
    return {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "v": v.to(device, dtype),
        "key_weights": weights.to(device) if weights.dtype == torch.bool else weights.to(device, dtype),
        "key_padding_mask": None if padding is None else padding.to(device),
    }
