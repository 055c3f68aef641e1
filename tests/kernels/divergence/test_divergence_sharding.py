"""linear_token_divergence with the lm head cut over a process group, on 2 and 3 processes: equal to the whole head, the
same bits on all ranks.

As in test_vocab_sharding.py every case is one function of a part: the parent calls it with all words and no group,
every process with its own. One start of processes per count runs all cases.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.backends import TABLE
from mmrpt_kernels.divergence.api import KINDS
from mmrpt_kernels.lm_head import chunk_sizes
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.testing import HeadCase, assert_close_to_truth, head_inputs, on_a_grid
from tests.kernels.lm_head import test_vocab_sharding
from tests.kernels.lm_head.test_vocab_sharding import TALL, WORLDS, D, Part, graded, joined, message_of

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"),
    # numpy, which Triton's interpreter runs on, says aloud what a word of probability zero is masked for.
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero encountered"),
]

# The cases of the other operators; here their rows need not divide into sequences.
HEADS = tuple(case._replace(rows=23) if case.rows == 24 else case for case in test_vocab_sharding.HEADS)
PLAIN, RICH = HEADS[:2]
BIASED = test_vocab_sharding.BIASED._replace(rows=23)
SMALL = RICH._replace(name="small", rows=4, chunk_size=3)


def inputs(case: HeadCase, part: Part, dtype=D, widen: bool = False, own_q: bool = False):
    """hidden, hidden_q, weight, bias and weight_q of this part as leaves; targets; options."""
    case = case._replace(vocab=case.vocab or part.world)
    raw = head_inputs(case, dtype=dtype, seed=3)
    words = part.words(case.vocab)
    made = {"hidden": raw["hidden"], "hidden_q": raw["hidden_q"], "weight": raw["weight"][words]}
    if case.bias:
        made["bias"] = raw["bias"][words]
    if own_q:  # a head of another hidden size
        made["hidden_q"] = raw["hidden_q"][:, :-1]
        made["weight_q"] = raw["weight"].roll(1, 0)[words, :-1]
    made = {name: (t.double() if widen else t).clone().requires_grad_() for name, t in made.items()}
    options = {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale", "chunk_size")}
    return made, raw["targets"], options | {"vocab_group": part.group, "backend": part.backend}


def factors(out, rows: int) -> list[torch.Tensor]:
    """A coefficient for each result, zero in a third of the rows."""
    generator = torch.Generator().manual_seed(11)
    idle = torch.rand(rows, generator=generator) < 0.3
    made = [torch.randn(part.shape, generator=generator, dtype=D).to(part.dtype) for part in out]
    for one in made:
        one[idle] = 0.0
    return made


def total_of(out) -> torch.Tensor:
    """As a trainer would: rows without a factor never meet the sum, whatever they hold."""
    out = [part for part in out if part is not None]
    scales = factors(out, out[0].shape[0])
    return sum(torch.where(f != 0, part * f, 0.0).sum() for part, f in zip(out, scales, strict=True))


def divergence(
    case: HeadCase,
    part: Part,
    dtype=D,
    widen: bool = False,
    *,
    kind=KINDS,
    own_q: bool = False,
    spoil=None,
    scored=lambda out: out,
    fixed: tuple[str, ...] = (),
) -> dict:
    """scored: the results that the loss is of. fixed: leaves that need no gradient."""
    made, targets, options = inputs(case, part, dtype, widen, own_q)
    if spoil is not None:
        spoil(made, targets, part)
    given = {name: made.get(name) for name in ("bias", "weight_q")} | {"targets": targets, "kind": kind}
    made = {name: t.detach() if name in fixed else t for name, t in made.items()}
    given |= {name: made[name] for name in ("bias", "weight_q") if name in made}
    out = linear_token_divergence(made["hidden"], made["hidden_q"], made["weight"], **given, **options)
    learning = {name: t for name, t in made.items() if name not in fixed}
    return out._asdict() | graded(total_of(scored(out)), learning)


def spoil_idle_rows(made: dict, targets: torch.Tensor, part: Part) -> None:
    """NaN and inf in rows that have no incoming gradient."""
    idle = (factors([torch.empty(len(targets))], len(targets))[0] == 0).nonzero()[:, 0]
    with torch.no_grad():
        made["hidden"][idle[0]] = torch.nan
        made["hidden_q"][idle[1]] = torch.inf
    targets[idle[:2]] = torch.tensor([3, 50])


def spoil_a_learning_row(made: dict, targets: torch.Tensor, part: Part) -> None:
    """NaN where there is a gradient: every word's gradient is NaN then, and d hidden in that row alone."""
    learning = (factors([torch.empty(len(targets))], len(targets))[0] != 0).nonzero()[:, 0]
    with torch.no_grad():
        made["hidden"][learning[0]] = torch.nan


