"""The policy: a vision-language model with its tokenizer and image processor, seen the way the trainer needs it.

Three things are done here once, so that no other file repeats them: images are encoded once per prompt and shared by
the rollouts of its group; positions are computed for whole batches; and tokens are checked against image features
before every forward pass.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import DynamicCache

from mmrpt.grouped import shared_mask, shared_positions, sharing_saves
from mmrpt.patch_embedding import use_patch_projection
from mmrpt.types import Batch
from mmrpt_kernels.integrations.caches import cache_keyword
from mmrpt_kernels.integrations.packed_rows import PackedRows
from mmrpt_kernels.integrations.transformers import enable_visual_mass

SUPPORTED_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
OTHER_RELEASE = "This release of transformers has another name for it; install one from 4.57 to 5.24."
# What the text model is called with, besides its cache; its **kwargs would take a name that it lost in silence.
TEXT_ARGUMENTS = ("inputs_embeds", "position_ids", "attention_mask", "use_cache")


def make_image_processor(
    patch_size: int,
    max_pixels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Any:
    """Qwen2-VL's image processor in its torchvision-free form, whatever the transformers version calls it.

    `mean` and `std` of each channel in [0, 1]; None: the family's own (CLIP's).
    """
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # transformers 4.x: the plain class is the torchvision-free one
        from transformers.image_processing_utils import BaseImageProcessor
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor

        if Processor.__base__ is not BaseImageProcessor:
            raise ImportError(
                f"Qwen2VLImageProcessor is a {Processor.__base__.__name__} and Qwen2VLImageProcessorPil is not there: "
                "expected one of the two to need no torchvision; install transformers 4.57 to 5.24."
            ) from None
    unit = (2 * patch_size) ** 2
    sizes = {"shortest_edge": unit, "longest_edge": max_pixels}
    statistics = {} if mean is None or std is None else {"image_mean": list(mean), "image_std": list(std)}
    sides = {"patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2}
    processor = Processor(**statistics, **sides, min_pixels=unit, max_pixels=max_pixels, size=sizes)
    for name, value in (sides | statistics).items():
        check_kept(processor, name, value)
    if any(processor.size[name] != value for name, value in sizes.items()):
        raise ValueError(f"{type(processor).__name__}.size is {processor.size}: expected {sizes}. {OTHER_RELEASE}")
    return processor


def check_kept(owner: Any, name: str, value: Any) -> None:
    """Raises ValueError unless `owner` has the setting that it was made with: constructors take unknown names too."""
    found = getattr(owner, name, None)
    if found != value and not (isinstance(value, list) and list(found or ()) == value):
        raise ValueError(f"{type(owner).__name__}.{name} is {found!r}: expected {value!r}. {OTHER_RELEASE}")


@dataclass(frozen=True)
class PixelBatch:
    """Processed images. `pixel_values` (sum of patches, C * temporal * patch * patch), `grid_thw` (P, 3)."""

    pixel_values: Tensor
    grid_thw: Tensor

    def tokens_per_image(self, merge_size: int) -> Tensor:
        return self.grid_thw.prod(-1) // merge_size**2


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
        self.model = enable_visual_mass(model)  # plain SDPA wherever nothing is recorded
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id: int = model.config.image_token_id
        self.merge_size: int = model.config.vision_config.spatial_merge_size
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.suppressed_ids = self._ids_never_sampled()
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
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Policy:
        """Opens a Hugging Face folder. Raises FileNotFoundError or ValueError with the remedy."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}: expected a Hugging Face model folder at model.path.")
        model_type = type(AutoConfig.from_pretrained(folder)).model_type
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(f"{folder} holds a {model_type!r}; the trainer serves {SUPPORTED_MODEL_TYPES}.")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
        check_kept(model, "dtype", dtype)
        return cls(model, AutoTokenizer.from_pretrained(folder), _load_image_processor(folder))

    def save(self, folder: str | Path) -> None:
        """Writes an ordinary Hugging Face folder, first beside its place, then renamed: no half folder stays."""
        folder = Path(folder)
        part = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.write_files(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def write_files(self, folder: Path) -> None:
        """The files of a Hugging Face folder, written into an existing directory."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # AutoProcessor asks for these two where torchvision is installed; nothing here reads them.
        vision = self.model.config.vision_config
        video = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "patch_size": vision.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
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
        """Token ids of a prompt whose single image marker stands for `image_tokens` features."""
        ids = self.tokenizer(self.prompt_text(instruction), add_special_tokens=False)["input_ids"]
        at = [i for i, token in enumerate(ids) if token == self.image_token_id]
        if len(at) != 1:
            raise ValueError(
                f"the prompt holds {len(at)} image markers, expected exactly one: does the text contain the marker "
                f"{self.tokenizer.decode([self.image_token_id])!r}? Remove it from the caption or instruction."
            )
        return ids[: at[0]] + [self.image_token_id] * image_tokens + ids[at[0] + 1 :]

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pixels: PixelBatch,
        image_index: Sequence[int],
        *,
        pad_left: bool = False,
    ) -> Batch:
        """Pads rows of prompt + response into one `Batch`; `response_mask` marks the response tokens."""
        rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        response = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            start = width - len(row) if pad_left else 0
            input_ids[i, start : start + len(row)] = torch.tensor(row)
            attention[i, start : start + len(row)] = 1
            response[i, start + len(prompt) : start + len(row)] = True
        device = self.device
        return Batch(
            input_ids.to(device),
            attention.to(device),
            response.to(device),
            pixels.pixel_values,
            pixels.grid_thw,
            torch.as_tensor(image_index, device=device),
        )

    def group_batch(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Sequence[int]]],
        pixels: PixelBatch,
        image_index: Sequence[int],
        *,
        share: bool | None = None,
    ) -> Batch:
        """Prompts with all their responses: a row a group, or a row a response, whichever costs less (`share` decides).

        `response_slices` gives the responses in the same order for both. Raises ValueError for an empty response.
        """
        if not all(len(response) for responses in groups for response in responses):
            raise ValueError("a response has no token: expected at least one, the end-of-turn token if nothing else.")
        if share is None:
            lengths = [[len(response) for response in responses] for responses in groups]
            share = sharing_saves([len(prompt) for prompt in prompts], lengths, self.head_weight.shape[1])
        if not share:
            rows = [(prompt, r, i) for prompt, rs, i in zip(prompts, groups, image_index, strict=True) for r in rs]
            alone, responses, index = zip(*rows, strict=True)
            return self.batch(alone, responses, pixels, index)
        flat = [[token for response in responses for token in response] for responses in groups]
        batch = self.batch(prompts, flat, pixels, image_index)
        segments = torch.full(batch.input_ids.shape, -1)
        for row, (prompt, responses) in enumerate(zip(prompts, groups, strict=True)):
            sizes = torch.tensor([len(prompt), *map(len, responses)])
            segments[row, : int(sizes.sum())] = torch.arange(len(sizes)).repeat_interleave(sizes)
        return replace(batch, segments=segments.to(self.device))

    # ---------------------------------------------------------------- forward

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

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
        features = self.model.model.get_image_features(pixel_values, grid_thw)
        features = getattr(features, "pooler_output", features)  # 4.x returns the parts themselves
        if not isinstance(features, Tensor):
            parts = list(features)
            if not all(isinstance(part, Tensor) for part in parts):
                raise ValueError(
                    f"get_image_features returned a {type(features).__name__} without pooler_output: expected the "
                    f"features of each image. {OTHER_RELEASE}"
                )
            features = torch.cat(parts)
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


def mrope_positions(
    input_ids: Tensor, attention_mask: Tensor, grid_thw: Tensor, image_token_id: int, merge_size: int
) -> Tensor:
    """(3, R, T) int64 rotary positions (time, height, width) of rows that show one image each.

    Text counts up by one; the image's tokens share one time step and get their row and column; the text after the image
    goes on from the image's larger side. Equal to `get_rope_index` of Qwen2.5-VL for such rows (a test says so),
    but computed for the whole batch at once. `grid_thw` is (R, 3), one image a row.
    """
    is_image = input_ids == image_token_id
    order = (torch.cumsum(attention_mask, -1) - 1).clamp_min(0)
    height, width = grid_thw[:, 1] // merge_size, grid_thw[:, 2] // merge_size
    tokens = (height * width)[:, None]
    has_image = is_image.any(-1, keepdim=True)
    first = torch.where(is_image, order, order.new_full((), 1 << 30)).amin(-1, keepdim=True)
    within = (order - first).clamp_min(0)
    after = order > first + tokens - 1
    text = torch.where(after & has_image, order - tokens + torch.maximum(height, width)[:, None], order)
    spatial = torch.stack((torch.zeros_like(within), within // width[:, None], within % width[:, None]))
    positions = torch.where(is_image, first + spatial, text.expand(3, -1, -1))
    return positions.masked_fill(attention_mask == 0, 0)


def _load_image_processor(folder: Path) -> Any:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    if "Qwen2VL" in settings.get("image_processor_type", ""):
        sizes = settings.get("size") or {}
        max_pixels = sizes.get("longest_edge") or settings.get("max_pixels") or 1_003_520
        statistics = settings.get("image_mean"), settings.get("image_std")
        return make_image_processor(settings.get("patch_size", 14), max_pixels, *statistics)
    return AutoImageProcessor.from_pretrained(folder)
