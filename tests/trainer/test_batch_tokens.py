"""Forward passes of bounded size: what is in each; gradients, scores and samples do not depend on the bound."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmrpt import batching, perception
from mmrpt.batching import micro_batches, split_rows
from mmrpt.captions import caption_batch
from mmrpt.corpus import ImageCache
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.engines.run import prepare_machine
from mmrpt.objective import supervised_backward
from mmrpt.policy import QwenVLPolicy
from mmrpt.rollout.collect import collect_round, hidden_fits
from mmrpt.rollout.generate import generate
from mmrpt.settings import PromptSettings, SettingsError, load_settings
from tests.trainer.conftest import TINY, make_looking_policy, masked_colour
from tests.trainer.test_objective import Recorder, check_same_gradients, gradients

WHOLE = 16_384  # more than any step of these tests has
EPS = torch.finfo(torch.float32).eps
# The sums behind a log-prob: over a row's tokens, the widths of each layer, and the vocabulary.
LOGP_TERMS = 100 + TINY.layers * (TINY.hidden_size + TINY.intermediate_size) + TINY.vocab_size


@pytest.fixture
def policy(looking_policy):
    return looking_policy


# ------------------------------------------------------------------------------------------------ the partition


groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=5
)


@given(groups_of_lengths, st.integers(1, 300), st.sampled_from([True, False, None]), st.sampled_from([8, 4096]))
def test_every_response_is_in_one_pass_in_order_and_no_pass_is_too_large(lengths, budget, share, hidden_size):
    prompts, groups = [prompt for prompt, _ in lengths], [responses for _, responses in lengths]
    parts = micro_batches(prompts, groups, budget, hidden_size, share)
    assert len({part.share for part in parts}) == 1 and share in (None, parts[0].share)
    met, done = [], 0
    for part in parts:
        own = [
            (i, j) for i, span in zip(part.prompts, part.responses, strict=True) for j in range(span.start, span.stop)
        ]
        assert len(set(part.prompts)) == len(part.prompts), "an image would be encoded twice"
        assert (part.rows.start, part.rows.stop) == (done, done + len(own))
        met, done = met + own, part.rows.stop
        if part.share:
            rows = [prompts[i] + sum(groups[i][span]) for i, span in zip(part.prompts, part.responses, strict=True)]
        else:
            rows = [prompts[i] + groups[i][j] for i, j in own]
        assert len(rows) * max(rows) <= budget or len(own) == 1
    assert met == [(i, j) for i, responses in enumerate(groups) for j in range(len(responses))]
    if sum(prompt + sum(responses) for prompt, responses in lengths) * len(met) <= budget:
        assert len(parts) == 1


def test_a_group_is_cut_only_where_it_must_be():
    """By hand: of answers of 5 tokens, 25 tokens hold three behind their prompt of 10, and 50 two such rows."""
    parts = micro_batches([10, 10, 10], [[5, 5, 5, 5, 5], [5, 5], [5]], 25, 8, True)
    assert [(p.prompts, [(s.start, s.stop) for s in p.responses]) for p in parts] == [
        ([0], [(0, 3)]),
        ([0], [(3, 5)]),
        ([1], [(0, 2)]),
        ([2], [(0, 1)]),
    ]
    assert [len(p.prompts) for p in micro_batches([10, 10, 10], [[5, 5, 5], [5, 5], [5]], 50, 8, True)] == [2, 1]
    assert micro_batches([], [], 25, 8) == []


@pytest.mark.parametrize("budget", [1, 60, 130, WHOLE])
def test_the_parts_of_a_batch_are_its_rows_with_their_images(policy, pairs, budget):
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(3)])
    prompts = [policy.encode_prompt("describe" + " card" * i, 4) for i in range(5)]
    index = [1, 0, 1, 2, 2]
    whole = policy.batch(prompts, [[5] * (1 + 3 * i) for i in range(5)], pixels, index)
    parts = split_rows(whole, budget)
    assert (len(parts) == 1) == (budget == WHOLE) and (len(parts) == 5) == (budget == 1)
    first = 0
    for part in parts:
        count, width = part.input_ids.shape
        rows = slice(first, first + count)
        assert count == 1 or count * width <= budget
        for name in ("input_ids", "attention_mask", "response_mask"):
            wanted = getattr(whole, name)[rows]
            assert torch.equal(getattr(part, name), wanted[:, :width])
        assert not whole.attention_mask[rows, width:].any() and part.attention_mask.any(0).all()
        of_rows = policy.pixels([pairs.image(pairs[i].id) for i in index[rows]]).pixel_values
        shown = part.pixels.pixel_values.split(part.pixels.grid_thw.prod(-1).tolist())
        assert torch.equal(torch.cat([shown[i] for i in part.image_index]), of_rows)
        first += count
    assert first == 5


# ------------------------------------------------------------------------------------------------ the same step


METHOD = ("rollout.group_size=4", "rollout.max_new_tokens=6", "rl.kl_coef=0.1", "rl.max_importance=2")


@pytest.fixture
def passes(monkeypatch):
    """(rows, tokens of each) of every forward pass but those of sampling, which fill a cache."""
    seen, hidden = [], QwenVLPolicy.hidden

    def spy(self, batch, *args, cache=None, **options):
        if cache is None:
            seen.append(tuple(batch.input_ids.shape))
        return hidden(self, batch, *args, cache=cache, **options)

    monkeypatch.setattr(QwenVLPolicy, "hidden", spy)
    return seen


@pytest.fixture
def a_round(policy, pairs, rewards_with_signal):
    reference = partial(nullcontext, make_looking_policy(seed=1))
    samples = [masked_colour(pairs, i) for i in (3, 0, 5, 2, 7, 4)]
    images = {s.example_id: pairs.image(s.example_id) for s in samples}
    return lambda settings: collect_round(policy, samples, images, settings, seed=1, reference=reference)


def check_same_scores(found, wanted):
    """Of two forward passes in another order of sums: a log-prob is off by LOGP_TERMS roundings, a divergence by twice
    as much for each log-prob of it, and k3 = exp(d) - d - 1 grows by at most k3 + 3 times that."""
    assert [g.responses for g in found] == [g.responses for g in wanted] and len(wanted) > 1
    for a, b in zip(found, wanted, strict=True):
        for name in ("logps", "perception", "ref_logps", "trainer_logps"):
            bounds = {"rtol": 2 * LOGP_TERMS * EPS, "atol": 6 * LOGP_TERMS * EPS}
            torch.testing.assert_close(getattr(a, name), getattr(b, name), **bounds)
    assert max(float(g.perception.max()) for g in wanted) > 100 * LOGP_TERMS * EPS


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_scores_gradients_and_statistics_do_not_depend_on_the_bound(
    policy, pairs, a_round, small_settings, passes, monkeypatch, kind, share
):
    monkeypatch.setattr(batching, "sharing_saves", lambda *_: share)
    some = 55 if share else 90  # holds a prompt and two answers or three; or two rows
    budgets = 1, some, WHOLE
    options = {b: small_settings(f"model.batch_tokens={b}", f"perception.kind={kind}", *METHOD) for b in budgets}
    rounds = {budget: a_round(settings).groups for budget, settings in options.items()}
    groups = rounds[WHOLE]
    responses, tokens = sum(len(g.responses) for g in groups), sum(g.response_tokens for g in groups)
    steps, counts = {}, {}
    for budget, settings in options.items():
        check_same_scores(rounds[budget], groups)
        passes.clear()
        recorder = Recorder(policy)
        metrics, _ = train_on_groups(policy, recorder, groups, ImageCache(pairs, 1 << 20), settings, step=0)
        steps[budget], counts[budget] = (recorder.gradients, metrics), len(passes)
    assert counts[WHOLE] == 1 and counts[1] == responses and len(groups) < counts[some] < responses
    wanted, metrics = steps[WHOLE]
    for found, own in (steps[1], steps[some]):
        check_same_gradients(found, wanted, tolerance=tokens * EPS)  # a gradient is a sum over the step's tokens
        assert own == pytest.approx(metrics, rel=LOGP_TERMS * EPS, abs=LOGP_TERMS * EPS)


def test_no_pass_of_training_is_above_the_bound(policy, pairs, a_round, small_settings, passes):
    """Perception of both views, reference and trainer log-probs, the update, and captions beside it."""
    settings = small_settings("model.batch_tokens=150", "rollout.keep_hidden_mb=0", *METHOD)
    groups = a_round(settings).groups
    views = len(passes)
    assert views % 4 == 0 and views > 4  # reference, trainer, perturbed and clean: each of several parts
    captions = caption_batch(policy, pairs, list(range(6)), PromptSettings(), restore_fraction=0.5, seed=0)
    train_on_groups(policy, Recorder(policy), groups, ImageCache(pairs, 1 << 20), settings, 0, captions)
    assert len(passes) > views + views // 4 + 1
    assert all(rows * width <= 150 or rows == 1 for rows, width in passes), passes
    assert any(rows > 1 for rows, _ in passes), "nothing was put together"


@pytest.mark.parametrize("budget", [1, 130])
def test_supervised_gradients_do_not_depend_on_the_bound(policy, pairs, passes, budget):
    batch = caption_batch(policy, pairs, list(range(7)), PromptSettings(), restore_fraction=0.5, seed=0)
    found = {}
    for tokens in (budget, WHOLE):
        passes.clear()
        loss = supervised_backward(policy, batch, tokens, weight=0.3)
        found[tokens] = gradients(policy), loss
        policy.model.zero_grad(set_to_none=True)
        assert (len(passes) == 1) == (tokens == WHOLE)
    (parts, loss), (whole, wanted) = found[budget], found[WHOLE]
    check_same_gradients(parts, whole, tolerance=int(batch.attention_mask.sum()) * EPS)
    assert loss == pytest.approx(wanted, rel=LOGP_TERMS * EPS)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(("batch_size", "prompts_at_once"), [(1, 1), (3, 1), (7, 2), (None, 5)])
def test_sampling_in_parts_is_sampling_each_part(policy, pairs, batch_size, prompts_at_once):
    """From one generator, which goes on from part to part; a group is never split."""
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(3)])
    prompts = [policy.encode_prompt("restore: a <mask> card" + " card" * (3 * i), 4) for i in range(5)]
    index = [2, 0, 1, 1, 0]
    options = {"group_size": 3, "max_new_tokens": 7}
    whole = generate(
        policy, prompts, pixels, index, **options, batch_size=batch_size, generator=torch.Generator().manual_seed(6)
    )
    generator, done = torch.Generator().manual_seed(6), 0
    for first in range(0, 5, prompts_at_once):
        own = slice(first, first + prompts_at_once)
        part = generate(policy, prompts[own], pixels, index[own], **options, generator=generator)
        rows = slice(done, done + len(part.token_ids))
        assert whole.token_ids[rows] == part.token_ids and torch.equal(whole.finished[rows], part.finished)
        for name in ("logps", "hidden"):
            found, wanted = getattr(whole, name)[rows], getattr(part, name)
            width = wanted.shape[1]
            torch.testing.assert_close(found[:, :width], wanted, rtol=0, atol=LOGP_TERMS * EPS)
            assert not found[:, width:].any()
        done = rows.stop
    assert done == 15 and whole.logps.shape[1] == whole.hidden.shape[1] == max(map(len, whole.token_ids))


def test_scores_without_kept_hidden_states_are_the_same(a_round, small_settings, passes, monkeypatch):
    found, given = {}, []
    score = perception.token_perception

    def spy(policy, batch, perturbed, hidden=None, **options):
        given.append(hidden)
        return score(policy, batch, perturbed, hidden, **options)

    monkeypatch.setattr(perception, "token_perception", spy)
    for megabytes in (1, 0):
        passes.clear()
        settings = small_settings(f"rollout.keep_hidden_mb={megabytes}", "model.batch_tokens=200", *METHOD)
        found[megabytes] = a_round(settings), len(passes)
    (kept, fewer), (again, more) = found[1], found[0]
    check_same_scores(again.groups, kept.groups)
    parts = len(given) // 2
    assert parts > 1 and more == fewer + parts  # the clean view's own pass
    assert [hidden is None for hidden in given] == [False] * parts + [True] * parts
    assert again.rollouts == kept.rollouts


def test_whether_hidden_states_are_kept_is_known_beforehand(policy):
    """128 answers of 256 tokens, 32 numbers each: 4 MB of float32, 2 of bfloat16; a token more is too much."""
    rollout = replace(load_settings().rollout, prompts=16, group_size=8, max_new_tokens=256, keep_hidden_mb=4)
    assert hidden_fits(policy, rollout)
    assert not hidden_fits(policy, replace(rollout, max_new_tokens=257))
    policy.model.to(torch.bfloat16)
    assert hidden_fits(policy, replace(rollout, keep_hidden_mb=2))
    assert not hidden_fits(policy, replace(rollout, keep_hidden_mb=1))


# ------------------------------------------------------------------------------------------------ attention


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [True, False])
def test_the_chosen_attention_computes_every_pass(a_round, small_settings, monkeypatch, share):
    """Sampling over a cache, shared rows and packed ones: the same scores, without the fused kernel."""
    monkeypatch.setattr(batching, "sharing_saves", lambda *_: share)
    found = {}
    try:
        for name in ("eager", "sdpa"):
            settings = small_settings(f"model.attention={name}", *METHOD, "rollout.max_new_tokens=2")
            prepare_machine(settings, "cpu")
            with Operators() as seen:
                groups = a_round(settings).groups
            kernels = {name for name in seen.names if "scaled_dot_product" in name}
            found[name] = groups, kernels
    finally:
        prepare_machine(small_settings(), "cpu")
    check_same_scores(found["eager"][0], found["sdpa"][0])
    assert not found["eager"][1] and any("flash" in kernel for kernel in found["sdpa"][1])


def test_an_attention_that_the_trainer_has_not_is_refused():
    with pytest.raises(SettingsError, match="model.attention is 'flash_attention_2': expected 'sdpa' or 'eager'"):
        load_settings(None, ["model.attention=flash_attention_2"])
