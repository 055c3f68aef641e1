"""perception_weights: counts, ties, trajectory weights, statistics over ranks, compilation."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt_kernels import perception_weights

BACKENDS = ("portable", "reference")


def sample(batch=6, length=23, seed=0, dtype=torch.float32):
    """Scores with many ties, responses of several lengths with holes, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 7, (batch, length), generator=generator).to(dtype) / 3
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[batch // 2] = False
    return scores, mask


def by_hand(scores, mask, keep_ratio: str):
    """The kept positions of each row by Python's own sort and exact fractions."""
    kept = torch.zeros_like(mask)
    for b in range(scores.shape[0]):
        positions = [t for t in range(scores.shape[1]) if mask[b, t]]
        count = math.ceil(Fraction(keep_ratio) * len(positions))
        for t in sorted(positions, key=lambda t: (-scores[b, t].item(), t))[:count]:
            kept[b, t] = True
    return kept


class TestMask:
    @settings(max_examples=100, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        keep_ratio=st.sampled_from(("0.4", "0.1", "0.55", "1", "0.000001")) | st.floats(1e-4, 1.0).map(str),
        shape=st.sampled_from(((1, 1), (1, 5), (6, 23), (3, 200))),
    )
    def test_against_a_plain_sort(self, seed, keep_ratio, shape):
        scores, mask = sample(*shape, seed=seed)
        expected = by_hand(scores, mask, keep_ratio)
        for backend in BACKENDS:
            out = perception_weights(scores, mask, keep_ratio=float(keep_ratio), backend=backend)
            assert torch.equal(out.perception_mask, expected), backend

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_counts_are_exact_for_every_length(self, backend):
        """0.4 * 5 is 2, though 0.4 as a binary float is a little more than two fifths."""
        lengths = torch.arange(1, 151)
        mask = torch.arange(150)[None] < lengths[:, None]
        for ratio in ("0.4", "0.1", "0.2", "0.3", "0.7", "0.9", "0.05", "0.001"):
            out = perception_weights(torch.zeros(150, 150), mask, keep_ratio=float(ratio), backend=backend)
            expected = torch.tensor([math.ceil(Fraction(ratio) * n) for n in range(1, 151)])
            assert torch.equal(out.perception_mask.sum(-1), expected), ratio
        third = perception_weights(torch.zeros(150, 150), mask, keep_ratio=2 / 3, backend=backend)
        assert torch.equal(third.perception_mask.sum(-1), (2 * lengths + 2) // 3)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_infinite_scores_rank_at_the_ends_and_stay_inside_the_response(self, backend):
        inf = torch.inf
        scores = torch.tensor([[9.0, -inf, 1.0, inf, -inf, 9.0]])
        mask = torch.tensor([[False, True, True, True, True, False]])
        for count, expected in enumerate(([3], [3, 2], [3, 2, 1], [3, 2, 1, 4]), start=1):
            out = perception_weights(scores, mask, keep_ratio=count / 4, backend=backend)
            assert sorted(expected) == out.perception_mask[0].nonzero()[:, 0].tolist()
            assert out.trajectory_weights.tolist() == [1.0]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_what_lies_outside_the_response_changes_nothing(self, backend, seed):
        scores, mask = sample(seed=seed)
        expected = perception_weights(scores, mask, backend=backend)
        for value in (float("nan"), float("inf"), 1e30):
            out = perception_weights(scores.masked_fill(~mask, value), mask, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_dtypes_and_strides(self, dtype, seed):
        scores, mask = sample(seed=seed, dtype=dtype)
        expected = perception_weights(scores.double(), mask)
        out = perception_weights(scores.T.contiguous().T, mask.T.contiguous().T)
        assert torch.equal(out.perception_mask, expected.perception_mask)
        assert out.trajectory_weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(out.trajectory_weights.double(), expected.trajectory_weights, rtol=1e-6, atol=0)


class TestTrajectoryWeights:
    @pytest.mark.parametrize("low", (0.9, 0.7))
    def test_it_is_the_paper_s_with_its_maximum_cancelled(self, low, seed):
        scores, mask = sample(seed=seed, dtype=torch.float64)
        rows = mask.any(-1)
        ours = perception_weights(scores, mask, min_weight=low).trajectory_weights
        assert ours[~rows].tolist() == [1.0]
        means = (scores * mask).sum(-1)[rows] / mask.sum(-1)[rows]
        scaled = (means - means.min()) / (means.max() - means.min())
        high = low + (1 - low) / scaled.mean()
        torch.testing.assert_close(ours[rows], low + (high - low) * scaled)
        given = perception_weights(scores, mask, min_weight=low, max_weight=high.item()).trajectory_weights
        torch.testing.assert_close(given, ours)

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 9), min_weight=st.floats(0.0, 1.0))
    def test_the_mean_weight_is_one(self, seed, batch, min_weight):
        scores, mask = sample(batch, 11, seed)
        mask[0, 0] = True
        weights = perception_weights(scores, mask, min_weight=min_weight).trajectory_weights
        assert abs(weights[mask.any(-1)].double().mean().item() - 1) < 1e-6
        assert (weights >= min_weight - 1e-6).all()

    def test_max_weight_bounds_the_weights(self, seed):
        scores, mask = sample(seed=seed)
        weights = perception_weights(scores, mask, min_weight=0.5, max_weight=1.25).trajectory_weights
        shaped = weights[mask.any(-1)]
        assert shaped.min().item() == 0.5 and shaped.max().item() == 1.25

    @pytest.mark.parametrize("max_weight", [None, 1.3])
    @pytest.mark.parametrize("value", [0.1, 0.0, -3.7, 1e-30, 1e6])
    def test_equal_scores_give_one_whatever_the_lengths(self, value, max_weight):
        mask = torch.arange(300)[None] < torch.tensor([3, 7, 300, 111, 1])[:, None]
        for dtype in (torch.float32, torch.float64):
            scores = torch.full((5, 300), value, dtype=dtype)
            out = perception_weights(scores, mask, max_weight=max_weight)
            assert out.trajectory_weights.tolist() == [1.0] * 5

    def test_no_response_and_no_columns(self):
        for columns in (4, 0):
            out = perception_weights(torch.rand(3, columns), torch.zeros(3, columns, dtype=torch.bool))
            assert not out.perception_mask.any() and out.perception_mask.shape == (3, columns)
            assert out.trajectory_weights.tolist() == [1.0] * 3

    def test_an_infinite_trajectory_does_not_spoil_the_others(self, seed):
        scores, mask = sample(seed=seed)
        expected = perception_weights(scores[1:], mask[1:])
        scores[0, 0], mask[0, 0] = torch.inf, True
        out = perception_weights(scores, mask)
        assert out.trajectory_weights[0] == 1
        assert torch.equal(out.trajectory_weights[1:], expected.trajectory_weights)

    def test_nothing_is_differentiable(self, seed):
        scores, mask = sample(seed=seed)
        assert not perception_weights(scores.requires_grad_(), mask).trajectory_weights.requires_grad


def rank_main(rank: int, world: int, file: str, folder: str) -> None:
    """One rank of a gloo group: its shard of the batch, both scopes, and a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    scores, mask = sample(7, 31, seed=5)
    own = slice(0, 2) if rank == 0 else slice(2, 7)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    results = {
        "batch": perception_weights(scores[own], mask[own]),
        "batch_bounded": perception_weights(scores[own], mask[own], max_weight=1.2),
        "local": perception_weights(scores[own], mask[own], scope="local"),
        "group": perception_weights(scores[own], mask[own], group=alone),
        "empty_rank": perception_weights(scores[own], mask[own] & (rank == 1)),
    }
    compiled = torch.compile(lambda s, m: perception_weights(s, m), fullgraph=True, backend="eager")
    results["compiled"] = compiled(scores[own], mask[own])
    torch.save({name: tuple(out) for name, out in results.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
def test_statistics_do_not_depend_on_the_rank_count(tmp_path):
    mp.spawn(rank_main, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    scores, mask = sample(7, 31, seed=5)
    whole = perception_weights(scores, mask)
    bounded = perception_weights(scores, mask, max_weight=1.2)
    for name, expected in {"batch": whole, "compiled": whole, "batch_bounded": bounded}.items():
        for field in range(2):
            joined = torch.cat([first[name][field], second[name][field]])
            torch.testing.assert_close(joined, expected[field], rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    shards = [perception_weights(scores[own], mask[own]) for own in (slice(0, 2), slice(2, 7))]
    for name in ("local", "group"):
        for saved, expected in zip((first, second), shards, strict=True):
            assert torch.equal(saved[name][1], expected.trajectory_weights), name
    assert not torch.allclose(shards[0].trajectory_weights, whole.trajectory_weights[:2])
    assert first["empty_rank"][1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(second["empty_rank"][1], shards[1].trajectory_weights)


class TestIntegration:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_compile_without_graph_break(self, backend, fresh_compiler, seed):
        def step(scores, mask, keep_ratio):
            return perception_weights(scores, mask, keep_ratio=keep_ratio, backend=backend)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for shape, ratio in (((6, 23), 0.4), ((5, 31), 0.4), ((5, 31), 0.25)):
            scores, mask = sample(*shape, seed=seed)
            for actual, expected in zip(compiled(scores, mask, ratio), step(scores, mask, ratio), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)

    def test_a_nan_under_compile_ranks_last_and_weighs_one(self, fresh_compiler):
        scores = torch.tensor([[float("nan"), 1.0, 2.0], [3.0, 4.0, 5.0], [0.0, 1.0, 1.0]])
        mask = torch.ones(3, 3, dtype=torch.bool)
        compiled = torch.compile(
            lambda s, m: perception_weights(s, m, keep_ratio=2 / 3), fullgraph=True, backend="eager"
        )
        out = compiled(scores, mask)
        assert out.perception_mask[0].tolist() == [False, True, True]
        assert out.trajectory_weights[0] == 1
        torch.testing.assert_close(out.trajectory_weights[1:], torch.tensor([1.1, 0.9]))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_opcheck(self, backend, seed):
        torch.library.opcheck(torch.ops.mmrpt_kernels.perception_mask.default, (*sample(seed=seed), 0.4, backend))

    def test_autocast_changes_nothing(self, seed):
        scores, mask = sample(seed=seed)
        expected = perception_weights(scores, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = perception_weights(scores, mask)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
