"""Tiny random policies of many families: models built from their configs, a tokenizer, and processors made by hand."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmrpt.families import make_image_processor
from mmrpt.policy import OwnForwardPolicy, QwenVLPolicy
from mmrpt.policy.qwen_vl import FAMILIES
from mmrpt.world.tiny_vlm import train_tokenizer
from tests.kernels.integrations import vlm_families
from tests.trainer.conftest import ColourPairs

OTHERS = ("llava", "internvl", "smolvlm", "gemma3")
IMAGE_TOKENS, PATCH = 4, 4  # of a picture of 16 x 16 pixels
MARKER = "<|image_pad|>"
TEXTS = [*(ColourPairs()[i].caption for i in range(4)), "user assistant describe restore: a cat sits on it here."]
SIZES = {"llava": 8}


def build_qwen2_vl():
    text = vlm_families.TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **vlm_families.QWEN_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def build_qwen3_5():
    """Layers of linear attention, whose state is no cache of keys, between those that look back."""
    kinds = ["linear_attention", "full_attention", "full_attention"]
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    text = vlm_families.TEXT | linear | {"linear_num_value_heads": 2, "layer_types": kinds, "head_dim": 8}
    text |= {"rope_parameters": rope | {"partial_rotary_factor": 1.0}}
    vision = {**vlm_families.QWEN_VISION, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **vlm_families.QWEN_IDS)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def build_model(family: str, tokenizer, **ids) -> torch.nn.Module:
    """The family's model for the tokenizer's words and image marker, with attention that is not uniform."""
    names = {"image_token_id": MARKER, "vision_start_token_id": "<|vision_start|>"}
    names |= {"vision_end_token_id": "<|vision_end|>", "video_token_id": "<|video_pad|>"}
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    text = {"vocab_size": -(-len(tokenizer) // 64) * 64}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    more = {"qwen2_vl": build_qwen2_vl, "qwen3_5": build_qwen3_5}
    with (
        mock.patch.dict(vlm_families.TEXT, text),
        mock.patch.dict(vlm_families.BUILDERS, more),
        mock.patch.object(vlm_families, "IMAGE", special["image_token_id"]),
        mock.patch.object(vlm_families, "QWEN_IDS", special),
    ):
        model = vlm_families.build(family).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)
            if name == "lm_head.weight":
                parameter.mul_(5)
    return model


def make_tokenizer():
    return train_tokenizer(TEXTS, 340)


class Processor:
    """A family's processor by hand: image tokens in the text, pixels of the family's shape from the image."""

    def __init__(self, family, tokenizer):
        self.family, self.tokenizer = family, tokenizer
        self.image_processor = make_image_processor(PATCH, 64 * 64)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, text, images, return_tensors):
        made, count = self.pixels(images[0])
        out = self.tokenizer([t.replace(MARKER, MARKER * count) for t in text], return_tensors=return_tensors)
        return transformers.BatchFeature({**out, **made})

    def pixels(self, image):
        if self.family.startswith("qwen"):
            out = dict(self.image_processor(images=[image], return_tensors="pt"))
            return out, int(out["image_grid_thw"].prod()) // 4
        side = SIZES.get(self.family, 16)
        values = np.asarray(image.resize((side, side), Image.BOX), np.float32).transpose(2, 0, 1) / 64 - 2
        values = torch.from_numpy(values)[None]
        return {"pixel_values": values[None] if self.family == "smolvlm" else values}, IMAGE_TOKENS


def make_family(family: str, *, own: bool = False) -> QwenVLPolicy | OwnForwardPolicy:
    """The family's policy; `own`: through the model's own forward pass, also where prompts could be shared."""
    tokenizer = make_tokenizer()
    model = build_model(family, tokenizer)
    if family in FAMILIES and not own:
        return QwenVLPolicy(model, tokenizer, make_image_processor(PATCH, 64 * 64))
    return OwnForwardPolicy(model, Processor(family, tokenizer))


def write_llava(folder: Path) -> None:
    """A folder of a LLaVA with transformers' own processor; skips where that needs torchvision."""
    processing = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    policy = make_family("llava")
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    policy.processor = transformers.LlavaProcessor(
        image_processor=processing.LlavaImageProcessorPil(**sizes),
        tokenizer=policy.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=MARKER,
        chat_template=policy.tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    policy.write_files(folder)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Pictures of noise, no pixel of which is black."""
    sizes = sizes or ((16, 16), (16, 16))
    noise = (np.random.default_rng(i).integers(1, 256, (h, w, 3), np.uint8) for i, (w, h) in enumerate(sizes))
    return [Image.fromarray(pixels) for pixels in noise]


def rows_of(policy, *sizes):
    """Two prompts of different lengths, their images, and two groups of responses of different lengths."""
    prompts, pixels = policy.prompts(["restore: a card", "describe"], pictures(*sizes))
    ids = policy.encode_text("the card is red. cards are made of paper.")
    return prompts, pixels, [[ids[:5], ids[1:2], ids[2:5]], [ids[3:4], ids[:7]]]


def group_batch(policy, prompts, groups, pixels):
    return policy.group_batch(prompts, groups, pixels, [0, 1], share=policy.shares_prompts)
