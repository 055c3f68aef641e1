"""scale=tiny: a model of the given one's architecture with few layers and random weights, as a folder of its own.

All that opens a model opens that folder in the same way: dtype, adapters, 4-bit weights, attention, checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig

from mmrpt.families import MODEL_FILES, OTHER_RELEASE, model_folder
from mmrpt.settings import Settings
from mmrpt.settings.scale import TINY_CAPS, TINY_MODEL

SMALL_FILES = [pattern for pattern in MODEL_FILES if "safetensors" not in pattern]
LAYERS, HEAD_SIZE, VISION_HEADS = 2, 16, 2
# Of a DeepStack's levels one: the second would be added behind the decoder's last layer, where nothing reads it.
VISION_LAYERS_NAMED = {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
MOST_PARAMETERS = 20_000_000  # besides the words'; a tiny model of a family served has below a million


def with_tiny_model(settings: Settings) -> Settings:
    """With scale=tiny, the settings with the tiny model's folder, made where it is not there, as model.path.

    The same settings give the same weights. No weights of the real model are downloaded. Raises OSError or ValueError
    with the remedy.
    """
    if settings.scale != "tiny" or settings.model.path is None:
        return settings
    folder = settings.run_dir / TINY_MODEL
    if not folder.exists():
        part = folder.with_name(f"{TINY_MODEL}.{os.getpid()}.tmp")
        try:
            write_tiny_model(settings.model.path, settings.model.revision, part, settings.seed)
            os.replace(part, folder)
        except OSError:
            if not folder.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return replace(settings, model=replace(settings.model, path=str(folder), revision=None))


def write_tiny_model(path: str, revision: str | None, folder: Path, seed: int) -> None:
    """Writes a model folder with tokenizer and processors of `path` and a tiny model by its config.json."""
    source = model_folder(path, revision, SMALL_FILES)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    shrink(config, words=-(-len(tokenizer) // 64) * 64)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    words = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    size = sum(p.numel() for p in model.parameters() if id(p) not in words)
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"scale=tiny does not know how to make a {type(config).model_type!r} small ({size:,} parameters besides "
            "the words' are left): try the recipe with a model of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(folder)
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if "safetensors" not in file.name and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    limit_pixels(folder / "preprocessor_config.json")


def shrink(config: PretrainedConfig, words: int) -> None:
    """Makes the text and the vision tower of a config small in place; `words` is the size of the vocabulary."""
    text, vision = config.get_text_config(), config.vision_config
    heads = text.num_attention_heads // getattr(text, "num_key_value_heads", text.num_attention_heads)
    heads, kv_heads = (heads, 1) if heads > 1 else (2, 2)
    width = heads * HEAD_SIZE
    for name, value in vars(text).items():  # such as layer_types
        if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:LAYERS])
    _set(text, ("num_hidden_layers",), LAYERS)
    _set(text, ("vocab_size",), words)
    _set(text, ("num_attention_heads",), heads)
    _set(text, ("hidden_size",), width)
    _set(text, ("intermediate_size",), 2 * width)
    for name, value in (("num_key_value_heads", kv_heads), ("head_dim", HEAD_SIZE)):
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    name = "rope_parameters" if hasattr(text, "rope_parameters") else "rope_scaling"  # of transformers 5 and 4
    rope = getattr(text, name, None) or {}
    if sections := rope.get("mrope_section"):
        setattr(text, name, rope | {"mrope_section": scaled_sections(sections, HEAD_SIZE // 2)})
    _set(vision, ("depth", "num_hidden_layers"), LAYERS)
    _set(vision, ("num_heads", "num_attention_heads"), VISION_HEADS)
    # Qwen2-VL's tower calls its width embed_dim, and hidden_size what others call out_hidden_size.
    if hasattr(vision, "embed_dim"):
        _set(vision, ("hidden_size",), width)
    elif hasattr(vision, "out_hidden_size"):
        _set(vision, ("out_hidden_size",), width)
    _set(vision, ("embed_dim", "hidden_size"), VISION_HEADS * HEAD_SIZE)
    if hasattr(vision, "intermediate_size"):
        vision.intermediate_size = 2 * VISION_HEADS * HEAD_SIZE
    for name, layers in VISION_LAYERS_NAMED.items():
        if getattr(vision, name, None):
            setattr(vision, name, layers)


def _set(config: PretrainedConfig, names: tuple[str, ...], value: Any) -> None:
    """Sets the first of `names` that the config has. Raises ValueError where it has none: it would be kept unread."""
    known = [name for name in names if hasattr(config, name)]
    if not known:
        raise ValueError(f"{type(config).__name__} has no {' or '.join(names)}. {OTHER_RELEASE}")
    setattr(config, known[0], value)


def scaled_sections(sections: list[int], total: int) -> list[int]:
    """Sections of rotary pairs in the same proportions (largest remainders), which add up to `total`."""
    exact = [section * total / sum(sections) for section in sections]
    scaled = [int(share) for share in exact]
    by_rest = sorted(range(len(scaled)), key=lambda i: (scaled[i] - exact[i], i))
    for i in by_rest[: total - sum(scaled)]:
        scaled[i] += 1
    return scaled


def limit_pixels(file: Path) -> None:
    """Lowers the image sizes of a preprocessor_config.json of Qwen2-VL's kind, which counts pixels."""
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if "Qwen2VL" not in settings.get("image_processor_type", ""):
        return
    size = settings.get("size") or {}
    for side, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        cap = TINY_CAPS[f"model.{name}"]
        size[side] = min(size.get(side) or settings.pop(name, None) or cap, cap)
    file.write_text(json.dumps(settings | {"size": size}, indent=2) + "\n")
