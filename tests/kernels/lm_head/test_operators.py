"""The laws that all operators of the lm head share, each on every backend that could break it.

Without a GPU Triton's kernels run in its interpreter and those of csrc in their host build; with one all run there.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels.testing import HEAD_CASES, HeadCase
from tests.kernels.lm_head.operators import (
    DEVICE,
    DOUBLE,
    ONE_VIEW,
    OPERATORS,
    PLAIN,
    SERVED,
    SMALL,
    LargestTensor,
    Operator,
    assert_by_the_rule,
    assert_same,
    by_operator,
    draw,
    leaves_of,
    mixed_sum,
    name_of,
    pairs,
    run,
    served,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs what is marked
CASES = (
    *HEAD_CASES,
    HeadCase("two_words", 5, 4, 2, bias=True),
    HeadCase("exactly_one_program", 3, 8, 256, ignored="none"),
    HeadCase("one_word_beyond_it", 3, 8, 257),
    HeadCase("negative_scale_and_softcap", 4, 8, 60, softcap=30.0, logit_scale=-1.2),
    HeadCase("negative_scale_and_low_temperature", 4, 8, 60, bias=True, temperature=0.2, logit_scale=-1.2),
    HeadCase("one_tall_chunk", 256, 64, 515),  # whose weight gradient needs no accumulator
    HeadCase("tall_chunks", 256, 64, 515, chunk_size=100),
)
LARGE = (
    HeadCase("long", 300, 64, 32_003, bias=True, temperature=0.9),
    HeadCase("qwen_rows", 65, 128, 151_936),
    HeadCase("gemma", 33, 64, 262_144, softcap=30.0),
)
# The losses' row kernels are the log-probabilities' own: for them, cases in which a chunk or an option differs.
OF_LOSSES = ("no_rows", "prime_vocab", "one_word", "all_ignored", "bias_and_temperature", "softcap_and_scale")
OF_HALVES = (
    *("prime_vocab", "qwen_vocab", "bias_and_temperature", "softcap_and_scale"),
    *("negative_scale_and_low_temperature", "one_tall_chunk", "tall_chunks"),
)
SINGLE, HALVES = torch.float32, (torch.bfloat16, torch.float16)
BACKENDS = ("portable", "reference")


@pytest.fixture(autouse=True)
def tiles(monkeypatch, request) -> None:
    """In the interpreter, whose time goes by operations: several programs for a short row, large tiles for a long."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if params.get("backend") == "triton" and DEVICE == "cpu":
        triton_forward = pytest.importorskip("mmrpt_kernels.divergence.triton_forward")
        block = 16_384 if params.get("case", PLAIN).vocab > 100_000 else 128
        monkeypatch.setattr(triton_forward, "BLOCK", block)
        monkeypatch.setattr(triton_forward, "SPAN", 2 * block)


def cases_of(operator: Operator, backend: str = "portable", dtype: torch.dtype = SINGLE) -> list[HeadCase]:
    slow = backend == "triton" and DEVICE == "cpu"
    names = [c.name for c in CASES] if operator.name in ("logprobs", "divergence") else OF_LOSSES
    if dtype in HALVES and (operator.name != "logprobs" or slow):
        names = [name for name in OF_HALVES if not slow or name not in ("prime_vocab", "qwen_vocab")]
    chosen = [*(c for c in CASES if c.name in names), *(LARGE if DEVICE == "cuda" else ())]
    if slow:  # the interpreter, whose time goes by programs
        most = 3 if operator.op == "divergence" else 256 if operator.op == "policy_loss" else 9
        chosen = [c._replace(rows=min(c.rows, most if c.vocab < 10**5 else 3)) for c in chosen]
    # float16's range
    return [c._replace(logit_size=min(c.logit_size, 1e3)) for c in chosen] if dtype == torch.float16 else chosen


@pytest.mark.parametrize("operator, case", [(o, c) for o in OPERATORS for c in cases_of(o)], ids=name_of)
def test_portable_equals_the_definition_in_float64(operator, case, seed):
    """Up to eps times the size of the logits, which is what a float64 logit itself is known to."""
    found, expected = (run(operator, draw(case, seed), seed, backend=name) for name in BACKENDS)
    size = max(1.0, case.logit_size * abs(case.logit_scale) / case.temperature)
    assert_same(found, expected, rtol=1e-9, atol=1e-12 * size)


LOW = [(o, name, dtype) for o in OPERATORS for name in SERVED[o.op] for dtype in (SINGLE, *HALVES)]
LOW = [(o, name, dtype, case) for o, name, dtype in LOW for case in cases_of(o, name, dtype)]


