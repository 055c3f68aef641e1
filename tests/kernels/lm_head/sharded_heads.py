"""What test_vocab_sharding.py runs on every process: each operator with its part of the vocabulary.

A case is a function of a `Part`: the parent calls it with all words and no group, every process with its own.
"""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels.backends import TABLE
from mmrpt_kernels.divergence.api import KINDS
from mmrpt_kernels.integrations import verl
from mmrpt_kernels.integrations.guards import SelfCheck, SelfCheckError
from mmrpt_kernels.lm_head import chunk_sizes, vocab_parallel
from mmrpt_kernels.logprobs import LogProbs, linear_logprobs
from mmrpt_kernels.testing import HeadCase, on_a_grid, poisoned_memory
from mmrpt_kernels.testing.interpreter import mend_interpreter
from tests.kernels.lm_head.operators import DOUBLE, OPERATORS, Operator, draw, leaves_of, mixed_sum, run

BY_NAME = {operator.name: operator for operator in OPERATORS}
LOGPROBS, DIVERGENCE, POLICY = (BY_NAME[n] for n in ("logprobs", "divergence", "policy_loss_with_entropy"))
WORLDS = (2, 3)
TIMEOUT = datetime.timedelta(seconds=150)  # what would deadlock raises
PLAIN = HeadCase("plain", 24, 8, 53, chunk_size=5)
RICH = HeadCase("rich", 24, 8, 53, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, chunk_size=7)
BIASED = HeadCase("biased", 24, 8, 53, bias=True, chunk_size=10)
TALL = PLAIN._replace(name="tall", rows=48, hidden=32, vocab=509, chunk_size=20)
FEW = RICH._replace(name="few", rows=4, chunk_size=3)
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
    "on_policy": {"change": lambda made, part: made.update(old_logps=None)},
    "all_masked": {"change": lambda made, part: made["active"].zero_()},
    "vppo": {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": -0.06, "entropy_kind": "sampled"},
    "kept_alone": {"entropy_scope": "kept", "kl_coef": 0.0},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04, "aggregation": "sequence_mean"},
    "gspo_masked": {"ratio_level": "sequence", "compact": False},
    "cispo": {"surrogate": "cispo", "clip_high": 0.28},
}


class Part(NamedTuple):
    """What a process, or the parent for all of them, computes with."""

    world: int  # processes that share the vocabulary, also for the parent
    rank: int | None = None  # None: the parent, with all words
    backend: str = "portable"
    dtype: torch.dtype = DOUBLE
    wide: bool = False  # the values of `dtype` in float64

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


def inputs(case: HeadCase, part: Part) -> dict:
    case = case._replace(vocab=case.vocab or part.world)
    made = draw(case, 3, dtype=part.dtype, wide=part.wide, device="cpu")
    words = part.words(case.vocab)
    made |= {n: made[n].detach()[words].requires_grad_() for n in ("weight", "bias") if made[n] is not None}
    made["options"] |= {"vocab_group": part.group, "backend": part.backend}
    return made | {"sequences": 4 if case.rows % 4 == 0 else 1}


def plain(
    operator: Operator, case: HeadCase, part: Part, *, change: Callable = lambda made, part: None, keep=None, **options
) -> dict:
    """change(made, part): what is spoilt in the inputs beforehand. keep: rows that learn."""
    made = inputs(case, part)
    change(made, part)
    return run(operator, made, 3, keep, **options)


IDLE, LEARNING = torch.arange(24) % 11 == 3, torch.arange(24) % 5 == 2


def spoil(rows: torch.Tensor, made: dict, part: Part) -> None:
    """NaN and inf in rows that have no incoming gradient, or in some that have."""
    with torch.no_grad():
        made["hidden"][rows] = torch.nan
        made["hidden_q"][rows & (torch.arange(24) > 10)] = torch.inf


def rule_out_a_part(made: dict, part: Part) -> None:
    """Every word of the first rank is impossible: its maximum is -inf."""
    first, own = Part(part.world, 0).words(BIASED.vocab).stop, part.words(BIASED.vocab)
    with torch.no_grad():
        made["bias"][torch.arange(own.start, own.stop) < first] = -torch.inf
    made["targets"][(made["targets"] >= 0) & (made["targets"] < first)] = BIASED.vocab - 1


def equal_views(made: dict, part: Part) -> None:
    with torch.no_grad():
        for name in ("hidden", "weight", "bias"):
            made[name].copy_(on_a_grid(made[name]))
        made["hidden_q"].copy_(made["hidden"])


def freeze(*names: str) -> Callable:
    return lambda made, part: [made[name].requires_grad_(False) for name in names]


