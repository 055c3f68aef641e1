"""The row kernels in CUDA C++: their host build against float64, the machine code they compile to, and the GPU itself.

What every set of row kernels must do is in test_row_kernels.py; here is what only these can get wrong: alignment,
tails, rounding to half precision, the extension's bindings.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmrpt_kernels import backends, linear_logprobs, linear_policy_loss, linear_token_loss
from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.common.head import HeadOptions, transform_logits
from mmrpt_kernels.logprobs.cuda import row_exponentials, row_gradient, row_statistics
from mmrpt_kernels.logprobs.rows import Exponentials, Partials, Softmax, finish, most_above
from mmrpt_kernels.testing import HEAD_CASES, HeadCase, assert_close_to_truth, head_inputs, poisoned_memory

ROOT = Path(__file__).resolve().parents[3]
HALVES = (torch.bfloat16, torch.float16)
# Rows, words, size of the logits.
SHAPES = {
    "one word": (3, 1, 1.0),
    "two words": (4, 2, 3.0),
    "ordinary": (5, 1009, 3.0),
    "one over a round of all lanes": (4, 8193, 3.0),
    "flat": (2, 4096, 1e-6),
    "peaked": (6, 300, 1e4),
    "long": (2, 151_936, 3.0),
}
PLAIN = HeadOptions()
OPTIONS = (PLAIN, HeadOptions(0.7), HeadOptions(1.3, 5.0, -1.7))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The host's build, and the GPU where there is one."""
    return served(request.param)


def served(device: str) -> str:
    if reason := backends._why_no_extension(device):
        pytest.skip(reason)
    return device


def strided(rows: int, vocab: int, size: float, device: str) -> torch.Tensor:
    """Logits (rows, vocab) at a stride that gives neighbouring rows different alignments."""
    return (size * torch.randn(rows, vocab + 3)).to(device)[:, :vocab]


