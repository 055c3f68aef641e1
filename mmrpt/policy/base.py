"""The policy: a vision-language model with its tokenizer and its processing of images, as the trainer needs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from mmrpt.batching import MicroBatch, group_batch, micro_batches, row_batch
from mmrpt.families import OTHER_RELEASE, base_model, check_kept, decoder_of, model_folder
from mmrpt.lora import base_folder, check_quantized, open_adapters, quantization
from mmrpt.types import Batch, Pixels
from mmrpt_kernels.integrations.transformers import enable_visual_mass

TEXT_PLACE = "[[text]]"  # stands for a text where a template is filled around it


class Policy(ABC):
    """A causal vision-language model of one image a prompt. Abstract is what differs between families; `load` chooses.

    `QwenVLPolicy` computes a prompt once for all its responses; `OwnForwardPolicy` serves any other model, a row a
    response, through its own forward pass.
    """

    shares_prompts: bool  # whether a row may hold a prompt with several responses

    def __init__(self, model: nn.Module, tokenizer: Any, template: Any) -> None:
        """`template`: what has `apply_chat_template`. Raises ValueError for a model that cannot be trained."""
        kind, config = type(model).__name__, model.config
        head = model.get_output_embeddings()
        if config.is_encoder_decoder or not isinstance(head, nn.Linear):
            got = "an encoder and a decoder" if config.is_encoder_decoder else f"{type(head).__name__} for a head"
            raise ValueError(f"{kind} has {got}: expected a decoder whose head is a linear layer; use another model.")
        image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if image_token_id is None:
            raise ValueError(f"the config of {kind} has no image_token_id: use another model.")
        self.compute = torch.float32  # bfloat16: forward passes run under autocast (`autocast`)
        self.model = enable_visual_mass(model)  # plain SDPA wherever nothing is recorded
        self.tokenizer, self.template = tokenizer, template
        self.image_token_id: int = image_token_id
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.markers: tuple[str, ...] = tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
        self._tokenizer_lock = Lock()  # a tokenizer's options are state of its own, which calls in other threads change
        self.eos_token_id: int = self._end_of_turn()
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, self.eos_token_id)
        self.pad_token_id: int = next(i for i in padding if i is not None)
        self.suppressed_ids = self._ids_never_sampled()
        marker = tokenizer.convert_ids_to_tokens(self.eos_token_id)
        if self.eos_token_id in self.encode_text(marker):
            raise ValueError(
                f"{type(tokenizer).__name__} reads {marker!r} in a text as a marker: expected a fast "
                f"tokenizer that knows split_special_tokens. {OTHER_RELEASE}"
            )

    # ---------------------------------------------------------------- loading and saving

    @staticmethod
    def load(
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
        from mmrpt.policy import policy_class  # which imports this file

        folder = model_folder(path, revision)
        base = base_folder(folder)
        model_type = type(AutoConfig.from_pretrained(base)).model_type
        options = quantization(dtype, device) if quantized else {}
        try:
            options |= {"dtype": dtype, "output_loading_info": True}
            model, info = AutoModelForImageTextToText.from_pretrained(base, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"{base} holds a {model_type!r}, which transformers {transformers.__version__} does not open as a "
                "model of images and text: use a vision-language model."
            ) from error
        if lost := sorted(info["missing_keys"]):  # transformers warns and draws them at random
            raise ValueError(
                f"{base} lacks {len(lost)} weights of a {type(model).__name__}, the first {lost[0]}: expected all of "
                "them; is model_type in config.json that of the weights, and is every file there?"
            )
        check_kept(model, "dtype", dtype)
        policy = policy_class(model_type).of_folder(model.to(device), folder, **pixel_limits)
        if quantized:
            check_quantized(policy)
        if base != folder:
            open_adapters(model, folder)
        return policy

    @classmethod
    @abstractmethod
    def of_folder(cls, model: nn.Module, folder: Path, **pixel_limits: int | None) -> Policy:
        """The policy of a model with the tokenizer and the image processor of its folder."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Writes the files of an ordinary Hugging Face folder, which is made where it is not there; of a model with
        adapters the adapters alone, as peft writes them."""

    def check_head(self) -> None:
        """Raises ValueError unless the logits are the head's product with the last hidden states, as losses make them.

        Families that go on from there (a soft cap, a scale) would be trained towards another distribution.
        """
        ids = torch.tensor([self.encode_text("an image")], device=self.device)
        with torch.no_grad():
            states = base_model(self.model)(input_ids=ids, use_cache=False).last_hidden_state
            wanted = self.model(input_ids=ids, use_cache=False).logits
            found = self.model.get_output_embeddings()(states)
        if not torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not its head's product with the last hidden states: "
                "it caps or scales them, which the trainer does not know; use another model."
            )

    # ---------------------------------------------------------------- prompts and images

    @abstractmethod
    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Runs the image processor. Raises ValueError where there is no image."""

    @abstractmethod
    def prompts(self, instructions: Sequence[str], images: Sequence[Image.Image]) -> tuple[list[list[int]], Pixels]:
        """Token ids of user turns with one image each, image tokens included, and the processed images."""

    @abstractmethod
    def perturbed(self, pixels: Pixels, seeds: Sequence[int], *, patch_size: int, probability: float) -> Pixels:
        """The images with black patches (VPPO's perturbation), those of each drawn from its seed."""

    @abstractmethod
    def perturbed_picture(self, image: Image.Image, seed: int, *, patch_size: int, probability: float) -> Image.Image:
        """`perturbed` for people: the picture, with the same patches."""

    def prompt_text(self, instruction: str) -> str:
        """The chat prompt of one user turn with one image, in the model's own template, image marker unexpanded."""
        return self._chat([self._turn("user", instruction, image=True)], add_generation_prompt=True)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which markers such as `<|im_end|>` are ordinary characters."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_text` with the characters [start, end) of each token."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        with self._tokenizer_lock:
            out = self.tokenizer(text, **options)
        return out["input_ids"], [tuple(span) for span in out["offset_mapping"]]

    # ---------------------------------------------------------------- batches

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pixels: Pixels,
        image_index: Sequence[int],
        *,
        pad_left: bool = False,
    ) -> Batch:
        """Rows of one prompt and one response each (`mmrpt.batching.row_batch`)."""
        options = {"pad_id": self.pad_token_id, "device": self.device}
        return row_batch(prompts, responses, pixels, image_index, pad_left=pad_left, **options)

    def group_batch(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Sequence[int]]],
        pixels: Pixels,
        image_index: Sequence[int],
        *,
        share: bool,
    ) -> Batch:
        """Prompts with all their responses (`mmrpt.batching.group_batch`)."""
        options = {"pad_id": self.pad_token_id, "device": self.device}
        return group_batch(prompts, groups, pixels, image_index, share=share, **options)

    def group_batches(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Sequence[int]]],
        pixels: Callable[[list[int]], Pixels],
        batch_tokens: int,
        *,
        share: bool | None = None,
    ) -> Iterator[tuple[MicroBatch, Batch]]:
        """Prompts with all their responses, a forward pass at a time (`mmrpt.batching.micro_batches`).

        Each prompt shows an image of its own: `pixels` gives those of the prompts of a pass.
        """
        lengths = [[len(response) for response in responses] for responses in groups]
        sizes = [len(prompt) for prompt in prompts]
        share = share if self.shares_prompts else False
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
        return decoder_of(self.model)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the lm head."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) or None: of the lm head."""
        return self.model.get_output_embeddings().bias

    def sampling_bias(self) -> Tensor:
        """(V,) float32 added to the logits, in sampling and in training alike: the ids that must never be sampled, and
        the head's own bias, in which it is differentiable."""
        bias = torch.zeros(self.head_weight.shape[0], device=self.device)
        bias[self.suppressed_ids] = -1e4
        return bias if self.head_bias is None else bias + self.head_bias.float()

    @abstractmethod
    def hidden(self, batch: Batch, *, padded: bool = False) -> Tensor:
        """(R, T, H) last hidden states; padding's are of no use. Differentiable in the model's parameters.

        `padded`: all layers see the padded rows, as a recording of visual mass needs.
        Raises ValueError where image tokens and images do not match.
        """

    @abstractmethod
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        pixels: Pixels,
        image_index: Sequence[int],
        group_size: int,
        max_new_tokens: int,
        next_tokens: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Decodes `group_size` responses to each prompt with a key-value cache, at most `max_new_tokens` long.

        `next_tokens` is given the states (P * group_size, H) that the next tokens are drawn from, a prompt's beside
        each other, and returns the tokens (P * group_size,), or None where no more is wanted.
        """

    # ---------------------------------------------------------------- what the tokenizer knows

    def _turn(self, role: str, text: str, *, image: bool = False) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}

    def _chat(self, turns: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        with self._tokenizer_lock:
            return self.template.apply_chat_template(turns, **options)

    def _end_of_turn(self) -> int:
        """The marker that the chat template puts behind an answer; where it puts none, the tokenizer's end of text."""
        turns = [self._turn("user", "?", image=True), self._turn("assistant", TEXT_PLACE)]
        behind = self._chat(turns, add_generation_prompt=False).rpartition(TEXT_PLACE)[2].strip()
        marker = max((marker for marker in self.markers if behind.startswith(marker)), key=len, default=None)
        found = self.tokenizer.eos_token_id if marker is None else self.tokenizer.convert_tokens_to_ids(marker)
        if found is None:
            raise ValueError(
                f"neither the chat template nor {type(self.tokenizer).__name__} has a token that ends an answer: give "
                "the tokenizer an eos_token."
            )
        return found

    def _ids_never_sampled(self) -> list[int]:
        """Image, video and other markers that would break the next forward pass, and ids past the tokenizer's end."""
        markers = {self.image_token_id, getattr(self.model.config, "video_token_id", None)}
        markers |= {self.tokenizer.convert_tokens_to_ids(marker) for marker in self.markers}
        beyond = range(len(self.tokenizer), self.head_weight.shape[0])
        return sorted((markers | set(beyond)) - {self.eos_token_id, None})