def another_head(learns: bool, part: Part) -> dict:
    """A head of another hidden size for the second view."""
    made = inputs(BIASED, part)
    whole = inputs(BIASED, part._replace(rank=None))["weight"].detach().roll(1, 0)
    made["weight_q"] = whole[part.words(BIASED.vocab), :-1].clone().requires_grad_(learns)
    made["hidden_q"] = made["hidden_q"].detach()[:, :-1].requires_grad_(learns)
    return run(DIVERGENCE._replace(leaves=("hidden", "weight", "hidden_q", "weight_q")), made, 3)


def learning_alone(names: tuple[str, ...], part: Part) -> dict:
    """A loss of some of the results."""
    call = lambda made: {name: value for name, value in DIVERGENCE.call(made).items() if name in names}  # noqa: E731
    return plain(DIVERGENCE._replace(call=call), RICH, part)


def chunked_by_budget(operator: Operator, part: Part) -> dict:
    """No chunk size, and memory for two rows of the whole vocabulary: for another number of rows of each part."""
    before = chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS
    chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = 2 * 8 * PLAIN.vocab, 1
    try:
        return plain(operator, PLAIN._replace(chunk_size=None), part)
    finally:
        chunk_sizes.CPU_BYTES, chunk_sizes.CPU_MIN_ROWS = before


def checkpointed(operator: Operator, part: Part) -> dict:
    """Recomputed in the backward, where its collectives come a second time."""
    made = inputs(PLAIN, part)
    wrt = leaves_of(operator, made)

    def total(*leaves):
        return mixed_sum(operator.call(made | dict(zip(wrt, leaves, strict=True))), 3)

    loss = checkpoint(total, *wrt.values(), use_reentrant=False)
    grads = torch.autograd.grad(loss, list(wrt.values()))
    return {"loss": loss} | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def verls_head(part: Part) -> dict:
    """That of verl's Megatron workers: every rank has all hidden states (S, 1, H), and its part of their gradient."""
    made = inputs(PLAIN._replace(ignored="none"), part)
    wrt, targets = (made["hidden"], made["weight"]), made["targets"]
    if part.rank is None:
        found = linear_logprobs(*wrt, targets, temperature=0.8, return_entropy=True, backend="reference")
    else:
        kernel = verl._make_heads(SelfCheck(True), None)[1]
        found = kernel(wrt[0][:, None], wrt[1], targets[None], 0.8, "none", part.group)
    named = dict(zip(("logps", "entropy"), found, strict=True))
    d_hidden, d_weight = torch.autograd.grad(mixed_sum(named, 3), wrt)
    if part.rank is not None:
        dist.all_reduce(d_hidden)
    return named | {"d_hidden": d_hidden, "d_weight": d_weight}


def verls_alarm(part: Part) -> str:
    """What the self-check of verl's head says to log-probabilities of another size, on every rank."""

    def broken(*arguments, **options) -> LogProbs:
        found = linear_logprobs(*arguments, **options)
        return found._replace(logps=found.logps - 0.5)

    verl.linear_logprobs = broken
    try:
        verls_head(part)
    except SelfCheckError as error:
        return str(error)
    finally:
        verl.linear_logprobs = linear_logprobs
    return "no error"


def compiled(operator: Operator, part: Part) -> dict:
    """In one graph without a break."""
    if part.rank is None:
        return plain(operator, RICH, part)
    torch._dynamo.reset()
    call = torch.compile(operator.call, fullgraph=True, backend="aot_eager")
    return plain(operator._replace(call=call), RICH, part)


case = functools.partial
EXACT = {
    f"{operator.name}_{head.name}": case(plain, operator, head)
    for operator, head in itertools.product((LOGPROBS, BY_NAME["entropy_loss"], DIVERGENCE), HEADS)
}
EXACT |= {
    f"{name}_plain": case(plain, BY_NAME[name], PLAIN) for name in ("logprobs_alone", "token_loss", "policy_loss")
}
EXACT |= {
    f"policy_{name}": case(plain, POLICY, PLAIN, statistics=True, **options) for name, options in VARIANTS.items()
}
EXACT |= {f"{kind}_alone": case(plain, DIVERGENCE, PLAIN, kind=(kind,)) for kind in KINDS}
for operator in (LOGPROBS, DIVERGENCE):
    EXACT |= {
        f"{operator.name}_idle_rows_of_nan": case(plain, operator, PLAIN, change=case(spoil, IDLE), keep=~IDLE),
        f"{operator.name}_learning_rows_of_nan": case(plain, operator, PLAIN, change=case(spoil, LEARNING)),
        f"{operator.name}_a_part_ruled_out": case(plain, operator, BIASED, change=rule_out_a_part),
        f"{operator.name}_checkpointed": case(checkpointed, operator),
    }
for operator in (LOGPROBS, BY_NAME["token_loss"], DIVERGENCE):
    EXACT[f"{operator.name}_chunked_by_budget"] = case(chunked_by_budget, operator)
