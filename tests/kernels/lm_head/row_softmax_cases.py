"""What test_row_softmax.py draws, runs and compares with: rows of logits, kernels on a device, float64 autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits
from mmrpt_kernels.lm_head.row_softmax import Slopes, Softmax, finish_exponentials, finish_partials, row_kernels
from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory, sum_cap

PLAIN = HeadOptions()


class Rows(NamedTuple):
    """Logits with their bias and targets, on the CPU."""

    logits: torch.Tensor  # (n, V) float32, a view into a wider table whose other columns are NaN
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor  # (n,)

    def __getitem__(self, rows: list[int]) -> Rows:
        return Rows(view_of(self.logits[rows]), self.bias, self.targets[rows])

    @property
    def raw(self) -> torch.Tensor:
        return self.logits if self.bias is None else self.logits + self.bias


def view_of(values: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """A copy at a row stride and an offset that are multiples of nothing, with NaN around it."""
    table = torch.full((len(values), values.shape[1] + 3), torch.nan, device=device)
    table[:, 1:-2] = values.to(device)
    return table[:, 1:-2]


def draw(rows: int, vocab: int, *, size: float = 4.0, has_bias: bool = False) -> Rows:
    bias = torch.randn(vocab) if has_bias else None
    return Rows(view_of(size * torch.randn(rows, vocab)), bias, torch.randint(vocab, (rows,)))


def draw_slopes(rows: int) -> Slopes:
    return torch.randn(rows), torch.randn(rows)


class Place:
    """Row kernels on a device. Results are on the CPU; memory that nothing wrote is NaN."""

    def __init__(self, backend: str, device: str):
        self.kernels, self.backend, self.device = row_kernels(backend), backend, device

    @property
    def sums_alone(self) -> bool:
        """Whether a row's sums do not depend on its neighbours: torch's on a GPU share their threads among rows."""
        return self.backend != "portable" or self.device == "cpu"

    def _taken(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        bias = None if rows.bias is None else rows.bias.to(self.device)
        return view_of(rows.logits, self.device), bias, rows.targets.to(self.device)

    def two_sweeps(
        self,
        rows: Rows,
        options: HeadOptions = PLAIN,
        slopes: Slopes | None = None,
        *,
        dtype: torch.dtype | None = None,
        want_entropy: bool = True,
        merged: Softmax | None = None,
    ) -> dict[str, torch.Tensor]:
        """Partials, logps, entropy, and where slopes are given the gradient, over the logits or in `dtype`."""
        logits, bias, targets = self._taken(rows)
        keep = slopes is not None and (slopes[1] is not None or options.softcap > 0.0)
        with poisoned_memory():
            partials, state = self.kernels.statistics(logits, bias, targets, options, want_entropy, keep)
            found = {name: value.clone() for name, value in partials._asdict().items()}
            logps, entropy, softmax = finish_partials(partials, logits.shape[1], want_entropy)
            found |= {"logps": logps, "entropy": entropy} if want_entropy else {"logps": logps}
            if slopes is not None:
                softmax = softmax if merged is None else Softmax(*(t.to(self.device) for t in merged))
                given = tuple(None if t is None else t.to(self.device) for t in slopes)
                out = found["gradient"] = logits if dtype is None else torch.empty_like(logits, dtype=dtype)
                self.kernels.gradient(state, bias, targets, options, softmax, given, out)
        return {name: value.cpu() for name, value in found.items()}

    def one_sweep(
        self, rows: Rows, options: HeadOptions = PLAIN, *, dtype: torch.dtype | None = None, want_entropy: bool = True
    ) -> dict[str, torch.Tensor]:
        """logps, entropy, the sums, and d logps / d raw as matrix and factor make it; dtype as above."""
        logits, bias, targets = self._taken(rows)
        with poisoned_memory():
            matrix = logits if dtype is None else torch.empty_like(logits, dtype=dtype)
            sums = self.kernels.exponentials(logits, bias, targets, options, want_entropy, matrix)
            logps, entropy, total = finish_exponentials(sums, logits.shape[1], want_entropy)
        gradient = matrix.float() * (-options.logit_scale / options.temperature / total)[:, None]
        found = {"logps": logps, "gradient": gradient, "matrix": matrix.float(), "shift": sums.shift, "rest": sums.rest}
        found |= {"rest_dots": sums.dots, "entropy": entropy} if want_entropy else {"rest_dots": sums.dots}
        return {name: value.cpu() for name, value in found.items()}


def truth(rows: Rows, options: HeadOptions, slopes: Slopes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same by autograd in plain torch; in float32 it is the yardstick of the error rule."""
    bias = 0.0 if rows.bias is None else rows.bias.to(dtype)
    raw = (rows.logits.to(dtype) + bias).requires_grad_()
    z = transform_logits(raw, options)
    top, log_sum = z.amax(-1), torch.logsumexp(z, -1)
    here = (rows.targets >= 0) & (rows.targets < raw.shape[1])
    target_z = z.gather(1, rows.targets.clamp(0, raw.shape[1] - 1)[:, None])[:, 0]
    shifted = (z - top[:, None]).clamp_min(-1e30)  # 0 log 0 = 0
    log_probs = (z - log_sum[:, None]).clamp_min(-1e30)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = torch.where(here, target_z, -torch.inf)
    exact = {"top": top, "total": shifted.exp().sum(-1), "dots": (shifted.exp() * shifted).sum(-1), "chosen": chosen}
    exact |= {"logps": chosen - log_sum, "entropy": entropy}
    # A word of another part adds nothing here: what is left of its log-probability is - log sum exp.
    loss = ((torch.where(here, target_z, 0.0) - log_sum) * slopes[0].to(dtype)).sum()
    if slopes[1] is not None:
        loss = loss + (entropy * slopes[1].to(dtype)).sum()
    exact["gradient"] = torch.autograd.grad(loss, raw)[0]
    return {name: value.detach() for name, value in exact.items()}


def assert_true(
    found: dict, rows: Rows, options: HeadOptions = PLAIN, slopes: Slopes | None = None, *, what: str, dtype=None
) -> None:
    """What `found` and `truth` both name, by the error rule: float64 is the truth, plain float32 the yardstick.

    slopes: None for the gradient of logps. dtype: the gradient's, None for float32.
    """
    dtype = dtype or torch.float32
    slopes = (torch.ones(len(rows.targets)), None) if slopes is None else slopes
    exact, eager = (truth(rows, options, slopes, wide) for wide in (torch.float64, torch.float32))
    size = max(1.0, exact["top"].abs().max().item())  # what differences of logits are known to
    # Where tanh is nearly 1, 1 - tanh^2 is known to the error of tanh^2, whatever is left: 7 eps where a tanh to 1 ulp
    # is had back from z, by two factors and two products, and squared. The rule doubles its limit: 4 of them.
    d_z = slopes[0].abs().max().item() * abs(options.logit_scale / options.temperature)
    units = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    floors = {"gradient": (4.0 * d_z * units if options.softcap > 0.0 else 0.0, dtype)}
    assert {"logps", "gradient"} <= found.keys() & exact.keys()
    for name in found.keys() & exact.keys():
        floor, rounded = floors.get(name, (size, torch.float32))
        cap = sum_cap(rows.logits.shape[1], exponents=size, dtype=rounded)
        rule = {"name": f"{what} {name}", "dtype": rounded, "floor": floor, "eager_cap": cap}
        assert_close_to_truth(found[name].float(), eager[name], exact[name], **rule)


def assert_same_bits(found: dict, expected: dict, rows: list[int] | slice = slice(None)) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value[rows]), name
