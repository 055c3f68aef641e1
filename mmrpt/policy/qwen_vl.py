"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, seen the way that makes them cheap to train.

Three things are done here once, so that no other file repeats them: images are encoded once per prompt and shared by
the rollouts of its group; positions are computed for whole batches; and tokens are checked against image features
before every forward pass.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicCache

from mmrpt.batching import as_addend, shared_mask, shared_positions
from mmrpt.families import (
    OTHER_RELEASE,
    blacken_pixels,
    feature_levels,
    load_image_processor,
    mrope_positions,
    use_patch_projection,
    video_settings,
)
from mmrpt.lora import save_weights
from mmrpt.perturbation import blacken_patches
from mmrpt.policy.base import TEXT_PLACE, Policy
from mmrpt.types import Batch, PixelBatch
from mmrpt_kernels.integrations.caches import cache_keyword
from mmrpt_kernels.integrations.packed_rows import PackedRows

# What the text model is called with, besides its cache; its **kwargs would take a name that it lost in silence.
TEXT_ARGUMENTS = ("inputs_embeds", "position_ids", "attention_mask", "use_cache")
DEEPSTACK_ARGUMENTS = ("visual_pos_masks", "deepstack_visual_embeds")


@dataclass(frozen=True)
class Family:
    """What one model type has of its own."""

    processor: str  # transformers' classes of its processor and of its video processor
    video_processor: str
    deepstack: bool = False  # features of several layers of the tower, added behind the decoder's first layers


FAMILIES = {
    "qwen2_vl": Family("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", deepstack=True),
}