for operator in (LOGPROBS, POLICY, DIVERGENCE):
    EXACT[f"{operator.name}_compiled"] = case(compiled, operator)
for operator in (LOGPROBS, BY_NAME["token_loss"], POLICY):
    EXACT[f"{operator.name}_masked"] = case(plain, operator, PLAIN, compact=False)
EXACT |= {
    "policy_rich": case(plain, POLICY, RICH),
    "another_head_for_q": case(another_head, True),
    "a_head_of_one_view_learns": case(another_head, False),
    "hidden_states_alone_learn": case(plain, DIVERGENCE, PLAIN, change=freeze("weight")),
    "first_hidden_states_alone_learn": case(plain, DIVERGENCE, PLAIN, change=freeze("weight", "hidden_q")),
    "entropies_alone_learn": case(learning_alone, ("entropy_p", "entropy_q")),
    "divergence_alone_learns": case(learning_alone, KINDS),
    "equal_views": case(plain, DIVERGENCE, RICH, change=equal_views),
    "verls_head": verls_head,
}
# Row kernels that a CPU can run besides: Triton's interpreter, slowly, and csrc's host build where it was built.
LOW_PRECISION = [
    (operator, head, dtype, "portable")
    for operator in (LOGPROBS, BY_NAME["token_loss"], POLICY, DIVERGENCE)
    for head in (TALL, RICH)
    for dtype in (torch.float32, torch.bfloat16)
]
LOW_PRECISION += [
    (operator, FEW, torch.float32, row.backend)
    for operator in (LOGPROBS, POLICY, DIVERGENCE)
    for row in TABLE
    if row.op == operator.op and row.devices == ("cpu",) and not row.missing
]


def message_of(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(operator: Operator, part: Part) -> list[tuple[str, str]]:
    """What is said on this rank to calls that cannot be meant; the ranks' next call must still work."""
    made, last = inputs(PLAIN, part), part.rank == part.world - 1
    targets, other = made["targets"], made["targets"].clone()
    other[4] = 17 if last else 18

    def said(*, backward=False, options=None, **changes) -> str:
        def call():
            found = operator.call(made | changes, **(options or {}))
            if backward:
                grads = torch.ones(24, dtype=DOUBLE)
                grads[5:] = 0.0 if last else 1.0
                next(iter(found.values())).backward(grads)

        return message_of(call)

    asked = [
        ("targets", said(targets=other)),
        ("options", said(options={"temperature": 1.0 + 0.1 * part.rank})),
        ("at least one word", said(weight=made["weight"][: 0 if last else None])),
        ("53", said(targets=torch.full_like(targets, 53))),
        ("vocab_group", said(options={"vocab_group": dist.GroupMember.NON_GROUP_MEMBER})),
        ("does not support", said(options={"backend": "reference"})),
        ("differ in their tokens with work", said(backward=True)),
    ]
    if operator is LOGPROBS:
        fewer = torch.where(torch.arange(24) < 3, -100, targets) if last else targets
        return [*asked, ("tokens with work", said(targets=fewer))]
    narrow = made["weight"].float() if last else None
    kinds = said(options={"kind": ("kl",) if last else ("js",)})
    return [*asked, ("differ in their options", kinds), ("their options", said(weight_q=narrow))]


def count_collectives(calls: list[str]) -> None:
    """Every collective of this process is written down from now on."""

    def counting(name: str, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for module, name in ((vocab_parallel, "gather"), (dist, "all_to_all_single")):
        setattr(module, name, counting(name, getattr(module, name)))


def rank_main(rank: int, world: int, folder: str) -> None:
    """One process: every case with what it took, saved to the folder."""
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.set_num_threads(1)
    mend_interpreter()
    calls: list[str] = []
    count_collectives(calls)
    part = Part(world, rank)
    named = {name: (case(one, part=part), 2 - ("compiled" in name)) for name, one in EXACT.items()}
    for operator, head, dtype, backend in LOW_PRECISION:
        chosen = part._replace(dtype=dtype, backend=backend)
        named[f"{operator.name} {head.name} {dtype} {backend}"] = case(plain, operator, head, chosen), 1
    found = {}
    for name, (one, times) in named.items():
        if "compiled" in name and world != WORLDS[0]:  # slow, and one count is enough
            continue
        values = []
        for _ in range(times):
            calls.clear()
            with poisoned_memory():
                values.append({key: value.detach() for key, value in one().items()})
        same = all(torch.equal(values[0][key].nan_to_num(7.0), values[-1][key].nan_to_num(7.0)) for key in values[0])
        found[name] = {"values": values[0], "repeats": same, "collectives": list(calls)}
    found["refusals"] = refusals(LOGPROBS, part) + refusals(DIVERGENCE, part)
    found["refusals"].append(("log-probability: max error", verls_alarm(part)))
    torch.save(found, f"{folder}/{world}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
