"""The clipped policy loss, forward and backward: linear_policy_loss against materialised logits and other fused heads.

    pytest benchmarks/bench_policy_loss.py [--quick] [--device cpu|cuda] [--threads 2] [--only 7b]

Every case is one training step of the head: loss, d hidden and d weight ("frozen": d hidden alone, as with LoRA;
"forward": the loss alone). "keep40" is VPPO's filter: 40 % of the tokens have a policy term, and no term of the loss
runs over the others; "keep100" has no filter. The same loss is built by "eager" from full logits and log_softmax, by
the heads of others (TRL, verl, cut-cross-entropy) from per-token log-probs of all tokens, as their trainers call them,
and by Liger from its own fused GRPO loss; "on gathered rows": the caller gives the tokens kept alone. Ours
compute what has a gradient; "statistics" also log-probs and entropies of all other response tokens. "bias" adds one to
the logits, as mmrpt's trainer always does.

Logits are flat (normal, standard deviation 3), but for "zipf", "peaked" and "trained", a briefly trained head
(`mmrpt_kernels.testing.draw_head`): there it pays to leave words without probability out of the gradient's products, as
cut-cross-entropy does, and ours with skip_below (their notes say which share of the words stays). Their gate compares
1,024 tokens.

"bare products" is the floor: the matrix products that the mathematics needs on the tokens kept, in the inputs' dtype,
all at once where memory allows, and nothing else. What is to be reached is judged below the tables (`goals`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.goals import CaseRows, Goals, ratio
from benchmarks.harness import Case, Contender, report
from benchmarks.heads import (
    OURS,
    Head,
    Skip,
    cut_cross_entropy,
    draw_bias,
    eager,
    eager_compiled,
    gate_rows,
    head_peers,
    in_dtype_of,
    missing,
    needs_gpu,
    no_compiler,
    ours,
    products,
    rounding_float32,
    words_left_out,
)
from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_loss
from mmrpt_kernels.testing import HEADS, draw_head

SEQUENCES = 8
BOTH, HIDDEN = ("hidden", "weight"), ("hidden",)


def clipped(logps, old_logps, advantages) -> torch.Tensor:
    """A token's policy loss; all of one shape."""
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def loss_from_logps(head: Head, hidden, weight, targets, bias, advantages, response_mask, perception_mask, old_logps):
    """The loss as a trainer writes it: per-token log-probs of all tokens, then the surrogate over (B, T)."""
    logps = head(hidden, weight, targets, bias, entropy=False).logps
    losses = clipped(logps, old_logps, advantages[:, None])
    return (losses * perception_mask * response_mask).sum() / response_mask.sum()


def loss_of_gathered(head: Head, hidden, weight, targets, bias, advantages, response_mask, perception_mask, old_logps):
    """The same from the tokens kept alone, gathered by whoever writes the trainer."""
    mask = response_mask & perception_mask
    logps = head(hidden[mask], weight, targets[mask], bias, entropy=False).logps
    return clipped(logps, old_logps[mask], advantages[:, None].expand(mask.shape)[mask]).sum() / response_mask.sum()


def fused(backend: str | None, *, return_statistics: bool = False, skip_below=None, **inputs: Any) -> torch.Tensor:
    options = {"return_statistics": return_statistics, "skip_below": skip_below, "backend": backend}
    return linear_policy_loss(**inputs, **options).loss


def token_loss(hidden, weight, targets, bias, advantages, response_mask, perception_mask, old_logps) -> torch.Tensor:
    """The same loss brought as a user's own function."""
    old, by_token = old_logps.reshape(-1), advantages[:, None].expand(targets.shape).reshape(-1)

    def loss(logps, _entropy, rows):
        return clipped(logps, old[rows], by_token[rows])

    mask = response_mask & perception_mask
    total = linear_token_loss(hidden, weight, targets, loss, active_mask=mask, use_entropy=False, bias=bias)
    return total / response_mask.sum()


