"""Losses, the reinforcement step and the optimiser, against plain PyTorch over transformers' own forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmrpt.corpus import ImageCache
from mmrpt.engines.rl_step import fill_buffer, response_mask_of, train_on_groups
from mmrpt.objective import policy_loss, supervised_loss
from mmrpt.optimiser import Optimiser, learning_rate
from mmrpt.rollout.buffer import GroupBuffer, stack_rows
from mmrpt.rollout.collect import collect_round
from mmrpt.settings import ModelSettings, OptimiserSettings, PerceptionSettings, RLSettings, RolloutSettings, Settings
from mmrpt.types import Group, PolicyTargets
from tests.trainer.conftest import masked_colour, response_logits


@pytest.fixture
def policy(looking_policy):
    return looking_policy


def make_groups(policy, pairs, n=2, seed=0):
    """Five groups of n responses of one to six tokens; advantages of both signs, old log-probs near and far."""
    generator = torch.Generator().manual_seed(seed)
    ids = policy.encode_text("the card is red. cards are made of paper. a thin card.")
    groups = []
    for i in range(5):
        sample = masked_colour(pairs, i)
        lengths = torch.randint(1, 7, (n,), generator=generator).tolist()
        responses = [ids[i + j : i + j + length - 1] + [policy.eos_token_id] for j, length in enumerate(lengths)]
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        advantages = torch.randn(n, generator=generator)
        groups.append(
            Group(
                sample.id,
                sample.example_id,
                policy.encode_prompt(sample.masked_caption, 4),
                responses,
                torch.zeros(n, width),
                torch.rand(n, width, generator=generator) * mask,
                torch.rand(n, generator=generator),
                advantages - advantages.mean(),
            )
        )
    return [replace(g, logps=old) for g, old in zip(groups, old_logps(policy, pairs, groups, generator), strict=True)]


def old_logps(policy, pairs, groups, generator):
    """Log-probs within a few clip widths of the present ones, so that every branch of the clip is met."""
    with torch.no_grad():
        now = [logps_by_row(policy, pairs, [g]) for g in groups]
    out = []
    for group, rows in zip(groups, now, strict=True):
        old = torch.zeros_like(group.logps)
        for j, row in enumerate(rows):
            old[j, : len(row)] = row + 0.5 * torch.randn(len(row), generator=generator)
        out.append(old)
    return out


def batch_of(policy, pairs, groups):
    pixels = policy.pixels([pairs.image(g.example_id) for g in groups])
    index = [i for i, g in enumerate(groups) for _ in g.responses]
    return policy.batch(
        [g.prompt for g in groups for _ in g.responses], [r for g in groups for r in g.responses], pixels, index
    )


def logps_by_row(policy, pairs, groups, temperature=1.0):
    rows = response_logits(policy, batch_of(policy, pairs, groups))
    responses = [r for g in groups for r in g.responses]
    return [
        (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        for logits, response in zip(rows, responses, strict=True)
    ]


def plain_loss(policy, pairs, groups, weights, rl, temperature=1.0):
    """VPPO's clipped surrogate, token by token as the papers write it; the whole step at once."""
    rows = logps_by_row(policy, pairs, groups, temperature)
    flat = [(g, j) for g in groups for j in range(len(g.responses))]
    sums, lengths = [], []
    for i, (logps, (group, j)) in enumerate(zip(rows, flat, strict=True)):
        advantage = float(group.advantages[j])
        if weights is not None:
            advantage *= float(weights.trajectory_weights[i])
        total = torch.zeros(())
        for t in range(len(logps)):
            if weights is not None and not weights.perception_mask[i, t]:
                continue
            ratio = (logps[t] - group.logps[j, t]).exp()
            clipped = ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            if rl.dual_clip is not None and advantage < 0:
                surrogate = torch.maximum(surrogate, torch.tensor(rl.dual_clip * advantage))
            total = total - surrogate
        sums.append(total)
        lengths.append(len(logps))
    if rl.aggregation == "token_mean":
        return sum(sums) / sum(lengths)
    if rl.aggregation == "sequence_mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    return sum(sums)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def check_same_gradients(found, wanted, tolerance=1e-5):
    """Within `tolerance` of the largest gradient of all: some are zero but for rounding (a key's bias, say)."""
    assert found.keys() == wanted.keys() and wanted
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 0
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