def rule_out_a_part(made: dict, targets: torch.Tensor, part: Part) -> None:
    """Every word of the first rank is impossible: its maximum is -inf."""
    first, own = Part(part.world, 0).words(BIASED.vocab).stop, part.words(BIASED.vocab)
    with torch.no_grad():
        made["bias"][torch.arange(own.start, own.stop) < first] = -torch.inf
    targets[(targets >= 0) & (targets < first)] = BIASED.vocab - 1


def equal_views(made: dict, targets: torch.Tensor, part: Part) -> None:
    with torch.no_grad():
        for name in ("hidden", "weight", "bias"):
            made[name].copy_(on_a_grid(made[name]))
        made["hidden_q"].copy_(made["hidden"])


def without_targets(part: Part) -> dict:
    made, _, options = inputs(PLAIN, part)
    out = linear_token_divergence(made["hidden"], made["hidden_q"], made["weight"], kind=("js", "kl"), **options)
    named = {name: value for name, value in out._asdict().items() if value is not None}
    return named | graded(total_of(out), made)


def chunked_by_budget(part: Part) -> dict:
    """No chunk size, and memory for two rows of the whole vocabulary: for another number of rows of each part."""
    kept = chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS
    chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = 2 * 8 * PLAIN.vocab, 1
    try:
        return divergence(PLAIN._replace(chunk_size=None), part)
    finally:
        chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = kept


def checkpointed(part: Part) -> dict:
    """Recomputed in the backward, where its collectives come a second time."""
    made, targets, options = inputs(PLAIN, part)

    def view(hidden, hidden_q, weight):
        return linear_token_divergence(hidden, hidden_q, weight, targets=targets, kind=KINDS, **options).divergence

    found = checkpoint(view, *made.values(), use_reentrant=False)
    return {"divergence": found, **graded(total_of([found]), made)}


def compiled(part: Part) -> dict:
    """In one graph without a break."""
    made, targets, options = inputs(RICH, part)

    def step(hidden, hidden_q, weight, bias):
        given = {"bias": bias, "targets": targets, "kind": ("kl", "js")}
        out = linear_token_divergence(hidden, hidden_q, weight, **given, **options)
        return out.divergence.square().sum() + out.entropy_q.sum()

    if part.rank is not None:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = step(*(made[name] for name in ("hidden", "hidden_q", "weight", "bias")))
    return {"loss": loss, **graded(loss, made)}


EXACT = {f"head_{case.name}": functools.partial(divergence, case) for case in HEADS}
EXACT |= {f"{kind}_alone": functools.partial(divergence, PLAIN, kind=kind) for kind in KINDS}
EXACT |= {
    "another_head_for_q": functools.partial(divergence, BIASED, own_q=True),
    "a_head_of_one_view_learns": functools.partial(divergence, PLAIN, own_q=True, fixed=("hidden_q", "weight_q")),
    "hidden_states_alone_learn": functools.partial(divergence, PLAIN, fixed=("weight",)),
    "first_hidden_states_alone_learn": functools.partial(divergence, PLAIN, fixed=("weight", "hidden_q")),
    "entropies_alone_learn": functools.partial(divergence, PLAIN, scored=lambda out: (out.entropy_p, out.entropy_q)),
    "divergence_alone_learns": functools.partial(divergence, RICH, scored=lambda out: (out.divergence,)),
    "idle_rows_of_nan": functools.partial(divergence, PLAIN, spoil=spoil_idle_rows),
    "a_learning_row_of_nan": functools.partial(divergence, PLAIN, spoil=spoil_a_learning_row),
    "a_part_ruled_out": functools.partial(divergence, BIASED, spoil=rule_out_a_part),
    "equal_views": functools.partial(divergence, RICH, spoil=equal_views),
    "without_targets": without_targets,
    "chunked_by_budget": chunked_by_budget,
    "checkpointed": checkpointed,
    "compiled": compiled,
}
ROUNDED = {
    "tall": functools.partial(divergence, TALL),
    "rich": functools.partial(divergence, RICH),
    "small": functools.partial(divergence, SMALL),
    "small_another_head": functools.partial(divergence, SMALL, own_q=True),
}
LOW_PRECISION = [*itertools.product(("tall", "rich"), (torch.float32, torch.bfloat16), ("portable",))]
if any(row.op == "divergence" and row.backend == "triton" and row.devices == ("cpu",) for row in TABLE):
    LOW_PRECISION += [(name, torch.float32, "triton") for name in ("small", "small_another_head")]  # interpreted


