"""Any vision-language model as a `CaptionModel`: its own processor makes the tokens, its own forward pass reads them.

Slower than the trainer's `Policy` and served wherever `mmrpt_kernels` records attention: Qwen2-VL to Qwen3-VL, LLaVA,
InternVL, SmolVLM, Gemma 3 and what else attends through transformers' attention interface and takes one image a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmrpt.families import SUPPORTED_MODEL_TYPES, model_folder
from mmrpt.lora import base_folder
from mmrpt.masking.forward import CaptionModel, PolicyModel, Prompt
from mmrpt.policy import Policy
from mmrpt_kernels.integrations.transformers import enable_visual_mass, record_visual_mass

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # 1 at image tokens


class VisionLanguageModel:
    """A transformers model and its processor."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = enable_visual_mass(model.eval())
        self.processor = processor
        config = model.config
        self.depth: int = config.get_text_config().num_hidden_layers
        added = processor.tokenizer.added_tokens_decoder.values()
        self.markers = tuple(token.content for token in added if token.special)
        image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if image_token_id is None:
            raise ValueError(f"the config of {type(model).__name__} has no image_token_id: use another model.")
        self._image_token_id: int = image_token_id
        self._token_types: set[str] = set()
        self._lock = Lock()  # a tokenizer's options are state of its own, which calls in other threads change

    @property
    def head_weight(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.model.get_output_embeddings().bias

    def prompt(self, instruction: str, image: Image.Image) -> Prompt:
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        with self._lock:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            out = dict(self.processor(text=[text], images=[image], return_tensors="pt"))
        ids = out.pop("input_ids")[0].tolist()
        if self._image_token_id not in ids:
            raise ValueError(f"{type(self.processor).__name__} made a prompt without an image token: {text[:200]!r}.")
        del out["attention_mask"]
        self._token_types.update(name for name in TOKEN_TYPES if out.pop(name, None) is not None)
        return Prompt(ids, {name: value for name, value in out.items() if isinstance(value, Tensor)})

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with self._lock:
            out = self.processor.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
        return out["input_ids"], [tuple(span) for span in out["offset_mapping"]]

    def forward(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        inputs, response = self._inputs(prompts, responses)
        base = getattr(self.model, self.model.base_model_prefix)
        if layers is None:
            return base(**inputs, use_cache=False).last_hidden_state, None
        groups = torch.stack((inputs["input_ids"] == self._image_token_id, response), -1)
        with record_visual_mass(self.model, key_weights=groups, layers=layers, head_reduction="mean") as record:
            hidden = base(**inputs, use_cache=False).last_hidden_state
        return hidden, record.stacked()

    def _inputs(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with, and which tokens (R, T) are the responses'."""
        rows = [[*p.ids, *r] for p, r in zip(prompts, responses, strict=True)]
        shape = (len(rows), max(map(len, rows)))
        tokenizer = self.processor.tokenizer
        padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        input_ids, attended = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
        response = torch.zeros(shape, dtype=torch.bool)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            input_ids[i, : len(row)] = torch.tensor(row)
            attended[i, : len(row)] = 1
            response[i, len(prompt.ids) : len(row)] = True
        inputs = {"input_ids": input_ids, "attention_mask": attended}
        inputs |= {name: (input_ids == self._image_token_id).long() for name in self._token_types}
        for name in prompts[0].tensors:
            inputs[name] = _joined([prompt.tensors[name] for prompt in prompts])
        device, dtype = self.head_weight.device, self.head_weight.dtype
        moved = {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
        return moved, response.to(device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Image inputs of several rows as one. Rows whose image was cut into fewer tiles are filled up with empty ones."""
    if len({part.shape[1:] for part in parts}) > 1 and parts[0].dim() > 2:
        tiles = max(part.shape[1] for part in parts)
        ends = [0, 0] * (parts[0].dim() - 2)
        parts = [functional.pad(part, (*ends, 0, tiles - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def load_caption_model(
    path: str,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    revision: str | None = None,
    quantized: bool = False,
    **pixel_limits: int | None,
) -> CaptionModel:
    """A model from a Hugging Face folder or hub name: as the trainer's policy where that serves its family, with what
    `Policy.load` does with adapters and `quantized`.

    Raises FileNotFoundError, OSError or ValueError with the remedy.
    """
    folder = model_folder(path, revision)
    model_type = type(AutoConfig.from_pretrained(base_folder(folder))).model_type
    if model_type in SUPPORTED_MODEL_TYPES:
        return PolicyModel(Policy.load(folder, dtype=dtype, device=device, quantized=quantized, **pixel_limits))
    if quantized or base_folder(folder) != folder:
        what = "model.lora.quantized is" if quantized else f"{path} is a folder of adapters, which are"
        raise ValueError(f"{what} for {SUPPORTED_MODEL_TYPES} alone, and the model is a {model_type!r}.")
    if any(pixel_limits.values()):
        raise ValueError(
            f"model.min_pixels and model.max_pixels are for {SUPPORTED_MODEL_TYPES}, but {path} holds a "
            f"{model_type!r}: leave them out, or set the size in its preprocessor_config.json."
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    return VisionLanguageModel(model, AutoProcessor.from_pretrained(folder))
