"""The reward's terms and their weights."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from mmrpt.settings.base import STRICT, require

NOT_OF_THE_TEXT = ("custom", "visual")  # several functions; a term that needs the model's log-probs


@dataclass(frozen=True, config=STRICT)
class RewardSettings:
    """Weights of the reward's terms; one of weight 0 is measured and adds nothing, but for `visual`."""

    format: float = Field(0.1, description="weight of an answer in the format <think>...</think><answer>...</answer>")
    exact: float = Field(1.0, description="weight of an answer that is the hidden words")
    prefix: float = Field(0.1, description="weight of the share of the hidden words that the answer begins with")
    semantic: float = Field(0.2, description="weight of an answer close to the hidden words in meaning")
    visual: float = Field(
        0.0,
        ge=0,
        description="weight of the share of a right answer's probability that is owed to the image; 0: not measured",
    )
    custom: dict[str, float] = Field(
        default_factory=dict,
        description="weights of your own functions: {my_rewards.py:length: 0.5, package.mod:f: 1}",
    )

    def __post_init__(self) -> None:
        names = [name for name in self.__dataclass_fields__ if name != "custom"]
        for place in self.custom:
            module, _, function = place.rpartition(":")
            require(
                bool(module) and function.isidentifier(),
                f"reward.custom names {place!r}: expected file.py:function or package.module:function.",
            )
            require(
                function not in names,
                f"reward.custom names {place!r}, but there is a term {function!r} already: rename the function.",
            )
            names.append(function)
        rewarded = self.exact + self.prefix + self.semantic > 0 or any(weight > 0 for weight in self.custom.values())
        require(rewarded, "reward: no term rewards the answer; raise exact.")

    def weights(self) -> dict[str, float]:
        """The weight of each term of the text by its name, which is the function's for those of `custom`."""
        own = {place.rpartition(":")[2]: weight for place, weight in self.custom.items()}
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in NOT_OF_THE_TEXT} | own