def refusals(part: Part) -> dict[str, str]:
    """What is said on this rank to calls that cannot be meant; the ranks' next call must still work."""
    made, targets, options = inputs(PLAIN, part)
    last = part.rank == part.world - 1
    other = targets.clone()
    other[4] = 17 if last else 18

    def call(targets=targets, weight=made["weight"], **changes):
        given = {"targets": targets, "kind": "kl"} | options | changes
        return functools.partial(linear_token_divergence, made["hidden"], made["hidden_q"], weight, **given)

    def backward_of_another_loss():
        grads = torch.ones(23, dtype=D)
        grads[5:] = 0.0 if last else 1.0
        call()().divergence.backward(grads)

    return {
        "targets, or which": message_of(call(other)),
        "differ in their options": message_of(call(kind="kl" if last else "js")),
        "in their options": message_of(call(temperature=1.0 + 0.1 * part.rank)),
        "their options": message_of(call(weight_q=made["weight"].float() if last else None)),
        "at least one word": message_of(call(weight=made["weight"][: 0 if last else None])),
        "got id 53, expected ids below the vocabulary size 53": message_of(call(torch.full_like(targets, 53))),
        "vocab_group": message_of(call(vocab_group=dist.GroupMember.NON_GROUP_MEMBER)),
        "does not support: vocab_group": message_of(call(backend="reference")),
        "differ in their tokens with work": message_of(backward_of_another_loss),
    }


def opchecks(part: Part) -> None:
    made, targets, _ = inputs(RICH, part)
    leaves = [made[name].detach() for name in ("hidden", "hidden_q", "weight")]
    tensors = (*leaves, None, made["bias"].detach(), targets)
    loop = LoopOptions("portable", 4, vocab_group=part.group.group_name)
    settings = ("kl,js,k3", *HeadOptions(0.8, 4.0, 1.3), *loop)
    operators, tests = torch.ops.mmrpt_kernels, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.linear_token_divergence.default, (*tensors, *settings), test_utils=tests)
    grads = (torch.ones(23, 3, dtype=D), None, torch.ones(23, dtype=D), None, torch.ones(23, dtype=D))
    backward = (*grads, *tensors, *settings, [True, True, True, False, True])
    torch.library.opcheck(operators.linear_token_divergence_backward.default, backward, test_utils=tests)


started = functools.partial(test_vocab_sharding.started, module=__name__)


@pytest.fixture(params=WORLDS, ids="{}_processes".format)
def world(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_whole_head_in_float64(name, world, folder):
    if name == "compiled" and world != WORLDS[0]:
        pytest.skip("compiled on one count of processes only")
    found = joined(name, started(world, folder))
    # The definition's autograd lets idle rows of NaN spread.
    expected = EXACT[name](part=Part(world, backend="portable" if name == "idle_rows_of_nan" else "reference"))
    assert found.keys() == expected.keys()
    size = 1e4 if "huge" in name else 1.0  # eps * the size of the logits is what a float64 logit is known to
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12 * size, atol=1e-12 * size, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_equal_views_have_no_divergence(world, folder):
    assert (joined("equal_views", started(world, folder))["divergence"] == 0).all()


@pytest.mark.parametrize(("name", "dtype", "rows"), LOW_PRECISION, ids=str)
def test_low_precision_by_the_error_rule(name, dtype, rows, world, folder):
    found = joined(f"{name} {dtype} {rows}", started(world, folder))
    whole = Part(world, backend="reference")
    truth, eager = ROUNDED[name](part=whole, dtype=dtype, widen=True), ROUNDED[name](part=whole, dtype=dtype)
    for key, value in found.items():
        assert value.dtype == eager[key].dtype
        kind = torch.float32 if not key.startswith("d_") else value.dtype
        triple = value, eager[key].detach(), truth[key].detach().double()
        if key != "divergence":
            assert_close_to_truth(*triple, name=key, dtype=kind, floor=10.0)
            continue
        assert_close_to_truth(*(each[:, :3] for each in triple), name=key, dtype=kind, floor=10.0)
        # k3 below its clamp has a slope of up to 11 in log-probabilities.
        assert_close_to_truth(*(each[:, 3] for each in triple), name="k3", dtype=kind, floor=110.0)


def test_same_bits_again_and_the_same_collectives_on_all_ranks(world, folder):
    ranks = started(world, folder)
    for name in ranks[0].keys() - {"refusals"}:
        assert all(rank[name]["repeats"] for rank in ranks), name
        assert all(rank[name]["collectives"] == ranks[0][name]["collectives"] for rank in ranks), name


@pytest.mark.parametrize(("kind", "sweeps"), [("kl", 1), ("reverse_kl", 1), ("k3", 1), ("js", 2)])
def test_one_collective_a_chunk_and_a_sweep(kind, sweeps, world, folder):
    calls = started(world, folder)[0][f"{kind}_alone"]["collectives"]
    active = int(sum((f != 0) for f in factors([torch.empty(23)], 23)).sum())
    forward, backward = -(-23 // 5), -(-active // 5)
    sums = ["all_to_all_single", "gather"] * 2  # d hidden_p and d hidden_q
    assert calls == ["gather"] * (1 + sweeps * forward + 1 + sweeps * backward) + sums


def test_what_cannot_be_meant_is_refused_on_every_rank(world, folder):
    for rank in started(world, folder):
        for part_of_message, message in rank["refusals"].items():
            assert part_of_message in message and "no error" not in message, (part_of_message, message)
