"""Token perception against the divergence of two whole forward passes, and the perturbation that it compares with."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mmrpt.batching import response_slices
from mmrpt.corpus import seed_of
from mmrpt.families import blacken_pixels, make_image_processor
from mmrpt.perception import image_share, score_tokens, shape_and_filter, token_perception
from mmrpt.perturbation import black_patches, blacken_patches, blank
from mmrpt.rollout.generate import generate
from mmrpt.settings import PerceptionSettings
from mmrpt.types import PixelBatch
from tests.trainer.conftest import COLOURS, forward_inputs, response_logits


@pytest.fixture
def policy(looking_policy):
    return looking_policy


@pytest.fixture
def views(policy, pairs):
    """Two prompts with three responses each of lengths 1 to 5, and the pixels of both views."""
    images = [pairs.image(pairs[i].id) for i in range(2)]
    damaged = [blacken_patches(image, seed=i, patch_size=14) for i, image in enumerate(images)]
    prompts = [policy.encode_prompt("restore: a <mask>" + " card" * i, 4) for i in range(2) for _ in range(3)]
    ids = policy.encode_text("the card is red. cards are made of paper.")
    responses = [ids[start : start + length] for start, length in ((0, 5), (1, 3), (2, 1), (3, 4), (0, 2), (4, 5))]
    index = [0, 0, 0, 1, 1, 1]
    clean, perturbed = policy.pixels(images), policy.pixels(damaged)
    return prompts, responses, index, clean, perturbed


def score(policy, views, perturbed, hidden, **options):
    """The scores of the views' rows, three of which share a prompt."""
    prompts, responses, index, clean, _ = views
    groups = [responses[i : i + 3] for i in range(0, len(responses), 3)]
    batch = policy.group_batch(prompts[::3], groups, clean, index[::3], share=True)
    return token_perception(policy, batch, perturbed, hidden, **options).scores


def perceive(policy, views, perturbed=None, **options):
    prompts, responses, index, clean, damaged = views
    batch = policy.batch(prompts, responses, clean, index)
    with torch.no_grad():
        hidden, *_ = response_slices(policy.hidden(batch), batch)
    return score(policy, views, perturbed or damaged, hidden, **options)


def divergence(kind, p, q, target):
    """float64, over ids that can be sampled; p and q log-probabilities (V,) with -inf at the others."""
    if kind == "k3":
        gap = q[target] - p[target]
        return float(gap.exp() - gap - 1)
    own = torch.isfinite(p)
    p, q = p[own], q[own]
    if kind == "kl":
        return float((p.exp() * (p - q)).sum())
    middle = torch.logaddexp(p, q) - np.log(2)
    return float((p.exp() * (p - middle)).sum() + (q.exp() * (q - middle)).sum()) / 2


@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_gains_are_the_differences_of_log_probs(policy, views, kind):
    prompts, responses, index, clean, damaged = views
    batch = policy.batch(prompts, responses, clean, index)
    gains = token_perception(policy, batch, damaged, kind=kind, temperature=0.7).gains
    with torch.no_grad():
        seen, blind = (
            [
                (rows / 0.7).log_softmax(-1)
                for rows in response_logits(policy, policy.batch(prompts, responses, p, index))
            ]
            for p in (clean, damaged)
        )
    for i, response in enumerate(responses):
        wanted = (seen[i] - blind[i]).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(gains[i, : len(response)], wanted, rtol=1e-3, atol=1e-4)
        assert not gains[i, len(response) :].any()
    assert gains.abs().max() > 1e-2


