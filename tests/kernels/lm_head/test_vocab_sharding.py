"""The lm head cut over a process group, on 2 and 3 processes: equal to the whole head, the same bits on all ranks.

One start of processes per count runs all cases of sharded_heads.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.kernels.lm_head import sharded_heads
from tests.kernels.lm_head.operators import judge, name_of
from tests.kernels.lm_head.sharded_heads import EXACT, LOW_PRECISION, PLAIN, WORLDS, Part, inputs, plain

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, which the interpreter runs on, of probability zero
]


@functools.cache
def started(world: int, folder: Path) -> list[dict]:
    """What the ranks of `world` processes found; one start of processes each."""
    mp.spawn(sharded_heads.rank_main, args=(world, str(folder)), nprocs=world)
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
    if "compiled" in name and world != WORLDS[0]:
        pytest.skip("compiled on one count of processes only")
    found = joined(name, started(world, folder))
    # The definition's autograd lets idle rows of NaN spread, and knows no compact=False.
    backend = "portable" if "of_nan" in name or "masked" in name else "reference"
    expected = EXACT[name](part=Part(world, backend=backend))
    assert found.keys() == expected.keys()
    if "learning_rows" in name:
        assert found["d_weight"].isnan().all()
    size = 1e4 if "huge" in name else 1.0  # eps * the size of the logits is what a float64 logit is known to
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12 * size, atol=1e-12 * size, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_equal_views_have_no_divergence(world, folder):
    found = joined("equal_views", started(world, folder))
    assert all((found[kind] == 0).all() for kind in ("kl", "reverse_kl", "js", "k3"))


@pytest.mark.parametrize(("operator", "head", "dtype", "backend"), LOW_PRECISION, ids=name_of)
def test_low_precision_by_the_error_rule(operator, head, dtype, backend, world, folder):
    found = joined(f"{operator.name} {head.name} {dtype} {backend}", started(world, folder))
    whole = Part(world, backend="reference", dtype=dtype)
    judge(operator, head, dtype, found, plain(operator, head, whole), plain(operator, head, whole._replace(wide=True)))


def test_same_bits_again_and_the_same_collectives_on_all_ranks(world, folder):
    ranks = started(world, folder)
    for name in ranks[0].keys() - {"refusals"}:
        assert all(rank[name]["repeats"] for rank in ranks), name
        assert all(rank[name]["collectives"] == ranks[0][name]["collectives"] for rank in ranks), name


@pytest.mark.parametrize(
    ("name", "views", "sweeps"),
    [
        *(("logprobs_plain", 1, 1), ("logprobs_alone_plain", 1, 1)),
        *((f"{kind}_alone", 2, 2 if kind == "js" else 1) for kind in ("kl", "reverse_kl", "k3", "js")),
    ],
)
def test_one_collective_a_chunk_and_a_sweep_and_two_for_d_hidden(name, views, sweeps, world, folder):
    """And one in each pass to compare the ranks. The backward of log-probs reads its logits again: exponentials are
    not kept, as they would be of each rank's own words."""
    case, targets = started(world, folder)[0][name], inputs(PLAIN, Part(1))["targets"]
    counted = 24 if views == 2 else int((targets != -100).sum())
    active = int((case["values"]["d_hidden"] != 0).any(-1).sum())
    assert 0 < active < counted
    gathers = sum(1 + sweeps * -(-rows // PLAIN.chunk_size) for rows in (counted, active))
    assert case["collectives"] == ["gather"] * gathers + ["all_to_all_single", "gather"] * views


def test_a_loss_makes_its_gradients_with_its_chunks_collectives(world, folder):
    case = started(world, folder)[0]["token_loss_plain"]
    made = inputs(PLAIN, Part(1))
    active = int((made["active"] & (made["targets"] != -100)).sum())
    assert case["collectives"] == ["gather"] * (1 + -(-active // PLAIN.chunk_size)) + ["all_to_all_single", "gather"]


def test_what_cannot_be_meant_is_refused_on_every_rank(world, folder):
    for rank in started(world, folder):
        for part_of_message, message in rank["refusals"]:
            assert part_of_message in message and "no error" not in message, (part_of_message, message)
