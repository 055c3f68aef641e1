"""What a masked sample's user turn says."""

from __future__ import annotations

from collections.abc import Sequence

from mmrpt.masking.sentences import sentence_at
from mmrpt.policy import Policy
from mmrpt.settings import PromptSettings
from mmrpt.types import MaskedSample, PixelBatch


def restore_text(sample: MaskedSample, prompts: PromptSettings) -> str:
    """The instruction to restore the sample's span."""
    return prompts.restore.format(
        masked_caption=sample.masked_caption, masked_sentence=sentence_at(sample.masked_caption, sample.start)
    )


def restore_prompts(
    policy: Policy, samples: Sequence[MaskedSample], pixels: PixelBatch, prompts: PromptSettings
) -> list[list[int]]:
    """Token ids of the prompt of each sample, whose image is the one at its place in `pixels`."""
    counts = pixels.tokens_per_image(policy.merge_size).tolist()
    return [policy.encode_prompt(restore_text(s, prompts), count) for s, count in zip(samples, counts, strict=True)]
