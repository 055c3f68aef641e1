"""What a recording of visual mass knows: the weights of the keys, pass by pass, and the masses of the layers.

Free of transformers: the hooks and the registered attention in transformers.py drive it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mmrpt_kernels.common.checks import check
from mmrpt_kernels.integrations.caches import key_counts, stored_keys

__all__ = ["KeyWeights", "VisualMassRecord", "Window", "read_mask"]

KeyWeights = torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None


def read_mask(mask: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A mask that transformers or the caller made, as (B, 1, T, S) bool, and as key padding where that says it all.

    Args:
        mask: (B or 1, 1, T, at least S) bool, or additive with nothing but zeros and -inf or its like.

    Returns:
        The mask, and key padding (B or 1, S) if the mask is that and bottom-right causality, else None.
    """
    mask = mask[..., :num_keys]
    if mask.dtype != torch.bool:
        allowed = mask == 0
        check(
            bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()),
            "attention_mask: got an additive bias, expected a boolean mask or zeros and -inf; "
            "biases are not supported in recorded layers: leave this layer out of layers=",
        )
        mask = allowed
    padding = mask[:, 0, -1]
    num_rows = mask.shape[2]
    triangle = torch.ones(num_rows, num_keys, dtype=torch.bool, device=mask.device).tril(num_keys - num_rows)
    return mask, padding if torch.equal(mask[:, 0], triangle & padding[:, None]) else None


@dataclass
class VisualMassRecord:
    """What the last top-level forward pass left.

    masses: layer index -> (B, T[, G]) with head_reduction "mean", (B, Hq, T[, G]) with "none"; float32. G where the key
        weights have groups. T counts the tokens of that forward pass: one in a decoding step of generate().
    """

    masses: dict[int, torch.Tensor] = field(default_factory=dict)

    def stacked(self) -> torch.Tensor:
        """(L, B, T[, G]) or (L, B, Hq, T[, G]): the recorded layers in rising order. ValueError before a forward."""
        check(
            bool(self.masses), "stacked: got an empty record, expected masses; run model(...) inside record_visual_mass"
        )
        device = next(iter(self.masses.values())).device
        return torch.stack([self.masses[layer].to(device) for layer in sorted(self.masses)])