class Recorder:
    """In the optimiser's place: keeps the gradients of the step, then clears them."""

    def __init__(self, policy):
        self.policy = policy

    def step(self, step, steps):
        self.gradients = gradients(self.policy)
        self.policy.model.zero_grad(set_to_none=True)
        return {"lr": 0.0, "grad_norm": 0.0, "skipped": False}


def step_settings(aggregation="token_mean", batch_tokens=16_384, perception=True, temperature=1.0, **rl):
    return Settings(
        model=ModelSettings(batch_tokens=batch_tokens),
        rl=RLSettings(aggregation=aggregation, steps=10, **rl),
        rollout=RolloutSettings(group_size=2, temperature=temperature),
        perception=PerceptionSettings(enabled=perception, min_weight=0.5),
    )


# ------------------------------------------------------------------------------------------------ supervised loss


def test_supervised_loss_is_the_mean_of_the_rows_cross_entropies(policy, pairs):
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(3)])
    prompts = [policy.encode_prompt("describe" + " card" * i, 4) for i in range(3)]
    responses = [policy.encode_text("the card is red. cards"[: 6 + 8 * i]) for i in range(3)]
    batch = policy.batch(prompts, responses, pixels, range(3))
    loss = supervised_loss(policy, batch)
    loss.backward()
    found = gradients(policy)
    policy.model.zero_grad(set_to_none=True)
    policy.suppressed_ids = []  # the supervised loss is over the whole vocabulary
    rows = zip(response_logits(policy, batch), responses, strict=True)
    wanted = sum(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)) for logits, ids in rows) / 3
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    check_same_gradients(found, gradients(policy))


# ------------------------------------------------------------------------------------------------ policy loss


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize(("perception", "temperature"), [(True, 1.0), (False, 0.8)])
def test_a_step_is_the_papers_loss(policy, pairs, aggregation, perception, temperature):
    groups = make_groups(policy, pairs)
    settings = step_settings(
        aggregation, perception=perception, temperature=temperature, dual_clip=1.5, entropy_coef=0.0
    )
    recorder = Recorder(policy)
    metrics, weights = train_on_groups(policy, recorder, groups, ImageCache(pairs, 1 << 20), settings, step=0)
    assert (weights is not None) == perception
    wanted = plain_loss(policy, pairs, groups, weights, settings.rl, temperature)
    wanted.backward()
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    check_same_gradients(recorder.gradients, gradients(policy), 2e-5)
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0.1  # the clip was at work


def per_token(groups, name):
    """The groups' rows of a per-token field, each cut to its response's length."""
    return [row[: len(r)] for g in groups for row, r in zip(getattr(g, name), g.responses, strict=True)]