class QwenVLPolicy(Policy):
    """A causal vision-language model of the Qwen-VL families with its tokenizer and image processor."""

    shares_prompts = True

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any) -> None:
        model_type = type(model.config).model_type  # 4.57's instance answers with its text model's, once loaded
        if model_type not in FAMILIES:
            raise ValueError(f"model type is {model_type!r}: expected one of {', '.join(FAMILIES)}.")
        self.family = FAMILIES[model_type]
        super().__init__(model, tokenizer, tokenizer)
        use_patch_projection(model)
        self.image_processor = image_processor
        self.merge_size: int = model.config.vision_config.spatial_merge_size
        self.levels = 1 + len(model.config.vision_config.deepstack_visual_indexes) if self.family.deepstack else 1
        forward = self.text_model.forward
        self.cache_keyword = cache_keyword(forward)
        wanted = TEXT_ARGUMENTS + (DEEPSTACK_ARGUMENTS if self.family.deepstack else ())
        lost = [name for name in wanted if name not in inspect.signature(forward).parameters]
        if lost:
            raise ValueError(
                f"{type(self.text_model).__name__} takes no {', '.join(lost)}: expected {wanted}. {OTHER_RELEASE}"
            )

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def of_folder(cls, model: nn.Module, folder: Path, **pixel_limits: int | None) -> QwenVLPolicy:
        return cls(model, AutoTokenizer.from_pretrained(folder), load_image_processor(folder, **pixel_limits))

    def write_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # AutoProcessor asks for these two where torchvision is installed; nothing here reads them.
        video = video_settings(self.model.config.vision_config, self.family.video_processor)
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings["processor_class"] = self.family.processor
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    # ---------------------------------------------------------------- prompts and images

    def pixels(self, images: Sequence[Image.Image]) -> PixelBatch:
        if not images:
            raise ValueError("no image was given: every row of a batch shows exactly one image.")
        # Resizing an image to its own size costs four times the rest of the processing.
        fits = all(self._keeps_size(image) for image in images)
        out = self.image_processor(images=list(images), return_tensors="pt", **({"do_resize": False} if fits else {}))
        # A round's pixels stay where the processor made them: as patches an image takes 24 bytes a pixel.
        return PixelBatch(out["pixel_values"], out["image_grid_thw"].to(self.device))

    def prompts(self, instructions: Sequence[str], images: Sequence[Image.Image]) -> tuple[list[list[int]], PixelBatch]:
        pixels = self.pixels(images)
        counts = pixels.tokens_per_image(self.merge_size).tolist()
        return [self.encode_prompt(text, count) for text, count in zip(instructions, counts, strict=True)], pixels

    def perturbed(self, pixels: PixelBatch, seeds: Sequence[int], *, patch_size: int, probability: float) -> PixelBatch:
        """`patch_size` counts pixels of the resized images, as the model sees them."""
        return blacken_pixels(pixels, self.image_processor, seeds, patch_size=patch_size, probability=probability)

    def perturbed_picture(self, image: Image.Image, seed: int, *, patch_size: int, probability: float) -> Image.Image:
        """The picture has the size that the processor gives it."""
        _, rows, columns = self.pixels([image]).grid_thw[0].tolist()
        side = self.image_processor.patch_size
        resized = image.resize((columns * side, rows * side))
        return blacken_patches(resized, seed=seed, patch_size=patch_size, probability=probability)

    def encode_prompt(self, instruction: str, image_tokens: int) -> list[int]:
        """Token ids of a prompt whose image stands for `image_tokens` features. Markers in the instruction are text."""
        if any(marker in instruction for marker in self.markers):  # only the template's own are markers
            before, after = self.prompt_text(TEXT_PLACE).split(TEXT_PLACE)
            ids = [*self._encode(before), *self.encode_text(instruction), *self._encode(after)]
        else:
            ids = self._encode(self.prompt_text(instruction))
        at = [i for i, token in enumerate(ids) if token == self.image_token_id]
        if len(at) != 1:
            raise ValueError(
                f"the chat template gives {len(at)} image markers for one image, expected exactly one: give the "
                "tokenizer the chat template of its family."
            )
        return ids[: at[0]] + [self.image_token_id] * image_tokens + ids[at[0] + 1 :]

    def _encode(self, text: str) -> list[int]:
        with self._tokenizer_lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ---------------------------------------------------------------- forward

    def image_features(self, pixels: PixelBatch) -> tuple[Tensor, ...]:
        """(sum of image tokens, H): the vision tower's output, one pass over the distinct images. With DeepStack more
        of that shape follow, one for each of the decoder's first layers."""
        grid = pixels.grid_thw
        with self.autocast():
            output = self.model.model.get_image_features(pixels.pixel_values.to(self.device), grid)
        levels = feature_levels(output, deepstack=self.family.deepstack)
        shape = (int(grid.prod(-1).sum()) // self.merge_size**2, self.head_weight.shape[1])
        found, wanted = [tuple(level.shape) for level in levels], [shape] * self.levels
        if found != wanted:
            found, wanted = (", ".join(map(str, shapes)) for shapes in (found, wanted))
            raise ValueError(
                f"get_image_features gave {found}: expected {wanted}, a feature for each image token. {OTHER_RELEASE}"
            )
        return levels

    def hidden(self, batch: Batch, *, padded: bool = False, cache: DynamicCache | None = None) -> Tensor:
        """Padding's states are 0 and left out of all but attention, unless `padded`. A given `cache` is filled."""
        levels = self.image_features(batch.pixels)
        is_image, source = self._image_places(batch)
        embeds = self.model.get_input_embeddings()(batch.input_ids)
        embeds = embeds.masked_scatter(is_image[..., None], levels[0][source].to(embeds.dtype))
        positions = mrope_positions(
            batch.input_ids,
            batch.attention_mask,
            batch.pixels.grid_thw[batch.image_index],
            self.image_token_id,
            self.merge_size,
        )
        mask = self._attention_mask(batch)
        if batch.segments is not None:
            positions = shared_positions(positions, batch.segments)
        deepstack = [level[source] for level in levels[1:]]
        keep = batch.attention_mask.bool()
        left = mask is not None and mask.dim() == 2  # transformers reads a mask (R, T) by the shape of the inputs
        if padded or left or cache is not None or bool(keep.all()):
            return self._decoder(embeds, positions, mask, cache, visual=is_image, deepstack=deepstack)
        rows = PackedRows(keep)
        embeds, positions, is_image = rows.pack(embeds), positions[:, keep][:, None], is_image[keep][None]
        states = self._decoder(embeds, positions, mask, visual=is_image, deepstack=deepstack, packed_rows=rows)
        return rows.unpack(states)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        pixels: PixelBatch,
        image_index: Sequence[int],
        group_size: int,
        max_new_tokens: int,
        next_tokens: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Each prompt is read once, and its group shares the cache: the rollouts are n tokens of one row at every step,
        behind a mask that shows each the prompt and its own past. The prompt's keys are never copied."""
        batch = self.batch(prompts, [[]] * len(prompts), pixels, image_index, pad_left=True)
        cache = DynamicCache(config=self.model.config.get_text_config())
        n = group_size
        hidden = self.hidden(batch, cache=cache)[:, -1:].expand(-1, n, -1)
        seen = batch.attention_mask.bool()[:, None, None].expand(-1, 1, n, -1)  # (P, 1, n, past)
        grid = pixels.grid_thw[batch.image_index]
        # An image's tokens advance the text by the longer side of its grid, not by their number.
        tokens = grid.prod(-1) // self.merge_size**2
        position = batch.attention_mask.sum(-1) - tokens + grid[:, 1:].amax(-1) // self.merge_size
        position = position[:, None].expand(-1, n)
        own = torch.eye(n, dtype=torch.bool, device=self.device).expand(len(prompts), 1, n, n)
        for _ in range(max_new_tokens):
            token = next_tokens(hidden.flatten(0, 1))
            if token is None:
                return
            seen = torch.cat((seen, own), -1)
            hidden = self.step(token.view(len(prompts), n), position, seen, cache)
            position = position + 1

    def step(self, token_ids: Tensor, positions: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        """(P, n, H): one decoding step of n tokens a row, which do not see each other, over the cache.

        `token_ids` and `positions` (P, n); `attention_mask` (P, 1, n, past + n) bool, True = may be attended.
        """
        embeds = self.model.get_input_embeddings()(token_ids)
        return self._decoder(embeds, positions.expand(3, -1, -1), attention_mask, cache)

    def _decoder(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: DynamicCache | None = None,
        *,
        visual: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
        packed_rows: PackedRows | None = None,
    ) -> Tensor:
        """`visual` (R, T) bool: where image tokens stand, to which `deepstack` (N, H) each is added layer by layer."""
        options: dict[str, Any] = {} if packed_rows is None else {"packed_rows": packed_rows}
        if deepstack:
            options |= {"visual_pos_masks": visual, "deepstack_visual_embeds": list(deepstack)}
        if self.family.deepstack:
            # Qwen3-VL reads an image's equal positions as the starts of packed rows, unless a row of text's stands
            # before them; transformers 4 then still makes a mask of its own, of a shape that packed rows do not have.
            text = torch.arange(positions.shape[-1], device=positions.device).expand_as(positions[:1])
            positions = torch.cat((text, positions))
            if mask is None and transformers.__version__.startswith("4."):
                rows, width = embeds.shape[:2] if packed_rows is None else packed_rows.shape
                mask = torch.ones(width, width, dtype=torch.bool, device=embeds.device).tril().expand(rows, 1, -1, -1)
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

    def _attention_mask(self, batch: Batch) -> Tensor | None:
        """What attention needs besides being causal: a causal row never sees padding on its right."""
        if batch.segments is not None:
            # SDPA makes such a sum of a boolean mask in each layer, and autograd keeps them all.
            dtype = self.head_weight.dtype if self.compute == torch.float32 else self.compute
            return as_addend(shared_mask(batch.segments), dtype)
        right = bool((batch.attention_mask.diff(dim=-1) <= 0).all())
        return None if right else batch.attention_mask

    def _keeps_size(self, image: Image.Image) -> bool:
        unit = self.merge_size * self.model.config.vision_config.patch_size
        low, high = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        return image.width % unit == 0 and image.height % unit == 0 and low <= image.width * image.height <= high

    def _image_places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where image tokens stand, (R, T) bool, and the feature of each, row by row, among those of all images."""
        is_image = batch.input_ids == self.image_token_id
        per_image = batch.pixels.tokens_per_image(self.merge_size)
        found, expected = is_image.sum(-1), per_image[batch.image_index]
        if not torch.equal(found, expected):
            row = int((found != expected).nonzero()[0])
            raise ValueError(
                f"row {row} holds {int(found[row])} image tokens but its image has {int(expected[row])} features. "
                "An image marker was sampled, cut off or left in the text: check the caption and the length limits."
            )
        first = torch.cumsum(per_image, 0) - per_image
        within = torch.cumsum(is_image, -1) - 1
        return is_image, (first[batch.image_index][:, None] + within)[is_image]