@dataclass
class Window:
    """One recording: what is wanted, and the state of the forward pass that is under way."""

    layers: dict[nn.Module, int]  # the attention modules to record
    all_layers: list[int]  # indices of all that could be recorded
    record: VisualMassRecord
    key_weights: KeyWeights
    image_token_id: int | None
    head_reduction: str
    query_mask: torch.Tensor | None
    differentiable: bool
    backend: str | None
    depth: int = 0  # nested calls of the hooked modules; the outermost opens and closes the window
    weights: torch.Tensor | None = None  # (B, keys known so far[, G])
    num_keys: int = 0  # keys that the sequence has after this forward pass
    num_new: int = 0  # of them, tokens of this forward pass
    counts: frozenset[int] = frozenset()  # how many keys a layer may be given in this forward pass
    seen: weakref.ref | None = None  # the cache of the last forward pass; None: it was passed none
    stored: weakref.ref | None = None  # the keys of a layer in it, as that pass left them
    prompt: int = 0  # keys after the last forward pass of more than one token
    recomputes: bool = False  # gradient checkpointing will run the layers again, after the window
    masks: dict[tuple[int, int], tuple] = field(default_factory=dict)  # what `read_mask` found in this forward pass

    def open(self, num_new: int, cache: object | None, input_ids: torch.Tensor | None) -> None:
        """Start a forward pass of `num_new` tokens after those of `cache`."""
        num_past = 0 if cache is None else int(cache.get_seq_length())
        self.num_new, self.num_keys = num_new, num_past + num_new
        self.counts = key_counts(cache, num_past, num_new, self.all_layers)
        if isinstance(self.key_weights, torch.Tensor):
            self.weights = self.key_weights
        else:
            self.weights = self._extended(self._weights_of(input_ids), num_past, cache)
        self.seen = None if cache is None else weakref.ref(cache)
        if num_past == 0 or num_new > 1:
            self.prompt = self.num_keys
        self.masks.clear()
        self.record.masses.clear()

    def close(self) -> None:
        """End a forward pass that went through: every layer that was wanted has left its mass."""
        self.masks.clear()
        keys = None if self.seen is None else stored_keys(self.seen(), self.all_layers[0])
        self.stored = None if keys is None else weakref.ref(keys)
        missing = sorted(set(self.layers.values()) - self.record.masses.keys())
        check(
            not missing,
            f"record_visual_mass: got no attention from layers {missing} in this forward pass, expected one call of "
            "each: they were skipped, or an unknown release of transformers attends elsewhere; leave them out of "
            "layers=, or install a release from 4.57 to 5.24",
        )

    def _weights_of(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        check(
            input_ids is not None,
            "record_visual_mass: got a forward pass without input_ids, expected them to find the image tokens; "
            "pass key_weights=(B, S) for calls with inputs_embeds",
        )
        if callable(self.key_weights):
            weights = self.key_weights(input_ids)
            check(
                isinstance(weights, torch.Tensor) and weights.shape[:2] == input_ids.shape,
                f"key_weights(input_ids): got {getattr(weights, 'shape', type(weights).__name__)}, expected "
                f"{tuple(input_ids.shape)} or that with groups last; return one weight per token",
            )
            return weights
        return input_ids == self.image_token_id

    def _extended(self, new: torch.Tensor, num_past: int, cache: object | None) -> torch.Tensor:
        """Weights of the cached keys, from the forward passes before, and of the new ones."""
        if num_past == 0:
            return new
        check(
            self.weights is not None
            and self.weights.shape[0] == new.shape[0]
            and self.weights.shape[1] >= num_past
            and (self.seen is None or self.seen() is cache),
            f"record_visual_mass: got a forward pass after {num_past} cached tokens that this recording has not seen, "
            "expected it to start with the prompt and to go on with the same cache; start earlier, record one sequence "
            "at a time, or pass key_weights=(B, S) for all keys",
        )
        sampled = self.weights[:, self.prompt : num_past]
        same_rows = self.stored is not None and self.stored() is stored_keys(cache, self.all_layers[0])
        check(
            same_rows or bool((sampled == sampled[:1]).all()),
            "record_visual_mass: got a cache whose rows were exchanged since the last forward pass, as beam search "
            "does, and sampled tokens whose weights differ between the rows, expected the same rows; record one "
            "forward pass over prompt and answer instead",
        )
        return torch.cat([self.weights[:, :num_past], new], dim=1)

    def weights_for(self, layer: int, num_rows: int, key: torch.Tensor) -> torch.Tensor:
        """(B, S[, G]) for the keys (B, Hkv, S, D) of one layer, whose queries are `num_rows` tokens.

        Keys beyond those known (generated tokens, empty slots of a static cache) weigh nothing. A sliding-window cache
        holds the last S keys.
        """
        num_keys = key.shape[2]
        check(
            num_rows == self.num_new and num_keys in self.counts,
            f"record_visual_mass: got {num_rows} queries and {num_keys} keys in layer {layer}, expected {self.num_new} "
            f"and {' or '.join(map(str, sorted(self.counts)))}: a forward pass of {self.num_new} tokens after "
            f"{self.num_keys - self.num_new} cached ones. The model adds or drops tokens or attends to something else "
            "(leave this layer out of layers=), or takes its cache in a way that is not known here (install "
            "transformers 4.57 to 5.24, or pass the cache to the recorded model by keyword)",
        )
        check(
            self.weights.dim() in (2, 3) and self.weights.shape[0] == key.shape[0],
            f"key_weights: got shape {tuple(self.weights.shape)} for a batch of {key.shape[0]}, expected (B, S) or "
            "(B, S, G); repeat it for num_return_sequences or beams",
        )
        check(
            self.weights.shape[1] <= max(self.num_keys, num_keys),
            f"key_weights: got {self.weights.shape[1]} keys, expected at most {self.num_keys}, the length of the "
            "sequence; cut it to the tokens that the model sees",
        )
        missing = max(0, max(self.num_keys, num_keys) - self.weights.shape[1])
        weights = nn.functional.pad(self.weights, (*(0, 0) * (self.weights.dim() - 2), 0, missing))
        if num_keys < self.num_keys:
            weights = weights[:, self.num_keys - num_keys : self.num_keys]
        return weights.to(key.device)

    def store(self, layer: int, mass: torch.Tensor) -> torch.Tensor:
        """Keep a layer's mass; returns what was kept."""
        if not self.differentiable:
            mass = mass.detach()
        if self.query_mask is not None:
            wanted = self.query_mask.to(mass.device)
            num_rows = mass.shape[1 if self.head_reduction == "mean" else 2]
            check(
                tuple(wanted.shape) == (mass.shape[0], num_rows),
                f"query_mask: got shape {tuple(wanted.shape)}, expected {(mass.shape[0], num_rows)} = (B, T) of this "
                "forward pass; leave it out for generate()",
            )
            wanted = wanted if self.head_reduction == "mean" else wanted[:, None]
            mass = mass.masked_fill(~wanted.reshape(wanted.shape + (1,) * (mass.dim() - wanted.dim())), 0.0)
        self.record.masses[layer] = mass
        return mass

    def read_mask(self, mask: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`read_mask`, once a forward pass: all layers share a mask or two."""
        key = (id(mask), num_keys)
        if key not in self.masks:
            self.masks[key] = (mask, read_mask(mask, num_keys))  # holding the mask keeps its id its own
        return self.masks[key][1]
