"""Tiny random VLMs of six families, built from their configs, and inputs for them made by hand."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers

from mmrpt_kernels.integrations.transformers import VisualMassRecord, enable_visual_mass, record_visual_mass

IMAGE, VOCAB, LENGTH, LAYERS = 3, 64, 14, 3
FIRST_IMAGE, LAST_IMAGE = 4, 8  # image tokens stand at [4, 8) of a row without padding
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "in_channels": 3}
QWEN_VISION |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
QWEN_IDS = {"image_token_id": IMAGE, "vision_start_token_id": 4, "vision_end_token_id": 5, "video_token_id": 6}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


def build_qwen2_5_vl():
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    vision = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def build_qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = TEXT | {"head_dim": 8, "rope_scaling": rope}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def build_llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}, image_size=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def build_internvl():
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=VISION | {"patch_size": [4, 4], "image_size": [16, 16]},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config)


def build_smolvlm():
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=VISION | {"image_size": 16},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def build_gemma3():
    """Sliding windows, and image tokens that see each other in both directions: masks that are no band."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "sliding_window": 6, "layer_types": kinds, "query_pre_attn_scalar": 8},
        vision_config=VISION | {"image_size": 16, "vision_use_head": False},
        image_token_index=IMAGE,
        boi_token_index=4,
        eoi_token_index=5,
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero by default: no image
    return model


BUILDERS = {
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "llava": build_llava,
    "internvl": build_internvl,
    "smolvlm": build_smolvlm,
    "gemma3": build_gemma3,
}


def build(family: str) -> torch.nn.Module:
    """The family's model with weights of seed 0; skips where this release of transformers has no such family."""
    torch.manual_seed(0)
    try:
        return BUILDERS[family]()
    except AttributeError as error:
        if "module transformers has no attribute" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


_built = functools.cache(build)


def model_of(family: str) -> torch.nn.Module:
    """The family's model in evaluation mode, enabled, without gradients; built once."""
    model = _built(family).eval()
    model.zero_grad()
    switch_checkpointing(model, None)
    return enabled(model)


def switch_checkpointing(model: torch.nn.Module, settings: dict | None) -> None:
    """Gradient checkpointing on, with torch's settings, or off (None), under the name that transformers has for it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if settings is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")(settings)


def enabled(model: torch.nn.Module) -> torch.nn.Module:
    model.set_attn_implementation("sdpa")  # also the vision tower's
    return enable_visual_mass(model)


def eager(model: torch.nn.Module, inputs: dict[str, torch.Tensor], weights: torch.Tensor | None = None):
    """The model's first result, and the mass (L, B, Hq, T) of keys of `weights` (B, S), image tokens by default, from
    the weights of eager attention over the whole sequence; the model is left enabled."""
    weights = inputs["input_ids"] == IMAGE if weights is None else weights
    model.set_attn_implementation("eager")
    try:
        found = model(**inputs, output_attentions=True)
    finally:
        (enabled if hasattr(model.config, "vision_config") else enable_visual_mass)(model)
    shares = [a for a in found.attentions if a is not None]
    return found[0], torch.stack([(a * weights[:, None, None, -a.shape[-1] :]).sum(-1) for a in shares])


def recorded(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **settings) -> VisualMassRecord:
    """What a forward pass records."""
    with record_visual_mass(model, **settings) as record:
        model(**inputs)
    return record


def pixels(family: str, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family.startswith("qwen"):
        patches = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}
    shape = {"llava": (batch, 3, 8, 8), "smolvlm": (batch, 1, 3, 16, 16)}.get(family, (batch, 3, 16, 16))
    return {"pixel_values": torch.randn(shape, generator=generator)}


def inputs_of(family: str, padding: str = "none", extra: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Two rows of a prompt with four image tokens; the second lacks three tokens. extra (2, n): more text."""
    ids = torch.randint(8, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, FIRST_IMAGE - 1], ids[:, LAST_IMAGE] = 4, 5
    ids[:, FIRST_IMAGE:LAST_IMAGE] = IMAGE
    attended = torch.ones_like(ids)
    if padding == "left":
        ids[1] = ids[1].roll(3)
        ids[1, :3], attended[1, :3] = 0, 0
    elif padding == "right":
        ids[1, -3:], attended[1, -3:] = 0, 0
    if extra is not None:
        ids, attended = torch.cat([ids, extra], 1), torch.cat([attended, torch.ones_like(extra)], 1)
    made = {"input_ids": ids, "attention_mask": attended, **pixels(family, 2)}
    if family == "gemma3":
        made["token_type_ids"] = (ids == IMAGE).long()
    elif "mm_token_type_ids" in inspect.signature(_built(family).forward).parameters:
        made["mm_token_type_ids"] = (ids == IMAGE).long()
    return made