def definition(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p (n,) and entropy (n,) of transformed logits (n, V), in their dtype."""
    z = z - z.detach().amax(-1, keepdim=True)
    log_probs = z - z.exp().sum(-1, keepdim=True).log()
    entropy = -(log_probs.exp() * log_probs.clamp_min(-1e30)).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy


def defined_gradient(raw: torch.Tensor, targets, options, slopes) -> torch.Tensor:
    """d (logps . slopes[0] + entropy . slopes[1]) / d raw by autograd, in raw's dtype."""
    leaf = raw.detach().clone().requires_grad_()
    found = definition(transform_logits(leaf, options), targets)
    return torch.autograd.grad(sum((f * s.to(raw.dtype)).sum() for f, s in zip(found, slopes, strict=True)), leaf)[0]


def softmax_of(raw, targets, options=PLAIN) -> tuple[torch.Tensor, torch.Tensor, Softmax, torch.Tensor]:
    """logps, entropy, what the gradient wants of them, and the state."""
    partials, state = row_statistics(raw, targets, options, True, True)
    return *finish(partials, raw.shape[-1], True), state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_statistics_against_float64(name, options, device, seed):
    rows, vocab, size = SHAPES[name]
    raw, targets = strided(rows, vocab, size, device), torch.randint(vocab, (rows,), device=device)
    before = raw.clone()
    with poisoned_memory():
        partials, state = row_statistics(raw, targets, options, True, True)
    assert torch.equal(raw, before) and state is raw, "the gradient reads the logits"
    logps, entropy, _ = finish(partials, vocab, True)
    truth = definition(transform_logits(raw.double(), options), targets)
    eager = definition(transform_logits(raw, options), targets)
    largest = transform_logits(raw, options).abs().max().item()
    for what, got, yardstick, want in zip(("logps", "entropy"), (logps, entropy), eager, truth, strict=True):
        assert_close_to_truth(got, yardstick, want, name=f"{name} {what}", floor=largest)
    assert (logps <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(vocab)).all()
    assert (partials.dots <= 0).all()


def test_the_sum_of_a_long_row_is_good_to_a_millionth(device, seed):
    raw, targets = strided(4, 151_936, 3.0, device), torch.zeros(4, dtype=torch.int64, device=device)
    partials, _ = row_statistics(raw, targets, PLAIN, True, True)
    shifted = raw.double() - raw.double().amax(-1, keepdim=True)
    total, dots = shifted.exp().sum(-1), (shifted * shifted.exp()).sum(-1)
    assert torch.equal(partials.top, raw.amax(-1)) and torch.equal(partials.chosen, raw[:, 0])
    torch.testing.assert_close(partials.total.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(partials.dots.double(), dots, rtol=1e-6, atol=0)


@pytest.mark.parametrize("entropy_learns", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_against_float64(name, options, entropy_learns, device, seed):
    rows, vocab, size = SHAPES[name]
    raw, targets = strided(rows, vocab, size, device), torch.randint(vocab, (rows,), device=device)
    slopes = torch.randn(2, rows, device=device)
    if not entropy_learns:
        slopes[1] = 0.0
    _, _, softmax, state = softmax_of(raw, targets, options)
    given = (slopes[0], slopes[1] if entropy_learns else None)
    with poisoned_memory():
        got = row_gradient(state, targets, options, softmax, given, torch.empty(rows, vocab, device=device))
    truth = defined_gradient(raw.double(), targets, options, slopes.double())
    eager = defined_gradient(raw, targets, options, slopes)
    # exp(z - top) inherits the rounding of z, as eager's does: at 1e4 that is 1e-3, in both.
    floor = truth.abs().max().item() + transform_logits(raw, options).abs().max().item()
    assert_close_to_truth(got, eager, truth, name=name, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 2051])
def test_every_alignment_of_rows_and_results(vocab, dtype, device, seed):
    """Logits and gradient at every offset from a 16-byte boundary: same numbers, nothing written beside the row."""
    values = torch.randn(3, vocab, device=device)
    targets = torch.tensor([0, vocab - 1, vocab // 2], device=device)
    slopes = (torch.tensor([1.0, -0.5, 0.25], device=device), torch.tensor([0.5, 0.0, -2.0], device=device))
    *_, softmax, state = softmax_of(values, targets)
    want = row_gradient(state, targets, PLAIN, softmax, slopes, values.new_empty(3, vocab, dtype=dtype))
    for offset in range(4):
        held = torch.full((offset + 3 * (vocab + 5),), torch.nan, device=device)
        raw = held[offset:].view(3, vocab + 5)[:, :vocab]
        raw.copy_(values)
        partials, state = row_statistics(raw, targets, PLAIN, True, True)
        assert torch.equal(partials.top, values.amax(-1)) and torch.equal(
            partials.chosen, values.gather(-1, targets[:, None])[:, 0]
        )
        torch.testing.assert_close(partials.total, (values - values.amax(-1, keepdim=True)).exp().sum(-1))
        for shift in range(8):
            around = torch.full((shift + 3 * (vocab + 9),), 7.0, device=device, dtype=dtype)
            out = around[shift:].view(3, vocab + 9)[:, :vocab]
            assert row_gradient(state, targets, PLAIN, softmax, slopes, out) is out
            assert torch.equal(out, want), f"offset {offset}, shift {shift}"
            out.fill_(7.0)
            assert (around == 7.0).all(), f"offset {offset}, shift {shift}: written beside the row"


def test_the_gradient_may_overwrite_the_logits(device, seed):
    raw, targets = strided(3, 8200, 2.0, device), torch.tensor([5, 0, 8199], device=device)
    slopes = (torch.randn(3, device=device), torch.randn(3, device=device))
    *_, softmax, state = softmax_of(raw, targets)
    apart = row_gradient(state, targets, PLAIN, softmax, slopes, torch.empty(3, 8200, device=device))
    over = row_gradient(state, targets, PLAIN, softmax, slopes)
    assert over is raw and torch.equal(over, apart)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_to_nearest_even_for_every_half(dtype, device):
    """Every half, its neighbours in float32 and the ties between halves, through d_logps: a target of probability 0
    beside a certain word gives (-d_logps, d_logps)."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = halves[halves.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    halves = halves[~halves.isinf()]  # an infinite slope is no number times probability 0
    values = torch.cat([halves, ties, torch.nextafter(ties, torch.tensor(1e38)), torch.nextafter(finite, -finite)])
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45, -1e-45])]).to(device)
    count = values.shape[0]
    raw = torch.tensor([0.0, -torch.inf], device=device).repeat(count, 1)
    one, zero = torch.ones(count, device=device), torch.zeros(count, device=device)
    targets = torch.ones(count, dtype=torch.int64, device=device)
    got = row_gradient(
        raw, targets, PLAIN, Softmax(zero, one, None), (values, None), raw.new_empty(count, 2, dtype=dtype)
    )
    want = torch.stack([-values, values], 1).to(dtype)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def test_rows_without_slopes_are_zeros_and_hostile_rows_poison_nobody(device, seed):
    raw = strided(8, 600, 2.0, device)
    raw[1, 5], raw[2, 7], raw[3] = torch.nan, torch.inf, -torch.inf
    raw[4, ::2], raw[5, 300:] = -torch.inf, -torch.inf
    raw[6, 5] = torch.nan
    raw[7], raw[7, 9] = -torch.inf, 3.0  # one word is left: certain
    targets = torch.tensor([0, 1, 2, 3, 1, 1, 2, 9], device=device)
    logps, entropy, softmax, state = softmax_of(raw, targets)
    sound = [0, 4, 5, 7]
    truth = definition(raw[sound].double(), targets[sound])
    torch.testing.assert_close(logps[sound].double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[sound].double(), truth[1], rtol=1e-6, atol=1e-6)
    assert logps[7] == 0 and entropy[7] == 0
    assert logps[[1, 2, 3, 6]].isnan().all() and entropy[[1, 2, 3, 6]].isnan().all()
    slopes = torch.randn(2, 8, device=device)
    slopes[:, [1, 2, 3]] = 0.0
    for dtype in (torch.float32, *HALVES):
        into = torch.full((8, 600), torch.nan, device=device, dtype=dtype)
        got = row_gradient(state, targets, PLAIN, softmax, tuple(slopes), into)
        assert (got[[1, 2, 3]] == 0).all() and got[sound].isfinite().all() and got[6].isnan().all()
        assert (got[4, ::2] == 0).all() and (got[5, 300:] == 0).all()


def test_an_all_ruled_out_row_has_empty_partials(device):
    raw, targets = torch.full((1, 77), -torch.inf, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    partials, _ = row_statistics(raw, targets, PLAIN, True, True)
    assert [value.item() for value in partials] == [-torch.inf, 0.0, 0.0, -torch.inf]


@pytest.mark.parametrize("options", OPTIONS)
def test_parts_of_a_vocabulary_merge_to_the_whole(options, device, seed):
    """Words 0..299 and 300..1000 apart: partials merge by max and rescaled sums, gradients are the whole's."""
    raw, split = strided(5, 1001, 3.0, device), 300
    targets = torch.tensor([0, 299, 300, 1000, 512], device=device)
    whole, _ = row_statistics(raw, targets, options, True, True)
    parts = [(raw[:, :split], targets), (raw[:, split:], targets - split)]
    found = [row_statistics(*part, options, True, True)[0] for part in parts]
    assert torch.equal(found[0].chosen.isneginf(), targets >= split)
    assert torch.equal(found[1].chosen.isneginf(), targets < split)
    top = torch.maximum(found[0].top, found[1].top)
    moved = [(part.top - top).exp() for part in found]
    total = sum(m * part.total for m, part in zip(moved, found, strict=True))
    dots = sum(m * (part.dots + (part.top - top) * part.total) for m, part in zip(moved, found, strict=True))
    merged = Partials(top, total, dots, torch.maximum(found[0].chosen, found[1].chosen))
    for name, one, other in zip(Partials._fields, merged, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    softmax, slopes = finish(merged, 1001, True)[2], tuple(torch.randn(2, 5, device=device))
    apart = [
        row_gradient(logits, local, options, softmax, slopes, torch.empty(logits.shape, device=device))
        for logits, local in parts
    ]
    together = row_gradient(raw, targets, options, softmax, slopes, torch.empty(raw.shape, device=device))
    assert torch.equal(torch.cat(apart, 1), together)


def test_dots_are_zero_unless_wanted_and_runs_repeat(device, seed):
    raw, targets = strided(4, 5003, 3.0, device), torch.arange(4, device=device)
    bare, full = (row_statistics(raw, targets, PLAIN, want, True)[0] for want in (False, True))
    assert (bare.dots == 0).all() and torch.equal(bare.total, full.total)
    again = row_statistics(raw, targets, PLAIN, True, True)[0]
    assert all(torch.equal(one, other) for one, other in zip(full, again, strict=True))


# ---- exponentials ----


def assert_same_bits(one: tuple[Exponentials, torch.Tensor], other: tuple[Exponentials, torch.Tensor], what="") -> None:
    for a, b in zip((*one[0], one[1]), (*other[0], other[1]), strict=True):
        assert torch.equal(a, b), what


def near_and_far(rows: int, vocab: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets; in every second row the target is too far below the others to be their base."""
    raw, targets = strided(rows, vocab, 2.0, device), torch.randint(vocab, (rows,), device=device)
    far = torch.arange(1, rows, 2, device=device)
    raw[far, targets[far]] -= 2 * most_above(False)
    return raw, targets


@pytest.mark.parametrize("options", OPTIONS)
def test_exponentials_over_the_logits_and_beside_them_are_the_same(options, device, seed):
    """A look ahead, and a second sweep for the rows that need it, settle on one base; runs repeat."""
    raw, targets = near_and_far(6, 8201, device)
    before, beside = raw.clone(), torch.empty(6, 8201, device=device)
    with poisoned_memory():
        apart = row_exponentials(raw, targets, options, True, beside)
        again = row_exponentials(raw, targets, options, True, torch.empty_like(beside))
        half = row_exponentials(raw, targets, options, True, torch.empty_like(beside, dtype=torch.bfloat16))
    assert torch.equal(raw, before) and apart[1] is beside
    assert_same_bits(apart, again)
    assert_same_bits((apart[0], beside.to(torch.bfloat16)), half, "rounded once, from float32")
    z = transform_logits(raw, options)
    gap = z.amax(1) - z.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(apart[0].shift, torch.where(gap > most_above(True), -gap, 0.0))
    assert options.softcap > 0.0 or apart[0].shift.count_nonzero() >= 3
    over = row_exponentials(raw, targets, options, True)
    assert over[1] is raw
    assert_same_bits(over, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 2051])
def test_exponentials_at_every_alignment(vocab, dtype, device, seed):
    """As for the gradient; another start adds the same words in another order."""
    values, targets = near_and_far(3, vocab, device)
    want = row_exponentials(
        values.contiguous(), targets, PLAIN, True, torch.empty(3, vocab, dtype=dtype, device=device)
    )
    for offset in range(4):
        held = torch.full((offset + 3 * (vocab + 5),), torch.nan, device=device)
        raw = held[offset:].view(3, vocab + 5)[:, :vocab]
        raw.copy_(values)
        for shift in range(8):
            around = torch.full((shift + 3 * (vocab + 9),), 7.0, device=device, dtype=dtype)
            out = around[shift:].view(3, vocab + 9)[:, :vocab]
            sums, matrix = row_exponentials(raw, targets, PLAIN, True, out)
            assert matrix is out
            assert torch.equal(sums.shift, want[0].shift)
            torch.testing.assert_close(sums.rest, want[0].rest, rtol=1e-6, atol=0)
            assert ((sums.dots - want[0].dots).abs() <= 1e-5 * sums.rest).all(), "a sum of two signs"
            at_target = torch.arange(3, device=device), targets
            torch.testing.assert_close(out[at_target], want[1][at_target])
            out[at_target] = want[1][at_target]
            assert torch.equal(out, want[1]), f"offset {offset}, shift {shift}"
            out.fill_(7.0)
            assert (around == 7.0).all(), f"offset {offset}, shift {shift}: written beside the row"


def test_exponentials_of_a_long_row_are_good_to_a_millionth(device, seed):
    raw, targets = strided(2, 151_936, 3.0, device), torch.tensor([5, 151_935], device=device)
    sums, matrix = row_exponentials(raw, targets, PLAIN, True, torch.empty(2, 151_936, device=device))
    own, top = raw.gather(1, targets[:, None]), raw.amax(1, keepdim=True)
    shifted = raw.double() - torch.where(top - own > most_above(True), top, own).double()
    exps = shifted.exp().scatter(1, targets[:, None], 0.0)
    torch.testing.assert_close(sums.rest.double(), exps.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.dots.double(), (shifted * exps).sum(1), rtol=1e-6, atol=1e-6 * exps.sum(1).max())
    assert torch.equal(matrix.gather(1, targets[:, None])[:, 0], -sums.rest)


def test_exponentials_of_no_word_touch_nobody(device, seed):
    """An id that is no word, which nothing checks on a GPU: a broken row of zeros, and no address beside it."""
    around = torch.full((5, 1000), 7.0, device=device)
    raw, targets = strided(3, 1000, 2.0, device), torch.tensor([-1, 3, 1000], device=device)
    sums, matrix = row_exponentials(raw, targets, PLAIN, True, around[1:4])
    assert sums.rest[[0, 2]].isnan().all() and (matrix[[0, 2]] == 0).all() and (around[[0, 4]] == 7).all()
    assert sums.rest[1] > 0 and (sums.dots[1] != 0)
    bare, _ = row_exponentials(raw, targets, PLAIN, False, around[1:4])
    assert bare.rest[1] > 0 and bare.dots[1] == 0


def test_exponentials_refuse_a_short_range(device):
    raw, targets = torch.zeros(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="float16's range is too short"):
        row_exponentials(raw, targets, PLAIN, True, raw.half())


# ---- the operators ----


def gradients(operator, case: HeadCase, dtype, device, backend: str, wide: bool = False) -> list[torch.Tensor]:
    """The operator's results and gradients on a case; `wide` widens the values of `dtype` to float64."""
    made = head_inputs(case, dtype=dtype, device=device)
    leaves = {n: made[n] for n in ("hidden", "weight", "bias") if made[n] is not None}
    leaves = {n: (t.double() if wide else t).detach().requires_grad_() for n, t in leaves.items()}
    options = {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale", "chunk_size")}
    with poisoned_memory():
        total, *seen = operator(leaves, made["targets"], options | {"bias": leaves.get("bias"), "backend": backend})
        return [*seen, *torch.autograd.grad(total, list(leaves.values()))]


def logprobs(leaves, targets, options):
    out = linear_logprobs(leaves["hidden"], leaves["weight"], targets, return_entropy=True, **options)
    factor = torch.linspace(-1, 1, max(targets.numel(), 1), device=targets.device)[: targets.numel()].to(
        out.logps.dtype
    )
    return (factor * (out.logps + 0.3 * out.entropy)).sum(), out.logps.detach(), out.entropy.detach()


def policy_loss(leaves, targets, options):
    """The rows as one sequence, an entropy bonus, and old log-probs that make some tokens clip."""
    count = targets.numel()
    advantages = torch.linspace(-2, 2, max(count, 1), device=targets.device)[:count]
    out = linear_policy_loss(
        leaves["hidden"][None],
        leaves["weight"],
        targets[None],
        advantages[None],
        response_mask=(targets != -100)[None],
        entropy_coef=0.1,
        **options,
    )
    return out.loss, out.loss.detach(), out.logps, out.entropy


def token_loss(leaves, targets, options):
    loss = linear_token_loss(
        leaves["hidden"], leaves["weight"], targets, lambda logps, entropy, _: 0.1 * entropy - logps, **options
    )
    return loss, loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("operator", [logprobs, policy_loss, token_loss])
@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
def test_operators_end_to_end(case, operator, dtype, device):
    got = gradients(operator, case, dtype, device, "cuda")
    eager = gradients(operator, case, dtype, device, "reference")
    truth = gradients(operator, case, dtype, device, "reference", wide=True)
    for at, (one, yardstick, want) in enumerate(zip(got, eager, truth, strict=True)):
        name = f"{case.name}, {operator.__name__}, result {at}"
        assert_close_to_truth(one, yardstick, want, name=name, dtype=one.dtype, floor=case.logit_size)


# ---- who is served ----


def test_chosen_by_name_alone_and_refusals_say_why(monkeypatch):
    served("cpu")
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    cpu = torch.device("cpu")
    assert backends.select("logprobs", device=cpu, dtype=torch.float32) == "portable"
    with pytest.raises(BackendError, match="float64"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="cuda")
    with pytest.raises(BackendError, match="divergence has no such backend"):
        backends.select("divergence", device=cpu, dtype=torch.float32, requested="cuda")
    monkeypatch.setattr(backends, "build_info", lambda: {"built": True, "cuda_architectures": ""})
    assert not backends._why_no_extension("cpu") and "without CUDA sources" in backends._why_no_extension("cuda")
    monkeypatch.setattr(backends, "build_info", lambda: {"built": False, "reason": "no such module"})
    for device in ("cpu", "cuda"):
        assert "extension not built (no such module)" in backends._why_no_extension(device)


# ---- the machine code ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="NO NVCC HERE: what csrc compiles to is not checked")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_keep_everything_in_registers(architecture, tmp_path):
    """No spills and no stack frame (an array that is indexed at run time goes to local memory), and no warnings."""
    source = ROOT / "csrc/logprobs/rows.cu"
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    command = ["nvcc", *flags, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "rows.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(kernels) == len(frames) == len(registers) == 24, done.stderr
    assert set(frames) == {("0", "0", "0")}, list(zip(kernels, frames, strict=True))
    assert max(registers) <= 64, "two blocks of 512 threads no longer fit a multiprocessor"


# ---- what only a GPU shows ----


@pytest.mark.gpu
def test_the_gpu_and_the_host_agree(seed):
    served("cuda")
    raw, targets = strided(7, 50_021, 3.0, "cpu"), torch.randint(50_021, (7,))
    slopes = tuple(torch.randn(2, 7))
    *here, softmax, state = softmax_of(raw, targets)
    *there, softmax_there, state_there = softmax_of(raw.cuda(), targets.cuda())
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=1e-5)
    one = row_gradient(state, targets, PLAIN, softmax, slopes, torch.empty(7, 50_021))
    given = tuple(slope.cuda() for slope in slopes)
    other = row_gradient(
        state_there, targets.cuda(), PLAIN, softmax_there, given, torch.empty(7, 50_021, device="cuda")
    )
    torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials_agree_with_the_host(dtype, seed):
    served("cuda")
    raw, targets = near_and_far(64, 50_021, "cpu")
    here = row_exponentials(raw, targets, PLAIN, True, torch.empty(64, 50_021, dtype=dtype))
    for into in (torch.empty(64, 50_021, dtype=dtype, device="cuda"), None):  # beside the logits, and over them
        sums, matrix = row_exponentials(raw.cuda(), targets.cuda(), PLAIN, True, into)
        sums, matrix = Exponentials(*(s.cpu() for s in sums)), matrix.float().cpu()
        torch.testing.assert_close(sums.shift, here[0].shift)
        torch.testing.assert_close(sums.rest, here[0].rest, rtol=1e-5, atol=0)
        assert ((sums.dots - here[0].dots).abs() <= 1e-5 * sums.rest).all(), "a sum of two signs"
        rounding = max(1e-5, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(matrix, here[1].float(), rtol=rounding, atol=1e-9)


@pytest.mark.gpu
def test_kernels_follow_the_current_stream_and_replay_from_a_graph(seed):
    served("cuda")
    raw, targets = torch.zeros(16, 40_000, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")
    into = torch.empty(16, 40_000, device="cuda")
    row_statistics(raw, targets, PLAIN, True, True)  # loads the kernels outside the capture
    row_exponentials(raw, targets, PLAIN, True, into)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        partials, _ = row_statistics(raw, targets, PLAIN, True, True)
        sums, _ = row_exponentials(raw, targets, PLAIN, True, into)
    raw.copy_(torch.randn(16, 40_000))
    graph.replay()
    torch.testing.assert_close(partials.total, (raw - raw.amax(-1, keepdim=True)).exp().sum(-1))
    base = raw[:, :1] - sums.shift[:, None]  # the target's logit, or the largest where that is far above
    torch.testing.assert_close(sums.rest, (raw - base).exp()[:, 1:].sum(-1))
