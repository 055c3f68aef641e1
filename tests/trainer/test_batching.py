"""A group behind one prompt gives what its responses give alone: states, gradients, order."""

from __future__ import annotations

import pytest
import torch

from mmrpt.batching import response_places, response_slices, shared_mask, shared_positions, sharing_saves

LENGTHS = ((5, 1, 3), (1, 1, 1), (2, 7, 4))  # of each group's responses


@pytest.fixture
def policy(looking_policy):
    return looking_policy


def batches(policy, pairs):
    """The same three groups as rows of their own and as shared rows, prompts of three lengths, two of one image."""
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(2)])
    prompts = [policy.encode_prompt("restore: a <mask>" + " card" * i, 4) for i in range(3)]
    ids = policy.encode_text("the card is red. cards are made of paper.")
    groups = [[ids[j : j + n] for j, n in enumerate(lengths)] for lengths in LENGTHS]
    return [policy.group_batch(prompts, groups, pixels, [1, 0, 1], share=share) for share in (False, True)]


def test_states_and_order_are_those_of_rows_alone(policy, pairs):
    alone, shared = batches(policy, pairs)
    assert alone.segments is None and shared.input_ids.shape[0] == 3
    (a, ids_a, mask_a), (b, ids_b, mask_b) = (response_slices(policy.hidden(x), x) for x in (alone, shared))
    assert torch.equal(mask_a, mask_b) and torch.equal(ids_a, ids_b)
    assert mask_a.sum(-1).tolist() == [n for lengths in LENGTHS for n in lengths]
    torch.testing.assert_close(b[mask_b], a[mask_a], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_rows_alone(policy, pairs):
    found = []
    for batch in batches(policy, pairs):
        hidden, ids, mask = response_slices(policy.hidden(batch), batch)
        logps = (hidden @ policy.head_weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        loss = (logps * torch.arange(1.0, mask.numel() + 1).view(mask.shape))[mask].sum()
        found.append(torch.autograd.grad(loss, [p for p in policy.model.parameters() if p.requires_grad]))
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()) + 1e-7)


def test_a_response_sees_no_other(policy, pairs):
    _, shared = batches(policy, pairs)
    changed = shared.input_ids.clone()
    second = shared.segments == 2
    changed[second] = policy.encode_text("blue")[0]
    assert not torch.equal(changed, shared.input_ids)
    before = policy.hidden(shared)
    shared.input_ids.copy_(changed)
    after = policy.hidden(shared)
    others = (shared.segments >= 0) & ~second
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[second], after[second])


def test_layout_of_one_row_by_hand():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5]]
    allowed = shared_mask(segments)[0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == seen
    positions = torch.arange(6).expand(3, 1, 6)
    assert shared_positions(positions, segments)[0, 0, :5].tolist() == [0, 1, 2, 3, 2]
    row, place, mask = response_places(segments)
    assert row.tolist() == [[0], [0]] and [p[m].tolist() for p, m in zip(place, mask, strict=True)] == [[2, 3], [4]]


def test_response_slices_move_each_response_to_the_left(policy, pairs):
    batch = batches(policy, pairs)[0]
    order = torch.arange(batch.input_ids.shape[1], dtype=torch.float32).expand(batch.input_ids.shape)
    states, ids, mask = response_slices(order[..., None], batch)
    first = batch.response_mask.int().argmax(-1)
    for row, (kept, start) in enumerate(zip(mask, first, strict=True)):
        count = int(kept.sum())
        assert kept.tolist() == [True] * count + [False] * (len(kept) - count)
        assert states[row, :count, 0].tolist() == list(range(start - 1, start - 1 + count))
        assert ids[row, :count].tolist() == batch.input_ids[row, start : start + count].tolist()
        assert not ids[row, count:].any()


def test_short_responses_share_and_long_ones_do_not():
    assert sharing_saves([60], [[10] * 8], hidden_size=128)
    assert sharing_saves([1000], [[500] * 8], hidden_size=3584)
    assert not sharing_saves([1000], [[4000] * 8], hidden_size=3584)
    assert not sharing_saves([60], [[10]], hidden_size=128)  # one response: nothing to share


def test_an_empty_response_is_refused(policy, pairs):
    pixels = policy.pixels([pairs.image(pairs[0].id)])
    with pytest.raises(ValueError, match="no token"):
        policy.group_batch([policy.encode_prompt("restore: a <mask>", 4)], [[[5], []]], pixels, [0], share=True)
