"""What a masked sample's user turn says."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mmrpt.masking.sentences import sentence_at, sentence_spans
from mmrpt.policy import Policy
from mmrpt.settings import PromptSettings
from mmrpt.types import MaskedSample, Pixels

THINK_WORDS = 3  # enough to say which thing is meant


def restore_text(sample: MaskedSample, prompts: PromptSettings) -> str:
    """The instruction to restore the sample's span."""
    return prompts.restore.format(
        masked_caption=sample.masked_caption, masked_sentence=sentence_at(sample.masked_caption, sample.start)
    )


def begun_thought(caption: str, sample: MaskedSample) -> str:
    """A completion's thought up to its answer: the `THINK_WORDS` words before the span in its sentence."""
    start = next((a for a, b in sentence_spans(caption) if a <= sample.start < b), 0)
    return " ".join(["<think>", *caption[start : sample.start].split()[-THINK_WORDS:]])


def restore_prompts(
    policy: Policy, samples: Sequence[MaskedSample], images: Sequence[Image.Image], prompts: PromptSettings
) -> tuple[list[list[int]], Pixels]:
    """Token ids of the prompt of each sample, whose image is the one at its place in `images`; and those, processed."""
    return policy.prompts([restore_text(sample, prompts) for sample in samples], images)
