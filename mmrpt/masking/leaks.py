"""Answers that need no image: those that stand elsewhere in the caption, and those a blinded model gives anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmrpt.masking.forward import CaptionModel, Prompt
from mmrpt.masking.words import letters_and_words
from mmrpt.types import MaskedSample
from mmrpt_kernels import linear_logprobs


def is_repeated(caption: str, start: int, end: int) -> bool:
    """Whether the words of caption[start:end] stand in the rest of the caption too, in the same order.

    >>> [is_repeated("A red car. The Red bus is redder.", start, start + 3) for start in (2, 29)]
    [True, False]
    """
    answer = letters_and_words(caption[start:end])
    return any(_holds(letters_and_words(rest), answer) for rest in (caption[:start], caption[end:]))


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    return bool(part) and any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


@torch.no_grad()
def answer_probabilities(
    model: CaptionModel, samples: Sequence[MaskedSample], prompts: Sequence[Prompt], thoughts: Sequence[str]
) -> list[float]:
    """The probability with which the model goes on from prompt and begun thought with the answer, as one batch.

    `prompts` ask for the answers; with a blanked image it is what the text alone gives away. A thought such as
    "<think> the card is" ends where the answer is due.
    """
    texts = [f"{thought} {sample.answer}" for thought, sample in zip(thoughts, samples, strict=True)]
    encoded = [model.encode(text) for text in texts]
    hidden, _ = model.forward(prompts, [ids for ids, _ in encoded])
    probabilities = []
    for row, (prompt, (ids, offsets), thought) in enumerate(zip(prompts, encoded, thoughts, strict=True)):
        first = next(i for i, (_, end) in enumerate(offsets) if end > len(thought))
        start = len(prompt.ids) - 1 + first  # the state before a token predicts it
        states = hidden[row, start : start + len(ids) - first]
        targets = torch.tensor(ids[first:], device=states.device)
        logps = linear_logprobs(states, model.head_weight, targets, bias=model.head_bias).logps
        probabilities.append(float(logps.double().sum().exp()))
    return probabilities