def clipped(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def gspo(rows, groups):
    """Mean over responses of min(s A, clip(s) A), s the exponential of the response's mean log-ratio."""
    terms = []
    for logps, old, advantage in zip(rows, per_token(groups, "logps"), advantages_of(groups), strict=True):
        terms.append(clipped((logps - old).mean().exp(), advantage, 0.05, 0.1))
    return -sum(terms) / len(terms)


def cispo(rows, groups):
    """Token mean of constant(clip(r)) A log pi."""
    total = 0.0
    for logps, old, advantage in zip(rows, per_token(groups, "logps"), advantages_of(groups), strict=True):
        total = total - ((logps - old).exp().clamp(0.8, 1.28).detach() * advantage * logps).sum()
    return total / sum(map(len, rows))


def dr_grpo(rows, groups):
    """The sum over tokens, divided by the responses times the generation budget."""
    total = 0.0
    for logps, old, advantage in zip(rows, per_token(groups, "logps"), advantages_of(groups), strict=True):
        total = total - clipped((logps - old).exp(), advantage, 0.2, 0.28).sum()
    return total / (len(rows) * BUDGET)


def entropy_penalty(rows, groups):
    """DAPO's loss + 0.06 * token mean of -log pi (VPPO's published code)."""
    surrogate = dr_grpo(rows, groups) * len(rows) * BUDGET / sum(map(len, rows))
    return surrogate + 0.06 * -torch.cat(rows).mean()


def reference_kl(rows, groups):
    """DAPO's loss + 0.2 * token mean of k3 to the reference (DeepSeekMath, eq. 4)."""
    surrogate = dr_grpo(rows, groups) * len(rows) * BUDGET / sum(map(len, rows))
    gap = torch.cat(per_token(groups, "ref_logps")) - torch.cat(rows)
    return surrogate + 0.2 * (gap.exp() - gap - 1).mean()


def truncated_importance(rows, groups):
    """The ratio to the trainer's own log-probs, times min(trainer / sampler, 1.2)."""
    fields = (per_token(groups, name) for name in ("logps", "trainer_logps"))
    total = 0.0
    for logps, sampled, old, advantage in zip(rows, *fields, advantages_of(groups), strict=True):
        total = (
            total - ((old - sampled).exp().clamp(max=1.2) * clipped((logps - old).exp(), advantage, 0.2, 0.28)).sum()
        )
    return total / sum(map(len, rows))


def advantages_of(groups):
    return torch.cat([g.advantages for g in groups])


BUDGET = 11  # rollout.max_new_tokens
METHODS = {
    gspo: {"loss": "gspo", "aggregation": "sequence_mean", "clip_low": 0.05, "clip_high": 0.1},
    cispo: {"loss": "cispo"},
    dr_grpo: {"advantage": "dr_grpo"},
    entropy_penalty: {"entropy_coef": -0.06, "entropy_kind": "sampled"},
    reference_kl: {"kl_coef": 0.2},
    truncated_importance: {"max_importance": 1.2},
}


@pytest.mark.parametrize("batch_tokens", [1, 16_384])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_settings_select_the_losses_of_the_papers(policy, pairs, method, batch_tokens):
    generator = torch.Generator().manual_seed(5)
    groups = [
        replace(
            group,
            **{
                name: group.logps + 0.3 * torch.randn(group.logps.shape, generator=generator)
                for name in ("ref_logps", "trainer_logps")
            },
        )
        for group in make_groups(policy, pairs)
    ]
    settings = step_settings(batch_tokens=batch_tokens, perception=False, dual_clip=None, **METHODS[method])
    settings = replace(settings, rollout=replace(settings.rollout, max_new_tokens=BUDGET))
    recorder = Recorder(policy)
    metrics, _ = train_on_groups(policy, recorder, groups, ImageCache(pairs, 1 << 20), settings, step=0)
    wanted = method(logps_by_row(policy, pairs, groups), groups)
    wanted.backward()
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    check_same_gradients(recorder.gradients, gradients(policy), 2e-5)


def test_a_half_precision_policy_starts_with_a_small_gap_to_its_sampler(
    policy, pairs, rewards_with_signal, small_settings
):
    """What is left is the rounding of the decoder's cached steps against its forward pass."""
    policy.model.to(torch.bfloat16)
    settings = small_settings("rollout.group_size=4", "rollout.max_new_tokens=6")
    samples = [masked_colour(pairs, i) for i in range(12)]
    images = ImageCache(pairs, 1 << 20)
    groups = collect_round(policy, samples, images.many([s.example_id for s in samples]), settings, seed=3).groups
    assert len(groups) > 2
    metrics, _ = train_on_groups(policy, Recorder(policy), groups, images, settings, step=0)
    assert metrics["rollout_logp_gap"] < 0.004


def test_statistics_of_a_step_do_not_depend_on_its_forward_passes(policy, pairs):
    groups = make_groups(policy, pairs, seed=2)
    rows = [
        train_on_groups(
            policy, Recorder(policy), groups, ImageCache(pairs, 1 << 20), step_settings(batch_tokens=size), 0
        )[0]
        for size in (1, 16_384)
    ]
    now = logps_by_row(policy, pairs, groups)
    old = [row for group in groups for row in group.logps]
    gaps = [(row - then[: len(row)]).abs() for row, then in zip(now, old, strict=True)]
    assert rows[0]["rollout_logp_gap"] == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-3)
    clips = "clip_fraction_low", "clip_fraction_high"
    assert all(rows[1][name] > 0 for name in clips)
    for name in (
        "kept_fraction",
        "logp_mean",
        "entropy_mean",
        "ratio_mean",
        "approx_kl",
        "tokens",
        "rollout_logp_gap",
        *clips,
    ):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6), name
    for name in ("ratio_max", "max_logp"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4), name


