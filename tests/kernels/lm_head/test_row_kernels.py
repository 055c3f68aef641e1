"""The row kernels of every backend against float64 autograd: partials, gradients, hostile rows and lengths.

Without a GPU, Triton's run in its interpreter and those of csrc in their host build, where the extension is built.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from mmrpt_kernels.common.head import HeadOptions, transform_logits
from mmrpt_kernels.logprobs.rows import Partials, RowKernels, Softmax, finish, finish_exponentials, row_kernels

from mmrpt_kernels.backends import TRITON_MISSING
from mmrpt_kernels.common.extension import extension
from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory, sum_cap

PLAIN = HeadOptions()
OPTIONS = {
    "plain": PLAIN,
    "scaled": HeadOptions(0.7, 0.0, 1.3),
    "capped": HeadOptions(1.3, 5.0, 1.7),
    "negative_scale": HeadOptions(1.0, 0.0, -2.0),
}
# Length 1, shorter than a warp, primes, a tile and one more, one beyond several tiles.
VOCABS = (1, 2, 33, 1009, 4096, 4097, 20_011)
ROWS = 5
GPU = pytest.mark.gpu


@pytest.fixture(
    params=[
        ("portable", "cpu"),
        ("triton", "cpu"),
        ("cuda", "cpu"),
        *(pytest.param((name, "cuda"), marks=GPU) for name in ("portable", "triton", "cuda")),
    ],
    ids=lambda param: "-".join(param),
)
def place(request) -> tuple[RowKernels, str]:
    """Row kernels and the device they run on here."""
    name, device = request.param
    if name == "triton" and (TRITON_MISSING or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip(TRITON_MISSING or "a process with a GPU compiles its kernels")
    if name == "cuda" and extension() is None:
        pytest.skip("the extension is not built")
    importlib.import_module(f"mmrpt_kernels.logprobs.{name}")
    return row_kernels(name), device


def logits(rows: int, vocab: int, size: float = 4.0) -> torch.Tensor:
    """(rows, vocab) float32 views into a wider table whose other columns are NaN."""
    table = torch.full((rows, vocab + 3), torch.nan)
    table[:, 1 : vocab + 1] = size * torch.randn(rows, vocab)
    return table[:, 1 : vocab + 1]


def to(device: str, view: torch.Tensor) -> torch.Tensor:
    """A copy of a view on `device` with the view's row stride."""
    base = torch.full((view.shape[0], view.stride(0)), torch.nan, device=device)
    copied = base[:, 1 : view.shape[1] + 1]
    copied.copy_(view)
    return copied


