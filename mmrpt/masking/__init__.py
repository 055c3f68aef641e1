"""From captions to masked samples: score sentences, choose a threshold, choose spans, write samples (MMRPT, 1 to 3)."""

from mmrpt.masking.baseline import subtract_position_baseline
from mmrpt.masking.build import build_masked_samples, random_masks
from mmrpt.masking.score import score_sentences
from mmrpt.masking.spans import choose_spans
from mmrpt.masking.threshold import choose_threshold

__all__ = [
    "build_masked_samples",
    "choose_spans",
    "choose_threshold",
    "random_masks",
    "score_sentences",
    "subtract_position_baseline",
]