def liger(hidden, weight, targets, bias, advantages, response_mask, perception_mask, old_logps) -> torch.Tensor:
    """Liger's fused linear GRPO; its mask is the filter, its divisor the response's length. Compiled where it can be,
    as its users run it."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    compiled = no_compiler(hidden.device) is None
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="dapo")
    mask = (response_mask & perception_mask).to(hidden.dtype)
    options = {"old_per_token_logps": old_logps, "num_items_in_batch": response_mask.sum()}
    return loss(hidden, weight, targets, mask, advantages, in_dtype_of(weight, bias), **options)[0]


def floor(hidden, weight, perception_mask, **_: Any) -> dict[str, torch.Tensor]:
    """One, two or three products on the tokens kept."""
    return products(hidden.detach()[perception_mask], weight, weight.requires_grad, hidden.requires_grad)


def make_inputs(
    device: torch.device,
    *,
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    keep: float,
    learn: tuple[str, ...],
    logits: str,
    bias: bool,
) -> dict[str, Any]:
    """logits: a kind of `draw_head`; ceil(keep * T) tokens kept a sequence. Log-ratios are within 0.1, and 0.5 or -0.5
    for one token in twenty: no rounding of logits to bfloat16 moves one across the clip, or it would be all that errors
    show."""
    drawn = draw_head(logits, rows, hidden, vocab, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    shape = (SEQUENCES, rows // SEQUENCES)
    made = {"hidden": drawn.hidden.view(*shape, hidden), "weight": drawn.weight.clone()}
    made = {name: tensor.requires_grad_(name in learn) for name, tensor in made.items()}
    made |= {"targets": drawn.targets.view(shape), "bias": draw_bias(vocab, device) if bias else None}
    with torch.no_grad():
        own = linear_logprobs(**made).logps
    far, near, place = torch.rand(3, *shape, generator=generator, device=device)
    log_ratio = torch.where(far < 0.05, (near - 0.5).sign() * 0.5, (near - 0.5) * 0.2)
    return made | {
        "advantages": torch.randn(SEQUENCES, generator=generator, device=device),
        "response_mask": torch.ones(shape, dtype=torch.bool, device=device),
        "perception_mask": place.argsort(1).argsort(1) < -int(-keep * shape[1] // 1),
        "old_logps": own - log_ratio,
    }


def case(
    name: str,
    head: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    keep: float,
    learn: tuple[str, ...] = BOTH,
    logits: str = "flat",
    bias: bool = False,
    quick: bool = False,
) -> Case:
    """A Case of N, H, V. Three (frozen: two; forward: one) products of 2 N H V each on the tokens kept: what the
    mathematics needs."""
    rows, hidden, vocab = head
    sizes = {"hidden": hidden, "vocab": vocab, "dtype": dtype, "keep": keep}
    inputs = partial(make_inputs, **sizes, learn=learn, logits=logits, bias=bias)
    params = {"N": rows, "H": hidden, "V": vocab, "dtype": str(dtype).removeprefix("torch."), "keep": keep}
    return Case(
        name,
        params | {"learn": list(learn), "logits": logits, "bias": bias},
        partial(inputs, rows=rows),
        gate_inputs=partial(inputs, rows=min(rows, gate_rows(logits))),
        floor=20.0,  # the size of the log-probabilities whose difference is the ratio's exponent
        flops=2.0 * (1 + len(learn)) * rows * hidden * vocab * keep,
        quick=quick,
    )


def cases(device: torch.device) -> list[Case]:
    full, half = torch.float32, torch.bfloat16
    if device.type == "cpu":
        large, small, wide = (1024, 512, 32_000), (1024, 512, 8192), (256, 256, 151_936)
        return [
            case("32k-keep40", large, full, keep=0.4, quick=True),
            case("32k-keep100", large, full, keep=1.0, quick=True),
            case("32k-keep40-bias", large, full, keep=0.4, bias=True, quick=True),
            case("tiny-keep40", (2048, 128, 1024), full, keep=0.4, quick=True),
            case("8k-trained-keep40", small, full, keep=0.4, logits="trained", quick=True),
            case("152k-keep40", wide, full, keep=0.4),
            case("32k-keep40-bf16", large, half, keep=0.4),
            *(case(f"8k-{kind}-keep40-bf16", small, half, keep=0.4, logits=kind) for kind in HEADS),
            case("8k-trained-keep100-bf16", small, half, keep=1.0, logits="trained"),
            case("32k-keep40-forward", large, full, keep=0.4, learn=()),
        ]
    # Heads of Qwen2.5-VL 3B and 7B, of Llama 3 8B's vocabulary at 5120 (a 32B's width). What the goals speak of comes
    # first: a budget that runs out leaves the others.
    seven, three, wide = (8192, 3584, 152_064), (8192, 2048, 151_936), (8192, 5120, 128_256)
    return [
        case("7b-8k-keep100", seven, half, keep=1.0, quick=True),
        case("7b-8k-keep40", seven, half, keep=0.4, quick=True),
        case("7b-8k-frozen", seven, half, keep=1.0, learn=HIDDEN, quick=True),
        case("7b-8k-trained-keep100", seven, half, keep=1.0, logits="trained", quick=True),
        case("7b-8k-keep40-bias", seven, half, keep=0.4, bias=True),
        case("3b-8k-keep40", three, half, keep=0.4),
        case("32b-8k-keep40", wide, half, keep=0.4),
        case("7b-8k-trained-keep40", seven, half, keep=0.4, logits="trained"),
        case("7b-8k-zipf-keep40", seven, half, keep=0.4, logits="zipf"),
        case("7b-8k-keep20", seven, half, keep=0.2),
        case("7b-8k-keep40-forward", seven, half, keep=0.4, learn=()),
        case("7b-64k-keep40", (65_536, *seven[1:]), half, keep=0.4),
        case("7b-16k-keep40", (16_384, *seven[1:]), half, keep=0.4),
        case("7b-4k-keep40", (4096, *seven[1:]), half, keep=0.4),
        case("3b-8k-keep100", three, half, keep=1.0),
        case("32b-8k-keep100", wide, half, keep=1.0),
        case("7b-8k-peaked-keep40", seven, half, keep=0.4, logits="peaked"),
    ]


def step(fn: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Loss and the gradients of what learns."""

    def call(**inputs: Any) -> Any:
        learn = [name for name in BOTH if inputs[name].requires_grad]
        if not learn:
            return {"value": fn(**inputs)}
        return harness.with_backward(fn, learn, lambda out, _: out)(**inputs)

    return call