def run(
    place: tuple[RowKernels, str],
    raw: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    slopes: tuple[torch.Tensor, torch.Tensor | None] | None,
    *,
    dtype: torch.dtype = torch.float32,
    merged: Softmax | None = None,
) -> tuple[Partials, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Partials, logps, entropy and gradient, all on the CPU; kernels that round write `dtype` into a second buffer."""
    kernels, device = place
    learns = slopes is not None and slopes[1] is not None
    keep = slopes is not None and (learns or options.softcap > 0.0)
    with poisoned_memory():
        taken = targets.to(device)
        partials, state = kernels.statistics(to(device, raw), taken, options, True, keep)
        seen = Partials(*(t.clone() for t in partials))
        logps, entropy, softmax = finish(partials, raw.shape[1], True)
        gradient = None
        if slopes is not None:
            whole = softmax if merged is None else Softmax(*(t.to(device) for t in merged))
            given = tuple(None if t is None else t.to(device) for t in slopes)
            into = None
            if kernels.rounds and dtype != torch.float32:
                into = torch.empty(raw.shape, dtype=dtype, device=device)
            gradient = kernels.gradient(state, taken, options, whole, given, into)
    if device == "cuda":
        torch.cuda.synchronize()
    return Partials(*(t.cpu() for t in seen)), logps.cpu(), entropy.cpu(), None if gradient is None else gradient.cpu()


def truth(
    raw: torch.Tensor, targets: torch.Tensor, options: HeadOptions, slopes=None, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """The same by autograd in plain torch; in float32 it is the yardstick of the error rule."""
    raw = raw.detach().to(dtype).requires_grad_()
    z = transform_logits(raw, options)
    top, log_sum = z.amax(-1), torch.logsumexp(z, -1)
    here = (targets >= 0) & (targets < raw.shape[1])
    own = z.gather(1, targets.clamp(0, raw.shape[1] - 1)[:, None])[:, 0]
    exps = (z - top[:, None]).exp()
    log_probs = (z - log_sum[:, None]).clamp_min(-1e30)  # 0 log 0 = 0
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = torch.where(here, own, -torch.inf)
    made = {
        "top": top,
        "total": exps.sum(-1),
        "dots": (exps * (z - top[:, None]).clamp_min(-1e30)).sum(-1),
        "chosen": chosen,
        "logps": chosen - log_sum,
        "entropy": entropy,
    }
    if slopes is not None:
        # A word of another part adds nothing here: what is left of its log-probability is - log sum exp.
        loss = ((torch.where(here, own, 0.0) - log_sum) * slopes[0].to(dtype)).sum()
        if slopes[1] is not None:
            loss = loss + (entropy * slopes[1].to(dtype)).sum()
        (made["gradient"],) = torch.autograd.grad(loss, raw)
    return {name: value.detach() for name, value in made.items()}


def assert_true(found: dict, raw, targets, options, slopes=None, *, rounded=torch.float32, what: str = "") -> None:
    """Every entry by the error rule: float64 is the truth, plain float32 the yardstick."""
    exact, eager = (truth(raw, targets, options, slopes, dtype) for dtype in (torch.float64, torch.float32))
    size = max(1.0, exact["top"].abs().max().item())  # what differences of logits are known to
    # The slope of a softcap is 1 - tanh^2: what is left of it where tanh is nearly 1 is known to eps of 1.
    capped = 0.0 if slopes is None or not options.softcap or rounded != torch.float32 else slopes[0].abs().max().item()
    for name, value in found.items():
        dtype, floor = (rounded, capped) if name == "gradient" else (torch.float32, size)
        cap = sum_cap(raw.shape[1], exponents=size, dtype=dtype)
        rule = {"name": f"{what} {name}", "dtype": dtype, "floor": floor, "eager_cap": cap}
        assert_close_to_truth(value.float(), eager[name], exact[name], **rule)


def named(partials: Partials, logps, entropy, gradient=None) -> dict[str, torch.Tensor]:
    made = partials._asdict() | {"logps": logps, "entropy": entropy}
    return made if gradient is None else made | {"gradient": gradient}


def slopes_of(rows: int, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.randn(rows), torch.randn(rows) if entropy else None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("vocab", VOCABS)
def test_partials_and_gradient(place, vocab, options, seed):
    raw, targets, slopes = logits(ROWS, vocab), torch.randint(vocab, (ROWS,)), slopes_of(ROWS)
    found = named(*run(place, raw, targets, options, slopes))
    assert_true(found, raw, targets, options, slopes, what=f"seed {seed}")
    assert (found["dots"] <= 0).all() and (found["logps"] <= 0).all() and (found["entropy"] >= 0).all()
    alone = run(place, raw, targets, options, (slopes[0], None))[3]
    assert_true({"gradient": alone}, raw, targets, options, (slopes[0], None), what=f"no entropy, seed {seed}")


@pytest.mark.parametrize("options", (OPTIONS["plain"], OPTIONS["capped"]), ids=("plain", "capped"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounded_gradient(place, dtype, options, seed):
    """Rounded once, from float32: every word within half a unit in its last place, not only the largest."""
    if not place[0].rounds:
        pytest.skip("writes over the logits")
    raw, targets, slopes = logits(ROWS, 1009), torch.randint(1009, (ROWS,)), slopes_of(ROWS)
    found, wide = (run(place, raw, targets, options, slopes, dtype=kind)[3] for kind in (dtype, torch.float32))
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("size", (1.0, 4.0, 1e4))
def test_long_rows(place, size, seed):
    """152k words: sums to 1e-6 of float64's, log-probabilities to 1e-5."""
    raw, targets = logits(2, 151_936, size), torch.randint(151_936, (2,))
    partials, logps, entropy, gradient = run(place, raw, targets, PLAIN, slopes := slopes_of(2))
    exact = truth(raw, targets, PLAIN, slopes)
    for name in ("total", "dots"):
        torch.testing.assert_close(getattr(partials, name).double(), exact[name], rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(logps.double(), exact["logps"], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact["entropy"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact["gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_huge_logits(place, options, seed):
    raw, targets, slopes = logits(ROWS, 257, 1e4), torch.randint(257, (ROWS,)), slopes_of(ROWS)
    found = run(place, raw, targets, options, slopes)
    assert_true(named(*found), raw, targets, options, slopes, what=f"seed {seed}")
    assert (found[1] <= 0).all() and (found[2] >= 0).all() and found[3].isfinite().all()


def test_largest_floats(place, seed):
    """Differences that overflow are probabilities of exactly 0, not NaN."""
    raw, targets = logits(2, 9001), torch.tensor([4, 4])
    raw[0], raw[1] = -3e38, 3e38
    raw[0, 5000:], raw[1, 5000:] = 3e38, -3e38
    partials, logps, entropy, gradient = run(place, raw, targets, PLAIN, slopes_of(2))
    assert torch.equal(partials.total, torch.tensor([4001.0, 5000.0])) and (partials.dots == 0).all()
    torch.testing.assert_close(entropy, partials.total.log())
    assert logps[0] == -torch.inf and gradient.isfinite().all() and (gradient[1, 5000:] == 0).all()


def test_targets_of_another_part(place, seed):
    """chosen is -inf, and the gradient has no word of its own."""
    raw, slopes = logits(6, 77), slopes_of(6)
    targets = torch.tensor([-1, 77, 2**40, 2**32 + 5, 5 - 2**32, 3])  # as 32-bit numbers two of them are words
    partials, _, _, gradient = run(place, raw, targets, PLAIN, slopes)
    assert (partials.chosen[:5] == -torch.inf).all() and partials.chosen[5] == raw[5, 3]
    assert_true({"gradient": gradient}, raw, targets, PLAIN, slopes, what=f"seed {seed}")


@pytest.mark.parametrize("left", (100, 1))
@pytest.mark.parametrize("options", (OPTIONS["plain"], OPTIONS["scaled"]), ids=("plain", "scaled"))
def test_forbidden_words_count_nothing(place, options, left, seed):
    raw, slopes = logits(ROWS, 300), slopes_of(ROWS)
    raw[:, left:] = -torch.inf
    targets = torch.randint(left, (ROWS,))
    partials, logps, entropy, gradient = run(place, raw, targets, options, slopes)
    few = run(place, logits_like(raw[:, :left]), targets, options, slopes)
    for value, expected in zip((*partials, logps, entropy), (*few[0], few[1], few[2]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :left], few[3], rtol=1e-5, atol=1e-6)
    assert (gradient[:, left:] == 0).all()


def logits_like(raw: torch.Tensor) -> torch.Tensor:
    """The same values in the layout of `logits`."""
    made = logits(*raw.shape)
    made.copy_(raw)
    return made


def test_a_row_without_words(place):
    """A part of a vocabulary may be ruled out altogether: it adds nothing to a merge, and gets no gradient from it."""
    raw = logits(2, 40)
    raw[0] = -torch.inf
    merged = Softmax(torch.tensor([1.5, raw[1].max()]), torch.tensor([3.0, 9.0]), torch.tensor([0.7, 0.9]))
    partials, _, _, gradient = run(place, raw, torch.tensor([3, 3]), PLAIN, slopes_of(2), merged=merged)
    assert partials.top[0] == -torch.inf and partials.total[0] == 0 and partials.dots[0] == 0
    one_hot = torch.zeros(40)
    one_hot[3] = gradient[0, 3]
    assert gradient[0].isfinite().all() and torch.equal(gradient[0], one_hot)


@pytest.mark.parametrize("poison", (torch.nan, torch.inf))
@pytest.mark.parametrize("options", (OPTIONS["plain"], OPTIONS["capped"]), ids=("plain", "capped"))
def test_poison_stays_in_its_row(place, poison, options, seed):
    """NaN or inf logits: their row says NaN, the others are what they were; idle rows are exactly zero all the same."""
    vocab = 5003
    raw, targets, slopes = logits(ROWS, vocab), torch.randint(vocab, (ROWS,)), slopes_of(ROWS)
    clean = run(place, raw, targets, options, slopes)
    raw[1, 17] = poison
    raw[3] = poison
    slopes[0][3] = slopes[1][3] = 0.0
    found = run(place, raw, targets, options, slopes)
    if not (poison == torch.inf and options.softcap > 0):  # a cap makes a finite logit of inf
        assert found[0].total[1].isnan() and found[1][1].isnan() and found[3][1].isnan().all()
    assert (found[3][3] == 0).all()
    for row in (0, 2, 4):
        for value, expected in zip((*found[0], *found[1:]), (*clean[0], *clean[1:]), strict=True):
            assert torch.equal(value[row], expected[row])


def test_idle_rows_are_exactly_zero(place, seed):
    raw, targets = logits(ROWS, 999), torch.randint(999, (ROWS,))
    d_logps, d_entropy = torch.randn(ROWS), torch.zeros(ROWS)
    d_logps[1] = 0.0
    d_logps[2], d_entropy[2] = 0.0, 1.0
    gradient = run(place, raw, targets, PLAIN, (d_logps, d_entropy))[3]
    assert (gradient[1] == 0).all() and (gradient[2] != 0).any()
    gradient = run(place, raw, targets, PLAIN, (d_logps, None))[3]
    assert (gradient[1] == 0).all() and (gradient[2] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("options", (OPTIONS["plain"], OPTIONS["capped"]), ids=("plain", "capped"))
def test_parts_of_a_vocabulary_merge(place, options, seed):
    """Partials of three parts, merged, give the whole row's numbers; each part's gradient from them is its slice."""
    vocab, cuts = 1500, (0, 700, 701, 1500)
    raw, targets, slopes = logits(ROWS, vocab), torch.randint(vocab, (ROWS,)), slopes_of(ROWS)
    targets[0], targets[1] = 700, 1499
    parts = [(logits_like(raw[:, a:b]), targets - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    seen = [run(place, part, ids, options, None)[0] for part, ids in parts]
    top = torch.stack([p.top for p in seen]).amax(0)
    shifts = [p.top - top for p in seen]
    merged = Partials(
        top,
        sum(s.exp() * p.total for s, p in zip(shifts, seen, strict=True)),
        sum(s.exp() * (p.dots + s * p.total) for s, p in zip(shifts, seen, strict=True)),
        torch.stack([p.chosen for p in seen]).amax(0),
    )
    logps, entropy, softmax = finish(merged, vocab, True)
    gradient = torch.cat([run(place, *part, options, slopes, merged=softmax)[3] for part in parts], 1)
    assert_true(
        {"logps": logps, "entropy": entropy, "gradient": gradient}, raw, targets, options, slopes, what=f"seed {seed}"
    )


def rows_are_alone(place: tuple[RowKernels, str]) -> bool:
    """Whether a row's bits do not depend on its neighbours: torch's sums on a GPU share their threads among rows."""
    kernels, device = place
    return kernels.rounds or device == "cpu"


def test_no_rows(place):
    empty = torch.empty(0, 10)
    kernels, device = place
    partials, state = kernels.statistics(
        empty.to(device), torch.empty(0, dtype=torch.int64, device=device), PLAIN, True, True
    )
    assert all(p.shape == (0,) for p in partials)


def test_same_bits_every_time_and_whatever_the_other_rows(place, seed):
    raw, targets, slopes = logits(ROWS, 20_011), torch.randint(20_011, (ROWS,)), slopes_of(ROWS)
    once, again = (run(place, raw, targets, PLAIN, slopes) for _ in range(2))
    alone = run(place, logits_like(raw[2:3]), targets[2:3], PLAIN, tuple(s[2:3] for s in slopes))
    for a, b, c in zip((*once[0], *once[1:]), (*again[0], *again[1:]), (*alone[0], *alone[1:]), strict=True):
        assert torch.equal(a, b) and (torch.equal(a[2:3], c) or not rows_are_alone(place))


def one_sweep(
    place: tuple[RowKernels, str], raw: torch.Tensor, targets: torch.Tensor, options: HeadOptions, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """logps, entropy, and d logps / d raw as matrix and factor make it, on the CPU; dtype as for `run`."""
    kernels, device = place
    into = None
    with poisoned_memory():
        if kernels.rounds and dtype != torch.float32:
            into = torch.empty(raw.shape, dtype=dtype, device=device)
        sums, matrix = kernels.exponentials(to(device, raw), targets.to(device), options, True, into)
        assert matrix.dtype == (torch.float32 if into is None else dtype)
        logps, entropy, total = finish_exponentials(sums, raw.shape[1], True)
    if device == "cuda":
        torch.cuda.synchronize()
    gradient = matrix.float() * (-options.logit_scale / options.temperature / total)[:, None]
    found = {"logps": logps, "entropy": entropy, "gradient": gradient, "matrix": matrix.float(), "total": total}
    return {name: value.cpu() for name, value in found.items()}


def assert_one_sweep(found: dict, raw, targets, options, *, dtype=torch.float32, what: str = "") -> None:
    slopes = (torch.ones(len(raw)), None)
    assert_true({name: found[name] for name in ("logps", "entropy")}, raw, targets, options, slopes, what=what)
    assert_true({"gradient": found["gradient"]}, raw, targets, options, slopes, rounded=dtype, what=what)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("vocab", VOCABS)
def test_exponentials(place, vocab, options, seed):
    """Over the logits and beside them: the same log-probabilities, entropies and gradients as two sweeps give."""
    raw, targets = logits(ROWS, vocab), torch.randint(vocab, (ROWS,))
    assert_one_sweep(one_sweep(place, raw, targets, options), raw, targets, options, what=f"seed {seed}")
    if place[0].rounds:
        found = one_sweep(place, raw, targets, options, torch.bfloat16)
        assert_one_sweep(found, raw, targets, options, dtype=torch.bfloat16, what=f"bfloat16, seed {seed}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gap", (15.9, 16.1, 60.0, 1e4, float("inf")))
def test_exponentials_of_a_target_far_below(place, gap, dtype, seed):
    """Whatever the base is, log-probabilities keep their precision and no exponential overflows."""
    raw, targets = logits(ROWS, 5003), torch.randint(5003, (ROWS,))
    raw[torch.arange(ROWS), targets] = raw.amax(1) - gap
    raw[1] += 3e4  # far from 0 as well
    found = one_sweep(place, raw, targets, PLAIN, dtype)
    assert found["matrix"].isfinite().all() and (found["logps"] <= 0).all()
    if gap == float("inf"):
        assert (found["logps"] == -torch.inf).all() and found["entropy"].isfinite().all()
        raw[torch.arange(ROWS), targets] = -1e6  # whose gradient is the same, and whose log-probability is a number
        found["logps"] = one_sweep(place, raw, targets, PLAIN)["logps"]
    assert_one_sweep(found, raw, targets, PLAIN, dtype=dtype, what=f"seed {seed}")


def test_exponentials_of_a_sure_word(place, seed):
    """-log1p(rest) where 1 + rest is 1: the loss and the gradient of what the model is sure of are not lost."""
    raw, targets = logits(ROWS, 999, 1.0), torch.randint(999, (ROWS,))
    raw[torch.arange(ROWS), targets] += 30.0
    found = one_sweep(place, raw, targets, PLAIN)
    # In float64 too 1 - p is known to 1e-16 only: the truth is rest / (1 + rest).
    own = targets[:, None]
    exps = (raw.double() - raw.double().gather(1, own)).exp().scatter(1, own, 0.0)
    rest = exps.sum(1, keepdim=True)
    gradient = (-exps).scatter(1, own, rest) / (1.0 + rest)
    torch.testing.assert_close(found["logps"].double(), -rest[:, 0].log1p(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found["gradient"].double(), gradient, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("options", (OPTIONS["plain"], OPTIONS["capped"]), ids=("plain", "capped"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_exponentials_keep_poison_in_its_row(place, poison, options, dtype, seed):
    """A broken row says NaN and leaves a matrix of finite numbers, all 0 where its sum is broken."""
    raw, targets = logits(ROWS, 5003), torch.randint(5003, (ROWS,))
    clean = one_sweep(place, raw, targets, options, dtype)
    raw[1, 17], targets[1] = poison, 17
    raw[3, (targets[3] + 1) % 5003] = poison
    raw[4] = poison
    found = one_sweep(place, raw, targets, options, dtype)
    assert found["matrix"].isfinite().all()
    if options.softcap == 0.0 or poison != poison:
        assert found["logps"][4].isnan() and (found["matrix"][4] == 0).all()
        assert not found["logps"][1] > -1e30
        assert poison == -torch.inf or found["logps"][3].isnan() and (found["matrix"][3] == 0).all()
    for row in (0, 2):
        for name, value in found.items():
            assert torch.equal(value[row], clean[name][row]), name


@pytest.mark.parametrize("size", (1.0, 4.0, 1e4))
def test_exponentials_of_long_rows(place, size, seed):
    raw, targets = logits(2, 151_936, size), torch.randint(151_936, (2,))
    found, exact = one_sweep(place, raw, targets, PLAIN), truth(raw, targets, PLAIN, (torch.ones(2), None))
    torch.testing.assert_close(found["logps"].double(), exact["logps"], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(found["entropy"].double(), exact["entropy"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found["gradient"].double(), exact["gradient"], rtol=1e-5, atol=1e-6)


def test_exponentials_have_the_same_bits_whatever_the_other_rows(place, seed):
    raw, targets = logits(ROWS, 20_011), torch.randint(20_011, (ROWS,))
    once, again = (one_sweep(place, raw, targets, PLAIN) for _ in range(2))
    alone = one_sweep(place, logits_like(raw[2:3]), targets[2:3], PLAIN)
    for name in once:
        assert torch.equal(once[name], again[name])
        assert torch.equal(once[name][2:3], alone[name]) or not rows_are_alone(place)
    kernels, device = place
    none = torch.empty(0, 10, device=device)
    sums, matrix = kernels.exponentials(none, torch.empty(0, dtype=torch.int64, device=device), PLAIN, True, None)
    assert matrix.shape == (0, 10) and all(s.shape == (0,) for s in sums)


def test_exponentials_of_no_word_touch_nobody(place, seed):
    """An id that is no word, which nothing checks on a GPU, makes a broken row and no address beside it."""
    if not place[0].rounds:
        pytest.skip("torch checks the index")
    raw, targets = logits(3, 1000), torch.tensor([-1, 3, 1000])
    found = one_sweep(place, raw, targets, PLAIN, torch.bfloat16)
    assert found["logps"][[0, 2]].isnan().all() and (found["matrix"][[0, 2]] == 0).all()
    assert_one_sweep(
        {name: value[1:2] for name, value in found.items()}, raw[1:2], targets[1:2], PLAIN, dtype=torch.bfloat16
    )


def test_unknown_rows_say_so():
    with pytest.raises(RuntimeError, match="rows: got 'fast', but row kernels are registered by "):
        row_kernels("fast")
