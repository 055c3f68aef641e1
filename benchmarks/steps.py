"""One step of reinforcement on a random vision-language model: what bench_step.py compares, and what it is given.

A step scores the responses under the image and under a blackened one (log-probs and KL of the two views), makes the
gradient of the clipped loss on the tokens that the filter keeps, and moves the weights by an optimiser. A way to do so
is a pair of functions:

    views(held) -> (KL (N, W), log-probs (N, W)) of all N responses, 0 past a row's end
    update(held, targets, optimiser) -> loss, a float; the step of `optimiser` included
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import synchronize
from mmrpt.corpus import ImageCache
from mmrpt.optimiser import Optimiser
from mmrpt.policy import Policy
from mmrpt.settings import OptimiserSettings, TinyVLMConfig
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import PixelBatch
from mmrpt.world.tiny_vlm import build_tiny_vlm

# So small that no weight moves: every call of every contender starts from the same ones.
STILL = OptimiserSettings(lr=1e-30, weight_decay=0.0, warmup_steps=0)
INSTRUCTION = "some words of this description of the image are hidden: a <mask> card lies left of a <mask> ball"
TIMED = 5  # the last calls, whose medians are a contender's seconds by part


@dataclass(frozen=True)
class Shape:
    """Of the model, its image and its responses: those of one prompt are half as long as `width` to as long."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    vision: tuple[int, int, int, int] = (4, 320, 4, 864)  # layers, width, heads, width of the MLP
    side: int = 224  # pixels; (side / 28) ** 2 image tokens
    prompts: int = 1
    responses: int = 8  # of each prompt
    width: int = 64  # tokens of the longest
    rows: int = 8  # of a forward pass with a row for each response
    adamw: bool = True  # False: the gradient's norm alone
    checkpointing: bool = False

    def params(self) -> dict[str, Any]:
        """What a reader must know to repeat it."""
        image, responses = (self.side // 28) ** 2, f"{self.prompts} x {self.responses} of {self.width}"
        sizes = {"layers": self.layers, "H": self.hidden, "V": self.vocab, "image": image, "responses": responses}
        return sizes | {"adamw": self.adamw, "checkpointing": self.checkpointing}


@dataclass
class Held:
    """A policy of random weights and what it is trained on. N responses, a prompt's beside each other; P prompts."""

    shape: Shape
    policy: Policy
    optimiser: Optimiser | None
    images: ImageCache
    pixels: PixelBatch  # of the P images
    blackened: PixelBatch
    prompts: list[list[int]]  # all of one length
    responses: list[list[list[int]]]
    of_rollout: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # states and log-probs, by pass

    @property
    def flat(self) -> list[list[int]]:
        return [response for group in self.responses for response in group]

    @property
    def mask(self) -> torch.Tensor:
        """(N, W) bool: where there is a token."""
        lengths = torch.tensor([len(response) for response in self.flat])
        return (torch.arange(self.shape.width) < lengths[:, None]).to(self.policy.device)


class _Pictures:
    """Noise of large blocks: an image of its own for each prompt."""

    def __init__(self, side: int) -> None:
        self.side = side

    def image(self, example_id: str) -> Image.Image:
        pixels = np.random.default_rng(int(example_id)).integers(0, 256, (8, 8, 3), np.uint8)
        return Image.fromarray(pixels).resize((self.side, self.side))


@lru_cache(maxsize=1)  # a large model leaves room for one
def held(shape: Shape, double: bool, device: torch.device) -> Held:
    """The same weights and data for every contender, in float32 or float64."""
    images = ImageCache(_Pictures(shape.side), 1 << 24)
    pictures = [images(str(i)) for i in range(shape.prompts)]
    with torch.device(device), torch.random.fork_rng(devices=[]):
        policy = _policy(shape, pictures)
    if double:
        policy.model.double()
    if shape.checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    count, width = shape.prompts * shape.responses, shape.width
    lengths = torch.randint(width // 2, width + 1, (count,), generator=generator)
    lengths[0] = width
    ids = [torch.randint(16, shape.vocab, (n,), generator=generator).tolist() for n in lengths.tolist()]
    prompts, pixels = policy.prompts([INSTRUCTION] * shape.prompts, pictures)
    return Held(
        shape,
        policy,
        Optimiser(policy.model, STILL) if shape.adamw else None,
        images,
        pixels,
        policy.perturbed(pixels, range(shape.prompts), patch_size=14, probability=0.5),
        prompts,
        [ids[start : start + shape.responses] for start in range(0, count, shape.responses)],
    )


def _policy(shape: Shape, pictures: list[Image.Image]) -> Policy:
    """Weights that keep a token's size through the layers, and logits of standard deviation 2."""
    layers, width, heads, mlp = shape.vision
    config = TinyVLMConfig(
        hidden_size=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vision_layers=layers,
        vision_hidden_size=width,
        vision_heads=heads,
        vision_intermediate_size=mlp,
        vocab_size=512,
        max_pixels=shape.side**2,
    )
    policy = build_tiny_vlm(config, [INSTRUCTION], images=pictures)
    policy.model.resize_token_embeddings(shape.vocab, mean_resizing=False)
    policy.suppressed_ids = []  # plain PyTorch's logits have no bias
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.text_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        policy.head_weight.mul_(2.0)
    return policy


@dataclass(frozen=True)
class Targets:
    """What the loss is made of besides the model, (N, W) each but for the advantages (N,)."""

    old_logps: torch.Tensor
    scores: torch.Tensor
    advantages: torch.Tensor


@dataclass
class MeasuredOptimiser:
    """In the optimiser's place: its seconds, the gradient's norm and, with `keep`, all gradients end to end.

    Without AdamW, whose state would not fit, it clips alone."""

    held: Held
    keep: bool
    gradients: torch.Tensor | None = None
    norm: float = 0.0
    seconds: float = 0.0

    def step(self, step: int, steps: int) -> dict[str, float | bool]:
        model, watch = self.held.policy.model, Stopwatch()
        if self.keep:
            self.gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        synchronize(self.held.policy.device)
        with watch.part("optimiser"):
            norms = self._step(model, step, steps)
            synchronize(self.held.policy.device)
        self.norm, self.seconds = norms["grad_norm"], watch.seconds["optimiser"]
        return norms

    def _step(self, model: torch.nn.Module, step: int, steps: int) -> dict[str, float | bool]:
        if self.held.optimiser is not None:
            return self.held.optimiser.step(step, steps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), STILL.max_grad_norm)
        model.zero_grad(set_to_none=True)
        return {"lr": 0.0, "grad_norm": float(norm), "skipped": False}


Views = Callable[[Held], tuple[torch.Tensor, torch.Tensor]]
Update = Callable[[Held, Targets, MeasuredOptimiser], float]


class Step:
    """A contender: one whole step. `facts` says where the time of the last calls went, and what they computed.

    Inputs: the shape, advantages (N,) in the dtype that is computed in (bfloat16: float32 weights under autocast),
    scores and log_ratio (N, W), gradients: whether they are among the results.
    """

    def __init__(self, views: Views, update: Update) -> None:
        self.views, self.update = views, update
        self.seen: dict[Any, list[dict[str, float]]] = defaultdict(list)

    def __call__(self, shape, advantages, scores, log_ratio, gradients) -> dict[str, torch.Tensor]:
        dtype, device = advantages.dtype, advantages.device
        here, watch = held(shape, dtype == torch.float64, device), Stopwatch()
        here.policy.compute = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimiser = MeasuredOptimiser(here, gradients)
        with watch.part("perception"):
            divergence, logps = self.views(here)
            synchronize(device)
        # The filter takes given scores: those of the two views would let a rounding choose other tokens.
        wide = advantages.to(torch.promote_types(dtype, torch.float32))
        targets = Targets((logps - log_ratio) * here.mask, scores, wide)
        with watch.part("update"):
            loss = self.update(here, targets, optimiser)
        by_part = {"perception": watch.seconds["perception"], "optimiser": optimiser.seconds}
        by_part["update"] = watch.seconds["update"] - optimiser.seconds
        self.seen[shape, dtype].append({f"{k} s": v for k, v in by_part.items()} | {"gradient norm": optimiser.norm})
        loss = torch.tensor(loss, dtype=torch.float64, device=device)
        return {"kl": divergence, "logps": logps, "value": loss, "d_weights": optimiser.gradients}

    def facts(self, shape, advantages, **_: Any) -> dict[str, float]:
        last = self.seen[shape, advantages.dtype][-TIMED:]
        return {name: median(call[name] for call in last) for name in last[0]}


def micro_batches(here: Held) -> Iterator[slice]:
    """The rows of each forward pass with a row for each response."""
    for start in range(0, here.shape.prompts * here.shape.responses, here.shape.rows):
        yield slice(start, start + here.shape.rows)
