"""Grouped sampling against plain decoding without a cache."""

from __future__ import annotations

import sys

import pytest
import torch

from mmrpt.batching import response_slices
from mmrpt.rollout.generate import _draw_top_p, _inverse_cdf, generate
from mmrpt_kernels import linear_logprobs


def prompts_and_pixels(policy, pairs, count=3):
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(count)])
    prompts = [policy.encode_prompt("restore: a <mask> card" + " card" * (2 * i), 4) for i in range(count)]
    return prompts, pixels


def test_greedy_decoding_equals_recomputing_every_step(policy, pairs):
    prompts, pixels = prompts_and_pixels(policy, pairs)
    out = generate(policy, prompts, pixels, range(3), max_new_tokens=6, temperature=0.0)
    bias = policy.sampling_bias()
    for row, prompt in enumerate(prompts):
        response: list[int] = []
        for _ in range(6):
            batch = policy.batch([prompt], [response], policy.pixels([pairs.image(pairs[row].id)]), [0])
            logits = policy.hidden(batch)[0, -1] @ policy.head_weight.T + bias
            response.append(int(logits.argmax()))
            if response[-1] == policy.eos_token_id:
                break
        assert list(out.token_ids[row]) == response, f"row {row}"


def test_sampled_logps_and_states_are_those_of_a_full_forward_pass(policy, pairs):
    prompts, pixels = prompts_and_pixels(policy, pairs)
    out = generate(
        policy, prompts, pixels, range(3), group_size=4, max_new_tokens=7, generator=torch.Generator().manual_seed(5)
    )
    rows = [p for p in prompts for _ in range(4)]
    index = [i for i in range(3) for _ in range(4)]
    batch = policy.batch(rows, out.token_ids, pixels, index)
    hidden, targets, mask = response_slices(policy.hidden(batch), batch)
    assert [tuple(t[m].tolist()) for t, m in zip(targets, mask, strict=True)] == out.token_ids
    width = mask.shape[1]
    torch.testing.assert_close(out.hidden[:, :width][mask], hidden[mask], rtol=1e-4, atol=1e-5)
    logits = hidden @ policy.head_weight.T + policy.sampling_bias()
    wanted = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(out.logps[:, :width][mask], wanted[mask], rtol=1e-4, atol=1e-5)
    assert (out.logps <= 0).all()


def test_a_half_precision_model_samples_from_the_distribution_that_it_trains(looking_policy, pairs):
    """Logits of a bfloat16 head that are rounded to bfloat16 are off by hundredths before any step was taken."""
    policy = looking_policy
    policy.model.to(torch.bfloat16)
    prompts, pixels = prompts_and_pixels(policy, pairs)
    out = generate(
        policy, prompts, pixels, range(3), group_size=8, max_new_tokens=7, generator=torch.Generator().manual_seed(5)
    )
    assert out.hidden.dtype == torch.bfloat16 and out.logps.dtype == torch.float32
    lengths = torch.tensor([len(ids) for ids in out.token_ids])
    mask = torch.arange(out.logps.shape[1]) < lengths[:, None]
    ids = torch.tensor([token for row in out.token_ids for token in row])
    with torch.no_grad():
        wanted = linear_logprobs(out.hidden[mask], policy.head_weight, ids, bias=policy.sampling_bias()).logps
    torch.testing.assert_close(out.logps[mask], wanted, rtol=0, atol=1e-4)


def test_draws_a_few_rows_at_a_time_are_the_draws_of_all(policy, pairs, monkeypatch):
    prompts, pixels = prompts_and_pixels(policy, pairs)

    def draw():
        generator = torch.Generator().manual_seed(2)
        return generate(policy, prompts, pixels, range(3), group_size=3, max_new_tokens=6, generator=generator)

    whole = draw()
    monkeypatch.setattr(sys.modules["mmrpt.rollout.generate"], "DRAWN_LOGITS", 4 * policy.head_weight.shape[0])
    parts = draw()
    assert parts.token_ids == whole.token_ids
    torch.testing.assert_close(parts.logps, whole.logps)


def test_draws_depend_on_the_generator_alone(policy, pairs):
    prompts, pixels = prompts_and_pixels(policy, pairs)
    draw = [
        generate(
            policy,
            prompts,
            pixels,
            range(3),
            group_size=2,
            max_new_tokens=5,
            generator=torch.Generator().manual_seed(seed),
        ).token_ids
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_suppressed_ids_never_appear(policy, pairs):
    with torch.no_grad():  # a head that wants nothing but the image marker
        policy.head_weight[policy.image_token_id] = 50 * policy.head_weight.abs().sum(0)
    prompts, pixels = prompts_and_pixels(policy, pairs)
    out = generate(
        policy,
        prompts,
        pixels,
        range(3),
        group_size=8,
        max_new_tokens=8,
        temperature=3.0,
        generator=torch.Generator().manual_seed(0),
    )
    sampled = {token for row in out.token_ids for token in row}
    assert not sampled & set(policy.suppressed_ids)


@pytest.mark.parametrize("top_p", [1e-4, 0.3, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_top_p_draws_follow_sorted_rows_that_are_cut(sharpness, top_p):
    """20,000 draws of each of four rows against the definition, within five standard deviations of a share."""
    p = (sharpness * torch.randn(4, 13, dtype=torch.float64)).softmax(-1)
    p[0] = 1 / 13  # equals: the first ones are kept
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    cut = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    wanted = torch.zeros_like(p).scatter(-1, index, cut / cut.sum(-1, keepdim=True))
    drawn = _draw_top_p(p.repeat_interleave(20_000, 0), top_p, torch.Generator().manual_seed(3)).view(4, -1)
    shares = torch.stack([torch.bincount(row, minlength=13) for row in drawn]) / 20_000
    assert not shares[wanted == 0].any()
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()


def test_draws_follow_the_weights_and_never_a_weight_of_zero():
    weights = torch.tensor([[0.0, 0.1, 0.0, 0.6, 0.3, 0.0]])
    drawn = _inverse_cdf(weights.expand(20_000, 6), torch.Generator().manual_seed(3))
    share = torch.bincount(drawn, minlength=6) / 20_000
    assert share[[0, 2, 5]].tolist() == [0, 0, 0]
    # Three standard deviations of a share of 20,000 draws are at most 0.011.
    torch.testing.assert_close(share, weights[0], rtol=0, atol=0.011)


def test_training_mode_is_left_as_it_was(policy, pairs):
    prompts, pixels = prompts_and_pixels(policy, pairs)
    policy.model.train()
    generate(policy, prompts, pixels, range(3), max_new_tokens=2, temperature=0.0)
    assert policy.model.training