def test_between_full_statistics_a_step_learns_the_same_and_logs_what_it_knows(policy, pairs):
    groups = make_groups(policy, pairs, seed=2)
    found = {}
    for step in (5, 6):
        recorder = Recorder(policy)
        metrics, _ = train_on_groups(policy, recorder, groups, ImageCache(pairs, 1 << 20), step_settings(), step)
        found[step] = recorder.gradients, metrics
    check_same_gradients(found[6][0], found[5][0])
    missing = found[5][1].keys() - found[6][1].keys()
    assert {"logp_mean", "entropy_mean", "ratio_mean", "approx_kl", "rollout_logp_gap"} <= missing
    for name in ("loss", "tokens", "kept_fraction", "clip_fraction_low", "clip_fraction_high"):
        assert found[6][1][name] == pytest.approx(found[5][1][name], rel=1e-4, abs=1e-6), name


def test_only_kept_tokens_of_the_response_pull_on_hidden_states(policy, pairs, monkeypatch):
    groups = make_groups(policy, pairs, seed=3)
    batch = batch_of(policy, pairs, groups)
    states = policy.hidden(batch).detach().requires_grad_()
    monkeypatch.setattr(policy, "hidden", lambda _: states)
    mask = response_mask_of(groups)
    kept = mask & (torch.arange(mask.shape[1]) % 2 == 1)
    targets = PolicyTargets(
        torch.cat([g.advantages for g in groups]), stack_rows(groups, "logps"), kept, torch.ones(len(mask))
    )
    rl = RLSettings(clip_low=0.9, clip_high=50.0, dual_clip=None)  # nothing is clipped: every kept token pulls
    policy_loss(policy, batch, targets, rl, normalizer=7.0, temperature=1.0).loss.backward()
    pulled = states.grad.abs().amax(-1) > 0
    expected = torch.zeros_like(pulled)
    for row, positions in enumerate(m.nonzero()[:, 0] for m in batch.response_mask):
        for t, position in enumerate(positions.tolist()):
            expected[row, position - 1] = kept[row, t]  # the state before a token predicts it
    assert torch.equal(pulled, expected) and expected.any()


def test_an_exact_entropy_reaches_kept_tokens_and_a_sampled_one_the_whole_response(policy, pairs, monkeypatch):
    groups = make_groups(policy, pairs, seed=4)
    batch = batch_of(policy, pairs, groups)
    mask = response_mask_of(groups)
    kept = mask & (torch.arange(mask.shape[1]) == 0)
    targets = PolicyTargets(torch.zeros(len(mask)), stack_rows(groups, "logps"), kept, None)
    for kind, wanted in (("exact", kept), ("sampled", mask)):
        states = policy.hidden(batch).detach().requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(policy, "hidden", lambda _, states=states: states)
            rl = RLSettings(entropy_coef=0.1, entropy_kind=kind)
            policy_loss(policy, batch, targets, rl, normalizer=1.0, temperature=1.0).loss.backward()
        assert int((states.grad.abs().amax(-1) > 0).sum()) == int(wanted.sum()), kind


# ------------------------------------------------------------------------------------------------ the optimiser


def weights_of(policy):
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


