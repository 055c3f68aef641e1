"""Rows of prompts and responses: padding, prompts that a group's responses share, forward passes of bounded size, and
where the responses stand.

A shared row lays a group's responses one after another behind their prompt, so that the prompt is computed once:

    row:       prompt  response 1  response 2  ...  padding
    segments:  0 0 0   1 1 1 1     2 2 2            -1

A response sees the prompt and itself, and its positions go on from the prompt's end, as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmrpt.types import Batch, Pixels


def row_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pixels: Pixels,
    image_index: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
    pad_left: bool = False,
) -> Batch:
    """Pads rows of prompt + response into one `Batch`; `response_mask` marks response tokens."""
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention = torch.zeros(len(rows), width, dtype=torch.int64)
    response = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = width - len(row) if pad_left else 0
        input_ids[i, start : start + len(row)] = torch.tensor(row)
        attention[i, start : start + len(row)] = 1
        response[i, start + len(prompt) : start + len(row)] = True
    index = torch.as_tensor(image_index, device=device)
    return Batch(input_ids.to(device), attention.to(device), response.to(device), pixels, index)


def group_batch(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
    pixels: Pixels,
    image_index: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
    share: bool,
) -> Batch:
    """Prompts with all their responses: a row a group where `share`, else a row a response.

    `response_slices` gives the responses in the same order for both. Raises ValueError for an empty response.
    """
    if not all(len(response) for responses in groups for response in responses):
        raise ValueError("a response has no token: expected at least one, the end-of-turn token if nothing else.")
    if not share:
        rows = [(prompt, r, i) for prompt, rs, i in zip(prompts, groups, image_index, strict=True) for r in rs]
        alone, responses, index = zip(*rows, strict=True)
        return row_batch(alone, responses, pixels, index, pad_id=pad_id, device=device)
    flat = [[token for response in responses for token in response] for responses in groups]
    batch = row_batch(prompts, flat, pixels, image_index, pad_id=pad_id, device=device)
    segments = torch.full(batch.input_ids.shape, -1)
    for row, (prompt, responses) in enumerate(zip(prompts, groups, strict=True)):
        sizes = torch.tensor([len(prompt), *map(len, responses)])
        segments[row, : int(sizes.sum())] = torch.arange(len(sizes)).repeat_interleave(sizes)
    return replace(batch, segments=segments.to(batch.input_ids.device))


@dataclass(frozen=True)
class MicroBatch:
    """The responses of one forward pass: of prompt `prompts[i]` those in `responses[i]`.

    `rows` are their places among all responses, a prompt's beside each other; `share` is that of `group_batch`.
    """

    prompts: list[int]
    responses: list[slice]
    rows: slice
    share: bool


def micro_batches(
    prompts: Sequence[int],
    groups: Sequence[Sequence[int]],
    batch_tokens: int,
    hidden_size: int,
    share: bool | None = None,
) -> list[MicroBatch]:
    """All responses in their order, in forward passes of at most `batch_tokens` tokens, padding included.

    Arguments: the tokens of each prompt, the tokens of each of its responses; H for `sharing_saves`, which decides for
    all of them where `share` is None. A group that is too long for one pass is split, and its prompt then stands in
    several; a single response that is too long behind its prompt goes alone.
    """
    pieces = [
        (i, part)
        for i, responses in enumerate(groups)
        for part in _runs(responses, batch_tokens, lambda run, prompt=prompts[i]: prompt + sum(run))
    ]
    if share is None:
        share = sharing_saves([prompts[i] for i, _ in pieces], [groups[i][part] for i, part in pieces], hidden_size)
    if not share:
        pieces = [(i, slice(j, j + 1)) for i, responses in enumerate(groups) for j in range(len(responses))]
    found, done = [], 0
    for run in _runs([prompts[i] + sum(groups[i][part]) for i, part in pieces], batch_tokens, _padded):
        chosen: dict[int, slice] = {}  # two pieces of a split group are too long for one pass: these are rows alone
        for i, part in pieces[run]:
            chosen[i] = slice(chosen.get(i, part).start, part.stop)
        count = sum(part.stop - part.start for part in chosen.values())
        found.append(MicroBatch([*chosen], [*chosen.values()], slice(done, done + count), share))
        done += count
    return found


def split_rows(batch: Batch, batch_tokens: int) -> list[Batch]:
    """The rows of a batch in their order, in batches of at most `batch_tokens` tokens; a row that is longer is alone.

    Each is as wide as its longest row and has the images that its rows show. Rows must be padded on the right.
    """
    lengths = batch.attention_mask.sum(-1).tolist()
    runs = _runs(lengths, batch_tokens, _padded)
    if len(runs) == 1:
        return [batch]
    parts = []
    for run in runs:
        width = max(lengths[run])
        images, index = batch.image_index[run].unique(return_inverse=True)
        shown = batch.pixels.select(images.tolist())
        rows = (x[run, :width] for x in (batch.input_ids, batch.attention_mask, batch.response_mask))
        segments = None if batch.segments is None else batch.segments[run, :width]
        parts.append(Batch(*rows, shown, index, segments))
    return parts


def _padded(lengths: Sequence[int]) -> int:
    return len(lengths) * max(lengths)


def _runs(lengths: Sequence[int], most: int, tokens: Callable[[Sequence[int]], int]) -> list[slice]:
    """Neighbours in runs, each as long as `tokens(run) <= most` allows, and of one where it does not."""
    runs, first = [], 0
    for end in range(2, len(lengths) + 1):
        if end - first > 1 and tokens(lengths[first:end]) > most:
            runs.append(slice(first, end - 1))
            first = end - 1
    return [*runs, slice(first, len(lengths))] if lengths else []


def sharing_saves(prompts: Sequence[int], groups: Sequence[Sequence[int]], hidden_size: int) -> bool:
    """Whether rows of a prompt and all its responses cost less than a row for each response.

    Arguments: the tokens of each prompt, the tokens of each of its responses, and H. Counted per decoder layer: about
    24 H^2 operations a token for the products, 4 H for each pair of tokens that attention visits. A shared row visits
    all pairs (its mask is no band), rows of their own only the causal half: long responses are better off alone.
    """
    shared = [prompt + sum(responses) for prompt, responses in zip(prompts, groups, strict=True)]
    alone = [prompt + length for prompt, responses in zip(prompts, groups, strict=True) for length in responses]

    def cost(rows: Sequence[int], share_of_pairs: float) -> float:
        return sum(24 * hidden_size**2 * n + 4 * hidden_size * share_of_pairs * n**2 for n in rows)

    return cost(shared, 1.0) < cost(alone, 0.5)


def shared_mask(segments: Tensor) -> Tensor:
    """(R, 1, T, T) bool of segments (R, T): True where a token may attend to another. Padding sees itself alone."""
    width = segments.shape[1]
    order = torch.arange(width, device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = ((key == 0) | (key == query)) & (query >= 0) & (order[:, None] >= order)
    return (allowed | torch.eye(width, dtype=torch.bool, device=segments.device))[:, None]


def as_addend(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask (..., T) bool is true and -inf elsewhere, of its shape. Rows start at multiples of 16 elements, or
    CUDA's kernels would copy them to such places."""
    width = allowed.shape[-1]
    padded = allowed.new_zeros(*allowed.shape[:-1], -(-width // 16) * 16, dtype=dtype)
    return padded[..., :width].masked_fill_(~allowed, -torch.inf)


def shared_positions(positions: Tensor, segments: Tensor) -> Tensor:
    """Rotary positions (3, R, T) of shared rows, from those of the same rows read as one text."""
    order = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    start = torch.where(_starts(segments), order, 0).cummax(-1).values
    prompt = (segments == 0).sum(-1, keepdim=True)
    return positions - torch.where(segments > 0, start - prompt, 0)


def response_places(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row (N, 1), place (N, W), mask (N, W)) of the tokens of all N responses, row by row; W the longest."""
    row, start = (_starts(segments) & (segments > 0)).nonzero(as_tuple=True)
    length = (segments[row] == segments[row, start][:, None]).sum(-1)
    offset = torch.arange(int(length.max()), device=segments.device)
    place = (start[:, None] + offset).clamp_max(segments.shape[1] - 1)
    return row[:, None], place, offset < length[:, None]


def response_slices(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The responses alone, one a row: (hidden that predicts them (N, W, H), their ids (N, W), mask (N, W)).

    The state before a token predicts it: the prompt's last one for a response's first token. W is the longest response;
    ids past a row's end are 0.
    """
    segments = batch.response_mask.long() if batch.segments is None else batch.segments
    row, place, mask = response_places(segments)
    before = (place - 1).clamp_min(0)
    if batch.segments is not None:  # another response stands before a response's first token
        before[:, 0] = (segments == 0).sum(-1)[row[:, 0]] - 1
    return hidden[row, before], batch.input_ids[row, place].masked_fill(~mask, 0), mask


def _starts(segments: Tensor) -> Tensor:
    before = torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-2)
    return segments != before
