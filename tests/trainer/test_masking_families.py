"""Captions scored by models of every family, against their own eager attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from mmrpt.masking.forward import PolicyModel
from mmrpt.masking.score import score_sentences
from mmrpt.policy import OwnForwardPolicy, Policy
from mmrpt.policy.own_forward import _joined
from mmrpt.policy.qwen_vl import FAMILIES
from mmrpt.types import Example
from tests.trainer.family_policies import IMAGE_TOKENS, MARKER, OTHERS, make_family, write_llava

CAPTIONS = ("the card is red. a cat sits on it here.", "red paper.", "cards!")


def images():
    return [Image.new("RGB", (16, 16), (shade, shade, 90)) for shade in (30, 120, 250)]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_scores_of_a_family_equal_its_eager_attention(family):
    own = make_family(family, own=True)
    eager = copy.deepcopy(own.model)
    eager.set_attn_implementation("eager")
    examples = [Example(str(i), caption) for i, caption in enumerate(CAPTIONS)]
    layers = [0, 1]  # Gemma 3: of the first the window ends behind the image
    for policy in dict.fromkeys((own, make_family(family))):
        model = PolicyModel(policy)
        scores = score_sentences(model, examples, images(), instruction="describe", layers=layers, attention_row="own")
        assert [s.example_id for s in scores] == ["0", "0", "1", "2"]
        for example, image in zip(examples, images(), strict=True):
            (prompt,), pixels = own.prompts(["describe"], [image])
            batch = own.batch([prompt], [own.encode_text(example.caption)], pixels, [0])
            with torch.no_grad():
                out = eager.model(**own._inputs(batch), output_attentions=True, use_cache=False)
            text = batch.response_mask[0].double()
            visual = (batch.input_ids[0] == own.image_token_id).double()
            assert visual.sum() == IMAGE_TOKENS
            shares = []
            for layer in layers:
                weights = out.attentions[layer][0].double().mean(0)[batch.response_mask[0]]
                v, t = weights @ visual, weights @ text
                shares.append(v / (v + t))
            wanted = torch.stack(shares).mean(0)
            found = [mass for s in scores if s.example_id == example.id for mass in s.token_scores]
            np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
        spread = [mass for s in scores for mass in s.token_scores]
        assert max(spread) - min(spread) > 0.05


def test_a_folder_of_another_family_is_opened_with_its_own_processor(tmp_path):
    write_llava(tmp_path)
    policy = Policy.load(tmp_path)
    assert isinstance(policy, OwnForwardPolicy) and MARKER in policy.markers
    model = PolicyModel(policy)
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30 + i, 3), np.uint8)) for i in range(2)]
    examples = [Example(str(i), CAPTIONS[i]) for i in range(2)]
    together = score_sentences(model, examples, photos, instruction="describe")
    alone = [
        score
        for example, photo in zip(examples, photos, strict=True)
        for score in score_sentences(model, [example], [photo], instruction="describe")
    ]
    assert [s.score for s in together] == pytest.approx([s.score for s in alone], abs=1e-6)
    assert model.prompt("describe", photos[0]).ids.count(policy.image_token_id) == IMAGE_TOKENS
    with pytest.raises(ValueError, match="model.max_pixels are for Qwen-VL's image processors, but .* a 'llava'"):
        Policy.load(tmp_path, max_pixels=784)


def test_images_cut_into_different_numbers_of_tiles_are_one_batch():
    parts = [torch.ones(1, 2, 3, 4, 4), 2 * torch.ones(1, 5, 3, 4, 4)]
    joined = _joined(parts)
    assert joined.shape == (2, 5, 3, 4, 4)
    assert torch.equal(joined[0, :2], parts[0][0]) and not joined[0, 2:].any() and torch.equal(joined[1:], parts[1])
    sides = _joined([torch.ones(1, 3, 4, 6), 2 * torch.ones(1, 3, 5, 2)])
    assert sides.shape == (2, 3, 5, 6) and sides[0, :, :4].all() and sides[1, :, :, :2].all() and sides.sum() == 3 * 44
    rows = [torch.ones(6, 12), torch.ones(4, 12)]  # patches of two images, one after another
    assert _joined(rows).shape == (10, 12)
