"""What keeps an adapter from training with wrong numbers: it refuses what it does not know and checks the first batch.

A fused head that is slightly wrong trains for hours before a reward collapses. So an adapter compares version and
signature of what it replaces before it replaces it, and the first batch it serves with plain PyTorch in float64.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from packaging.version import Version

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits
from mmrpt_kernels.lm_head.vocab_parallel import gather
from mmrpt_kernels.testing import assert_close_to_truth

__all__ = ["SelfCheck", "SelfCheckError", "UnsupportedError", "check_parameters", "check_version"]

CHECKED_ROWS = 8
# Words of the head widened to float64 at a time: 60 MB at a hidden size of 3,584.
CHECKED_WORDS = 2048


class UnsupportedError(RuntimeError):
    """The installed library is not one the adapter knows; the message says what differs and what to install."""


class SelfCheckError(RuntimeError):
    """The fused head broke a law or disagrees with plain PyTorch on the first batch."""


def check_version(package: str, low: str, high: str) -> str:
    """The installed version of `package`. Raises UnsupportedError unless low <= version < high."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(
            f"{package}: not installed, expected >={low},<{high}; pip install 'mmrpt[{package}]'"
        ) from None
    if not Version(low).release <= Version(version).release < Version(high).release:  # (1, 16, 0) of 1.16.0.dev1
        raise UnsupportedError(
            f"{package}: got {version}, expected >={low},<{high}, the versions this adapter knows; "
            f"pip install '{package}>={low},<{high}', or train without the adapter"
        )
    return version


def check_parameters(function: Callable, expected: Sequence[str], where: str) -> None:
    """Raise UnsupportedError unless the parameters of `function` are `expected`, in their order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise UnsupportedError(
            f"{where}: takes ({', '.join(found)}), expected ({', '.join(expected)}): an unknown release; install one "
            "that the adapter was tested with, or train without the adapter"
        )


class SelfCheck:
    """Compares the first batch of a fused head with plain PyTorch; afterwards it does nothing.

    All rows: log-probability <= 0, entropy >= 0. A few rows: the error rule of mmrpt_kernels.testing against float64,
    with eager in the inputs' dtype as the yardstick. Costs the logits of `CHECKED_ROWS` rows, once.
    """

    def __init__(self, enabled: bool) -> None:
        self.pending = enabled

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        options: HeadOptions,
        found: tuple[torch.Tensor, torch.Tensor | None],
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check `found`: logps (N,) and entropy (N,) or None of hidden (N, H), weight (V, H), targets (N,), bias (V,).

        group: weight and bias are this rank's words of a vocabulary that is cut over its ranks, which all check the
        same rows: two collectives in each of two precisions.

        A batch without a finite row leaves the check to the next one. Raises SelfCheckError.
        """
        if not self.pending or targets.numel() == 0 or torch.compiler.is_compiling():
            return
        device = hidden.device.type
        rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.pending = not _check(hidden, weight, targets, bias, options, found, rounded=rounded, group=group)


@torch.no_grad()
@without_autocast
def _check(hidden, weight, targets, bias, options, found, *, rounded: torch.dtype | None, group) -> bool:
    """Whether there was something to compare. `rounded`: the dtype that autocast casts the inputs to."""
    logps, entropy = found
    broken = int((logps > 0).sum()) + (0 if entropy is None else int((entropy < 0).sum()))
    if broken:
        raise SelfCheckError(_message(f"{broken} log-probabilities above 0 or entropies below 0"))
    count = min(CHECKED_ROWS, targets.numel())
    rows = torch.linspace(0, targets.numel() - 1, count, device=hidden.device, dtype=torch.float64).round().long()
    common = rounded or torch.promote_types(hidden.dtype, weight.dtype)
    results = []
    for dtype in (torch.float64, common):
        logits = _logits(hidden[rows], weight, bias, rounded, dtype)
        logits = logits if group is None else _all_words(logits, group)
        z = transform_logits(logits.to(statistics_dtype(logits)), options)
        results.append((*_definition(z, targets[rows]), z.abs().max()))
    (truth_logps, truth_entropy, size), (eager_logps, eager_entropy, _) = results
    finite = torch.isfinite(truth_logps) & torch.isfinite(truth_entropy) & torch.isfinite(eager_logps)
    if not bool(finite.any()):
        return False
    compared = {"log-probability": (logps, eager_logps, truth_logps)}
    if entropy is not None:
        compared["entropy"] = (entropy, eager_entropy, truth_entropy)
    rule = {"dtype": common, "eager_cap": float("inf"), "floor": float(size) if bool(size.isfinite()) else 0.0}
    for name, (actual, eager, truth) in compared.items():
        try:
            assert_close_to_truth(actual[rows][finite], eager[finite], truth[finite], name=name, **rule)
        except AssertionError as error:
            raise SelfCheckError(_message(str(error))) from None
    return True


def _logits(rows, weight, bias, rounded: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    """(n, V) of rows (n, H) as eager PyTorch computes them in `dtype`, the head widened a block at a time."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if rounded is None else tensor.to(rounded)).to(dtype)

    logits = torch.cat([cast(rows) @ cast(block).T for block in weight.split(CHECKED_WORDS)], -1)
    return logits if bias is None else logits + cast(bias)


def _all_words(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(n, V) from every rank's (n, V_r), in rank order; V_r may differ."""
    counts = gather(torch.tensor([logits.shape[1]], device=logits.device), group).flatten().tolist()
    padded = torch.nn.functional.pad(logits, (0, max(counts) - logits.shape[1])).contiguous()
    return torch.cat([part[:, :count] for part, count in zip(gather(padded, group), counts, strict=True)], -1)


def _definition(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(z, -1)
    entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy


def _message(what: str) -> str:
    return (
        f"self-check of the fused head on the first batch: {what}. Training would go on with wrong numbers. Report it "
        "with the output of `python -m mmrpt.doctor`; until then train without the adapter, or set "
        "MMRPT_KERNELS_BACKEND=portable if another backend served (self_check=False switches this check off)"
    )
