"""What a transformers model says about its key-value cache, found by what a cache can do and not by one name.

transformers 5.24 renamed the argument from `past_key_values` to `cache`, and whoever read the old name alone saw no
cache. So a cache is any argument that can tell its length, and the attention layers check afterwards that as many keys
came as that length promises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch

from mmrpt_kernels.common.checks import check

# What transformers has called the argument, the newest name first.
NAMES = ("cache", "past_key_values")


def cache_keyword(forward: Callable) -> str:
    """The name under which `forward` takes its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    Raises:
        ValueError: it takes neither.
    """
    taken = inspect.signature(forward).parameters
    name = next((name for name in NAMES if name in taken), None)
    check(
        name is not None,
        f"{getattr(forward, '__qualname__', forward)}: takes ({', '.join(taken)}), expected one of {NAMES} for its "
        "key-value cache: an unknown release of transformers; install one from 4.57 to 5.24",
    )
    return name


def find_cache(args: tuple, kwargs: dict) -> object | None:
    """The argument that is a key-value cache, under whatever name or at whatever place; None: there is none.

    Raises:
        ValueError: several caches, or one that cannot tell its length (tuples of tensors, as transformers 4 took).
    """
    for name in NAMES:
        value = kwargs.get(name)
        check(
            value is None or hasattr(value, "get_seq_length"),
            f"{name}: got {type(value).__name__} without get_seq_length, expected a cache that tells how many keys it "
            "holds; pass a transformers.Cache, such as DynamicCache",
        )
    found = {id(value): value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")}
    check(
        len(found) <= 1,
        f"record_visual_mass: got {len(found)} caches in one forward pass "
        f"({', '.join(type(value).__name__ for value in found.values())}), expected at most one; "
        "record the model that takes one",
    )
    return next(iter(found.values()), None)


def key_counts(cache: object | None, num_past: int, num_new: int, layers: Iterable[int]) -> frozenset[int]:
    """How many keys a layer may be given in a forward pass of `num_new` tokens after `num_past`, which starts now.

    The tokens so far; with a cache also what it says the masks of `layers` need: all slots of a static cache, the last
    keys of a sliding window.
    """
    counts = {num_past + num_new}
    sizes = getattr(cache, "get_mask_sizes", None)
    if sizes is None:
        return frozenset(counts)
    asked = next(iter(inspect.signature(sizes).parameters), "")
    if asked == "cache_position":  # transformers 4
        query = torch.arange(num_past, num_past + num_new)
    elif asked == "query_length":
        query = num_new
    else:  # an unknown release: layers that are given another number of keys than the tokens so far will be refused
        return frozenset(counts)
    return frozenset(counts | {int(sizes(query, layer)[0]) for layer in layers})


def stored_keys(cache: object | None, layer: int) -> torch.Tensor | None:
    """The tensor in which `cache` holds a layer's keys: beam search puts another in its place. None: not found."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return getattr(layers[layer], "keys", None) if layer < len(layers) else None