def one_step(policy, pairs, optimiser, step, poison=None):
    batch = batch_of(policy, pairs, make_groups(policy, pairs)[:2])
    supervised_loss(policy, batch).backward()
    if poison is not None:
        next(p for p in policy.model.parameters() if p.grad is not None).grad.view(-1)[3] = poison
    return optimiser.step(step, 10)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(policy, pairs, kind, poison):
    optimiser = Optimiser(policy.model, OptimiserSettings(kind=kind, warmup_steps=0))
    assert one_step(policy, pairs, optimiser, 0)["skipped"] is False
    weights, state = weights_of(policy), optimiser.state_dict()
    state = [{k: v.clone() for k, v in s.items()} for part in state["parts"] for s in part["state"].values()]
    metrics = one_step(policy, pairs, optimiser, 1, poison)
    assert metrics["skipped"] is True
    assert all(torch.equal(value, weights[name]) for name, value in policy.model.state_dict().items())
    after = [s for part in optimiser.state_dict()["parts"] for s in part["state"].values()]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(state, after, strict=True) for k in a)
    assert all(p.grad is None for p in policy.model.parameters())
    assert one_step(policy, pairs, optimiser, 2)["skipped"] is False  # and it goes on
    assert any(not torch.equal(value, weights[name]) for name, value in policy.model.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimiser_goes_on_bit_for_bit(policy, pairs, kind, tmp_path):
    settings = OptimiserSettings(kind=kind, warmup_steps=2, vision_scale=0.5)
    optimiser = Optimiser(policy.model, settings, vision_frozen_steps=2)
    for step in range(2):
        one_step(policy, pairs, optimiser, step)
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    weights = weights_of(policy)
    for step in range(2, 4):
        one_step(policy, pairs, optimiser, step)
    straight = weights_of(policy)
    policy.model.load_state_dict(weights)
    restored = Optimiser(policy.model, settings, vision_frozen_steps=2)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        one_step(policy, pairs, restored, step)
    assert all(torch.equal(value, straight[name]) for name, value in policy.model.state_dict().items())


def test_the_vision_tower_stands_still_before_its_start(policy, pairs):
    optimiser = Optimiser(policy.model, OptimiserSettings(warmup_steps=0), vision_frozen_steps=1)
    before = weights_of(policy)
    one_step(policy, pairs, optimiser, 0)
    moved = {n for n, v in policy.model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and not any("visual." in name for name in moved)
    one_step(policy, pairs, optimiser, 1)
    moved = {n for n, v in policy.model.state_dict().items() if not torch.equal(v, before[n])}
    assert any("visual." in name for name in moved)


def test_a_model_whose_vision_tower_is_not_found_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "get_decoder", lambda: policy.model)
    with pytest.raises(ValueError, match="no parameters outside of its decoder, embedding and head"):
        Optimiser(policy.model, OptimiserSettings())


def test_muon_gets_the_matrices_of_the_decoder_alone(policy):
    muon = Optimiser(policy.model, OptimiserSettings(kind="muon")).parts[1]
    names = {parameter: name for name, parameter in policy.model.named_parameters()}
    found = {names[p].split(".")[-2] for group in muon.param_groups for p in group["params"]}
    assert found == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all("language_model" in names[p] for group in muon.param_groups for p in group["params"])


def test_the_learning_rate_is_a_function_of_the_step():
    settings = OptimiserSettings(lr=1.0, warmup_steps=4, final_fraction=0.2)
    rates = [learning_rate(settings, step, 14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[9] == pytest.approx(0.6) and rates[14] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(OptimiserSettings(lr=1.0, warmup_steps=0, final_fraction=1.0), 7, 9) == 1.0


# ------------------------------------------------------------------------------------------------ filling a step


def test_the_buffer_is_filled_no_further_than_a_step_needs(policy, pairs, rewards_with_signal, small_settings):
    """Groups that wait grow old: no round is sampled while the buffer holds a step's groups already."""
    settings = small_settings("rl.groups_per_step=2", "rollout.prompts=6", "rl.max_rounds=3")
    samples = [masked_colour(pairs, i) for i in range(12)]
    buffer, number, sizes = GroupBuffer(), 0, []
    for _ in range(6):
        held = len(buffer)
        rounds = list(fill_buffer(policy, buffer, samples, ImageCache(pairs, 1 << 20), settings, number))
        number += len(rounds)
        assert len(rounds) <= 3 and (held < 2 or not rounds)
        assert len(buffer) >= 2 or len(rounds) == 3
        sizes.append(len(buffer))
        buffer.take(2)
    assert max(sizes) <= 2 - 1 + 6, f"waiting groups {sizes}: the buffer grows without end"


def test_a_buffer_survives_its_state(policy, pairs, tmp_path):
    first, *others = make_groups(policy, pairs)
    groups = [replace(first, ref_logps=first.logps - 1, trainer_logps=first.logps + 1), *others]
    torch.save(GroupBuffer(list(groups)).state(), tmp_path / "buffer.pt")
    restored = GroupBuffer.from_state(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert len(restored) == len(groups)
    for a, b in zip(restored.take(9), groups, strict=True):
        for name, value in vars(b).items():
            other = getattr(a, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    assert len(restored) == 0