def goals(cases: list[CaseRows], device: str) -> list[dict[str, Any]]:
    """What a training step is to reach with the kernels that the table of backends chooses, exact and with words left
    out. Peers count as their trainers call them, not on gathered rows."""
    found = Goals()
    for case in cases:
        if not case.params["learn"]:
            continue
        if device == "cpu":
            judge_cpu(found, case)
        else:
            for name in ("triton", "triton, skip_below=auto"):
                judge_gpu(found, case, name)
    return found.rows


def judge_cpu(found: Goals, case: CaseRows) -> None:
    for name in ("portable", "portable, skip_below=auto"):
        faster = case.of(name, "speedup")
        found.at_least(f"eager's time / {name}", case.name, faster, 1.7 if case.params["keep"] < 1.0 else 1.0)


def judge_gpu(found: Goals, case: CaseRows, name: str) -> None:
    keep, trains = case.params["keep"], case.params["learn"] == list(BOTH)
    seconds = case.of(name, "seconds")
    best = case.fastest(lambda name, row: row["kind"] == "peer" and not name.endswith("gathered rows"))
    memory = ratio(case.of(name, "peak_bytes"), case.of(best, "peak_bytes"))
    floors = 1.25 if keep < 1.0 else 1.10
    found.at_most(f"time / bare products, {name}", case.name, case.of(name, "of_floor"), floors)
    if trains and keep in (0.4, 1.0):
        faster = ratio(case.of(best, "seconds"), seconds)
        found.at_least(f"fastest peer's time ({best}) / {name}", case.name, faster, 2.4 if keep < 1.0 else 1.3)
    for peer in ("Liger GRPO", "TRL") if trains and keep == 1.0 else ():
        found.at_least(f"{peer}'s time / {name}", case.name, ratio(case.of(peer, "seconds"), seconds), 1.5)
    found.at_most(f"memory / fastest peer's ({best}), {name}", case.name, memory, 0.5)


def contenders(device: torch.device) -> list[Contender]:
    chosen = OURS[device.type][0]

    def peer(name: str, fn: Callable[..., Any], skip: Skip, variant: bool = False) -> Contender:
        return Contender(name, step(fn), "peer", skip=skip, variant=variant)

    def all_kept(case: Case) -> str | None:
        return "all tokens are kept" if case.params["keep"] == 1.0 else None

    def with_head(head: Head) -> Callable[..., Any]:
        return step(partial(loss_from_logps, head))

    def setting(name: str, fn: Callable[..., Any], **options: Any) -> Contender:
        return Contender(name, step(fn), variant=True, **options)

    def not_exact(case: Case) -> str | None:
        exact = device.type == "cpu" and case.params["dtype"] == "bfloat16"
        return None if exact else "for bfloat16 inputs on a CPU"

    no_cut = needs_gpu(device) or missing("cut_cross_entropy")
    return [
        Contender("eager", with_head(eager), "baseline"),
        Contender("bare products", floor, "floor"),
        *(Contender(backend, step(partial(fused, backend))) for backend in OURS[device.type]),
        setting(f"{chosen}, statistics", partial(fused, chosen, return_statistics=True)),
        setting(f"{chosen}, float32 rounds to bfloat16", rounding_float32(partial(fused, chosen)), skip=not_exact),
        *words_left_out(chosen, lambda share: step(partial(fused, chosen, skip_below=share))),
        setting("linear_token_loss", token_loss),
        setting("linear_logprobs + autograd", partial(loss_from_logps, partial(ours, None))),
        *eager_compiled(device, partial(loss_from_logps, eager), step),
        *head_peers(device, with_head),
        peer("Liger GRPO", liger, missing("liger_kernel.chunked_loss")),
        peer("cut-cross-entropy", partial(loss_from_logps, cut_cross_entropy), no_cut),
        peer("eager on gathered rows", partial(loss_of_gathered, eager), all_kept),
        peer(
            "cut-cross-entropy on gathered rows",
            partial(loss_of_gathered, cut_cross_entropy),
            no_cut or all_kept,
            variant=True,
        ),
    ]


def test_policy_loss(rows, contender, benchmark) -> None:
    report(rows[contender], benchmark)
