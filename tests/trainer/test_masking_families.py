"""Captions scored by models that the trainer does not know, against their own eager attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmrpt.masking.forward import PolicyModel
from mmrpt.masking.score import score_sentences
from mmrpt.masking.vlm import VisionLanguageModel, _joined, load_caption_model
from mmrpt.types import Example
from mmrpt.world.tiny_vlm import train_tokenizer
from tests.kernels.integrations import vlm_families
from tests.trainer.conftest import make_policy

IMAGE_TOKENS = 4
CAPTIONS = ("the card is red. a cat sits on it here.", "red paper.", "cards!")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([*CAPTIONS, "describe"], 330)
    made.add_tokens(["<image>"], special_tokens=True)
    made.chat_template = TEMPLATE
    return made


class Processor:
    """A family's processor by hand: image tokens in the text, pixels of the family's shape from the image."""

    def __init__(self, family, tokenizer):
        self.family, self.tokenizer = family, tokenizer

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, text, images, return_tensors):
        out = self.tokenizer([t.replace("<image>", "<image>" * IMAGE_TOKENS) for t in text], return_tensors="pt")
        made = dict(out)
        made.pop("token_type_ids", None)
        pixels = vlm_families.pixels(self.family, 1)
        shade = float(np.asarray(images[0]).mean()) / 255  # so that each image gives other features
        made |= {**pixels, "pixel_values": pixels["pixel_values"] * (0.5 + shade)}
        image = (made["input_ids"] == self.tokenizer.convert_tokens_to_ids("<image>")).long()
        if self.family == "gemma3":
            made["token_type_ids"] = image
        elif self.family in ("qwen2_5_vl", "qwen3_vl"):
            made["mm_token_type_ids"] = image
        return transformers.BatchFeature(made)


def build(family, tokenizer, monkeypatch):
    image = tokenizer.convert_tokens_to_ids("<image>")
    monkeypatch.setitem(vlm_families.TEXT, "vocab_size", 384)
    monkeypatch.setattr(vlm_families, "IMAGE", image)
    monkeypatch.setattr(vlm_families, "QWEN_IDS", vlm_families.QWEN_IDS | {"image_token_id": image})
    model = vlm_families.build(family).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # attention that is not uniform
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)
    return model


def images():
    return [Image.new("RGB", (16, 16), (shade, shade, 90)) for shade in (30, 120, 250)]


@pytest.mark.parametrize("family", vlm_families.BUILDERS)
def test_scores_of_a_family_equal_its_eager_attention(family, tokenizer, monkeypatch):
    model = build(family, tokenizer, monkeypatch)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    vlm = VisionLanguageModel(model, Processor(family, tokenizer))
    examples = [Example(str(i), caption) for i, caption in enumerate(CAPTIONS)]
    layers = [0, 2]
    scores = score_sentences(vlm, examples, images(), instruction="describe", layers=layers, attention_row="own")
    assert [s.example_id for s in scores] == ["0", "0", "1", "2"]
    for example, image in zip(examples, images(), strict=True):
        prompt = vlm.prompt("describe", image)
        ids, _ = vlm.encode(example.caption)
        inputs, response = vlm._inputs([prompt], [ids])
        with torch.no_grad():
            out = eager.model(**inputs, output_attentions=True, use_cache=False)
        text = response[0].double()
        visual = (inputs["input_ids"][0] == tokenizer.convert_tokens_to_ids("<image>")).double()
        assert visual.sum() == IMAGE_TOKENS
        shares = []
        for layer in layers:
            weights = out.attentions[layer][0].double().mean(0)[response[0]]
            v, t = weights @ visual, weights @ text
            shares.append(v / (v + t))
        wanted = torch.stack(shares).mean(0)
        found = [mass for s in scores if s.example_id == example.id for mass in s.token_masses]
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
    spread = [mass for s in scores for mass in s.token_masses]
    assert max(spread) - min(spread) > 0.05


def test_a_folder_of_another_family_is_opened_with_its_own_processor(tmp_path, tokenizer, monkeypatch):
    image_processing = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    model = build("llava", tokenizer, monkeypatch)
    processor = transformers.LlavaProcessor(
        image_processor=image_processing.LlavaImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    vlm = load_caption_model(str(tmp_path), torch.float32, "cpu")
    assert isinstance(vlm, VisionLanguageModel) and "<image>" in vlm.markers
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30 + i, 3), np.uint8)) for i in range(2)]
    examples = [Example(str(i), CAPTIONS[i]) for i in range(2)]
    together = score_sentences(vlm, examples, photos, instruction="describe")
    alone = [
        score
        for example, photo in zip(examples, photos, strict=True)
        for score in score_sentences(vlm, [example], [photo], instruction="describe")
    ]
    assert [s.score for s in together] == pytest.approx([s.score for s in alone], abs=1e-6)
    assert vlm.prompt("describe", photos[0]).ids.count(tokenizer.convert_tokens_to_ids("<image>")) == IMAGE_TOKENS


def test_images_cut_into_different_numbers_of_tiles_are_one_batch():
    parts = [torch.ones(1, 2, 3, 4, 4), 2 * torch.ones(1, 5, 3, 4, 4)]
    joined = _joined(parts)
    assert joined.shape == (2, 5, 3, 4, 4)
    assert torch.equal(joined[0, :2], parts[0][0]) and not joined[0, 2:].any() and torch.equal(joined[1:], parts[1])
    rows = [torch.ones(6, 12), torch.ones(4, 12)]  # patches of two images, one after another
    assert _joined(rows).shape == (10, 12)


def test_a_folder_of_the_trainers_family_is_opened_as_its_policy(tmp_path):
    make_policy().write_files(tmp_path / "model")
    assert isinstance(load_caption_model(str(tmp_path / "model"), torch.float32, "cpu"), PolicyModel)
