"""The lm head cut over a process group, on 2 and 3 processes: equal to the whole head, the same bits on all ranks.

Every case is one function of (words, group): the parent calls it with all words and no group, every process with its
part. One start of processes per count runs all cases.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_loss
from mmrpt_kernels.backends import TABLE
from mmrpt_kernels.lm_head import chunk_sizes, vocab_parallel
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import operator
from mmrpt_kernels.testing import HeadCase, assert_close_to_truth, head_inputs, poisoned_memory
from mmrpt_kernels.testing.interpreter import mend_interpreter

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

D = torch.float64
WORLDS = (2, 3)
TIMEOUT = datetime.timedelta(seconds=150)  # what would deadlock raises
PLAIN = HeadCase("plain", 24, 8, 53, chunk_size=5)
RICH = HeadCase("rich", 24, 8, 53, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, chunk_size=7)
BIASED = HeadCase("biased", 24, 8, 53, bias=True, chunk_size=10)
HEADS = (
    PLAIN,
    RICH,
    PLAIN._replace(name="chunk_of_one", chunk_size=1),
    PLAIN._replace(name="chunk_of_all", chunk_size=None),
    HeadCase("one_row", 1, 8, 53, ignored="none"),
    HeadCase("no_rows", 0, 8, 53),
    HeadCase("all_ignored", 8, 8, 53, ignored="all"),
    HeadCase("huge_logits", 16, 16, 101, logit_size=1e4),
    HeadCase("one_word_a_rank", 9, 4, 0),  # the vocabulary has as many words as there are ranks
)
VARIANTS = {
    "on_policy": {"old_logps": None},
    "vppo": {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": -0.06, "entropy_kind": "sampled"},
    "entropy_and_k3": {"entropy_coef": 0.05, "kl_coef": 0.1, "aggregation": "sum"},
    "kept_alone": {"return_statistics": False, "entropy_coef": 0.05, "entropy_scope": "kept"},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04, "aggregation": "sequence_mean"},
    "gspo_alone": {"return_statistics": False, "ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "gspo_everything": {"ratio_level": "sequence", "entropy_coef": 0.1, "kl_coef": 0.1, "dual_clip": 1.5},
    "cispo": {"surrogate": "cispo", "clip_high": 0.28},
    "all_masked": {"response_mask": None},
}


class Part(NamedTuple):
    """What a process, or the parent for all of them, computes with."""

    world: int  # processes that share the vocabulary, also for the parent
    rank: int | None = None  # None: the parent, with all words
    backend: str = "portable"

    @property
    def group(self):
        return None if self.rank is None else dist.group.WORLD

    def words(self, vocab: int) -> slice:
        """Uneven parts; the second of three has a single word."""
        if self.rank is None:
            return slice(0, vocab)
        cuts = [0, vocab // 3 + (vocab < 3), vocab] if self.world == 2 else [0, 1 + vocab // 2, 2 + vocab // 2, vocab]
        cuts = list(range(self.world + 1)) if vocab == self.world else cuts
        return slice(cuts[self.rank], cuts[self.rank + 1])


def leaves(
    case: HeadCase, part: Part, dtype=D, widen: bool = False, compact: bool = True
) -> tuple[dict, torch.Tensor, dict]:
    """hidden, weight and bias of this part as leaves; targets; the head's options."""
    case = case._replace(vocab=case.vocab or part.world)
    raw = head_inputs(case, dtype=dtype, seed=3)
    words = part.words(case.vocab)
    made = {"hidden": raw["hidden"], "weight": raw["weight"][words]}
    if case.bias:
        made["bias"] = raw["bias"][words]
    made = {name: (t.double() if widen else t).clone().requires_grad_() for name, t in made.items()}
    options = {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale", "chunk_size")}
    return made, raw["targets"], options | {"vocab_group": part.group, "backend": part.backend, "compact": compact}


def factors(rows: int) -> torch.Tensor:
    """(2, rows) random, a third of them zero."""
    generator = torch.Generator().manual_seed(11)
    made = torch.randn(2, rows, generator=generator, dtype=D)
    made[:, torch.rand(rows, generator=generator) < 0.3] = 0.0
    return made


def graded(total: torch.Tensor, made: dict) -> dict:
    return {f"d_{name}": grad for name, grad in zip(made, torch.autograd.grad(total, list(made.values())), strict=True)}


def logprobs(case: HeadCase, part: Part, dtype=D, widen=False, spoil=None, entropy=True, compact=True) -> dict:
    made, targets, options = leaves(case, part, dtype, widen, compact)
    if spoil is not None:
        spoil(made, targets, part)
    out = linear_logprobs(
        made["hidden"], made["weight"], targets, bias=made.get("bias"), return_entropy=entropy, **options
    )
    scale = factors(case.rows).to(out.logps.dtype)
    # As a trainer would: rows without a factor never meet the sum, whatever they hold.
    total = torch.where(scale[0] != 0, out.logps * scale[0], 0.0).sum()
    if entropy:
        total = total + torch.where(scale[1] != 0, out.entropy * scale[1], 0.0).sum()
    return {"logps": out.logps, **({"entropy": out.entropy} if entropy else {}), **graded(total, made)}


def token_loss(case: HeadCase, part: Part, dtype=D, widen: bool = False, compact: bool = True) -> dict:
    made, targets, options = leaves(case, part, dtype, widen, compact)

    def focal(logps, entropy, rows):
        return -((1 - logps.exp()) ** 2) * logps + 0.1 * entropy * (rows + 1)

    head = {"bias": made.get("bias"), "active_mask": torch.arange(case.rows) % 4 != 1, **options}
    loss = linear_token_loss(made["hidden"], made["weight"], targets, focal, **head)
    return {"loss": loss, **graded(loss, made)}


def policy_arguments(case: HeadCase, targets: torch.Tensor) -> dict:
    """Constants of `linear_policy_loss` for case.rows tokens as (4, rows / 4)."""
    shape = (4, case.rows // 4)
    generator = torch.Generator().manual_seed(13)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=D)

    whole, ids, options = leaves(case, Part(1))
    with torch.no_grad():
        own = linear_logprobs(whole["hidden"], whole["weight"], ids, bias=whole.get("bias"), **options).logps.view(
            shape
        )
    return {
        "advantages": normal(4),
        "response_mask": torch.rand(shape, generator=generator) < 0.8,
        "perception_mask": torch.rand(shape, generator=generator) < 0.5,
        "trajectory_weights": torch.rand(4, generator=generator, dtype=D) + 0.5,
        "old_logps": own + 0.1 * normal(*shape),
        "ref_logps": own + 0.5 * normal(*shape),
        "sampler_weights": torch.rand(shape, generator=generator, dtype=D) + 0.5,
        "targets": targets.view(shape),
    }


def policy_loss(variant: str, case: HeadCase, part: Part, dtype=D, widen: bool = False, compact: bool = True) -> dict:
    made, targets, options = leaves(case, part, dtype, widen, compact)
    constants = policy_arguments(case, targets) | VARIANTS[variant]
    if constants["response_mask"] is None:
        constants["response_mask"] = torch.zeros_like(constants["perception_mask"])
    hidden = made["hidden"].view(4, case.rows // 4, -1)
    options = {"return_statistics": True} | options | {"bias": made.get("bias")}
    out = linear_policy_loss(hidden, made["weight"], **(options | constants))
    named = {"loss": out.loss, "logps": out.logps, **out.statistics}
    return named | ({} if out.entropy is None else {"entropy": out.entropy}) | graded(out.loss, made)


def spoil_rows(made: dict, targets: torch.Tensor, part: Part) -> None:
    """NaN and inf in rows that have no incoming gradient, or none at all."""
    idle = (factors(len(targets)) == 0).all(0).nonzero().squeeze(-1)
    with torch.no_grad():
        made["hidden"][idle[0]] = torch.nan
        made["hidden"][idle[1]] = torch.inf
        made["hidden"][2], targets[2] = torch.nan, -100
    targets[idle[:2]] = torch.tensor([3, 50])


def spoil_a_learning_row(made: dict, targets: torch.Tensor, part: Part) -> None:
    """NaN where there is a gradient: every word's gradient is NaN then, and d hidden in that row alone."""
    with torch.no_grad():
        made["hidden"][(factors(len(targets)) != 0).all(0).nonzero()[0]] = torch.nan


def rule_out_a_part(made: dict, targets: torch.Tensor, part: Part) -> None:
    """Every word of the first rank is impossible: its maximum is -inf."""
    first = Part(part.world, 0).words(BIASED.vocab).stop
    own = part.words(BIASED.vocab)
    with torch.no_grad():
        made["bias"][torch.arange(own.start, own.stop) < first] = -torch.inf
    targets[(targets >= 0) & (targets < first)] = BIASED.vocab - 1


def chunked_by_budget(part: Part) -> dict:
    """No chunk size, and memory for two rows of the whole vocabulary: for another number of rows of each part."""
    before = chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS
    chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = 2 * 8 * PLAIN.vocab, 1
    try:
        return logprobs(PLAIN._replace(chunk_size=None), part) | {
            f"{key} of the loss": value for key, value in token_loss(PLAIN._replace(chunk_size=None), part).items()
        }
    finally:
        chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = before


def checkpointed(part: Part) -> dict:
    """Recomputed in the backward, where its collectives come a second time."""
    made, targets, options = leaves(PLAIN, part)

    def head(hidden, weight):
        return linear_logprobs(hidden, weight, targets, **options).logps

    logps = checkpoint(head, made["hidden"], made["weight"], use_reentrant=False)
    return {"logps": logps, **graded((logps * factors(24)[0]).sum(), made)}


def compiled(part: Part) -> dict:
    """All three operators in one graph without a break."""
    made, targets, options = leaves(RICH, part)
    constants = policy_arguments(RICH, targets)
    del constants["targets"]

    def step(hidden, weight, bias, targets):
        shaped = (hidden.view(4, 6, -1), weight, targets.view(4, 6))
        policy = linear_policy_loss(*shaped, bias=bias, **constants, **options).loss
        logps, entropy = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, **options)
        own = linear_token_loss(hidden, weight, targets, lambda lp, h, rows: lp * h, bias=bias, **options)
        return policy + (logps * logps + entropy).sum() + own

    if part.rank is not None:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = step(made["hidden"], made["weight"], made["bias"], targets)
    return {"loss": loss, **graded(loss, made)}


EXACT = {f"logprobs_{case.name}": functools.partial(logprobs, case) for case in HEADS}
EXACT |= {f"token_loss_{case.name}": functools.partial(token_loss, case) for case in HEADS}
EXACT |= {f"policy_{name}": functools.partial(policy_loss, name, PLAIN) for name in VARIANTS}
EXACT |= {
    "logprobs_masked": functools.partial(logprobs, PLAIN, compact=False),
    "token_loss_masked": functools.partial(token_loss, PLAIN, compact=False),
    "policy_masked": functools.partial(policy_loss, "entropy_and_k3", PLAIN, compact=False),
    "policy_gspo_masked": functools.partial(policy_loss, "gspo", PLAIN, compact=False),
    "policy_cispo": functools.partial(policy_loss, "cispo", PLAIN),
    "policy_rich_head": functools.partial(policy_loss, "entropy_and_k3", RICH),
    "logprobs_alone": functools.partial(logprobs, RICH, entropy=False),
    "idle_rows_of_nan": functools.partial(logprobs, PLAIN, spoil=spoil_rows),
    "a_learning_row_of_nan": functools.partial(logprobs, PLAIN, spoil=spoil_a_learning_row),
    "a_part_ruled_out": functools.partial(logprobs, BIASED, spoil=rule_out_a_part),
    "chunked_by_budget": chunked_by_budget,
    "checkpointed": checkpointed,
    "compiled": compiled,
}
TALL = PLAIN._replace(rows=48, hidden=32, vocab=509, chunk_size=20)
ROUNDED = {
    "logprobs": functools.partial(logprobs, TALL),
    "logprobs_rich": functools.partial(logprobs, RICH),
    "token_loss": functools.partial(token_loss, TALL),
    "policy_gspo_everything": functools.partial(policy_loss, "gspo_everything", TALL),
    "policy_vppo": functools.partial(policy_loss, "vppo", TALL),
    "policy_rich": functools.partial(policy_loss, "entropy_and_k3", RICH),
}
DTYPES = (torch.float32, torch.bfloat16)
# Row kernels that a CPU can run besides: Triton's interpreter, slowly, and csrc's host build where it was built.
OTHERS = [row.backend for row in TABLE if row.op == "logprobs" and row.devices == ("cpu",) and not row.missing]
LOW_PRECISION = [*itertools.product(ROUNDED, DTYPES, ("portable",))]
LOW_PRECISION += [(name, torch.float32, rows) for name in ("logprobs_rich", "policy_rich") for rows in OTHERS]


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(part: Part) -> dict[str, str]:
    """What is said on this rank to calls that cannot be meant; the ranks' next call must still work."""
    made, targets, options = leaves(PLAIN, part)
    hidden, weight = made["hidden"], made["weight"]
    last = part.rank == part.world - 1
    other = targets.clone()
    other[4] = 17 if last else 18

    def call(targets=targets, weight=weight, **changes):
        return functools.partial(linear_logprobs, hidden, weight, targets, **(options | changes))

    def backward_of_another_loss():
        grads = torch.ones(24, dtype=D)
        grads[5:] = 0.0 if last else 1.0
        call()().logps.backward(grads)

    return {
        "targets": message_of(call(other)),
        "tokens with work": message_of(call(torch.where(torch.arange(24) < 3, -100, targets) if last else targets)),
        "options": message_of(call(temperature=1.0 + 0.1 * part.rank)),
        "at least one word": message_of(call(weight=weight[: 0 if last else None])),
        "expected 0 to 52": message_of(call(torch.full_like(targets, 53))),
        "vocab_group": message_of(call(vocab_group=dist.GroupMember.NON_GROUP_MEMBER)),
        "does not support": message_of(call(backend="reference")),
        "differ in their tokens with work": message_of(backward_of_another_loss),
    }


def opchecks(part: Part) -> None:
    made, targets, _ = leaves(RICH, part)
    head = [t.detach() for t in (made["hidden"], made["weight"], made["bias"])]
    loop = LoopOptions("portable", 4, vocab_group=part.group.group_name)
    options, tests = (*HeadOptions(0.8, 4.0, 1.3), *loop), ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.linear_logprobs, (*head, targets, -100, True, *options), test_utils=tests)
    backward = (*head, targets, torch.ones(24, dtype=D), None, -100, [True] * 3, *options)
    torch.library.opcheck(operator.linear_logprobs_backward, backward, test_utils=tests)


