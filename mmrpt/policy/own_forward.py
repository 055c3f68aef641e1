"""Any vision-language model: its own processor makes its inputs, its own forward pass knows positions and masks.

Slower than shared prompts, since each response is a row with its prompt and image, and served wherever transformers
does: LLaVA, InternVL, SmolVLM, Gemma 3, Qwen3.5 and what else opens as `AutoModelForImageTextToText`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoProcessor, GenerationConfig, LogitsProcessor

from mmrpt.families import base_model
from mmrpt.lora import save_weights
from mmrpt.perturbation import blacken_patches
from mmrpt.policy.base import Policy
from mmrpt.types import Batch, ProcessedImages

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # 1 at image tokens
OF_TEXT = ("input_ids", "attention_mask", *TOKEN_TYPES)


class OwnForwardPolicy(Policy):
    """A transformers model and its processor."""

    shares_prompts = False

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor.tokenizer, processor)
        self.processor = processor
        taken = inspect.signature(base_model(model).forward).parameters
        self._token_types = [name for name in TOKEN_TYPES if name in taken]
        self._check_processor()

    @classmethod
    def of_folder(cls, model: nn.Module, folder: Path, **pixel_limits: int | None) -> OwnForwardPolicy:
        if any(pixel_limits.values()):
            raise ValueError(
                f"model.min_pixels and model.max_pixels are for Qwen-VL's image processors, but {folder} holds a "
                f"{type(model.config).model_type!r}: leave them out and set the size in its preprocessor_config.json."
            )
        try:
            processor = AutoProcessor.from_pretrained(folder)
        except ImportError as error:  # torchvision, for many
            raise ValueError(f"the processor in {folder} cannot be opened: {str(error).strip()}") from error
        if not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"{folder} has a {type(processor).__name__} where a processor of images and text is expected: bring "
                "the model's processor_config.json."
            )
        return cls(model, processor)

    def write_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder)
        self.processor.save_pretrained(folder)

    # ---------------------------------------------------------------- prompts and images

    def pixels(self, images: Sequence[Image.Image]) -> ProcessedImages:
        return self.prompts([""] * len(images), images)[1]

    def prompts(
        self, instructions: Sequence[str], images: Sequence[Image.Image]
    ) -> tuple[list[list[int]], ProcessedImages]:
        """A marker in an instruction gets a space inside, so that the processor reads it as text."""
        if not images:
            raise ValueError("no image was given: every row of a batch shows exactly one image.")
        rows = [self._processed(text, image) for text, image in zip(instructions, images, strict=True)]
        return [ids for ids, _ in rows], ProcessedImages(tuple(images), tuple(tensors for _, tensors in rows))

    def perturbed(
        self, pixels: ProcessedImages, seeds: Sequence[int], *, patch_size: int, probability: float
    ) -> ProcessedImages:
        """`patch_size` counts pixels of the pictures as they were given, before the processor resizes them."""
        patches = {"patch_size": patch_size, "probability": probability}
        pairs = zip(pixels.pictures, seeds, strict=True)
        return self.pixels([blacken_patches(picture, seed=seed, **patches) for picture, seed in pairs])

    def perturbed_picture(self, image: Image.Image, seed: int, *, patch_size: int, probability: float) -> Image.Image:
        return blacken_patches(image, seed=seed, patch_size=patch_size, probability=probability)

    def _processed(self, instruction: str, image: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
        """The prompt's token ids, and what the model takes of the image."""
        for marker in self.markers:
            instruction = instruction.replace(marker, f"{marker[0]} {marker[1:]}")
        text = self.prompt_text(instruction)
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        with self._tokenizer_lock:
            options = {"add_special_tokens": False} if begun else {}
            out = dict(self.processor(text=[text], images=[image], return_tensors="pt", **options))
        ids = out["input_ids"][0].tolist()
        if self.image_token_id not in ids:
            raise ValueError(f"{type(self.processor).__name__} made a prompt without an image token: {text[:200]!r}.")
        return ids, {name: x for name, x in out.items() if isinstance(x, Tensor) and name not in OF_TEXT}

    def _check_processor(self) -> None:
        """Raises ValueError where what the model takes of an image depends on the text beside it: it is made anew for
        each forward pass, without the text."""
        image = Image.new("RGB", (64, 64))
        (_, one), (_, other) = (self._processed(text, image) for text in ("", "a longer text"))
        if changed := [name for name in one if one[name].shape != other[name].shape]:
            raise ValueError(
                f"{type(self.processor).__name__} makes {', '.join(changed)} of image and text together, which the "
                "trainer does not know: use another model."
            )

    # ---------------------------------------------------------------- forward

    def hidden(self, batch: Batch, *, padded: bool = False) -> Tensor:
        if batch.segments is not None:
            raise ValueError(f"{type(self.model).__name__} takes one response a row: expected share=False.")
        wrong = ((batch.input_ids == self.image_token_id) & batch.response_mask).any(-1)
        if bool(wrong.any()):
            raise ValueError(
                f"row {int(wrong.nonzero()[0])} holds an image token in its response: an image marker was sampled or "
                "left in the text; check the caption."
            )
        with self.autocast():
            return base_model(self.model)(**self._inputs(batch), use_cache=False).last_hidden_state

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        pixels: ProcessedImages,
        image_index: Sequence[int],
        group_size: int,
        max_new_tokens: int,
        next_tokens: Callable[[Tensor], Tensor | None],
    ) -> None:
        """transformers' `generate` keeps cache, positions and masks; each token is the one that `next_tokens` gives."""
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        index = [i for i in image_index for _ in range(group_size)]
        inputs = self._inputs(self.batch(rows, [[]] * len(rows), pixels, index, pad_left=True))
        ends = {"eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        with self._own_generation_config(), self.autocast(), _Choice(self, next_tokens) as choice:
            options = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, **ends)
            self.model.generate(**inputs, generation_config=options, logits_processor=[choice])

    @contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        """Without the folder's generation settings, which fill in what `generate` is not told: a penalty, a top-k."""
        kept, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = kept

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is called with: each row with the inputs of its image."""
        rows = [batch.pixels.tensors[i] for i in batch.image_index.tolist()]
        inputs = {name: _joined([row[name] for row in rows]) for name in rows[0]}
        inputs |= {name: (batch.input_ids == self.image_token_id).long() for name in self._token_types}
        inputs |= {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        dtype = self.head_weight.dtype
        return {n: x.to(self.device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}


class _Choice(LogitsProcessor):
    """Leaves one token to each row of `generate`: what `next_tokens` gives for the states that enter the head."""

    def __init__(self, policy: Policy, next_tokens: Callable[[Tensor], Tensor | None]) -> None:
        self._next_tokens, self._end = next_tokens, policy.eos_token_id
        self._head = policy.model.get_output_embeddings()
        self._states: Tensor | None = None

    def __enter__(self) -> _Choice:
        self._hook = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _keep(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0][:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._states is None:
            raise ValueError("generate asked for a token without a call of the head: expected one for each token.")
        chosen, self._states = self._next_tokens(self._states), None
        chosen = torch.full_like(input_ids[:, 0], self._end) if chosen is None else chosen
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Image inputs of several rows as one. Images of fewer tiles, or of smaller sides, are filled up with zeros behind
    their own, as their processors do for images of one batch."""
    sizes = [max(own) for own in zip(*(part.shape[1:] for part in parts), strict=True)]
    missing = ([size - own for size, own in zip(sizes, part.shape[1:], strict=True)] for part in parts)
    ends = [[n for count in reversed(counts) for n in (0, count)] for counts in missing]
    return torch.cat([functional.pad(part, end) if any(end) else part for part, end in zip(parts, ends, strict=True)])