def test_the_image_s_share_is_what_a_probability_loses_without_it():
    p, q = torch.tensor([0.8, 0.5, 0.2]), torch.tensor([0.2, 0.5, 0.4])
    gains = torch.stack(((p / q).log() / 2, (p / q).log() / 2), -1)  # of two tokens
    torch.testing.assert_close(image_share(gains), torch.tensor([0.75, 0.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["kl", "js", "k3"])
def test_perception_is_the_divergence_of_two_forward_passes(policy, views, kind, temperature):
    prompts, responses, index, clean, damaged = views
    found = perceive(policy, views, kind=kind, temperature=temperature)
    assert found.shape == (6, 5) and found.dtype == torch.float32
    with torch.no_grad():
        seen = [
            [(logits.double() / temperature).log_softmax(-1) for logits in response_logits(policy, batch)]
            for batch in (policy.batch(prompts, responses, pixels, index) for pixels in (clean, damaged))
        ]
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for row, response in enumerate(responses):
        for t, token in enumerate(response):
            expected[row, t] = divergence(kind, seen[0][row][t], seen[1][row][t], token)
    assert expected.max() > 1e-3, "the two views do not differ: the comparison would be empty"
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2e-3, atol=2e-6)
    assert (found >= 0).all()


@pytest.mark.parametrize("share", [True, False])
def test_mass_is_the_eager_attention_of_the_position_before(policy, views, tmp_path, share):
    """On the image's tokens, in the second of two layers, heads averaged; one row at a time, in float64."""
    prompts, responses, index, clean, _ = views
    groups = [responses[i : i + 3] for i in range(0, len(responses), 3)]
    batch = policy.group_batch(prompts[::3], groups, clean, index[::3], share=share)
    options = PerceptionSettings(kind="mass")
    found = score_tokens(policy, batch, None, (), options, temperature=1.0).scores
    assert found.shape == (6, 5) and found.dtype == torch.float32
    policy.write_files(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = policy.batch([prompt], [response], clean.select([index[row]]), [0])
        with torch.no_grad():
            attention = eager.model(**forward_inputs(policy, alone), output_attentions=True).attentions[1][0]
        on_image = (attention.double().mean(0) * (alone.input_ids[0] == policy.image_token_id)).sum(-1)
        first = len(prompt) - 1
        expected[row, : len(response)] = on_image[first : first + len(response)]
    assert expected[0].max() - expected[0].min() > 0.02, "uniform attention would pass for any row"
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-6)


def test_nothing_is_perceived_where_the_image_is_the_same(policy, views):
    assert perceive(policy, views, perturbed=views[3]).abs().max() < 1e-6
    assert perceive(policy, views).max() > 1e-3


def test_scores_past_the_end_are_zero_whatever_the_states_hold(policy, views):
    _, responses, _, _, damaged = views
    hidden = torch.full((6, 7, 32), torch.nan)  # wider than the longest response, as a generation's can be
    for row, response in enumerate(responses):
        hidden[row, : len(response)] = 0.1
    scores = score(policy, views, damaged, hidden)
    for row, response in enumerate(responses):
        assert (scores[row, len(response) :] == 0).all() and torch.isfinite(scores[row]).all()


def test_states_of_the_rollout_serve_as_the_clean_view(policy, pairs):
    """The cached decoding's hidden states give the same scores as a forward pass over the finished responses."""
    images = [pairs.image(pairs[i].id) for i in range(2)]
    prompts = [policy.encode_prompt("restore: a <mask>" + " card" * i, 4) for i in range(2)]
    pixels = policy.pixels(images)
    out = generate(
        policy, prompts, pixels, range(2), group_size=3, max_new_tokens=6, generator=torch.Generator().manual_seed(1)
    )
    rows, index = [p for p in prompts for _ in range(3)], [0, 0, 0, 1, 1, 1]
    damaged = policy.pixels([blank(image) for image in images])
    views = (rows, out.token_ids, index, pixels, damaged)
    found = score(policy, views, damaged, out.hidden)
    wanted = perceive(policy, views)
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.4, 0.5, 1.0])
def test_each_trajectory_keeps_its_share_rounded_up(keep_ratio):
    lengths = torch.tensor([1, 2, 5, 10, 30, 7])
    mask = torch.arange(30) < lengths[:, None]
    scores = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)).where(mask, 9.0)
    weights = shape_and_filter(scores, mask, keep_ratio=keep_ratio, min_weight=0.9)
    expected = [ceil(Fraction(str(keep_ratio)) * int(n)) for n in lengths]
    assert weights.perception_mask.sum(-1).tolist() == expected
    for row in range(6):
        kept = weights.perception_mask[row]
        assert not (kept & ~mask[row]).any()
        left = scores[row][mask[row] & ~kept]
        assert not left.numel() or scores[row][kept].min() >= left.max()
    assert float(weights.trajectory_weights.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights.trajectory_weights.min()) == pytest.approx(0.9, abs=1e-6)
    fixed = shape_and_filter(scores, mask, keep_ratio=keep_ratio, min_weight=0.9, max_weight=1.5)
    assert float(fixed.trajectory_weights.min()) == pytest.approx(0.9, abs=1e-6)
    assert float(fixed.trajectory_weights.max()) == pytest.approx(1.5, abs=1e-6)


