"""What the attention tests share: cases, where a backend runs, and the comparison with the float64 definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from mmrpt_kernels.attention import attention_with_visual_mass, reference, visual_mass
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_close_to_truth,
    attention_inputs,
    poisoned_memory,
)
from tests.kernels.devices import INTERPRETING

CASES = (
    *ATTENTION_CASES,
    AttentionCase("window_of_one", 1, 23, 23, 2, 1, 8, window_size=(0, 0)),
    AttentionCase("window_suffix", 2, 13, 47, 4, 2, 8, window_size=(6, 0)),
    AttentionCase("window_more_queries", 1, 29, 11, 2, 2, 8, causal=False, window_size=(3, 2)),
    AttentionCase("left_window_alone", 1, 31, 17, 2, 2, 8, causal=False, window_size=(4, -1)),
    AttentionCase("one_query_not_causal", 2, 1, 1, 2, 2, 8, causal=False),
    AttentionCase("window_padding_groups", 2, 37, 37, 4, 2, 8, window_size=(9, 0), groups=3, padding="left"),
    AttentionCase(
        "softcap_padding_value_dim", 3, 27, 27, 4, 1, 8, dim_v=20, softcap=3.0, padding="right", score_size=5.0
    ),
    AttentionCase("float_padding_decode", 3, 1, 40, 4, 2, 16, weights="float", padding="left"),
    AttentionCase("sixteen_rows_many_keys", 1, 16, 150, 3, 1, 24, dim_v=40),
    AttentionCase(
        "few_rows_window", 2, 5, 200, 2, 1, 16, window_size=(60, 0), weights="float", groups=2, padding="left"
    ),
    AttentionCase("many_blocks", 1, 1031, 1031, 2, 1, 8, window_size=(300, 0)),
    AttentionCase("eleven_groups", 1, 19, 21, 4, 2, 8, groups=11),
    AttentionCase("eleven_float_groups", 1, 19, 21, 2, 1, 8, groups=11, weights="float", padding="right"),
    AttentionCase("head_size_80", 1, 18, 35, 2, 1, 80, weights="float"),
    AttentionCase("heads_wider_than_values", 1, 20, 20, 2, 2, 40, dim_v=8, groups=2),
    AttentionCase("seven_query_heads", 1, 17, 17, 7, 1, 8),
)
# Halves on a GPU, besides CASES.
GPU_CASES = (
    AttentionCase("long", 1, 1031, 1031, 4, 2, 128, groups=2),
    AttentionCase("long_window", 2, 700, 900, 4, 2, 96, window_size=(300, 0), padding="left", weights="float"),
    AttentionCase("wide_heads", 1, 515, 515, 2, 1, 256, softcap=20.0, score_size=4.0),
    AttentionCase("odd_head_size", 1, 390, 777, 4, 4, 80, padding="right"),
    AttentionCase("long_not_causal", 1, 801, 1203, 7, 1, 64, causal=False, weights="float"),
    AttentionCase("long_cache", 1, 1, 8191, 28, 4, 128, groups=2),
    AttentionCase("equal_heads", 2, 390, 390, 4, 4, 80),
    AttentionCase("wide_square", 1, 515, 515, 2, 1, 256, weights="float"),
)
# Where the order of samples and heads matters: sharing of key heads, strides.
MANY_HEADS = ("grouped_heads", "window_padding_groups", "seven_query_heads")

PACKED_OPTIONS = pytest.mark.parametrize(
    "keywords", [{}, {"window_size": (3, 0)}, {"causal": False, "softcap": 2.0}], ids=str
)


class Run(NamedTuple):
    """A backend and where it runs."""

    name: str
    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of tests that say nothing of dtypes

    def attend(self, q, k, v, weights, **keywords) -> tuple[torch.Tensor, ...]:
        """out, mass, lse on the CPU; tensors are taken to the device and brought back."""
        keywords = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
        tensors = (x.to(self.device) for x in (q, k, v, weights))
        return tuple(x.cpu() for x in attention_with_visual_mass(*tensors, **keywords, backend=self.backend))

    def mass(self, q, k, lse, weights, **keywords) -> torch.Tensor:
        keywords = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
        tensors = (x.to(self.device) for x in (q, k, lse, weights))
        return visual_mass(*tensors, **keywords, backend=self.backend).cpu()

    def takes(self, case: AttentionCase) -> bool:
        """Whether the backend serves the case at all."""
        if self.backend == "flash-attn+mass":
            return case.padding == "none" and case.dim_v in (None, case.dim) and case.dim % 8 == 0
        if self.backend != "sdpa+mass":
            return True
        band = case.causal and case.q_len not in (1, case.k_len)
        plain = case.softcap == 0.0 and case.padding == "none" and case.window_size == (-1, -1)
        return plain and not band and case.dim_v in (None, case.dim) and (self.device == "cpu" or case.dim % 8 == 0)


PORTABLE = Run("portable", "portable")
PLAIN = Run("plain", "portable")  # without torch's fused CPU attention
SDPA = Run("sdpa", "sdpa+mass")
SDPA_GPU = Run("sdpa_gpu", "sdpa+mass", "cuda", torch.bfloat16)
FLASH_ATTN = Run("flash_attn", "flash-attn+mass")  # a stand-in for the package, see test_attention_flash_attn.py
FLASH_ATTN_GPU = Run("flash_attn_gpu", "flash-attn+mass", "cuda", torch.bfloat16)
TRITON = Run("triton", "triton")
TRITON_GPU = Run("triton_gpu", "triton", "cuda", torch.bfloat16)
_MARKS = {
    "triton": pytest.mark.skipif(not INTERPRETING, reason="not interpreting"),
    "triton_gpu": pytest.mark.gpu,
    "sdpa_gpu": pytest.mark.gpu,
}


def by_run(*runs: Run) -> pytest.MarkDecorator:
    """Parameter `run`."""
    made = [pytest.param(run, marks=_MARKS.get(run.name, ()), id=run.name) for run in runs]
    return pytest.mark.parametrize("run", made)


def by_run_and_case(*runs: Run, names: tuple[str, ...] = (), gpu_cases: tuple[AttentionCase, ...] = ()):
    """Parameters `run` and `case`: of CASES those that the backend serves (names: only these), on a GPU more."""
    made = []
    for run in runs:
        for case in (*CASES, *(gpu_cases if run.device == "cuda" else ())):
            if run is TRITON:
                case = for_the_interpreter(case)
            if case is None or not run.takes(case):
                continue
            if not names or case.name in names or case in gpu_cases:
                made.append(pytest.param(run, case, marks=_MARKS.get(run.name, ()), id=f"{run.name}-{case.name}"))
    return pytest.mark.parametrize("run, case", made)


def for_the_interpreter(case: AttentionCase) -> AttentionCase | None:
    """The case with one key head, at most two query heads, and a second sample only where padding tells them apart: the
    interpreter's time is their number, and MANY_HEADS are kept as they are. None: it takes too long."""
    if case.name in MANY_HEADS:
        return case
    heads = min(2, case.heads_q // case.heads_kv)
    case = case._replace(batch=1 if case.padding == "none" else 2, heads_q=heads, heads_kv=1)
    return None if case.name == "many_blocks" else case


def case_named(name: str) -> AttentionCase:
    return next(case for case in CASES if case.name == name)


def options_of(case: AttentionCase) -> AttentionOptions:
    left, right = case.window_size
    return AttentionOptions(left, 0 if case.causal else right, case.dim**-0.5, case.softcap)


def options_from(keywords: dict, dim: int) -> AttentionOptions:
    left, right = keywords.get("window_size", (-1, -1))
    right = 0 if keywords.get("causal", True) else right
    return AttentionOptions(left, right, dim**-0.5, keywords.get("softcap", 0.0))


def keywords_of(case: AttentionCase, padding: torch.Tensor | None) -> dict:
    return {
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "key_padding_mask": padding,
    }


def grouped(weights: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return weights if weights.dim() == q.dim() - 1 else weights[..., None]


def definition_of(options: AttentionOptions, masks: Masks = Masks()) -> Callable:  # noqa: B008
    """(q, k, v, weights, dtype) -> the definition's out, mass, lse; no group dimension where weights have none."""

    def definition(q, k, v, w, dtype=torch.float64):
        out, mass, lse = reference.attention(q, k, v, grouped(w, q), options, masks, dtype=dtype)
        return out, (mass if w.dim() == q.dim() - 1 else mass[..., 0]), lse

    return definition


def mass_definition_of(lse: torch.Tensor, options: AttentionOptions, masks: Masks) -> Callable:
    """(q, k, weights, dtype) -> the definition's mass from a given lse."""

    def definition(q, k, w, dtype=torch.float64):
        mass = reference.mass_from_lse(q, k, lse, grouped(w, q), options, masks, dtype=dtype)
        return mass if w.dim() == q.dim() - 1 else mass[..., 0]

    return definition


def with_gradients(call, tensors: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The results of call(*tensors) and the gradients of a random mixture of all of them, -inf entries left out.

    The first result's share is scaled by its width, so that dP = dout v^T is of order 1.
    """
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    mixture = 0.0
    for result in results:
        factors = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        part = (result.masked_fill(result == -torch.inf, 0.0) * factors).double().sum()
        mixture = mixture + (part if result is not results[0] else part * result.shape[-1] ** -0.5)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(mixture, wanted)
    named = {f"result{i}": result.detach() for i, result in enumerate(results)}
    return named | {f"gradient{i}": gradient for i, gradient in enumerate(gradients)}


def three_ways(
    implementation, definition, tensors: list[torch.Tensor], seed: int, lse: torch.Tensor, given: bool = False
):
    """The error rule on results and gradients: float64 truth, the definition in float32 on the rounded inputs.

    Two subtractions leave their rounding in the gradients: s - lse, and dP - delta with dP up to about 4 here. With a
    given lse the first one is in the results too.
    """
    size = max([4.0, *lse[lse.isfinite()].abs().tolist()])
    dtype = torch.float32
    low = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    widened = [t.double() if t.is_floating_point() else t for t in low]
    truth = with_gradients(lambda *t: definition(*t, dtype=torch.float64), widened, seed)
    eager = with_gradients(lambda *t: definition(*t, dtype=torch.float32), low, seed)
    with poisoned_memory():
        actual = with_gradients(implementation, low, seed)
    assert actual.keys() == truth.keys()
    for name in truth:
        floor = size if given or name.startswith("gradient") else 1.0
        assert_close_to_truth(actual[name], eager[name], truth[name].double(), name=name, dtype=dtype, floor=floor)


def half_precision(implementation, definition, tensors: list[torch.Tensor], seed: int, lse: torch.Tensor):
    """The error rule for half-precision inputs: what returns in their dtype against eager's in it, and the float32
    statistics against eager's in float32, whose scores err by eps of float32 times their size.

    No floor for the former: what is subtracted is float32. Eager may err by 32 eps; 2 * 33 eps of bfloat16 is half of
    the largest entry, so that zeros are refused whatever eager made.
    """
    dtype = tensors[0].dtype
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = with_gradients(lambda *t: definition(*t, dtype=torch.float64), wide, seed)
    eager = with_gradients(lambda *t: definition(*t, dtype=dtype), tensors, seed)
    in_float32 = with_gradients(lambda *t: definition(*t, dtype=torch.float32), tensors, seed)
    actual = with_gradients(implementation, tensors, seed)
    assert actual.keys() == truth.keys() and dtype in {x.dtype for x in actual.values()}
    size = max([4.0, *lse[lse.isfinite()].abs().tolist()])
    for name, found in actual.items():
        true = truth[name].double()
        if found.dtype == torch.float32:
            assert_close_to_truth(found, in_float32[name], true, name=name, dtype=torch.float32, floor=size)
        else:
            assert_close_to_truth(found, eager[name], true, name=name, dtype=dtype, eager_cap=32.0)


def problem_of(case: AttentionCase, seed: int, dtype: torch.dtype = torch.float64):
    """[q, k, v, weights], padding, options, and the lse of the definition."""
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    padding = inputs.pop("key_padding_mask")
    lse = definition_of(options_of(case), Masks(padding))(*inputs.values())[2]
    return list(inputs.values()), padding, options_of(case), lse


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_batch(seed: int, dim_v: int = 8) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v, two groups of float weights, and cu_seqlens: sequences of 0, 1 and other lengths."""
    lengths_q, lengths_k = [5, 0, 17, 1, 4, 3], [5, 4, 17, 9, 0, 2]
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = ((total_q, 4, 8), (total_k, 2, 8), (total_k, 2, dim_v), (total_k, 2))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors, {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
