"""The row kernels of every backend against float64 autograd: sums, matrices, gradients, hostile rows and lengths.

Without a GPU, Triton's run in its interpreter and those of csrc in their host build, where the extension is built.
"""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.backends import TRITON_MISSING
from mmrpt_kernels.common.extension import extension
from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.lm_head.row_softmax import Partials, Softmax
from tests.kernels.lm_head.row_softmax_cases import (
    PLAIN,
    Place,
    Rows,
    assert_same_bits,
    assert_true,
    draw,
    draw_slopes,
    view_of,
)

OPTIONS = {
    "plain": PLAIN,
    "scaled": HeadOptions(0.7, 0.0, 1.3),
    "capped": HeadOptions(1.3, 5.0, 1.7),
    "negative_scale": HeadOptions(1.0, 0.0, -2.0),
}
# Length 1, shorter than a warp, primes, a tile and one more, one beyond several tiles; one with logits of 1e4.
SIZES = {1: 4.0, 2: 4.0, 33: 4.0, 257: 1e4, 1009: 4.0, 4096: 4.0, 4097: 4.0, 12_289: 4.0}
ROWS = 5
PLACES = [(name, "cpu") for name in ("portable", "triton", "cuda")]
PLACES += [pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name, _ in PLACES]

by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
plain_and_capped = pytest.mark.parametrize("options", (PLAIN, OPTIONS["capped"]), ids=("plain", "capped"))
with_and_without_bias = pytest.mark.parametrize("has_bias", (False, True), ids=("", "bias"))


