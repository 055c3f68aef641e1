"""What the operators cost on a GPU, counted without one: the numbers do not depend on the machine."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import costs
from benchmarks.costs import Shape

QWEN = {"hidden": 3584, "vocab": 152_064}


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("keep", (1.0, 0.4))
def test_policy_loss_is_three_products_of_the_tokens_that_learn(keep, bias):
    shape = Shape(keep=keep, bias=bias, **QWEN)
    found = costs.count(costs.policy_loss, shape)
    rows = {"forward": [p for p in found.products if p[1] == shape.vocab], "backward": []}
    rows["backward"] = [p for p in found.products if p not in rows["forward"]]
    assert sum(m for m, *_ in rows["forward"]) == shape.kept == (8192 if keep == 1.0 else 3277)
    assert all(n == shape.vocab and k == shape.hidden for _, n, k, _ in rows["forward"])
    assert rows["backward"] == [
        (shape.kept, shape.hidden, shape.vocab, "bfloat16"),
        (shape.vocab, shape.hidden, shape.kept, "bfloat16"),
    ]
    assert found.flops == 3 * 2 * shape.kept * shape.hidden * shape.vocab
    assert found.other_bytes <= 8 * shape.kept * shape.vocab, found.by_operation
    assert found.launches <= 120 and found.waits == 1
    predicted = found.seconds() / costs.floor_seconds(shape, 3)
    assert predicted <= (1.12 if keep == 1.0 else 1.15)


def test_memory_is_the_budget_the_weight_gradient_and_little_more():
    shape = Shape(**QWEN)
    found = costs.count(costs.policy_loss, shape)
    weight = 2 * shape.vocab * shape.hidden
    assert weight + 2 * shape.tokens * shape.vocab < found.peak_bytes <= 4 * 2**30 + weight + 2**29


def test_scoring_is_one_product_and_one_read_of_the_logits():
    shape = Shape(**QWEN)
    found = costs.count(costs.logprobs_forward, shape)
    assert found.flops == 2 * shape.tokens * shape.hidden * shape.vocab
    assert found.other_bytes <= 4.5 * shape.tokens * shape.vocab and found.waits == 1


def test_kept_exponentials_save_the_backward_a_product():
    few = Shape(tokens=2048, **QWEN)
    many = Shape(**QWEN)
    product = 2 * few.hidden * few.vocab
    assert costs.count(costs.logprobs, few).flops == 3 * product * few.tokens
    assert costs.count(costs.logprobs, many).flops == 4 * product * many.tokens


def test_divergence_projects_both_views_once_without_waiting():
    shape = Shape(**QWEN)
    found = costs.count(costs.divergence_forward, shape)
    assert found.flops == 2 * 2 * shape.tokens * shape.hidden * shape.vocab and found.waits == 0
    assert found.other_bytes <= 10 * shape.tokens * shape.vocab, found.by_operation  # two views of 4 bytes


def test_attention_makes_two_products_forward_and_seven_backward():
    """The backward makes q k^T and dout v^T twice, once by rows and once by keys, and needs no atomics for it."""
    (forward, products), (both, _) = costs.ATTENTION_CASES.values()
    shape = Shape(tokens=4096)
    one = 2 * 28 * shape.tokens**2 // 2 * 128
    alone, whole = costs.count(forward, shape), costs.count(both, shape)
    assert alone.flops == products * one and whole.flops == (2 + 7) * one
    assert alone.launches <= 4 and whole.launches <= 16 and alone.waits == whole.waits == 0
    # Nothing of T^2 elements is made or moved.
    assert whole.peak_bytes < 16 * shape.tokens * 28 * 128 * 2 and whole.other_bytes < 2 * shape.tokens**2 * 28


ATTENTION_STEPS = tuple(step for step, _ in costs.ATTENTION_CASES.values())


@pytest.mark.parametrize("step", (costs.policy_loss, costs.logprobs, costs.divergence_forward, *ATTENTION_STEPS))
def test_ten_lengths_compile_no_kernel_twice(step):
    assert costs.variants(step, Shape(tokens=4096, **QWEN)) <= (8 if step in ATTENTION_STEPS else 4)


def test_what_is_counted():
    """By hand: a product, an operation that reads and writes, a view, a constant."""
    found = costs.Costs()
    with costs.Counting(found):
        x, y = torch.empty(4, 8, device="meta"), torch.empty(8, 16, device="meta")
        z = (x @ y).t()
        total = z.add(1.0)
        total[2:3].mul_(2.0)
    assert found.products == [(4, 16, 8, "float32")]
    assert found.launches == 3 and found.other_bytes == 2 * 4 * 64 + 2 * 4 * 4
    assert found.peak_bytes >= 4 * (64 + 64)


def test_a_call_that_waits_unseen_is_refused():
    with pytest.raises(AssertionError, match="waits for the device"), costs.AsOnGpu(costs.Costs(), 1):
        torch.empty((), device="meta").item()


def test_the_table_says_that_its_times_are_predictions(capsys):
    assert costs.main([]) == 0
    assert "Times are predictions: nothing ran on a GPU" in capsys.readouterr().out