# ------------------------------------------------------------------------------------------------ the perturbation


def noise(width, height):
    pixels = np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)  # no black pixel
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (50, 33), (14, 28), (13, 5), (100, 15)])
def test_patches_are_black_or_untouched(width, height):
    image = noise(width, height)
    before = np.asarray(image)
    after = np.asarray(blacken_patches(image, seed=4, patch_size=14, probability=0.5))
    assert after.shape == before.shape
    black = 0
    for top in range(0, height, 14):
        for left in range(0, width, 14):
            patch = after[top : top + 14, left : left + 14]
            untouched = before[top : top + 14, left : left + 14]
            assert (patch == 0).all() or (patch == untouched).all(), (top, left)
            black += int((patch == 0).all())
    assert black >= 1
    assert (np.asarray(image) == before).all()  # the image itself is left alone


def test_the_draw_depends_on_the_seed_alone():
    image = noise(112, 112)
    np.random.seed(1)
    first = np.asarray(blacken_patches(image, seed=7))
    np.random.seed(2)
    assert (np.asarray(blacken_patches(image, seed=7)) == first).all()
    assert (np.asarray(blacken_patches(image, seed=8)) != first).any()
    assert (np.asarray(blacken_patches(noise(112, 112).rotate(90), seed=7)) == 0).all(-1).sum() == (first == 0).all(
        -1
    ).sum()


def test_the_share_of_black_patches_is_the_probability():
    image = noise(140, 140)
    for probability in (0.1, 0.5, 0.9):
        shares = [
            (np.asarray(blacken_patches(image, seed=seed, probability=probability)) == 0).all(-1).mean()
            for seed in range(60)
        ]  # 6,000 draws: standard error at most 0.0065
        assert np.mean(shares) == pytest.approx(probability, abs=0.026), f"seeds 0 to 59, probability {probability}"
    assert (np.asarray(blacken_patches(image, seed=0, probability=1.0)) == 0).all()


def test_at_least_one_patch_is_black():
    for seed in range(50):
        black = (np.asarray(blacken_patches(noise(42, 42), seed=seed, probability=1e-9)) == 0).all(-1)
        assert black.sum() == 14 * 14, f"seed {seed}"


def processed(processor, images):
    out = processor(images=images, return_tensors="pt")
    return PixelBatch(out["pixel_values"], out["image_grid_thw"])