def counted(calls: list[str]) -> None:
    """Every collective of this process is written down from now on."""

    def counting(name: str, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for module, name in ((vocab_parallel, "gather"), (dist, "all_to_all_single")):
        setattr(module, name, counting(name, getattr(module, name)))


def rank_main(rank: int, world: int, folder: str, module: str) -> None:
    """One process: the cases of a test module, each result with what it took, saved to the folder."""
    cases = importlib.import_module(module)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.set_num_threads(1)
    mend_interpreter()
    part, calls, found = Part(world, rank), [], {}
    counted(calls)
    named = {name: functools.partial(case, part=part) for name, case in cases.EXACT.items()}
    for name, dtype, rows in cases.LOW_PRECISION:
        chosen = {"dtype": dtype, "part": part._replace(backend=rows)}
        named[f"{name} {dtype} {rows}"] = functools.partial(cases.ROUNDED[name], **chosen)
    if world != WORLDS[0]:  # slow, and one count is enough
        del named["compiled"]
    for name, case in named.items():
        twice = []
        for _ in range(2 if name in cases.EXACT and name != "compiled" else 1):
            calls.clear()
            with poisoned_memory():
                twice.append({key: value.detach() for key, value in case().items()})
        same = all(torch.equal(twice[0][key].nan_to_num(7.0), twice[-1][key].nan_to_num(7.0)) for key in twice[0])
        found[name] = {"values": twice[0], "repeats": same, "collectives": list(calls)}
    found["refusals"] = cases.refusals(part)
    cases.opchecks(part)
    torch.save(found, f"{folder}/{world}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def started(world: int, folder: Path, module: str = __name__) -> list[dict]:
    """What the ranks of `world` processes found for the cases of a test module; one start of processes each."""
    mp.spawn(rank_main, args=(world, str(folder), module), nprocs=world)
    return [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)]


@pytest.fixture(params=WORLDS, ids="{}_processes".format)
def world(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def joined(name: str, ranks: list[dict]) -> dict:
    """The values of a case: parts put together, and the rest, which must be the same bits on every rank."""
    values = [rank[name]["values"] for rank in ranks]
    whole = {}
    for key, first in values[0].items():
        if key.startswith(("d_weight", "d_bias")):
            whole[key] = torch.cat([value[key] for value in values])
            continue
        whole[key] = first
        for other in values[1:]:
            torch.testing.assert_close(other[key], first, rtol=0, atol=0, equal_nan=True, msg=f"{key}: ranks differ")
    return whole


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_whole_head_in_float64(name, world, folder):
    if name == "compiled" and world != WORLDS[0]:
        pytest.skip("compiled on one count of processes only")
    found = joined(name, started(world, folder))
    expected = EXACT[name](part=Part(world))
    assert found.keys() == expected.keys()
    size = 1e4 if "huge" in name else 1.0  # eps * the size of the logits is what a float64 logit is known to
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12 * size, atol=1e-12 * size, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("name", "dtype", "rows"), LOW_PRECISION, ids=str)
def test_low_precision_by_the_error_rule(name, dtype, rows, world, folder):
    found = joined(f"{name} {dtype} {rows}", started(world, folder))
    whole = Part(world, backend="reference")
    truth, eager = ROUNDED[name](part=whole, dtype=dtype, widen=True), ROUNDED[name](part=whole, dtype=dtype)
    for key, value in found.items():
        assert value.dtype == eager[key].dtype
        kind = torch.float32 if not key.startswith("d_") else value.dtype
        assert_close_to_truth(
            value, eager[key].detach(), truth[key].detach().double(), name=key, dtype=kind, floor=10.0
        )


def test_same_bits_again_and_the_same_collectives_on_all_ranks(world, folder):
    ranks = started(world, folder)
    for name in ranks[0].keys() - {"refusals"}:
        assert all(rank[name]["repeats"] for rank in ranks), name
        assert all(rank[name]["collectives"] == ranks[0][name]["collectives"] for rank in ranks), name


def test_one_collective_a_chunk_and_two_for_d_hidden(world, folder):
    """And one in each pass to compare the ranks. The backward of log-probs reads its logits again: exponentials are
    not kept, as they would be of each rank's own words."""
    found = started(world, folder)[0]
    targets, sums = leaves(PLAIN, Part(1))[1], ["all_to_all_single", "gather"]

    def gathers(rows: torch.Tensor, chunk_size: int) -> list[str]:
        return ["gather"] * (1 + -(-int(rows.sum()) // chunk_size))

    counted = targets != -100
    assert found["token_loss_plain"]["collectives"] == gathers(counted & (torch.arange(24) % 4 != 1), 5) + sums
    twice = gathers(counted, 7) + gathers(counted & (factors(24)[0] != 0), 7)
    assert found["logprobs_alone"]["collectives"] == twice + sums


def test_what_cannot_be_meant_is_refused_on_every_rank(world, folder):
    for rank in started(world, folder):
        for part_of_message, message in rank["refusals"].items():
            assert part_of_message in message and "no error" not in message, (part_of_message, message)
