"""out and lse from the flash-attn package: releases 2, 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`).

Packed sequences, windows and soft caps are its own; its backward pass gives the gradient of out. No kernel of it knows
of a mass: `visual_mass` makes it from the lse. Each release is called by the argument names that are known of it: where
the installed one has others, the call raises and says what was found.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.common.checks import check
from mmrpt_kernels.common.extension import installed


class Release(NamedTuple):
    """How one release is called."""

    module: str
    returns_lse: str  # the argument that makes it return the lse
    no_limit: int | None  # of a window
    softcap_gradient: bool  # whether its backward pass has soft caps


# The newest first. Sources: flash_attn/cute/interface.py, hopper/flash_attn_interface.py and
# flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention.
RELEASES = (
    Release("flash_attn.cute", "return_lse", None, False),
    Release("flash_attn_interface", "return_attn_probs", -1, True),
    Release("flash_attn", "return_attn_probs", -1, True),
)
DENSE = ("q", "k", "v", "softmax_scale", "causal", "window_size", "softcap")
PACKED = (*DENSE, "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _capability(device: torch.device) -> int:
    """Compute capability of a GPU, its first number."""
    return torch.cuda.get_device_capability(device)[0]


def _release(device: torch.device) -> Release:
    """The newest release that is installed and has kernels for the GPU: 4 from compute capability 9 on, 3 for 9."""
    capability = _capability(device)
    serves = {"flash_attn.cute": capability >= 9, "flash_attn_interface": capability == 9, "flash_attn": True}
    for release in RELEASES:
        if serves[release.module] and installed(release.module):
            return release
    raise ValueError(
        f"flash-attn: got no release for compute capability {capability}, expected one of "
        f"{', '.join(r.module for r in RELEASES)}; pip install flash-attn, or choose another backend"
    )


def _function(release: Release, name: str, expected: tuple[str, ...]) -> Callable:
    """`name` of the release, its signature compared with what is known here."""
    module = importlib.import_module(release.module)
    function = getattr(module, name, None)
    found = () if function is None else tuple(inspect.signature(function).parameters)
    missing = {*expected, release.returns_lse} - set(found)
    check(
        not missing,
        f"flash-attn: got {release.module} {getattr(module, '__version__', 'of unknown version')} whose {name} "
        f"takes {', '.join(found) or 'nothing: it does not exist'}, expected {', '.join(sorted(missing))} besides; "
        "install a release that is known here (2.6 or newer, 3, 4), or choose another backend",
    )
    return function


@torch.compiler.disable
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
    max_seqlens: tuple[int | None, int | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, D), differentiable by the package's own backward pass, and lse (B, Hq, T), which is not.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D); packed as the public function takes them.
        masks: cu_seqlens alone.
        max_seqlens: of packed rows and keys; None is read from cu_seqlens, which waits for the device.

    Raises:
        ValueError: no known release is installed, or it cannot serve the call.
    """
    release = _release(q.device)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    check(
        release.softcap_gradient or options.softcap == 0.0 or not wanted,
        f"softcap: got {options.softcap} with gradients, expected 0: {release.module} has no backward pass for it; "
        "use backend='triton'",
    )
    arguments = {
        "softmax_scale": options.scale,
        "causal": options.window_right == 0,
        "window_size": tuple(release.no_limit if side < 0 else side for side in options[:2]),
        "softcap": options.softcap,
        release.returns_lse: True,
    }
    name, expected, rows = "flash_attn_func", DENSE, (q.shape[0], q.shape[2], q.shape[1])
    if masks.cu_seqlens_q is not None:
        name, expected, rows = "flash_attn_varlen_func", PACKED, (q.shape[1], q.shape[0])
        for side, cu, longest in zip("qk", masks[-2:], max_seqlens, strict=True):
            arguments[f"cu_seqlens_{side}"] = cu.int().contiguous()
            arguments[f"max_seqlen_{side}"] = int(cu.diff().max()) if longest is None else longest
    out, lse, *_ = _function(release, name, expected)(q, k, v, **arguments)
    check(
        tuple(lse.shape) == rows,
        f"flash-attn: got a lse of shape {tuple(lse.shape)} from {release.module}, expected {rows}; install a known "
        "release (2.6 or newer, 3, 4), or choose another backend",
    )
    # Release 2 reports +inf for a row without keys (and for one that is NaN).
    return out, lse.detach().masked_fill(lse == torch.inf, -torch.inf)