def as_picture(rows, grid, side=14, merge=2):
    """(frames, channels, height, width) of one image's rows of patches, patch by patch in the processor's order."""
    _, height, width = grid.tolist()
    picture = torch.empty(2, 3, height * side, width * side)
    order = [
        (block_row * merge + row, block_column * merge + column)
        for block_row in range(height // merge)
        for block_column in range(width // merge)
        for row in range(merge)
        for column in range(merge)
    ]
    for values, (row, column) in zip(rows, order, strict=True):
        patch = values.view(3, 2, side, side).transpose(0, 1)
        picture[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
    return picture


def test_a_photo_is_perturbed_after_the_processor_has_shrunk_it():
    """Whole patches as the tower sees them are black, exactly, or as they were; VPPO blackens after the resize."""
    processor = make_image_processor(14, 280 * 280)
    clean = processed(processor, [noise(1000, 700)])
    (frames, rows, columns), count = clean.grid_thw[0].tolist(), len(clean.pixel_values)
    assert rows * columns * 14**2 <= 280 * 280 and count == frames * rows * columns
    black = processed(processor, [Image.new("RGB", (28, 28))]).pixel_values[0]
    found = blacken_pixels(clean, processor, [seed_of("photo")])
    is_black = (found.pixel_values == black).all(-1)
    assert torch.equal(found.pixel_values[~is_black], clean.pixel_values[~is_black])
    assert abs(is_black.float().mean() - 0.5) < 4 * 0.5 / count**0.5
    drawn = black_patches(rows * 14, columns * 14, seed=seed_of("photo"))
    picture = as_picture(found.pixel_values, found.grid_thw[0])
    dark = as_picture(black.expand(count, -1), found.grid_thw[0])
    assert np.array_equal((picture == dark).all(0).all(0), drawn)
    # Blackening before the resize leaves hardly a patch black.
    before = processed(processor, [blacken_patches(noise(1000, 700), seed=seed_of("photo"))])
    assert (before.pixel_values == black).all(-1).float().mean() < 0.1


@pytest.mark.parametrize("patch_size", [14, 10, 28, 200])
def test_patches_of_any_size_are_pixels_of_the_resized_image(patch_size):
    processor = make_image_processor(14, 280 * 280)
    clean = processed(processor, [noise(112, 112), noise(1000, 700)])
    found = blacken_pixels(clean, processor, [3, 4], patch_size=patch_size, probability=0.4)
    small, photo = found.select([0]).pixel_values, found.select([1])
    picture = blacken_patches(noise(112, 112), seed=3, patch_size=patch_size, probability=0.4)
    assert torch.equal(small, processed(processor, [picture]).pixel_values)
    values = as_picture(photo.pixel_values, photo.grid_thw[0])
    untouched = as_picture(clean.select([1]).pixel_values, photo.grid_thw[0])
    drawn = black_patches(*values.shape[2:], seed=4, patch_size=patch_size, probability=0.4)
    assert np.array_equal((values != untouched).any(0).any(0), drawn) and drawn.any()


def test_a_picture_shows_what_the_model_sees(policy):
    policy.image_processor = make_image_processor(14, 280 * 280)
    _, rows, columns = policy.pixels([noise(1000, 700)]).grid_thw[0].tolist()
    shown = np.asarray(policy.perturbed_picture(noise(1000, 700), 4, patch_size=14, probability=0.5))
    drawn = black_patches(rows * 14, columns * 14, seed=4)
    assert shown.shape == (*drawn.shape, 3) and np.array_equal((shown == 0).all(-1), drawn)


def test_pixels_of_another_processor_are_refused():
    clean = processed(make_image_processor(14, 280 * 280), [noise(112, 112)])
    with pytest.raises(ValueError, match="pixel_values have shape .* give the processor that made them"):
        blacken_pixels(clean, make_image_processor(16, 320 * 320), [0])


def test_blanked_images_are_one_grey_of_the_same_size():
    image = Image.new("RGB", (30, 17), COLOURS["red"])
    assert blank(image).size == (30, 17) and blank(image).getcolors() == [(30 * 17, (127, 127, 127))]


def test_seeds_of_names_are_the_same_in_every_process():
    assert seed_of(0, "round", 3) == 0x62E20D03 != seed_of(0, "round", 4)
    assert len({seed_of(s, name, n) for s in range(3) for name in ("warmup", "rl") for n in range(200)}) == 1200
