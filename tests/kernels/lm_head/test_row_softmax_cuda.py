"""The row kernels in CUDA C++: alignment, rounding to half precision, machine code, and the GPU against the host build.

What every set of row kernels must do is in test_row_softmax.py; here is what only these can get wrong.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmrpt_kernels import backends, linear_logprobs
from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits
from mmrpt_kernels.lm_head.row_softmax import Softmax, finish_partials, max_above_target
from mmrpt_kernels.lm_head.row_softmax_cuda import exponentials, gradient, statistics
from mmrpt_kernels.testing import poisoned_memory

ROOT = Path(__file__).resolve().parents[3]
HALVES = (torch.bfloat16, torch.float16)
PLAIN = HeadOptions()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The host's build, and the GPU where there is one."""
    return served(request.param)


def served(device: str) -> str:
    if reason := backends._why_no_extension(device):
        pytest.skip(reason)
    return device


def near_and_far(rows: int, vocab: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets; in every second row the target is too far below the others to be their base."""
    logits, targets = (2.0 * torch.randn(rows, vocab)).to(device), torch.randint(vocab, (rows,), device=device)
    far = torch.arange(1, rows, 2, device=device)
    logits[far, targets[far]] -= 2 * max_above_target(False)
    return logits, targets


def all_kernels(logits, bias, targets, slopes, make_out) -> dict[str, torch.Tensor]:
    """Every number and matrix of the three kernels; make_out(): an output (n, V)."""
    partials, state = statistics(logits, bias, targets, PLAIN, True, True)
    *_, softmax = finish_partials(partials, logits.shape[1], True)
    found = {"gradient": make_out()}
    gradient(state, bias, targets, PLAIN, softmax, slopes, found["gradient"])
    if found["gradient"].dtype != torch.float16:
        found["matrix"] = make_out()
        found |= exponentials(logits, bias, targets, PLAIN, True, found["matrix"])._asdict()
        found["rest_dots"] = found.pop("dots")  # the partials have dots too
    return found | partials._asdict()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 8193])
def test_every_alignment_gives_the_same_bits(vocab, dtype, device, seed):
    """Logits, bias and output at every offset from a 16-byte boundary; nothing is written beside a row."""
    values, targets = near_and_far(3, vocab, device)
    bias, slopes = torch.randn(vocab, device=device), tuple(torch.randn(2, 3, device=device))
    want = all_kernels(values, bias, targets, slopes, lambda: values.new_empty(3, vocab, dtype=dtype))
    for offset in range(4):
        logits = torch.full((offset + 3 * (vocab + 5),), torch.nan, device=device)[offset:].view(3, vocab + 5)
        logits[:, :vocab] = values
        shifted_bias = torch.cat([bias.new_full((offset,), torch.nan), bias])[offset:]
        for shift in range(8):
            tables = []

            def make_out(shift=shift, tables=tables) -> torch.Tensor:
                tables.append(torch.full((shift + 3 * (vocab + 9),), 7.0, device=device, dtype=dtype))
                return tables[-1][shift:].view(3, vocab + 9)[:, :vocab]

            found = all_kernels(logits[:, :vocab], shifted_bias, targets, slopes, make_out)
            for name, value in want.items():
                assert torch.equal(found[name], value), f"{name}, offset {offset}, shift {shift}"
            for table in tables:
                table[shift:].view(3, vocab + 9)[:, :vocab].fill_(7.0)
                assert (table == 7.0).all(), f"offset {offset}, shift {shift}: written beside a row"
        assert torch.equal(logits[:, :vocab], values) and logits[:, vocab:].isnan().all()


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
    logits = torch.tensor([0.0, -torch.inf], device=device).repeat(count, 1)
    softmax = Softmax(torch.zeros(count, device=device), torch.ones(count, device=device), None)
    targets = torch.ones(count, dtype=torch.int64, device=device)
    got = logits.new_empty(count, 2, dtype=dtype)
    gradient(logits, None, targets, PLAIN, softmax, (values, None), got)
    want = torch.stack([-values, values], 1).to(dtype)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("options", (PLAIN, HeadOptions(0.7), HeadOptions(1.3, 5.0, -1.7)))
def test_exponentials_over_the_logits_and_beside_them_are_the_same(options, device, seed):
    """A look ahead, and a second sweep for the rows that need it, settle on one base."""
    logits, targets = near_and_far(6, 8201, device)
    beside, half = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bfloat16)
    with poisoned_memory():
        sums = exponentials(logits, None, targets, options, True, beside)
        sums_of_half = exponentials(logits, None, targets, options, True, half)
        z = transform_logits(logits, options)
        gap = z.amax(1) - z.gather(1, targets[:, None])[:, 0]
        over = exponentials(logits, None, targets, options, True, logits)
    torch.testing.assert_close(sums.shift, torch.where(gap > max_above_target(True), -gap, 0.0))
    assert options.softcap > 0.0 or sums.shift.count_nonzero() >= 3
    for one, other, third in zip(sums, over, sums_of_half, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert torch.equal(logits, beside) and torch.equal(half, beside.to(torch.bfloat16)), "rounded once, from float32"


def test_exponentials_refuse_a_short_range(device):
    logits, targets = torch.zeros(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="float16's range is too short"):
        exponentials(logits, None, targets, PLAIN, True, logits.half())


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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="NO NVCC HERE: what csrc compiles to is not checked")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_keep_everything_in_registers(architecture, tmp_path):
    """No spills and no stack frame (an array that is indexed at run time goes to local memory), and no warnings."""
    source = ROOT / "csrc/lm_head/row_softmax.cu"
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_and_the_host_agree(dtype, seed):
    served("cuda")
    logits, targets = near_and_far(64, 50_021, "cpu")
    given = logits, torch.randn(50_021), targets
    slopes, out = tuple(torch.randn(2, 64)), torch.empty(64, 50_021, dtype=dtype)
    here = all_kernels(*given, slopes, lambda: torch.empty_like(out))
    taken = [t.cuda() for t in given], tuple(slope.cuda() for slope in slopes)
    there = all_kernels(*taken[0], taken[1], lambda: torch.empty_like(out, device="cuda"))
    rounding = max(1e-5, 2 * torch.finfo(dtype).eps)
    for name, value in here.items():
        # dots are sums of two signs, of terms as large as the total's
        atol = {"rest_dots": 1e-5 * here["rest"].max().item(), "gradient": 1e-7}.get(name, 1e-9)
        rtol = rounding if value.dim() == 2 else 1e-5
        there[name] = there[name].cpu()
        torch.testing.assert_close(there[name].float(), value.float(), rtol=rtol, atol=atol, msg=f"{name} differs")
    over = taken[0][0]
    sums = exponentials(over, *taken[0][1:], PLAIN, True, over)
    torch.testing.assert_close(sums.rest.cpu(), here["rest"], rtol=1e-5, atol=0)
    torch.testing.assert_close(over.cpu(), here["matrix"].float(), rtol=rounding, atol=1e-9)


@pytest.mark.gpu
def test_kernels_follow_the_current_stream_and_replay_from_a_graph(seed):
    served("cuda")
    logits, targets = torch.zeros(16, 40_000, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")
    out = torch.empty(16, 40_000, device="cuda")
    statistics(logits, None, targets, PLAIN, True, True)  # loads the kernels outside the capture
    exponentials(logits, None, targets, PLAIN, True, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        partials, _ = statistics(logits, None, targets, PLAIN, True, True)
        sums = exponentials(logits, None, targets, PLAIN, True, out)
    logits.copy_(torch.randn(16, 40_000))
    graph.replay()
    torch.testing.assert_close(partials.total, (logits - logits.amax(-1, keepdim=True)).exp().sum(-1))
    base = logits[:, :1] - sums.shift[:, None]  # the target's logit, or the largest where that is far above
    torch.testing.assert_close(sums.rest, (logits - base).exp()[:, 1:].sum(-1))
