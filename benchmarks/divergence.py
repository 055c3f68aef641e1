"""Full-vocabulary divergence of two views: linear_token_divergence against materialised logits.

    python -m benchmarks.divergence [--quick] [--device cpu|cuda]

"score" cases are the trainer's use: token perception of a rollout, forward only, KL with both entropies and the sampled
tokens' log-probabilities. "train" cases differentiate the KL in both views and the head (PAPO and its kin).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Case, Contender
from mmrpt_kernels import TokenDivergence, linear_token_divergence
from mmrpt_kernels.common.head import statistics_dtype


def eager(hidden_p, hidden_q, weight, targets, kind="kl") -> TokenDivergence:
    """What a trainer writes without the operator: both views' logits, softmax in float32."""
    dtype = statistics_dtype(hidden_p)
    lp, lq = (torch.log_softmax(F.linear(h, weight).to(dtype), -1) for h in (hidden_p, hidden_q))
    p, q = lp.exp(), lq.exp()
    columns = {"kl": lambda: (p * (lp - lq)).sum(-1), "js": lambda: jensen_shannon(lp, lq, p, q)}
    kinds = (kind,) if isinstance(kind, str) else kind
    divergence = torch.stack([columns[one]() for one in kinds], -1)
    on_targets = [x.gather(-1, targets[:, None])[:, 0] for x in (lp, lq)]
    divergence = divergence[:, 0] if isinstance(kind, str) else divergence
    return TokenDivergence(divergence, *on_targets, -(p * lp).sum(-1), -(q * lq).sum(-1))


def jensen_shannon(lp, lq, p, q):
    log_mean = ((p + q) / 2).log()
    return ((p * (lp - log_mean)).sum(-1) + (q * (lq - log_mean)).sum(-1)) / 2


def forward_or_both(fn: Callable[..., TokenDivergence]) -> Callable[..., Any]:
    """Forward alone where no input requires gradients; else the mean divergence and its gradients."""
    train = harness.with_backward(fn, ("hidden_p", "hidden_q", "weight"), lambda out, inputs: out.divergence.mean())

    def call(**inputs: Any) -> Any:
        return train(**inputs) if inputs["weight"].requires_grad else fn(**inputs)

    return call


def make_inputs(
    device: torch.device, *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, train: bool, kind="kl"
) -> dict[str, Any]:
    """Logits of standard deviation 3; the second view differs from the first by a tenth."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_p = normal(rows, hidden)
    hidden_q = hidden_p + 0.1 * normal(rows, hidden)
    weight = normal(vocab, hidden) * (3.0 / hidden**0.5)
    made = {"hidden_p": hidden_p, "hidden_q": hidden_q, "weight": weight}
    made = {name: tensor.to(dtype).requires_grad_(train) for name, tensor in made.items()}
    return made | {"targets": torch.randint(vocab, (rows,), generator=generator, device=device), "kind": kind}


def case(
    name: str, rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, train=False, kind="kl", quick=True
) -> Case:
    """A Case; products count 2 N H V each: two for scoring, six with the gradients of both views and the head."""
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "train": train, "kind": kind}
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "kind": str(kind)}
    return Case(
        name,
        params,
        partial(make_inputs, rows=rows, **sizes),
        gate_inputs=partial(make_inputs, rows=min(rows, 64), **sizes),
        floor=20.0,  # log-probabilities of this size are what divergences subtract
        flops=2.0 * rows * hidden * vocab * (6 if train else 2),
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case("score-tiny", 2048, 128, 1024, torch.float32),
            case("score-32k", 1024, 512, 32_000, torch.float32),
            case("score-32k-kl-js", 1024, 512, 32_000, torch.float32, kind=("kl", "js"), quick=False),
            case("train-32k", 1024, 512, 32_000, torch.float32, train=True),
            case("score-152k", 256, 256, 151_936, torch.float32, quick=False),
        ]
    return [
        case("score-3b", 8192, 2048, 151_936, torch.bfloat16),
        case("score-7b", 8192, 3584, 152_064, torch.bfloat16, quick=False),
        case("train-3b", 4096, 2048, 151_936, torch.bfloat16, train=True),
    ]


def main(argv=None) -> int:
    args = harness.parse_args("divergence", argv)
    contenders = [
        Contender("eager", forward_or_both(eager), baseline=True),
        Contender("portable", forward_or_both(partial(linear_token_divergence, backend="portable"))),
    ]
    return harness.run("divergence", cases(args.device), contenders, args)


if __name__ == "__main__":
    raise SystemExit(main())
