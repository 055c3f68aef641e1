"""The row kernels in CUDA C++: their host build against float64, the machine code they compile to, and the GPU itself.

What every set of row kernels must do is in test_row_kernels.py; here is what only these can get wrong: alignment,
tails, rounding to half precision, the extension's bindings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mmrpt_kernels.common.head import HeadOptions, transform_logits
from mmrpt_kernels.logprobs.cuda import row_exponentials, row_gradient, row_statistics
from mmrpt_kernels.logprobs.rows import Exponentials, Softmax, finish, most_above

from mmrpt_kernels import backends, linear_logprobs
from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.testing import poisoned_memory

ROOT = Path(__file__).resolve().parents[3]
HALVES = (torch.bfloat16, torch.float16)
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


def softmax_of(raw, targets, options=PLAIN) -> tuple[torch.Tensor, torch.Tensor, Softmax, torch.Tensor]:
    """logps, entropy, what the gradient wants of them, and the state."""
    partials, state = row_statistics(raw, targets, options, True, True)
    return *finish(partials, raw.shape[-1], True), state


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 8193])
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
        assert state is raw and torch.equal(raw, values), "the gradient reads the logits"
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


def test_dots_are_zero_unless_wanted(device, seed):
    raw, targets = strided(4, 5003, 3.0, device), torch.arange(4, device=device)
    bare, full = (row_statistics(raw, targets, PLAIN, want, True)[0] for want in (False, True))
    assert (bare.dots == 0).all() and torch.equal(bare.total, full.total)


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
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 8193])
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
