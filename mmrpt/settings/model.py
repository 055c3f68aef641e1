"""The model's settings, and the defaults that change where a pretrained model takes the tiny one's place."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mmrpt.settings.base import STRICT, require

PARTS = ("vision", "merger", "decoder")


@dataclass(frozen=True, config=STRICT)
class LoraSettings:
    """Low-rank adapters (LoRA, by peft): they alone are trained, in float32, over weights that stay as they are."""

    # No dropout: the ratio of the policy's probabilities to the sampler's, and perception, compare two forward passes.
    rank: int = Field(0, ge=0, description="rank of the adapters; 0: none, all weights of the model are trained")
    alpha: int | None = Field(None, ge=1, description="adapters count alpha / rank times; null: twice the rank")
    targets: Literal["decoder", "all"] | tuple[str, ...] = Field(
        "decoder",
        description="linear layers that get adapters: the decoder's; all: tower and merger too; or names, as [q_proj]",
    )
    quantized: bool = Field(
        False, description="the decoder's frozen weights in 4-bit NF4 (QLoRA, by bitsandbytes), of model.path"
    )


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The model that is trained."""

    path: str | None = Field(
        None, description="Hugging Face folder or hub name of a vision-language model; null: the demo's tiny model"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub name; null: main")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights of a model from model.path")
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: forward passes under torch.autocast; float32: in the dtype of the weights"
    )
    freeze: tuple[Literal["vision", "merger", "decoder"], ...] = Field(
        (), description="parts that are not trained: vision (the tower), merger, decoder (with embedding and head)"
    )
    min_pixels: int | None = Field(
        None, ge=1, description="smaller images are enlarged to as many pixels; null: as the model's folder says"
    )
    max_pixels: int | None = Field(
        None, ge=1, description="larger images are reduced to as many pixels; null: as the model's folder says"
    )
    batch_tokens: int = Field(
        16_384, ge=1, description="tokens of one forward pass of training, padding included; one longer row goes alone"
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="sdpa: torch's fastest kernel for the mask; eager: plain products, which hold all scores"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to save memory")
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        require(
            set(self.freeze) != set(PARTS),
            f"model.freeze is {list(self.freeze)}: nothing is left to train; leave one of {', '.join(PARTS)} out.",
        )
        require(
            None in (self.min_pixels, self.max_pixels) or self.min_pixels <= self.max_pixels,
            f"model.min_pixels is {self.min_pixels}: expected at most model.max_pixels, {self.max_pixels}.",
        )


# With model.path these take the place of defaults that were found for the tiny model. Rates and lengths are VPPO's.
WITH_MODEL_PATH: dict[str, Any] = {
    "model": {"compute": "bfloat16"},
    "prompts": {
        "restore": "Some words of this description of the image are hidden:\n{masked_caption}\nThe sentence in "
        "question: {masked_sentence}\nLook at the image and reason about what is hidden, then give the hidden words "
        "alone, exactly in this form: <think>your reasoning</think><answer>the hidden words</answer>"
    },
    "warmup": {"steps": 0, "optimiser": {"kind": "adamw", "lr": 1e-6}},
    "rollout": {"max_new_tokens": 2048, "top_p": 0.99},
    "rl": {"caption_weight": 0.0, "optimiser": {"lr": 1e-6}},
}

# With adapters these too: float32 adapters move over weights that need not.
WITH_LORA: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "warmup": {"optimiser": {"lr": 1e-5}},
    "rl": {"optimiser": {"lr": 1e-5}},
}
