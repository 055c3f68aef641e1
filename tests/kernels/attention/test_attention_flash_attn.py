"""flash-attn's attention with our mass behind it: packed, windowed, soft-capped, forward and backward.

Without a GPU stand-ins have the signatures and the conventions of releases 2, 3 and 4 (what a window without limit is,
how the lse is asked for, what it is in a row without keys, dtypes of lengths) and compute by the definition; with one
the package itself is compared, where it is installed.
"""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from mmrpt_kernels import BackendError, backends
from mmrpt_kernels.attention import flash_attn, reference
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.testing import AttentionCase
from tests.kernels.attention.attention_checks import (
    CASES,
    FLASH_ATTN,
    FLASH_ATTN_GPU,
    GPU_CASES,
    PACKED_OPTIONS,
    definition_of,
    half_precision,
    keywords_of,
    options_from,
    packed_batch,
    problem_of,
    three_ways,
)

LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
OF_2 = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
OF_3 = (
    "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa "
    "deterministic sm_margin return_attn_probs"
)
OF_4 = "softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic"


class Release(NamedTuple):
    generation: int  # of a GPU that takes it
    dense: str  # the arguments of flash_attn_func behind q, k, v
    packed: str  # those of flash_attn_varlen_func
    asks: str  # the argument that asks for the lse
    unlimited: int | None  # a window's side without limit
    dead: float  # the lse of a row without keys


RELEASES = {
    "flash_attn": Release(8, OF_2, f"{LENGTHS} {OF_2} block_table", "return_attn_probs", -1, torch.inf),
    "flash_attn_interface": Release(
        9, OF_3, f"{LENGTHS} seqused_q seqused_k {OF_3}", "return_attn_probs", -1, -torch.inf
    ),
    "flash_attn.cute": Release(
        10,
        f"{OF_4} mask_mod return_lse",
        f"{LENGTHS} seqused_q seqused_k page_table {OF_4} return_lse",
        "return_lse",
        None,
        -torch.inf,
    ),
}


def compute(q, k, v, scale, causal, window, softcap, cu=(None, None), dead=-torch.inf):
    """out as q, and a float32 lse without a gradient; `dead` in rows without keys."""
    left, right = (-1 if side is None else side for side in window)
    weights = k.new_zeros((*k.shape[:-2], 1))
    masks = Masks(cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
    options = AttentionOptions(left, 0 if causal else right, scale, softcap)
    out, _, lse = reference.attention(q, k, v, weights, options, masks)
    return out, lse.detach().float().masked_fill(lse == -torch.inf, dead)


def stand_in(release: Release, names: str):
    """A function with the signature of one of the release's, which holds its caller to the release's conventions."""
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("q", "k", "v")]
    parameters += [parameters[0].replace(name=name, default=None) for name in names.split()]
    signature = inspect.Signature(parameters)

    def function(*arguments, **keywords):
        given = signature.bind(*arguments, **keywords).arguments
        window, cu = given["window_size"], (given.get("cu_seqlens_q"), given.get("cu_seqlens_k"))
        assert given[release.asks] and given.get("dropout_p", 0.0) == 0.0
        assert (-1 if release.unlimited is None else None) not in window
        for side, lengths in zip("qk", cu, strict=True):
            if lengths is not None:
                assert lengths.dtype == torch.int32 and lengths.is_contiguous()
                assert given[f"max_seqlen_{side}"] >= lengths.diff().max()
        options = (given["softmax_scale"], given["causal"], window, given["softcap"])
        found = compute(given["q"], given["k"], given["v"], *options, cu, release.dead)
        return found if release.generation > 8 else (*found, None)

    function.__signature__ = signature
    return function


def provide(module: ModuleType, release: Release) -> None:
    module.flash_attn_func = stand_in(release, release.dense)
    module.flash_attn_varlen_func = stand_in(release, release.packed)


def install(monkeypatch, name: str) -> ModuleType:
    """The stand-in of one release, the table's rows opened to the CPU."""
    module = ModuleType(name)
    module.__spec__, module.__version__ = ModuleSpec(name, None), "9.9"
    provide(module, RELEASES[name])
    for other in RELEASES:
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_attn, "_capability", lambda device: RELEASES[name].generation)
    rows = [
        row._replace(devices=("cpu",), dtypes=backends.FLOATS, missing="") if row.backend == "flash-attn+mass" else row
        for row in backends.TABLE
    ]
    monkeypatch.setattr(backends, "TABLE", rows)
    return module


@pytest.fixture(params=RELEASES)
def release(request, monkeypatch) -> str:
    install(monkeypatch, request.param)
    return request.param


# A float32 lse of size 160 is no lse for float32 inputs; the package takes halves alone.
SERVED = [case for case in CASES if FLASH_ATTN.takes(case) and case.score_size < 10.0]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_it_meets_the_definition(case, release, seed):
    if release == "flash_attn.cute" and case.softcap:
        pytest.skip("release 4 has no gradient under a soft cap")
    tensors, _, options, lse = problem_of(case, seed)
    keywords = keywords_of(case, None)
    three_ways(lambda *t: FLASH_ATTN.attend(*t, **keywords), definition_of(options), tensors, seed, lse, given=True)


