"""The number that comes in from above the loss: half-precision gradients are multiplied by all of its bits."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.testing import HeadCase, assert_close_to_truth
from tests.kernels.lm_head.operators import DEVICE, ONE_VIEW, draw, leaves_of, name_of, served

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs what is marked
TOKEN, POLICY, POLICY_WITH_ENTROPY = ONE_VIEW[2], *ONE_VIEW[4:]

FACTOR = 1.0 / 12.0  # gradient accumulation over 12 batches; 0.2 % from the next bfloat16


CASE = HeadCase("scaled", 9, 16, 40, bias=True, ignored="none")


@pytest.mark.parametrize(("operator", "compiled"), [(TOKEN, False), (POLICY, False), (POLICY, True)], ids=name_of)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_gradients_are_rounded_once_after_the_factor(operator, compiled, dtype, seed, fresh_compiler):
    """factor * gradient as the exact product of the two rounds to: what a rounded factor misses in most entries."""
    call = torch.compile(operator.call, fullgraph=True, backend="aot_eager") if compiled else operator.call
    made, factor = draw(CASE, seed, dtype=dtype), torch.tensor(FACTOR, device=DEVICE)
    wrt = list(leaves_of(operator, made).values())
    whole, scaled = (torch.autograd.grad(call(made)["loss"], wrt, by) for by in (torch.ones_like(factor), factor))
    for one, found in zip(whole, scaled, strict=True):
        assert found.dtype == dtype and one.any()
        assert torch.equal(found, (one.double() * factor.double()).float().to(dtype))


@pytest.mark.parametrize("backend", ("portable", "triton"))
@pytest.mark.parametrize("operator", (POLICY, POLICY_WITH_ENTROPY), ids=lambda operator: operator.name)
def test_float16_gradients_outlive_a_small_loss(operator, backend, seed):
    """A loss over a million tokens has gradients below float16's range: they wait for the loss scale in float32."""
    served(operator, backend)
    case, many = HeadCase("wide", 24, 16, 4001, chunk_size=7, ignored="none"), 2.0**20

    def gradients(backend: str, factor: float, wide: bool = False) -> tuple[torch.Tensor, ...]:
        made = draw(case, seed, dtype=torch.float16, wide=wide)
        loss = operator.call(made, normalizer=factor, backend=backend)["loss"]
        return torch.autograd.grad(factor * loss, (made["hidden"], made["weight"]))

    triples = zip(
        gradients(backend, many), gradients("reference", 1.0), gradients("reference", many, True), strict=True
    )
    for found, eager, truth in triples:
        assert found.dtype == torch.float16
        assert_close_to_truth(found, eager, truth, name=f"seed {seed}")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("count", (1, 100, 8192, 8193))
def test_the_kernel_rounds_once_and_leaves_what_is_behind(count, dtype, seed):
    pytest.importorskip("triton")
    from mmrpt_kernels.policy_loss.scale_gradients_triton import scale

    device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter without one
    memory = torch.randn(count + 3, device=device).to(dtype)
    for factor in (1.0, FACTOR, 0.0, float("nan")):
        found, by = memory.clone(), torch.tensor(factor, device=device)
        scale(found[:count], by)
        expected = (memory.double() * by.double()).float().to(dtype)
        assert torch.equal(found[:count].isnan(), expected[:count].isnan())
        assert torch.equal(found[:count].nan_to_num(), expected[:count].nan_to_num())
        assert torch.equal(found[count:], memory[count:])


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_the_kernel_compiles_without_spills_and_reads_nothing_where_the_factor_is_one(arch):
    pytest.importorskip("triton")
    from mmrpt_kernels.policy_loss import scale_gradients_triton
    from mmrpt_kernels.testing.aot import compile_kernels, recorded_launches

    with recorded_launches(scale_gradients_triton, arch=arch) as specs:
        for dtype in (torch.bfloat16, torch.float32):
            grad = torch.empty(4096, 512, dtype=dtype, device="meta")
            scale_gradients_triton.scale(grad, torch.empty((), device="meta"))
    for one in compile_kernels(specs):
        code = one.ptx
        assert code.index("setp.") < code.index("ld.global.v4"), "the factor is compared before the gradient is read"
