"""The policy: a vision-language model with its tokenizer and image processor, seen the way the trainer needs it.

Three things are done here once, so that no other file repeats them: images are encoded once per prompt and shared by
the rollouts of its group; positions are computed for whole batches; and tokens are checked against image features
before every forward pass.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import DynamicCache

from mmrpt.batching import MicroBatch, group_batch, micro_batches, row_batch, shared_mask, shared_positions
from mmrpt.families import (
    OTHER_RELEASE,
    SUPPORTED_MODEL_TYPES,
    check_kept,
    joined_features,
    load_image_processor,
    model_folder,
    mrope_positions,
    use_patch_projection,
    video_settings,
)
from mmrpt.lora import base_folder, check_quantized, open_adapters, quantization, save_weights
from mmrpt.types import Batch, PixelBatch
from mmrpt_kernels.integrations.caches import cache_keyword
from mmrpt_kernels.integrations.packed_rows import PackedRows
from mmrpt_kernels.integrations.transformers import enable_visual_mass

# What the text model is called with, besides its cache; its **kwargs would take a name that it lost in silence.
TEXT_ARGUMENTS = ("inputs_embeds", "position_ids", "attention_mask", "use_cache")
INSTRUCTION_PLACE = "[[instruction]]"  # stands for the user's text where a template is filled around it


class Policy:
    """A causal vision-language model of the Qwen2-VL family with its tokenizer and image processor."""

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any) -> None:
        model_type = type(model.config).model_type  # 4.57's instance answers with its text model's, once loaded
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"model type {model_type!r} is not supported by the trainer: expected one of {SUPPORTED_MODEL_TYPES}. "
                "The operators of mmrpt_kernels serve any model; the trainer shares image features within a group, "
                "which needs to know where a family puts them."
            )
        use_patch_projection(model)
        self.compute = torch.float32  # bfloat16: forward passes run under autocast (`autocast`)
        self.model = enable_visual_mass(model)  # plain SDPA wherever nothing is recorded
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id: int = model.config.image_token_id
        self.merge_size: int = model.config.vision_config.spatial_merge_size
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.suppressed_ids = self._ids_never_sampled()
        self.markers: tuple[str, ...] = tuple(tokenizer.all_special_tokens)
        if self.eos_token_id in self.encode_text(tokenizer.eos_token):
            raise ValueError(
                f"{type(tokenizer).__name__} reads {tokenizer.eos_token!r} in a text as a marker: expected a fast "
                f"tokenizer that knows split_special_tokens. {OTHER_RELEASE}"
            )
        forward = self.text_model.forward
        self.cache_keyword = cache_keyword(forward)
        lost = [name for name in TEXT_ARGUMENTS if name not in inspect.signature(forward).parameters]
        if lost:
            raise ValueError(
                f"{type(self.text_model).__name__} takes no {', '.join(lost)}: expected {TEXT_ARGUMENTS}. "
                f"{OTHER_RELEASE}"
            )

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        quantized: bool = False,
        **pixel_limits: int | None,
    ) -> Policy:
        """Opens a Hugging Face folder or hub name; `min_pixels` and `max_pixels` replace its image processor's.

        A folder of LoRA adapters opens the model that they were made for, with the adapters in it. `quantized`: the
        decoder's linear layers in 4 bits. Raises OSError (FileNotFoundError for a folder) or ValueError with the
        remedy.
        """
        folder = model_folder(path, revision)
        base = base_folder(folder)
        model_type = type(AutoConfig.from_pretrained(base)).model_type
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(f"{base} holds a {model_type!r}; the trainer serves {SUPPORTED_MODEL_TYPES}.")
        options = quantization(dtype, device) if quantized else {}
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **options).to(device)
        check_kept(model, "dtype", dtype)
        policy = cls(model, AutoTokenizer.from_pretrained(folder), load_image_processor(folder, **pixel_limits))
        if quantized:
            check_quantized(policy)
        if base != folder:
            open_adapters(model, folder)
        return policy

    def write_files(self, folder: Path) -> None:
        """Writes the files of an ordinary Hugging Face folder, which is made where it is not there; of a model with
        adapters the adapters alone, as peft writes them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # AutoProcessor asks for these two where torchvision is installed; nothing here reads them.
        video = json.dumps(video_settings(self.model.config.vision_config), indent=2)
        (folder / "video_preprocessor_config.json").write_text(video + "\n")
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings["processor_class"] = "Qwen2_5_VLProcessor"
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    # ---------------------------------------------------------------- inputs

    def pixels(self, images: Sequence[Image.Image]) -> PixelBatch:
        """Runs the image processor. Raises ValueError when there is no image."""
        if not images:
            raise ValueError("no image was given: every row of a batch shows exactly one image.")
        # Resizing an image to its own size costs four times the rest of the processing.
        fits = all(self._keeps_size(image) for image in images)
        out = self.image_processor(images=list(images), return_tensors="pt", **({"do_resize": False} if fits else {}))
        device = self.device
        return PixelBatch(out["pixel_values"].to(device), out["image_grid_thw"].to(device))

    def prompt_text(self, instruction: str) -> str:
        """The chat prompt of one user turn with one image, in the tokenizer's own template, image marker unexpanded."""
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode_prompt(self, instruction: str, image_tokens: int) -> list[int]:
        """Token ids of a prompt whose image stands for `image_tokens` features. Markers in the instruction are text."""
        encode = partial(self.tokenizer, add_special_tokens=False)
        if any(marker in instruction for marker in self.markers):  # only the template's own are markers
            before, after = self.prompt_text(INSTRUCTION_PLACE).split(INSTRUCTION_PLACE)
            ids = [*encode(before)["input_ids"], *self.encode_text(instruction), *encode(after)["input_ids"]]
        else:
            ids = encode(self.prompt_text(instruction))["input_ids"]
        at = [i for i, token in enumerate(ids) if token == self.image_token_id]
        if len(at) != 1:
            raise ValueError(
                f"the chat template gives {len(at)} image markers for one image, expected exactly one: give the "
                "tokenizer the chat template of its family."
            )
        return ids[: at[0]] + [self.image_token_id] * image_tokens + ids[at[0] + 1 :]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which markers such as `<|im_end|>` are ordinary characters."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_text` with the characters [start, end) of each token."""
        out = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pixels: PixelBatch,
        image_index: Sequence[int],
        *,
        pad_left: bool = False,
    ) -> Batch:
        """Rows of one prompt and one response each (`mmrpt.batching.row_batch`)."""
        return row_batch(prompts, responses, pixels, image_index, pad_id=self.pad_token_id, pad_left=pad_left)

    def group_batch(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Sequence[int]]],
        pixels: PixelBatch,
        image_index: Sequence[int],
        *,
        share: bool,
    ) -> Batch:
        """Prompts with all their responses (`mmrpt.batching.group_batch`)."""
        return group_batch(prompts, groups, pixels, image_index, pad_id=self.pad_token_id, share=share)

    def group_batches(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Sequence[int]]],
        pixels: Callable[[list[int]], PixelBatch],
        batch_tokens: int,
        *,
        share: bool | None = None,
    ) -> Iterator[tuple[MicroBatch, Batch]]:
        """Prompts with all their responses, a forward pass at a time (`mmrpt.batching.micro_batches`).

        Each prompt shows an image of its own: `pixels` gives those of the prompts of a pass.
        """
        lengths = [[len(response) for response in responses] for responses in groups]
        sizes = [len(prompt) for prompt in prompts]
        for part in micro_batches(sizes, lengths, batch_tokens, self.head_weight.shape[1], share):
            own = [groups[i][responses] for i, responses in zip(part.prompts, part.responses, strict=True)]
            rows = [prompts[i] for i in part.prompts], own, pixels(part.prompts), range(len(own))
            yield part, self.group_batch(*rows, share=part.share)

    # ---------------------------------------------------------------- forward

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes and losses run under, and a loop of passes, which then casts each weight once."""
        half = self.compute != torch.float32
        return torch.autocast(self.device.type, self.compute) if half else nullcontext()

    @property
    def text_model(self) -> nn.Module:
        """The decoder without its head: what reads embeddings of text and image features."""
        return self.model.model.language_model

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the lm head."""
        return self.model.lm_head.weight

    def sampling_bias(self) -> Tensor:
        """(V,) float32 added to the logits, in sampling and in training alike: the ids that must never be sampled."""
        bias = torch.zeros(self.head_weight.shape[0], device=self.device)
        bias[self.suppressed_ids] = -1e4
        return bias

    def image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """(sum of image tokens, H): the vision tower's output, one pass over the distinct images."""
        with self.autocast():
            features = joined_features(self.model.model.get_image_features(pixel_values, grid_thw))
        shape = (int(grid_thw.prod(-1).sum()) // self.merge_size**2, self.head_weight.shape[1])
        if features.shape != shape:
            raise ValueError(
                f"get_image_features gave {tuple(features.shape)}: expected {shape}, a feature for each image token. "
                f"{OTHER_RELEASE}"
            )
        return features

    def hidden(
        self,
        batch: Batch,
        features: Tensor | None = None,
        cache: DynamicCache | None = None,
        *,
        padded: bool = False,
    ) -> Tensor:
        """(R, T, H) last hidden states, 0 for padding. Differentiable in the model's parameters.

        `features` (sum of image tokens, H) replaces the vision tower's output; a given `cache` is filled. Padding is
        left out of all but attention, unless `padded`, as a recording of visual mass needs.
        Raises ValueError when image tokens and features do not match.
        """
        if features is None:
            features = self.image_features(batch.pixel_values, batch.image_grid_thw)
        embeds = self.model.get_input_embeddings()(batch.input_ids)
        embeds = self._place_features(embeds, batch, features)
        positions = mrope_positions(
            batch.input_ids,
            batch.attention_mask,
            batch.image_grid_thw[batch.image_index],
            self.image_token_id,
            self.merge_size,
        )
        mask = self._attention_mask(batch)
        if batch.segments is not None:
            positions = shared_positions(positions, batch.segments)
        keep = batch.attention_mask.bool()
        left = mask is not None and mask.dim() == 2  # transformers reads a mask (R, T) by the shape of the inputs
        if padded or left or cache is not None or bool(keep.all()):
            return self._decode(embeds, positions, mask, cache)
        rows = PackedRows(keep)
        positions = positions[:, keep][:, None]
        return rows.unpack(self._decode(rows.pack(embeds), positions, mask, packed_rows=rows))

    def _decode(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None = None, **options: Any
    ) -> Tensor:
        with self.autocast():
            out = self.text_model(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask=mask,
                use_cache=cache is not None,
                **{self.cache_keyword: cache},
                **options,
            )
        return out.last_hidden_state

    @staticmethod
    def _attention_mask(batch: Batch) -> Tensor | None:
        """What attention needs besides being causal: a causal row never sees padding on its right."""
        if batch.segments is not None:
            return shared_mask(batch.segments)
        right = bool((batch.attention_mask.diff(dim=-1) <= 0).all())
        return None if right else batch.attention_mask

    def step(self, token_ids: Tensor, positions: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        """(P, n, H): one decoding step of n tokens a row, which do not see each other, over the cache.

        `token_ids` and `positions` (P, n); `attention_mask` (P, 1, n, past + n) bool, True = may be attended.
        """
        embeds = self.model.get_input_embeddings()(token_ids)
        return self._decode(embeds, positions.expand(3, -1, -1), attention_mask, cache)

    def _keeps_size(self, image: Image.Image) -> bool:
        unit = self.merge_size * self.model.config.vision_config.patch_size
        low, high = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        return image.width % unit == 0 and image.height % unit == 0 and low <= image.width * image.height <= high

    def _place_features(self, embeds: Tensor, batch: Batch, features: Tensor) -> Tensor:
        is_image = batch.input_ids == self.image_token_id
        per_image = batch.image_grid_thw.prod(-1) // self.merge_size**2
        found, expected = is_image.sum(-1), per_image[batch.image_index]
        if not torch.equal(found, expected):
            row = int((found != expected).nonzero()[0])
            raise ValueError(
                f"row {row} holds {int(found[row])} image tokens but its image has {int(expected[row])} features. "
                "An image marker was sampled, cut off or left in the text: check the caption and the length limits."
            )
        first = torch.cumsum(per_image, 0) - per_image
        within = torch.cumsum(is_image, -1) - 1
        source = (first[batch.image_index][:, None] + within)[is_image]
        return embeds.masked_scatter(is_image[..., None], features[source].to(embeds.dtype))

    def _ids_never_sampled(self) -> list[int]:
        """Image, video and other markers that would break the next forward pass, and ids past the tokenizer's end."""
        end = {self.eos_token_id}
        markers = set(self.tokenizer.all_special_ids) | {self.model.config.video_token_id, self.image_token_id}
        beyond = range(len(self.tokenizer), self.model.lm_head.weight.shape[0])
        return sorted((markers | set(beyond)) - end)
