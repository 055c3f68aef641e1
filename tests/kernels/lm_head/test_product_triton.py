"""The matrix product that leaves exponentials ("triton-fused"): against the ordinary way, and where it steps aside.

Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels import backends, linear_logprobs
from mmrpt_kernels.common.head import HeadOptions, project
from mmrpt_kernels.logprobs.rows import finish_exponentials, row_kernels
from mmrpt_kernels.logprobs.triton import product
from mmrpt_kernels.testing import HEAD_CASES, HeadCase, poisoned_memory
from mmrpt_kernels.testing.aot import compile_kernels, recorded_launches
from tests.kernels.lm_head.test_loss_backends import DEVICE, PLAIN, VARIANTS, assert_by_the_rule, learn, score

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
# Rows, H, V. A GPU reads 16 bytes at a time: other rows go the ordinary way there.
SHAPES = ((1, 1, 1), (1, 8, 33), (5, 64, 128), (131, 72, 300), (128, 13, 1009), (129, 200, 257))
if DEVICE == "cuda":
    SHAPES = tuple((rows, width + -width % 16, vocab) for rows, width, vocab in SHAPES)


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(rows, width).to(DEVICE, dtype)
    weight = (torch.randn(vocab, width) * (3.0 / width**0.5)).to(DEVICE, dtype)
    return hidden, weight, torch.randn(vocab).to(DEVICE, dtype), torch.randint(vocab, (rows,)).to(DEVICE)


def both(hidden, weight, bias, targets, options: HeadOptions) -> list[dict[str, torch.Tensor]]:
    """logps, entropy and d logps / d raw of the fused product and of the ordinary way."""
    kernels = row_kernels("triton-fused")
    found = []
    for fused in (True, False):
        into = None
        with poisoned_memory():
            if hidden.dtype != torch.float32:
                vocab = len(weight)  # rows at multiples of 16 words, as the stream has them on a GPU
                into = torch.empty(len(targets), vocab + -vocab % 16, dtype=hidden.dtype, device=DEVICE)[:, :vocab]
            if fused:
                made = kernels.product(hidden, weight, bias, targets, options, True, into)
            else:
                made = kernels.exponentials(project(hidden, weight, bias), targets, options, True, into)
            logps, entropy, total = finish_exponentials(made[0], len(weight), True)
        found.append({"logps": logps, "entropy": entropy, "gradient": made[1].float() / total[:, None]})
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", (HeadOptions(), HeadOptions(0.7, 0.0, -1.3)), ids=("plain", "scaled"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_agrees_with_the_ordinary_way(shape, options, dtype, seed):
    hidden, weight, bias, targets = inputs(*shape, dtype)
    for given in (bias, None):
        fused, plain = both(hidden, weight, given, targets, options)
        for name, value in fused.items():
            # Logits are 2e-5 apart, and so, relatively, is each word's gradient; a base of its own rounds it apart too.
            rule = {"rtol": 1e-5, "atol": 2e-5}
            if name == "gradient":
                rule = {"rtol": 2e-5 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0), "atol": 1e-9}
            torch.testing.assert_close(value, plain[name], **rule, msg=lambda m, n=name: f"{n}, seed {seed}: {m}")


def test_strides(seed):
    """Rows of a wider table, and a weight that is one; a transposed weight goes the ordinary way."""
    hidden, weight, bias, targets = inputs(37, 64, 300, DTYPES[0])
    wide = torch.full((37, 112), torch.nan, dtype=DTYPES[0], device=DEVICE)
    wide[:, 16:80] = hidden
    tall = torch.full((300, 96), torch.nan, dtype=DTYPES[0], device=DEVICE)
    tall[:, 16:80] = weight
    made = both(wide[:, 16:80], tall[:, 16:80], bias, targets, HeadOptions())[0]
    for name, value in both(hidden, weight, bias, targets, HeadOptions())[0].items():
        assert torch.equal(made[name], value)
    transposed = weight.t().contiguous().t()
    assert row_kernels("triton-fused").product(hidden, transposed, bias, targets, HeadOptions(), True, None) is None


@pytest.mark.parametrize("trouble", ("far", "nan", "inf", "softcap", "dtypes"))
def test_what_it_cannot_do_goes_the_ordinary_way(trouble, seed):
    hidden, weight, bias, targets = inputs(9, 16, 200, DTYPES[0])
    options = HeadOptions(softcap=5.0) if trouble == "softcap" else HeadOptions()
    if trouble == "far":
        bias[targets[3]] -= 80.0
    elif trouble in ("nan", "inf"):
        hidden[4] = float(trouble)
    elif trouble == "dtypes":
        weight = weight.half()
    arguments = (hidden, weight, bias, targets, options, True, None)
    assert row_kernels("triton-fused").product(*arguments) is None
    if DEVICE == "cuda":
        return  # what follows compares in float32, which is for the interpreter
    calls = {name: linear_logprobs(
        hidden, weight, targets, bias=bias, softcap=options.softcap, return_entropy=True, backend=name
    ) for name in ("triton-fused", "reference")}  # fmt: skip
    for found, expected in zip(*calls.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_policy_loss(options, dtype, seed):
    assert_by_the_rule(learn, PLAIN, seed, dtype, "triton-fused", **options)


@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
def test_log_probabilities(case: HeadCase, seed):
    assert_by_the_rule(score, case, seed, torch.bfloat16, "triton-fused")


def test_one_wait_a_chunk_and_none_without_compaction(monkeypatch, seed):
    """compact=False asks that nothing waits: then the product, whose chunks are looked at, is not tried."""
    tried = []
    real = row_kernels("triton-fused")
    spy = real._replace(product=lambda *a: tried.append(a[0].shape[0]) or real.product(*a))
    monkeypatch.setattr("mmrpt_kernels.logprobs.operator.row_kernels", lambda name: spy)
    hidden, weight, _, targets = inputs(10, 8, 40, torch.bfloat16)
    for compact in (True, False):
        states = hidden.clone().requires_grad_()
        how = {"compact": compact, "chunk_size": 4, "backend": "triton-fused"}
        linear_logprobs(states, weight, targets, **how).logps.sum().backward()
    assert tried == [4, 4, 2]


@pytest.mark.parametrize("arch", product.TILES)
def test_compiled_without_spills(arch):
    """Accumulators of 128 x 256 leave few registers: none may be spilled, and products go through tensor cores."""
    specs = []

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    half = torch.bfloat16
    for vocab, width, entropy, biased in (
        (151_936, 3584, True, True),
        (32_003, 2064, False, False),
        (128, 64, True, False),
    ):
        tensors = (empty(4096, width, of=half), empty(vocab, width, of=half), empty(vocab, of=half) if biased else None)
        with recorded_launches(product, arch=arch) as seen:
            product.launch(
                *tensors,
                empty(4096, of=torch.int64),
                empty(4096),
                empty(4096, vocab + -vocab % 16, of=half)[:, :vocab],
                empty(3, 1200, 4096),
                factor=1.5,
                want_entropy=entropy,
                tiles=product.TILES[arch],
            )
        specs += seen
    for one in compile_kernels(specs):
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[arch] in one.ptx, one.spec.title


def test_the_table_has_it_by_name():
    rows = [row for row in backends.TABLE if row.backend == "triton-fused"]
    assert {row.op for row in rows} == {"logprobs", "policy_loss", "token_loss"} and all(row.by_name for row in rows)