@PACKED_OPTIONS
@pytest.mark.parametrize("limits", [{}, {"max_seqlen_q": 17, "max_seqlen_k": 20}], ids=["read", "given"])
def test_packed_meets_the_definition(keywords, limits, release, seed):
    if release == "flash_attn.cute" and keywords.get("softcap"):
        pytest.skip("release 4 has no gradient under a soft cap")
    tensors, cu = packed_batch(seed)
    cu = {name: x.long() for name, x in cu.items()}
    definition = definition_of(options_from(keywords, 8), Masks(**cu))
    lse = definition(*tensors)[2]
    assert (lse == -torch.inf).any(), "a row without keys, whose lse release 2 reports as +inf"
    call = lambda *t: FLASH_ATTN.attend(*t, **cu, **limits, **keywords)  # noqa: E731
    three_ways(call, definition, tensors, seed, lse, given=True)


def test_a_soft_cap_with_gradients_is_refused_where_the_release_has_none(monkeypatch, seed):
    install(monkeypatch, "flash_attn.cute")
    tensors, *_ = problem_of(AttentionCase("x", 1, 9, 9, 2, 2, 8), seed, torch.float32)
    FLASH_ATTN.attend(*tensors, softcap=2.0)
    with pytest.raises(
        ValueError, match="softcap: got 2.0 with gradients, expected 0: flash_attn.cute has no backward"
    ):
        FLASH_ATTN.attend(tensors[0], tensors[1].requires_grad_(), *tensors[2:], softcap=2.0)


def test_an_unknown_release_is_refused_with_what_was_found(monkeypatch, seed):
    tensors, *_ = problem_of(AttentionCase("x", 1, 9, 9, 2, 2, 8), seed, torch.float32)
    module = install(monkeypatch, "flash_attn")
    module.flash_attn_func = lambda q, k, v, scale: None
    with pytest.raises(
        ValueError, match=r"got flash_attn 9.9 whose flash_attn_func takes q, k, v, scale, expected caus"
    ):
        FLASH_ATTN.attend(*tensors)
    del module.flash_attn_func
    with pytest.raises(ValueError, match="whose flash_attn_func takes nothing: it does not exist"):
        FLASH_ATTN.attend(*tensors)
    provide(module, RELEASES["flash_attn"])
    monkeypatch.setattr(sys.modules[__name__], "compute", lambda q, *_, **__: (q, q[..., 0]))
    with pytest.raises(ValueError, match=r"got a lse of shape \(1, 9, 2\) from flash_attn, expected \(1, 2, 9\)"):
        FLASH_ATTN.attend(*tensors)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        ValueError, match="flash-attn: got no release for compute capability 8, expected one of flash_attn"
    ):
        FLASH_ATTN.attend(*tensors)


@pytest.mark.parametrize("refused", ["value_dim", "head_size_not_8s", "scale_not_positive"])
def test_what_it_does_not_serve_it_refuses(refused, release):
    q = torch.zeros(1, 9, 2, 12 if refused == "head_size_not_8s" else 8)
    v = torch.zeros(1, 9, 2, 16) if refused == "value_dim" else q
    keywords = {"softmax_scale": -1.0} if refused == "scale_not_positive" else {}
    with pytest.raises(BackendError, match=f"does not support: {refused}"):
        FLASH_ATTN.attend(q, q, v, torch.ones(1, 9, dtype=torch.bool), **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in GPU_CASES if FLASH_ATTN_GPU.takes(c)], ids=lambda case: case.name)
def test_the_package_errs_no_more_than_eager(case, dtype, seed):
    if backends.NO_FLASH_ATTN:
        pytest.skip(f"{backends.NO_FLASH_ATTN}: the package itself was NOT compared")
    tensors, _, options, lse = problem_of(case, seed, dtype)
    keywords = keywords_of(case, None)
    half_precision(lambda *t: FLASH_ATTN_GPU.attend(*t, **keywords), definition_of(options), tensors, seed, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (100, 0)], ids=str)
def test_the_package_packed_errs_no_more_than_eager(window, seed):
    if backends.NO_FLASH_ATTN:
        pytest.skip(f"{backends.NO_FLASH_ATTN}: the package itself was NOT compared")
    case = AttentionCase("packed", 1, 700, 700, 8, 2, 64)
    tensors, *_ = problem_of(case, seed, torch.bfloat16)
    tensors = [x[0] for x in tensors]
    cu = torch.tensor([0, 1, 300, 300, 700], dtype=torch.int32)
    masks = Masks(cu_seqlens_q=cu, cu_seqlens_k=cu)
    definition = definition_of(AttentionOptions(window[0], 0, 64**-0.5, 0.0), masks)
    call = lambda *t: FLASH_ATTN_GPU.attend(*t, window_size=window, cu_seqlens_q=cu, cu_seqlens_k=cu)  # noqa: E731
    half_precision(call, definition, tensors, seed, definition(*tensors)[2])