@pytest.mark.parametrize("operator, backend, dtype, case", LOW, ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which the interpreter runs on, of probability zero
def test_low_precision_by_the_error_rule(operator, backend, dtype, case, seed):
    served(operator, backend)
    assert_by_the_rule(operator, case, seed, dtype, backend)


@by_operator
def test_frozen_leaves_get_nothing_and_the_others_the_same(operator, seed):
    full = run(operator, draw(SMALL, seed), seed)
    for flags in itertools.product((True, False), repeat=len(operator.leaves)):
        made = draw(SMALL, seed)
        for name, flag in zip(operator.leaves, flags, strict=True):
            made[name].requires_grad_(flag)
        if not any(flags):
            assert not any(part.requires_grad for part in operator.call(made).values())
            continue
        found = run(operator, made, seed)
        assert {name for name in found if name.startswith("d_")} == {f"d_{name}" for name in leaves_of(operator, made)}
        assert_same(found, {name: full[name] for name in found})


@by_operator
def test_without_gradients_results_are_the_same(operator, seed):
    made = draw(SMALL, seed)
    expected = operator.call(made)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = operator.call(made)
        assert not any(part.requires_grad for part in found.values()) and found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].detach(), msg=lambda m, n=name: f"{n}: {m}")


@by_operator
def test_tied_embeddings_and_strides(operator, seed):
    """The head's weight is the table its inputs come from, and nothing is contiguous: both gradients add up."""
    grads = []
    for backend in BACKENDS:
        made = draw(PLAIN, seed)
        table = made["weight"].detach().t().contiguous().t().requires_grad_()
        ids = torch.randint(PLAIN.vocab, (2 * PLAIN.rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        states = torch.tanh(F.embedding(ids, table)).t().contiguous().t()
        made |= {"weight": table, "hidden": states[::2], "hidden_q": states[1::2], "targets": ids.roll(-1)[::2]}
        made["active"] = made["active"].repeat_interleave(2)[::2]
        assert not any(made[n].is_contiguous() for n in ("weight", "hidden", "hidden_q", "targets", "active"))
        grads += torch.autograd.grad(mixed_sum(operator.call(made, backend=backend), seed), table)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", (True, False))
@by_operator
def test_checkpoints(operator, reentrant, seed):
    made = draw(SMALL, seed)

    def loss(hidden, weight):
        return mixed_sum(operator.call(made | {"hidden": torch.tanh(hidden), "weight": weight}), seed)

    wrt = (made["hidden"], made["weight"])
    expected = torch.autograd.grad(loss(*wrt), wrt)
    checkpoint(loss, *wrt, use_reentrant=reentrant).backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in wrt), expected)


@by_operator
def test_what_derivatives_are_refused(operator, seed):
    """Second ones, and forward-mode ones, which would be dropped."""
    made = draw(SMALL, seed)
    total = mixed_sum(operator.call(made), seed) ** 2
    with pytest.raises(RuntimeError, match="once_differentiable|first derivatives only|no autograd formula was"):
        torch.autograd.grad(total, made["hidden"], create_graph=True)[0].sum().backward()
    constants = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in made.items()}

    def values(hidden, backend):
        return next(iter(operator.call(constants | {"hidden": hidden}, backend=backend).values()))

    one = (constants["hidden"],)
    with pytest.raises(RuntimeError, match="reverse-mode derivatives only|must override the setup_context"):
        torch.func.jvp(lambda hidden: values(hidden, "portable"), one, one)
    assert torch.func.jvp(lambda hidden: values(hidden, "reference"), one, one)[1].any()


@pytest.mark.parametrize("wide", ("hidden", "hidden_q", "weight", "bias"))
@by_operator
def test_one_float64_tensor_makes_every_statistic_float64(operator, wide, seed):
    """Of float32 and of bfloat16 inputs, whose products may be rounded; gradients come in the leaves' dtypes."""
    if wide not in operator.leaves:
        pytest.skip("one view")
    for dtype in (SINGLE, torch.bfloat16):
        found = []
        for backend in BACKENDS:
            made = draw(SMALL, seed, dtype=dtype)
            made[wide] = made[wide].detach().double().requires_grad_()
            found.append(run(operator, made, seed, backend=backend))
        assert all(value.dtype == DOUBLE for name, value in found[0].items() if not name.startswith("d_"))
        for name, value in found[1].items():
            assert found[0][name].dtype == value.dtype
            tolerance = {DOUBLE: 1e-11, SINGLE: 1e-5, torch.bfloat16: 2.0**-7}[value.dtype]
            torch.testing.assert_close(found[0][name], value, rtol=tolerance, atol=tolerance)


