"""Folders of real models without their weights: the values of their config.json beside a small tokenizer."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmrpt.world.tiny_vlm import train_tokenizer
from tests.trainer.conftest import ColourPairs

_QWEN2_5_TEXT = {"max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32_768}
_QWEN2_5_TEXT |= {"use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
_QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
_QWEN2_5_VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "tokens_per_second": 2}
_QWEN2_5_VISION |= {"fullatt_block_indexes": [7, 15, 23, 31], "in_chans": 3, "hidden_act": "silu"}
_QWEN3_TEXT = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36}
_QWEN3_TEXT |= {"vocab_size": 151_936, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6, "rope_theta": 5e6}
_QWEN3_TEXT |= {"model_type": "qwen3_vl_text", "attention_bias": False}
_QWEN3_TEXT |= {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}}
_QWEN3_VISION = {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN3_VISION |= {"num_position_embeddings": 2304, "in_channels": 3, "model_type": "qwen3_vl"}

# As the hub has them, but for ids of tokens.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": {
        "model_type": "qwen2_vl",
        **_QWEN2_5_TEXT,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 1536,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "Qwen2.5-VL-3B": {
        "model_type": "qwen2_5_vl",
        **_QWEN2_5_TEXT,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
    },
    "Qwen2.5-VL-7B": {
        "model_type": "qwen2_5_vl",
        **_QWEN2_5_TEXT,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
    },
    "Qwen3-VL-4B": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3_TEXT, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_config": {
            **_QWEN3_VISION,
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "Qwen3-VL-8B": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3_TEXT, "hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "vision_config": {
            **_QWEN3_VISION,
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}


def write_shape(folder: Path, shape: str, **changed: Any) -> Path:
    """The folder of a model of `SHAPES` as it is downloaded, without weights; `changed` config values win."""
    tokenizer = train_tokenizer([ColourPairs()[i].caption for i in range(4)], 512)
    tokenizer.save_pretrained(folder)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.pad_token_id}
    config = {**deepcopy(SHAPES[shape]), **dict(zip(keys, ids, strict=True)), "torch_dtype": "bfloat16"}
    config.get("text_config", config).update(ends)
    (folder / "config.json").write_text(json.dumps(config | changed))
    side = config["vision_config"]["patch_size"]
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": side,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5] if side == 16 else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5, 0.5, 0.5] if side == 16 else [0.26862954, 0.26130258, 0.27577711],
    }
    sizes = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    processor |= sizes if side == 16 else {"min_pixels": 3136, "max_pixels": 12_845_056}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
