"""verl's fused lm heads replaced by `linear_logprobs`, for its workers with `use_fused_kernels=True`.

    MMRPT_VERL=1 python -m verl.trainer.main_ppo ...     # every worker: verl loads the entry point of this package

or, in a process of your own, `enable_fused_head()`. Both of verl's heads are replaced, that of its backends "torch" and
"liger" and that of its backend "triton", which is also the vocabulary-parallel head of its Megatron workers. FSDP
workers look them up at each forward pass; verl's Megatron modules hold the function, and are given ours.
Log-probabilities and entropies are float32 whatever the model's dtype, and the backward pass does no work for tokens
without a gradient: prompts, padding, zero advantages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mmrpt_kernels.integrations.guards import SelfCheck, UnsupportedError, check_parameters, check_version
from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.lm_head.vocab_parallel import divide_gradient
from mmrpt_kernels.logprobs import linear_logprobs

__all__ = ["disable_fused_head", "enable_fused_head", "fused_head"]

VERSIONS = ("0.9", "0.10")
PARAMETERS = {
    "FusedLinearForPPO.forward": ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
    "LinearCrossEntropy.forward": (
        "ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group",
    ),
}  # fmt: skip
# (owner, attribute, what stood there before) of each head that was replaced, the latest last.
_replaced: list[tuple[object, str, Callable]] = []


def enable_fused_head(*, self_check: bool = True, backend: str | None = None) -> None:
    """Let verl compute log-probabilities and entropies by `linear_logprobs`, from now on in this process.

    Args:
        self_check: compare the first batch with plain PyTorch (a few rows; see `guards.SelfCheck`).
        backend: of `linear_logprobs`, see mmrpt_kernels.backends.

    Raises:
        UnsupportedError: verl is missing, or not a release whose heads this adapter knows.
    """
    version = check_version("verl", *VERSIONS)
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel

    heads = {
        "FusedLinearForPPO.forward": torch_functional.FusedLinearForPPO.forward,
        "LinearCrossEntropy.forward": kernel.LinearCrossEntropy.forward,
    }
    for name, function in heads.items():
        check_parameters(function, PARAMETERS[name], f"verl {version}: {name}")
    forward, cross_entropy = _make_heads(SelfCheck(self_check), backend)
    _replace(torch_functional.FusedLinearForPPO, "forward", forward)
    for holder in _holders(kernel.linear_cross_entropy):
        _replace(holder, "linear_cross_entropy", cross_entropy)


def disable_fused_head() -> None:
    """Give verl its own heads back; harmless where they are there already."""
    _restore(0)


@contextmanager
def fused_head(*, self_check: bool = True, backend: str | None = None) -> Iterator[None]:
    """`enable_fused_head` inside the block; afterwards the heads are what they were before."""
    depth = len(_replaced)
    enable_fused_head(self_check=self_check, backend=backend)
    try:
        yield
    finally:
        _restore(depth)


def _holders(function: Callable) -> list[object]:
    """The modules of verl, imported already, that have `function` as theirs or imported it by name, wherever it is."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("verl.") and module is not None]
    return [module for module in loaded if vars(module).get("linear_cross_entropy") is function]


def _replace(owner: object, attribute: str, ours: Callable) -> None:
    _replaced.append((owner, attribute, getattr(owner, attribute)))
    setattr(owner, attribute, ours)


def _restore(depth: int) -> None:
    """Undo the latest replacements until `depth` of them are left."""
    while len(_replaced) > depth:
        owner, attribute, before = _replaced.pop()
        for holder in _holders(getattr(owner, attribute)):  # imported since
            setattr(holder, attribute, before)
        setattr(owner, attribute, before)


def _make_heads(check: SelfCheck, backend: str | None) -> tuple[Callable, Callable]:
    """Ours under the names and parameters of FusedLinearForPPO.forward and linear_cross_entropy."""

    def serve(hidden, weight, targets, temperature, group=None) -> tuple[torch.Tensor, torch.Tensor]:
        """logps (N,), entropy (N,) of hidden (N, H), targets (N,); group: weight (V_r, H) is this rank's words."""
        options = {"temperature": temperature, "ignore_index": -1, "return_entropy": True, "backend": backend}
        found = linear_logprobs(hidden, weight, targets, vocab_group=group, **options)
        check(hidden, weight, targets, None, HeadOptions(float(temperature)), found, group=group)
        return found.logps, found.entropy

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        """log_probs and entropy (...), float32, of hidden_states (..., H), vocab_weights (V, H), input_ids (...)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logps, entropy = serve(flat, vocab_weights, input_ids.reshape(-1).long(), temperature)
        return logps.view(input_ids.shape), entropy.view(input_ids.shape)

    def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        """logprobs (N,) and entropy (N,), float32 and flat whatever the shape of hidden (..., H) and labels (...).

        With a process group weight (V_r, H) is this rank's words, and d hidden is this rank's part of a sum over ranks,
        as verl's kernel leaves it: Megatron's gather_from_sequence_parallel_region adds the parts up.
        """
        if reduction.lower() != "none":
            raise UnsupportedError(
                f"linear_cross_entropy: got reduction={reduction!r}, expected 'none': verl's own calls reduce the "
                "log-probabilities themselves; train without the adapter"
            )
        flat, group = hidden.reshape(-1, hidden.shape[-1]), dist_process_group
        if group is not None:
            flat = divide_gradient(flat, dist.get_world_size(group))
        return serve(flat, weight, labels.reshape(-1).long(), temperature, group)

    return forward, linear_cross_entropy