@pytest.fixture(params=PLACES, ids=lambda param: "-".join(param))
def place(request) -> Place:
    backend, device = request.param
    if backend == "triton" and (TRITON_MISSING or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip(TRITON_MISSING or "a process with a GPU compiles its kernels")
    if backend == "cuda" and extension() is None:
        pytest.skip("the extension is not built")
    return Place(backend, device)


@by_options
@pytest.mark.parametrize("vocab", SIZES)
@with_and_without_bias
def test_partials_and_gradient(place, has_bias, vocab, options, seed):
    rows, slopes = draw(ROWS, vocab, size=SIZES[vocab], has_bias=has_bias), draw_slopes(ROWS)
    found = place.two_sweeps(rows, options, slopes)
    assert_true(found, rows, options, slopes, what=f"seed {seed}")
    assert (found["dots"] <= 0).all() and (found["logps"] <= 0).all() and (found["entropy"] >= 0).all()
    alone = place.two_sweeps(rows, options, (slopes[0], None), want_entropy=False)
    assert (alone.pop("dots") == 0).all()
    assert_true(alone, rows, options, (slopes[0], None), what=f"no entropy, seed {seed}")


@by_options
@pytest.mark.parametrize("vocab", SIZES)
@with_and_without_bias
def test_exponentials(place, has_bias, vocab, options, seed):
    """Over the logits and beside them: the log-probabilities, entropies and gradients of two sweeps."""
    rows = draw(ROWS, vocab, size=SIZES[vocab], has_bias=has_bias)
    for dtype in (None, torch.float32, torch.bfloat16):
        found = place.one_sweep(rows, options, dtype=dtype)
        assert_true(found, rows, options, dtype=dtype, what=f"{dtype}, seed {seed}")


@plain_and_capped
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounded_gradient(place, dtype, options, seed):
    """Rounded once, from float32: every word within half a unit in its last place, not only the largest."""
    rows, slopes = draw(ROWS, 1009, has_bias=True), draw_slopes(ROWS)
    found, wide = (place.two_sweeps(rows, options, slopes, dtype=kind)["gradient"] for kind in (dtype, torch.float32))
    assert found.dtype == dtype and torch.equal(found, wide.to(dtype))


def test_largest_floats(place, seed):
    """Differences that overflow are probabilities of exactly 0, not NaN."""
    rows = draw(2, 9001)
    rows.targets.fill_(4)
    rows.logits[0], rows.logits[1] = -3e38, 3e38
    rows.logits[0, 5000:], rows.logits[1, 5000:] = 3e38, -3e38
    found = place.two_sweeps(rows, PLAIN, draw_slopes(2))
    assert torch.equal(found["total"], torch.tensor([4001.0, 5000.0])) and (found["dots"] == 0).all()
    torch.testing.assert_close(found["entropy"], found["total"].log())
    assert found["logps"][0] == -torch.inf
    assert found["gradient"].isfinite().all() and (found["gradient"][1, 5000:] == 0).all()


@with_and_without_bias
def test_targets_of_another_part(place, has_bias, seed):
    """chosen is -inf, and the gradient has no word of its own."""
    rows, slopes = draw(6, 77, has_bias=has_bias), draw_slopes(6)
    rows.targets[:] = torch.tensor([-1, 77, 2**40, 2**32 + 5, 5 - 2**32, 3])  # as 32-bit numbers two of them are words
    found = place.two_sweeps(rows, PLAIN, slopes)
    assert (found["chosen"][:5] == -torch.inf).all() and found["chosen"][5] == rows.raw[5, 3]
    assert_true(found, rows, PLAIN, slopes, what=f"seed {seed}")


@pytest.mark.parametrize("left", (100, 1))
@pytest.mark.parametrize("options", (PLAIN, OPTIONS["scaled"]), ids=("plain", "scaled"))
@with_and_without_bias
def test_words_at_minus_infinity_add_nothing(place, has_bias, options, left, seed):
    """By their logits, or by the bias: results of the other words alone, and a gradient of exactly 0."""
    rows, slopes = draw(ROWS, 300, has_bias=has_bias), draw_slopes(ROWS)
    rows.targets.remainder_(left)
    (rows.bias if has_bias else rows.logits)[..., left:] = -torch.inf
    few = Rows(view_of(rows.logits[:, :left]), rows.bias[:left] if has_bias else None, rows.targets)
    for sweep in (
        lambda given: place.two_sweeps(given, options, slopes),
        lambda given: place.one_sweep(given, options),
    ):
        found, expected = sweep(rows), sweep(few)
        for name, value in expected.items():
            seen = found[name][:, :left] if value.dim() == 2 else found[name]
            torch.testing.assert_close(seen, value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert (found["gradient"][:, left:] == 0).all()


def test_a_row_without_words(place):
    """A part of a vocabulary may be ruled out altogether: it adds nothing to a merge, and gets no gradient from it."""
    rows = draw(2, 40)
    rows.logits[0] = -torch.inf
    rows.targets.fill_(3)
    merged = Softmax(torch.tensor([1.5, rows.logits[1].max()]), torch.tensor([3.0, 9.0]), torch.tensor([0.7, 0.9]))
    found = place.two_sweeps(rows, PLAIN, draw_slopes(2), merged=merged)
    assert found["top"][0] == -torch.inf and found["total"][0] == 0 and found["dots"][0] == 0
    gradient, one_hot = found["gradient"][0], torch.zeros(40)
    one_hot[3] = gradient[3]
    assert gradient.isfinite().all() and torch.equal(gradient, one_hot)


@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf))
@plain_and_capped
def test_poison_stays_in_its_row(place, poison, options, seed):
    """A broken row says NaN, the others are what they were, and idle rows are exactly zero all the same. Its matrix of
    exponentials is finite, and 0 where the sum is broken."""
    rows, slopes = draw(ROWS, 5003, has_bias=True), draw_slopes(ROWS)
    slopes[0][3] = slopes[1][3] = 0.0
    sweeps = [lambda: place.two_sweeps(rows, options, slopes)]
    sweeps += [lambda dtype=dtype: place.one_sweep(rows, options, dtype=dtype) for dtype in (None, torch.bfloat16)]
    clean = [sweep() for sweep in sweeps]
    rows.logits[1, 17], rows.targets[1] = poison, 17
    rows.logits[3] = poison
    rows.logits[4, (rows.targets[4] + 1) % 5003] = poison
    two, *ones = found = [sweep() for sweep in sweeps]
    for one, expected in zip(found, clean, strict=True):
        assert_same_bits({name: value[[0, 2]] for name, value in one.items()}, expected, [0, 2])
    assert (two["gradient"][3] == 0).all() and all(one["matrix"].isfinite().all() for one in ones)
    if options.softcap > 0.0 and poison == poison:
        return  # a cap makes a finite logit of inf
    if poison != -torch.inf:
        assert all(two[name][[1, 4]].isnan().all() for name in ("total", "logps", "gradient"))
    for one in ones:
        assert one["logps"][3].isnan() and (one["matrix"][3] == 0).all() and not one["logps"][1] > -1e30
        assert poison == -torch.inf or one["logps"][4].isnan() and (one["matrix"][4] == 0).all()


