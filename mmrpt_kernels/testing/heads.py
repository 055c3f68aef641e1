"""lm heads whose words are as likely as in flat, Zipf-shaped and peaked distributions, and in a briefly trained head.

What an operator may skip, and what it saves, depends on how unevenly a head spreads its probability. Tests and
benchmarks draw the same heads here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmrpt_kernels.lm_head import sparse_vocab

HEADS = ("flat", "zipf", "peaked", "trained")
# The brief training of "trained": as many contexts as it can learn in as many steps, to about 3 nats at 8,192 words.
CONTEXTS, STEPS, BATCH = 256, 80, 256
CHOICES = 8  # words a context chooses among, most of the time


class HeadDraw(NamedTuple):
    """hidden (N, H) and weight (V, H) in the dtype asked for, targets (N,) int64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor


def draw_head(
    kind: str,
    rows: int,
    hidden: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> HeadDraw:
    """`rows` tokens at a head of the given kind; no gradients asked for yet.

    flat: normal logits of standard deviation 3, unlike any trained model's.
    zipf: a word's log-frequency, -1.1 log(rank + 2.7), plus normal logits of standard deviation 1.
    peaked: frequencies of exponent 2; two thirds of the tokens nearly certain.
    trained: a linear head after 80 steps of Adam on next words of a made-up corpus: each of 256 contexts, a frozen
        random feature seen under noise, chooses among 8 words of its own, or, by a share of its own, takes one of a
        Zipf distribution over all. Seconds on a CPU up to 4 million weights, and on a GPU at any lm head's size.

    In all but "flat", rare words' weights share a direction, as in trained models. Raises ValueError for another kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "trained":
        corpus = _Corpus(hidden, vocab, generator)
        states, targets = corpus.draw(rows, generator.manual_seed(seed + 1))  # other tokens than it was trained on
        weight = _train(hidden, vocab, dtype, torch.device(device), seed)
        return HeadDraw(states.to(dtype), weight, targets)
    states = torch.randn(rows, hidden, generator=generator, device=device)
    weight = torch.randn(vocab, hidden, generator=generator, device=device).mul_(hidden**-0.5)
    if kind == "flat":
        targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        return HeadDraw(states.to(dtype), weight.mul_(3.0).to(dtype), targets)
    if kind not in HEADS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(HEADS)}")
    frequency = _log_frequency(vocab, 2.0 if kind == "peaked" else 1.1, device)
    targets = torch.multinomial(frequency.softmax(0), rows, replacement=True, generator=generator)
    weight[:, 0] = frequency / 4.0
    states[:, 0] = 4.0
    if kind == "peaked":
        towards = weight[targets].clone()
        towards[:, 0] = 0.0
        certain = torch.rand(rows, 1, generator=generator, device=device) < 0.67
        states += torch.where(certain, 20.0, 10.0) * F.normalize(towards, dim=1)
    return HeadDraw(states.to(dtype), weight.to(dtype), targets)


def _log_frequency(vocab: int, exponent: float, device: torch.device | str) -> torch.Tensor:
    """(V,) up to a constant, Zipf's law with Mandelbrot's shift."""
    return -exponent * torch.log(torch.arange(vocab, device=device) + 2.7)


class _Corpus:
    """Contexts with their features (contexts, H), favourite words (contexts, CHOICES) and how often they take those."""

    def __init__(self, hidden: int, vocab: int, generator: torch.Generator) -> None:
        at = {"generator": generator, "device": generator.device}
        self.common = torch.randn(hidden, **at)  # what all hidden states share: it learns the words' frequencies
        self.features = torch.randn(CONTEXTS, hidden, **at)
        self.frequency = _log_frequency(vocab, 1.1, generator.device).softmax(0)
        self.words = torch.multinomial(self.frequency.expand(CONTEXTS, -1), min(CHOICES, vocab), generator=generator)
        self.choices = (-0.7 * torch.arange(self.words.shape[1], device=generator.device)).softmax(0)
        self.sure = torch.rand(CONTEXTS, **at) ** 0.15

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (count, H), each of length sqrt(H), and their next words (count,)."""
        at = {"generator": generator, "device": generator.device}
        context = torch.randint(CONTEXTS, (count,), **at)
        noise = torch.randn(count, self.common.shape[0], **at)
        states = F.normalize(self.features[context] + self.common + 0.3 * noise, dim=1) * noise.shape[1] ** 0.5
        chosen = torch.multinomial(self.choices, count, replacement=True, generator=generator)
        any_word = torch.multinomial(self.frequency, count, replacement=True, generator=generator)
        own = torch.rand(count, **at) < self.sure[context]
        return states, torch.where(own, self.words[context, chosen], any_word)


@functools.lru_cache(maxsize=1)  # the gate's and the timing's inputs of a case share one training
def _train(hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """(V, H) in `dtype`, trained in float32 on the corpus of `seed`."""
    generator = torch.Generator(device).manual_seed(seed)
    corpus = _Corpus(hidden, vocab, generator)
    with torch.enable_grad():
        weight = torch.zeros(vocab, hidden, device=device, requires_grad=True)
        # A step moves a logit by up to the rate times the sum of |hidden|: by about one, whatever the size.
        rate = 1.0 / hidden
        adam = torch.optim.Adam([weight], lr=rate, betas=(0.9, 0.95))
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = rate * (1.0 - step / STEPS)
            states, targets = corpus.draw(BATCH, generator)
            adam.zero_grad()
            F.cross_entropy(states @ weight.t(), targets).backward()
            adam.step()
    return weight.detach().to(dtype)


@contextmanager
def kept_words() -> Iterator[list[float]]:
    """Inside the block the list grows by the share of words that each chunk keeps under `skip_below`; 1.0 = all."""
    seen: list[float] = []
    real = sparse_vocab.split

    def watched(matrix: torch.Tensor, factor: torch.Tensor | None, share: float) -> sparse_vocab.SparseColumns | None:
        found = real(matrix, factor, share)
        seen.append(1.0 if found is None else found.kept.shape[0] / matrix.shape[1])
        return found

    sparse_vocab.split = watched
    try:
        yield seen
    finally:
        sparse_vocab.split = real
