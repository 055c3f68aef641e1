"""What the trainer knows of a model family: its image processor, rotary positions and image features.

The Qwen2-VL families: images are cut into patches, `spatial_merge_size`**2 of which make one token, and the rotary
positions of an image's tokens are its rows and columns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor

from mmrpt.perturbation import black_patches
from mmrpt.types import PixelBatch

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
TOWERS = ("visual", "vision_tower", "vision_model")  # what models call their vision tower
MERGERS = ("multi_modal_projector", "connector")  # and what is between it and the decoder, where that stands outside
OTHER_RELEASE = "This release of transformers has another name for it; install one from 4.57 to 5.24."


def make_image_processor(
    patch_size: int,
    max_pixels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    min_pixels: int | None = None,
) -> Any:
    """Qwen2-VL's image processor in its torchvision-free form, whatever the transformers version calls it.

    `mean` and `std` of each channel in [0, 1]; None: the family's own (CLIP's). `min_pixels` None: those of one token.
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
    low = unit if min_pixels is None else min_pixels
    if low > max_pixels:
        raise ValueError(f"images get at least {low} and at most {max_pixels} pixels: set min_pixels below max_pixels.")
    sizes = {"shortest_edge": low, "longest_edge": max_pixels}
    statistics = {} if mean is None or std is None else {"image_mean": list(mean), "image_std": list(std)}
    sides = {"patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2}
    processor = Processor(**statistics, **sides, min_pixels=low, max_pixels=max_pixels, size=sizes)
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


def blacken_pixels(
    pixels: PixelBatch, image_processor: Any, seeds: Sequence[int], *, patch_size: int = 14, probability: float = 0.5
) -> PixelBatch:
    """Processed images with black patches (VPPO's perturbation), each drawn from its seed.

    `patch_size` counts pixels of the resized images, as the model sees them. For an image that the processor does not
    resize this is the same as processing `mmrpt.perturbation.blacken_patches` of it. Raises ValueError where the pixels
    are not rows of patches that `image_processor` made.
    """
    side, merge = image_processor.patch_size, image_processor.merge_size
    unit = side * merge
    # Any black image gives the processor's own value for black.
    black = image_processor(images=[Image.new("RGB", (unit, unit))], return_tensors="pt")["pixel_values"][0]
    expected = (int(pixels.grid_thw.prod(-1).sum()), len(black))
    if pixels.pixel_values.shape != expected:
        raise ValueError(
            f"pixel_values have shape {tuple(pixels.pixel_values.shape)}: expected {expected}, a row of this image "
            "processor for each patch of the grid; give the processor that made them."
        )
    black = black.to(pixels.pixel_values)
    masks = []
    for (frames, rows, columns), seed in zip(pixels.grid_thw.tolist(), seeds, strict=True):
        options = {"seed": seed, "patch_size": patch_size, "probability": probability}
        mask = torch.from_numpy(black_patches(rows * side, columns * side, **options))
        # The processor's order: blocks of merge x merge patches, row by row; within a patch, channel before row.
        mask = mask.view(rows // merge, merge, side, columns // merge, merge, side).permute(0, 3, 1, 4, 2, 5)
        masks.append(mask.reshape(rows * columns, 1, side * side).repeat(frames, 1, 1))
    mask = torch.cat(masks).to(black.device)
    per_pixel = pixels.pixel_values.unflatten(-1, (-1, side * side))  # (patches, channels * temporal, pixels)
    values = torch.where(mask, black.unflatten(-1, (-1, side * side)), per_pixel)
    return PixelBatch(values.flatten(1), pixels.grid_thw)


def load_image_processor(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The folder's image processor; `min_pixels` and `max_pixels` None: as the folder says."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    if "Qwen2VL" in settings.get("image_processor_type", ""):
        sizes = settings.get("size") or {}
        low = min_pixels or sizes.get("shortest_edge") or settings.get("min_pixels")
        high = max_pixels or sizes.get("longest_edge") or settings.get("max_pixels") or 1_003_520
        statistics = settings.get("image_mean"), settings.get("image_std")
        return make_image_processor(settings.get("patch_size", 14), high, *statistics, min_pixels=low)
    if min_pixels or max_pixels:
        raise ValueError(
            f"model.min_pixels and model.max_pixels are for Qwen2-VL's image processor: {folder} has "
            f"{settings.get('image_processor_type')!r}; leave them out and set the size in preprocessor_config.json."
        )
    return AutoImageProcessor.from_pretrained(folder)


def video_settings(vision_config: Any, processor: str) -> dict[str, Any]:
    """What AutoProcessor wants to know of videos, which the trainer has none of."""
    return {
        "video_processor_type": processor,
        "patch_size": vision_config.patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
    }


def model_folder(path: str | Path, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local folder of a model: `path` itself, or what the hub has under the name owner/model, downloaded once.
    `files` are the patterns of those that are.

    Raises FileNotFoundError for a folder that is not there or holds no model, OSError for a name that the hub lacks.
    """
    folder = Path(path)
    is_name = isinstance(path, str) and path.count("/") == 1 and path[:1] not in "./~"
    if folder.is_dir() or not is_name:
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            absent = "" if folder.is_dir() else " (there is no such folder)"
            raise FileNotFoundError(
                f"no config.json in {folder}{absent}: expected a Hugging Face model folder, or a hub name such as "
                "Qwen/Qwen2.5-VL-3B-Instruct."
            )
        if revision is not None:
            raise ValueError(f"model.revision is {revision!r}, but model.path is the folder {folder}: leave it out.")
        return folder
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = str(error).splitlines()[0]
        raise OSError(
            f"model.path is {str(path)!r}: no such folder, and the hub gave no model of that name{at} ({reason})."
        ) from error


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head; transformers 4 does not name it for every family."""
    return model.model if model.base_model is model else model.base_model


def decoder_of(model: nn.Module) -> nn.Module:
    """The text model without its head; for some families transformers 4 names the whole base model instead."""
    decoder, base = model.get_decoder(), base_model(model)
    return base.text_model if decoder is base else decoder


def freeze_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Takes the gradients from `parts` of the model: "vision" (the tower without its mergers), "merger" (what makes the
    decoder's tokens of its output) and "decoder" (with embedding and head)."""
    if not parts:
        return
    base = base_model(model)
    tower = next((module for name in TOWERS if (module := getattr(base, name, None)) is not None), nn.Module())
    inside = {p for name, child in tower.named_children() if "merger" in name for p in child.parameters()}
    vision = set(tower.parameters()) - inside
    words = (model.get_input_embeddings(), model.get_output_embeddings())
    decoder = {p for module in (decoder_of(model), *words) for p in module.parameters()} - vision - inside
    merger = set(model.parameters()) - vision - decoder
    if not (vision and merger and decoder):
        raise ValueError(
            f"{type(base).__name__} has no {', '.join(TOWERS)}, or nothing between it and the decoder: its parts "
            f"cannot be told; leave model.freeze out. {OTHER_RELEASE}"
        )
    for part, parameters in (("vision", vision), ("merger", merger), ("decoder", decoder)):
        for parameter in parameters if part in parts else ():
            parameter.requires_grad_(False)


def feature_levels(output: Any, *, deepstack: bool) -> tuple[Tensor, ...]:
    """What `get_image_features` returned: (sum of image tokens, H), then DeepStack's levels of that shape."""
    if not deepstack:
        return (_joined(getattr(output, "pooler_output", output), output),)  # 4.x returns the parts themselves
    if isinstance(output, tuple) and len(output) == 2:  # 4.x
        features, levels = output
    else:
        features, levels = (getattr(output, name, None) for name in ("pooler_output", "deepstack_features"))
    return (_joined(features, output), *(_joined(level, output) for level in levels or ()))


def _joined(features: Any, output: Any) -> Tensor:
    if isinstance(features, Tensor):
        return features
    parts = list(features or ())
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"get_image_features returned a {type(output).__name__} without pooler_output: expected the "
            f"features of each image. {OTHER_RELEASE}"
        )
    return torch.cat(parts)


class PatchProjection(nn.Conv3d):
    """A convolution whose input is one patch, of the kernel's own size: (N, C, t, p, p) -> (N, out, 1, 1, 1).

    On a CPU the product takes 0.4 of the convolution's time, forward and backward.
    """

    def forward(self, patches: Tensor) -> Tensor:
        out = functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[..., None, None, None]


def use_patch_projection(model: nn.Module) -> None:
    """Replaces the forward of every `patch_embed.proj` that is given single patches; parameters and names stay."""
    for name, module in model.named_modules():
        if name.endswith("patch_embed.proj") and type(module) is nn.Conv3d and module.stride == module.kernel_size:
            module.__class__ = PatchProjection
