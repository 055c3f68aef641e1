"""Muon on CPUs against its definition and against torch's own."""

from __future__ import annotations

import pytest
import torch

from mmrpt.muon import Muon, orthogonalise

SHAPES = [(128, 128), (64, 128), (64, 128), (176, 64), (1, 8)]


def options() -> dict:
    return Muon([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0).param_groups[0]


def newton_schulz(matrix, group):
    """The iteration of Muon's authors on one (A, B) matrix, in its dtype."""
    a, b, c = group["ns_coefficients"]
    x = matrix / matrix.norm()
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_float32_on_a_cpu(shape):
    """Each of five iterations stretches small singular values, and with them the rounding of those before, by at most
    a = 3.44; so the error stays below 3.44**5 eps of float32, 6e-5, times the growth of a sum. bfloat16 is at 1e-2."""
    matrices = torch.randn(3, *shape)
    found = orthogonalise(matrices, options()).double()
    wanted = torch.stack([newton_schulz(m, options()) for m in matrices.double()])
    error = (found - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
    assert error.max() < 1e-3, f"relative errors {error.tolist()}"


def test_updates_are_those_of_torchs_muon_within_bfloat16():
    ours = [torch.nn.Parameter(0.02 * torch.randn(s)) for s in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    fine = Muon([{"params": ours, "weight_decay": 10.0}], lr=1e-2)
    coarse = torch.optim.Muon([{"params": theirs, "weight_decay": 10.0}], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = None if step == 1 and p.shape == (1, 8) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        fine.step()
        coarse.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        # 15 products in bfloat16, each rounded by at most 2**-8; decay and updates move the weights about as far
        assert (p - q).norm() < 15 * 2**-8 * (p - first).norm(), tuple(p.shape)
    assert fine.state_dict()["state"].keys() == coarse.state_dict()["state"].keys()
    for a, b in zip(fine.state_dict()["state"].values(), coarse.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"])
