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
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
SUPPORTED_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
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


def video_settings(vision_config: Any) -> dict[str, Any]:
    """What AutoProcessor wants to know of videos, which the trainer has none of."""
    return {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "patch_size": vision_config.patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
    }


def model_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or what the hub has under the name owner/model, downloaded once.

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
        return Path(snapshot_download(path, revision=revision, allow_patterns=MODEL_FILES))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = str(error).splitlines()[0]
        raise OSError(
            f"model.path is {str(path)!r}: no such folder, and the hub gave no model of that name{at} ({reason})."
        ) from error


def freeze_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Takes the gradients from `parts` of the model: "vision" (the tower without its merger), "merger" (what makes the
    decoder's tokens of its output) and "decoder" (all else, embedding and head included)."""
    if not parts:
        return
    visual = getattr(model.model, "visual", None)
    if getattr(visual, "merger", None) is None:
        raise ValueError(f"{type(model).__name__} has no model.visual.merger to tell its parts by. {OTHER_RELEASE}")
    merger = set(visual.merger.parameters())
    tower = set(visual.parameters()) - merger
    for parameter in model.parameters():
        part = "merger" if parameter in merger else "vision" if parameter in tower else "decoder"
        if part in parts:
            parameter.requires_grad_(False)


def joined_features(output: Any) -> Tensor:
    """(sum of image tokens, H) of what `get_image_features` returned."""
    features = getattr(output, "pooler_output", output)  # 4.x returns the parts themselves
    if isinstance(features, Tensor):
        return features
    parts = list(features)
    if not all(isinstance(part, Tensor) for part in parts):
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
