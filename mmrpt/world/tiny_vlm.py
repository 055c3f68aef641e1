"""A tiny model of a real architecture, Qwen3-VL's or Qwen2.5-VL's, of about two million parameters.

Built in memory from a config, with a byte-level BPE tokenizer trained on the world's own captions, and saved as an
ordinary Hugging Face folder, so that everything written for it also opens a real folder of the family.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mmrpt.families import OTHER_RELEASE, make_image_processor
from mmrpt.policy import QwenVLPolicy
from mmrpt.settings import TinyVLMConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CLASSES = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
FORMAT_TOKENS = ("<mask>", "<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's markers; `<mask>`, `<think>`, ... are one token each but ordinary text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(FORMAT_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in FORMAT_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    lost = set(SPECIAL_TOKENS) - set(tokenizer.all_special_tokens)
    if lost:  # markers that are not special would be sampled
        raise ValueError(f"the tokenizer does not know {sorted(lost)} as special tokens. {OTHER_RELEASE}")
    return tokenizer


def build_tiny_vlm(
    config: TinyVLMConfig, texts: Iterable[str], seed: int = 0, images: Sequence[Image.Image] = ()
) -> QwenVLPolicy:
    """A randomly initialised policy whose tokenizer knows `texts`. The same arguments give the same weights.

    With `images`, the vision tower starts from them: its patch embedding from their principal components
    (`whiten_patches`), its last layer so that features vary and have no common part (`spread_features`). The global
    random state is left as it was.
    """
    tokenizer = train_tokenizer(texts, config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
        model = CLASSES[config.family][1](tiny_config(config, ids, len(tokenizer)))
        if config.family == "qwen3_vl":  # beside embedded patches of `patch_std`, places must not be lost
            torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=config.patch_std / 4)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise ValueError(f"the head has weights of its own: expected the embedding's. {OTHER_RELEASE}")
    image_processor = make_image_processor(config.patch_size, config.max_pixels, config.image_mean, config.image_std)
    policy = QwenVLPolicy(model, tokenizer, image_processor)
    if images:
        whiten_patches(policy, images, config.patch_std)
        spread_features(policy, images, config.feature_std)
    return policy


def tiny_config(config: TinyVLMConfig, ids: Mapping[str, int], words: int) -> PretrainedConfig:
    """The model's config for a tokenizer of so many words with these ids of the special tokens."""
    own_text, own_vision = (_qwen2_5_vl if config.family == "qwen2_5_vl" else _qwen3_vl)(config)
    text = {
        "vocab_size": -(-words // 64) * 64,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **own_text,
    }
    vision = {
        "depth": config.vision_layers,
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size,
        "num_heads": config.vision_heads,
        "out_hidden_size": config.hidden_size,
        "patch_size": config.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **own_vision,
    }
    hf_config = CLASSES[config.family][0](
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    _check_names(hf_config.text_config, text)
    _check_names(hf_config.vision_config, vision)
    rope = getattr(hf_config.text_config, "rope_parameters", None) or hf_config.text_config.rope_scaling
    sections = text["rope_scaling"]["mrope_section"]
    if rope.get("mrope_section") != sections:  # transformers 4 calls it rope_scaling
        raise ValueError(
            f"text_config's rotary settings are {rope}: expected mrope_section {sections}. {OTHER_RELEASE}"
        )
    return hf_config


def _qwen2_5_vl(config: TinyVLMConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Qwen2.5-VL's text and vision configs have of their own."""
    half = config.hidden_size // config.heads // 2
    sections = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": sections, "rope_theta": 1e4}
    windows = {"window_size": 8 * config.patch_size, "fullatt_block_indexes": list(range(config.vision_layers))}
    return {"rope_scaling": rope}, windows


def _qwen3_vl(config: TinyVLMConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Qwen3-VL's have: learned positions of 8 x 8 patches, interpolated for other images, and no DeepStack, whose
    features no vision pre-training has taught anything."""
    head_size = config.hidden_size // config.heads
    sections = [head_size // 2 - 2 * (head_size // 6), head_size // 6, head_size // 6]
    rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": 1e4}
    places = {"num_position_embeddings": 64, "deepstack_visual_indexes": []}
    return {"rope_scaling": rope, "head_dim": head_size}, places


def _check_names(config: PretrainedConfig, given: Mapping[str, Any]) -> None:
    """Refuses names that `config` does not know: it would keep them, and the model would be another one."""
    known = {name for part in type(config).__mro__ for name in inspect.signature(part.__init__).parameters}
    by_what_they_do = {"rope_theta", "rope_scaling", "tie_word_embeddings"}
    any_config = {"bos_token_id", "eos_token_id"}  # read by generation, if the class knows them or not
    lost = given.keys() - known - by_what_they_do - any_config
    if lost:
        raise ValueError(f"{type(config).__name__} knows no {', '.join(sorted(lost))}. {OTHER_RELEASE}")


@torch.no_grad()
def whiten_patches(policy: QwenVLPolicy, images: Sequence[Image.Image], std: float) -> None:
    """Makes the patch embedding the principal components of the images' patches, nearly whitened, of deviation `std`.

    Neighbouring pixels are nearly equal, so a random embedding says the same of all things: the colour behind them. A
    component of deviation s is scaled by s ** -0.75. With as many steps of vision pre-training, twice as many of the
    held-out objects are told apart. A large `std` makes the tower's blocks, which add to it, small changes at first.
    """
    patches = policy.pixels(images).pixel_values
    projection = policy.model.model.visual.patch_embed.proj
    size = projection.weight.shape[0]
    values, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
    values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size]
    deviation = values.sqrt().clamp_min(1e-3 * float(values[0]) ** 0.5)
    # Of each vector and its negative, the one whose largest entry is positive: the same on every machine.
    sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    rows = (vectors * sign / deviation**0.75).T
    rows *= std / (rows @ patches.double().T).std(1).square().mean().sqrt()
    filled = torch.zeros(size, patches.shape[1], dtype=torch.float64)
    filled[: rows.shape[0]] = rows
    projection.weight.copy_(filled.view_as(projection.weight))


@torch.no_grad()
def spread_features(policy: QwenVLPolicy, images: Sequence[Image.Image], std: float) -> None:
    """Makes the features of `images` have mean 0 and, over all their tokens, standard deviation `std`.

    From a plain random start nine tenths of a feature are the same for every image; the decoder normalises each token,
    learns to ignore the rest, and never looks. One data-dependent layer (as LSUV, arXiv 1511.06422) mends that.
    """
    pixels = policy.pixels(images)
    merger = policy.model.model.visual.merger
    last = merger.linear_fc2 if hasattr(merger, "linear_fc2") else merger.mlp[2]  # Qwen3-VL's, Qwen2.5-VL's
    (features,) = policy.image_features(pixels)
    spread = features.std(0).mean()
    last.weight.mul_(std / spread)
    last.bias.mul_(std / spread)
    last.bias.sub_(features.mean(0) * (std / spread))