@pairs(*OPERATORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_forbidden_word_is_a_missing_word(operator, backend, seed):
    """A bias of -inf: the results and gradients of a smaller vocabulary, and none for the word."""
    served(operator, backend)
    made = draw(PLAIN._replace(ignored="none", rows=4, vocab=300), seed, dtype=SINGLE)
    made["targets"] %= 200
    bias = torch.zeros(300, device=DEVICE).index_fill_(0, torch.arange(200, 300, device=DEVICE), -torch.inf)
    few = made | {"weight": made["weight"].detach()[:200].requires_grad_()}
    found = run(operator, made | {"bias": bias}, seed, backend=backend)
    expected = run(operator, few, seed, backend="reference")
    assert (found["d_weight"][200:] == 0).all()
    found["d_weight"] = found["d_weight"][:200]
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", (float("nan"), float("inf"), -float("inf")))
@pairs(*OPERATORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_broken_row_without_gradient_reaches_nothing(operator, backend, poison, seed):
    """It says so in its own results, and leaves the gradients as they would be without it."""
    served(operator, backend)
    made = draw(PLAIN._replace(ignored="none", rows=6), seed, dtype=SINGLE)
    made["active"][:], made["kept"][:] = True, True
    keep = torch.arange(6, device=DEVICE) != 4
    if not operator.by_rows:  # a token that the loss leaves out of the gradient, and of all but the statistics
        made["active" if operator.call is not OPERATORS[4].call else "kept"][4] = False
    clean = run(operator, made, seed, keep, backend=backend)
    with torch.no_grad():
        made["hidden"][4] = poison
    found = run(operator, made, seed, keep, backend=backend)
    for name, value in found.items():
        rows = keep if operator.by_rows and not name.startswith("d_") else ...
        torch.testing.assert_close(value[rows], clean[name][rows], msg=lambda m, n=name: f"{n}: {m}")
        assert name not in ("logps", "kl") or not value[4].isfinite()
    assert (found["d_hidden"][4] == 0).all()


@pairs(*ONE_VIEW)
def test_padding_rows_give_nothing_whatever_they_hold(operator, backend, seed):
    """compact=False visits all rows, so that nothing waits: NaN hidden states, and targets that are no word. Of other
    dtypes and heights of chunks in test_chunk_loop.py."""
    served(operator, backend)
    for share in (0.6, 0.0):
        made = draw(PLAIN._replace(ignored="none", bias=True), seed, dtype=SINGLE)
        mask = torch.rand(PLAIN.rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < share
        made |= {"active": mask, "kept": mask}
        if operator.op == "logprobs":
            made["targets"] = torch.where(mask, made["targets"], -100)
        expected = run(operator, made, seed, backend=backend)
        with torch.no_grad():
            made["hidden"][~mask] = torch.nan
        if operator.op != "logprobs":
            made["targets"] = torch.where(mask, made["targets"], 10**9)
        found = run(operator, made, seed, backend=backend, compact=False)
        assert (found["d_hidden"][~mask] == 0).all()
        assert_same(found, expected, rtol=1e-4, atol=1e-6)


@by_operator
def test_a_broken_row_that_learns_spoils_its_own_hidden_state_and_every_word(operator, seed):
    made = draw(PLAIN._replace(ignored="none"), seed)
    made["active"][:], made["kept"][:] = True, True
    with torch.no_grad():
        made["hidden"][4] = float("nan")
    results = operator.call(made)
    total = sum(part.sum() for part in results.values() if part.requires_grad)
    d_hidden, d_weight = torch.autograd.grad(total, (made["hidden"], made["weight"]))
    others = torch.arange(PLAIN.rows, device=DEVICE) != 4
    assert d_hidden[others].isfinite().all() and d_hidden[4].isnan().all() and d_weight.isnan().all()


@by_operator
def test_ignored_rows_are_zero_and_get_nothing(operator, seed):
    """Whatever their hidden states are; a divergence without a target still has all but k3 and log-probabilities."""
    made = draw(PLAIN, seed)
    ignored = made["targets"] == -100
    assert ignored.any() and not ignored.all()
    if operator.op == "divergence":
        results = {name: v for name, v in operator.call(made).items() if name in ("k3", "logps_p", "logps_q")}
    else:
        with torch.no_grad():
            made["hidden"][ignored] = float("nan")
        results = operator.call(made)
    grads = torch.autograd.grad(sum(part.sum() for part in results.values() if part.requires_grad), made["hidden"])
    assert all((part[ignored] == 0).all() for part in results.values() if part.dim())
    assert (grads[0][ignored] == 0).all() and grads[0].isfinite().all()


@pytest.mark.parametrize("operator", ONE_VIEW, ids=name_of)
def test_logits_of_all_rows_never_exist(operator, seed):
    """Without gradients the largest tensor is a chunk (test_divergence.py has the same of two views)."""
    made = draw(HeadCase("long", 400, 4, 500, ignored="none", chunk_size=10), seed)
    with torch.no_grad(), LargestTensor() as seen:
        operator.call(made, backend="portable")
    assert 10 * 500 <= seen.size <= 2 * 10 * 500


# test_autocast_head.py compiles the others.
NAMES = ("logprobs", "policy_loss_with_entropy", "divergence")
COMPILED = [(o, b) for o in OPERATORS for b in (*BACKENDS, "triton") if o.name in NAMES[:: 2 if b == "triton" else 1]]


@pytest.mark.parametrize("operator, backend", COMPILED, ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_compiles_without_a_graph_break(operator, backend, seed, fresh_compiler):
    """A backend is imported while the compiler traces."""
    served(operator, backend)
    made = draw(SMALL._replace(rows=3), seed, dtype=SINGLE)
    wrt = leaves_of(operator, made)

    def step(*leaves):
        return operator.call(made | dict(zip(wrt, leaves, strict=True)), backend=backend)

    compiler = "inductor" if (operator.name, backend) == ("logprobs", "portable") else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    found, expected = (mixed_sum(call(*wrt.values()), seed) for call in (compiled, step))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(total, list(wrt.values())) for total in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