def test_a_bias_of_nan_breaks_every_row(place, seed):
    """As `logits + bias` would: also where the word is a row's target, and but for rows without a slope."""
    rows = draw(ROWS, 1009, has_bias=True)
    rows.bias[rows.targets[0]] = torch.nan
    slopes = (torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), None)
    found = place.two_sweeps(rows, PLAIN, slopes)
    assert found["total"].isnan().all() and found["logps"].isnan().all() and found["chosen"][0].isnan()
    assert found["gradient"][[0, 1, 3, 4]].isnan().all() and (found["gradient"][2] == 0).all()
    for dtype in (None, torch.bfloat16):
        found = place.one_sweep(rows, dtype=dtype)
        assert found["logps"].isnan().all() and (found["matrix"] == 0).all()


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gap", (15.9, 16.1, 60.0, 1e4, float("inf")))
def test_exponentials_of_a_target_far_below(place, gap, dtype, seed):
    """Whatever the base is, log-probabilities keep their precision and no exponential overflows."""
    rows = draw(ROWS, 5003)
    own = torch.arange(ROWS), rows.targets
    rows.logits[own] = rows.logits.amax(1) - gap
    rows.logits[1] += 3e4  # far from 0 as well
    for want_entropy in (True, False):  # whose bases differ
        found = place.one_sweep(rows, dtype=dtype, want_entropy=want_entropy)
        assert found["matrix"].isfinite().all() and (found["logps"] <= 0).all()
        assert want_entropy or (found["rest_dots"] == 0).all()
        comparable = rows
        if gap == float("inf"):
            assert (found["logps"] == -torch.inf).all() and not want_entropy or found["entropy"].isfinite().all()
            comparable = Rows(view_of(rows.logits), None, rows.targets)
            comparable.logits[own] = -1e6  # whose gradient is the same, and whose log-probability is a number
            found["logps"] = place.one_sweep(comparable)["logps"]
        assert_true(found, comparable, dtype=dtype, what=f"seed {seed}")


def test_exponentials_of_a_word_of_probability_one(place, seed):
    """-log1p(rest) where 1 + rest is 1: the loss and the gradient of what the model is sure of are not lost."""
    rows = draw(ROWS, 999, size=1.0)
    own = rows.targets[:, None]
    rows.logits.scatter_add_(1, own, torch.full((ROWS, 1), 30.0))
    found = place.one_sweep(rows)
    # In float64 too 1 - p is known to 1e-16 only: the truth is rest / (1 + rest).
    z = rows.logits.double()
    exps = (z - z.gather(1, own)).exp().scatter(1, own, 0.0)
    rest = exps.sum(1, keepdim=True)
    gradient = (-exps).scatter(1, own, rest) / (1.0 + rest)
    torch.testing.assert_close(found["logps"].double(), -rest[:, 0].log1p(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found["gradient"].double(), gradient, rtol=1e-5, atol=0.0)


def test_exponentials_of_no_word_touch_nobody(place, seed):
    """An id that is no word, which nothing checks on a GPU, makes a broken row and no address beside it."""
    if place.backend == "portable":
        pytest.skip("torch checks the index")
    rows = draw(3, 1000, has_bias=True)
    rows.targets[:] = torch.tensor([-1, 3, 1000])
    found = place.one_sweep(rows, dtype=torch.bfloat16)
    assert found["logps"][[0, 2]].isnan().all() and (found["matrix"][[0, 2]] == 0).all()
    found = {name: value[1:2] for name, value in found.items()}
    assert_true(found, rows[[1]], dtype=torch.bfloat16, what=f"seed {seed}")


def assert_rows_stand_alone(place: Place, vocab: int, dtype: torch.dtype | None) -> None:
    """The targets of some rows are far below the others."""
    rows, slopes = draw(ROWS, vocab, has_bias=True), draw_slopes(ROWS)
    rows.logits[[1, 3], rows.targets[[1, 3]]] -= 60.0

    def sweeps(order: list[int]) -> tuple[dict, dict]:
        some, taken = rows[order], tuple(slope[order] for slope in slopes)
        return place.two_sweeps(some, PLAIN, taken, dtype=dtype), place.one_sweep(some, dtype=dtype)

    whole = list(range(ROWS))
    expected = sweeps(whole)
    orders = ([2], [3], [4, 0], whole[::-1], [3, 3, 1, 2, 3, 0, 4]) if place.sums_alone else ()
    for order in (whole, *orders):
        for found, wanted in zip(sweeps(order), expected, strict=True):
            assert_same_bits(found, wanted, order)


@pytest.mark.parametrize("vocab", (1001, 9011, 9008))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_same_bits_every_time_and_whatever_the_other_rows(place, dtype, vocab, seed):
    """Sums, matrix and gradient of a row depend on nothing but the row: not on the number, the order or the content of
    the other rows of its chunk, nor on where in memory it begins."""
    assert_rows_stand_alone(place, vocab, dtype)


def test_same_bits_of_a_lone_row_on_several_threads(seed):
    """torch divides the sum of one row of 32,768 words and more among its threads, and that of two rows not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_rows_stand_alone(Place("portable", "cpu"), 40_009, None)
    finally:
        torch.set_num_threads(threads)


def test_no_rows(place):
    rows = Rows(torch.empty(0, 10), torch.zeros(10), torch.empty(0, dtype=torch.int64))
    two, one = place.two_sweeps(rows, PLAIN, (torch.empty(0), None)), place.one_sweep(rows)
    assert two["gradient"].shape == one["matrix"].shape == (0, 10)
    assert all(two[name].shape == (0,) for name in Partials._fields) and one["rest"].shape == (0,)
