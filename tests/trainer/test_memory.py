"""Estimates of memory against what PyTorch's allocator gave out for the same work with weights and data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from benchmarks import costs
from benchmarks.measure import peak_bytes
from mmrpt.batching import split_rows
from mmrpt.engines.estimate import DEMO_TEXT, Work, captions, estimate, largest_image, perceive, sample, score, update
from mmrpt.engines.run import prepare_policy
from mmrpt.memory import FOUR_BITS, WEIGHTS, Ledger, measured, shape_of, shape_policy
from mmrpt.optimiser import Optimiser
from mmrpt.settings import Settings, TinyVLMConfig, load_settings
from mmrpt.world.tiny_vlm import build_tiny_vlm
from mmrpt_kernels import linear_logprobs, linear_policy_loss
from mmrpt_kernels.lm_head.chunk_sizes import sized_for
from tests.trainer.conftest import SMALL_RUN, TINY, ColourPairs
from tests.trainer.shapes import write_shape

CPU = torch.device("cpu")
GIB = 2**30
WIDE = TinyVLMConfig(hidden_size=256, layers=6, heads=8, kv_heads=4, intermediate_size=704, vocab_size=8192)
HEAD = replace(TINY, hidden_size=64, vocab_size=8192)
COMMON = (
    "masking.batch_tokens=600",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rl.groups_per_step=3",
    "rl.caption_weight=0",
)
UPDATE = ("update", "update: optimiser")
EVERY = ("scoring", "sampling", "perception", *UPDATE, "control", "control: optimiser")
HALF, TWICE = "model.compute=bfloat16", "model.gradient_checkpointing=true"
LORA = ("model.path=/m", "model.lora.rank=4", "model.max_pixels=12544", "rl.optimiser.kind=adamw", "warmup.steps=0")
CASES = {
    "every phase": (TINY, (), EVERY),
    "several passes a step": (TINY, (HALF, "model.batch_tokens=200", "warmup.batch_size=2"), (*UPDATE, "control")),
    "checkpointing": (TINY, (TWICE,), UPDATE),
    "captions beside answers": (TINY, ("rl.caption_weight=0.3",), ("update",)),
    "vision tower frozen": (TINY, (HALF, "model.freeze=[vision]"), UPDATE),
    "adapters": (TINY, (*LORA, "rollout.max_new_tokens=6"), ("sampling", *UPDATE)),
    "reference model": (TINY, ("rl.kl_coef=0.1", "perception.enabled=false"), ("perception", "update")),
    "most memory in the head": (HEAD, (HALF, "rollout.max_new_tokens=12"), ("perception", *UPDATE)),
}
SLOW = (
    "several passes a step",
    "captions beside answers",
    "vision tower frozen",
    "most memory in the head",
    "reference model",
)
WIDE_CASES = {"float32": (), "bfloat16": (HALF,), "checkpointing": (TWICE,), "both": (HALF, TWICE)}


def settings_of(*overrides: str) -> Settings:
    return load_settings(None, [*SMALL_RUN, *COMMON, "model.batch_tokens=3000", "warmup.steps=0", *overrides])


def start(sizes: TinyVLMConfig, settings: Settings) -> Work:
    """The policy with weights, of a vocabulary as large as the sizes say."""
    policy = build_tiny_vlm(sizes, [ColourPairs()[i].caption for i in range(4)])
    if sizes.vocab_size > policy.head_weight.shape[0]:  # the tokenizer found no more words
        policy.model.resize_token_embeddings(sizes.vocab_size)
    policy.suppressed_ids = [*policy.suppressed_ids, policy.eos_token_id]  # answers are as long as they may be
    policy.model.to(getattr(torch, settings.model.dtype))
    prepare_policy(policy, settings)
    policy.model.train()
    policy.image_processor = InTorchsMemory(policy.image_processor)
    return Work(policy, settings, largest_image(settings, policy.model.config.vision_config), DEMO_TEXT)


class InTorchsMemory:
    """An image processor whose pixels PyTorch's allocator holds, as on a GPU; on a CPU NumPy's does."""

    def __init__(self, processor) -> None:
        self.processor = processor

    def __call__(self, **options):
        return {name: value.clone() for name, value in self.processor(**options).items()}

    def __getattr__(self, name):
        return getattr(self.processor, name)


class NoStep:
    def step(self, step: int, steps: int) -> dict[str, bool]:
        return {"skipped": False}


def real_peaks(work: Work, phases: tuple[str, ...]) -> dict[str, int]:
    """The allocator's peak of each phase, what was there before it included."""
    settings, model = work.settings, work.policy.model
    learning = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    gradients = sum(p.nbytes for p in learning)

    def peak(before: int, function, *arguments) -> int:
        return before + peak_bytes(lambda: function(*arguments), CPU)

    def fill() -> None:
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)

    found = {"scoring": peak(weights, score, work)} if "scoring" in phases else {}
    optimiser = Optimiser(model, settings.rl.optimiser)
    fill()
    optimiser.step(0, 1)
    base = weights + sum(x.nbytes for part in optimiser.parts for s in part.state.values() for x in s.values())
    base += sum(p.nbytes for p in model.parameters()) if settings.rl.kl_coef else 0
    rollout, tokens = settings.rollout, settings.rollout.max_new_tokens
    shape = rollout.prompts * rollout.group_size, tokens, work.policy.head_weight.shape[1]
    kept = torch.zeros(shape) if settings.perception.enabled else torch.zeros(0)
    images = work.pixels(rollout.prompts)
    pixels = images.pixel_values
    if "sampling" in phases:
        how = rollout.prompts, rollout.group_size, tokens, rollout.temperature
        found["sampling"] = peak(base + kept.nbytes + pixels.nbytes, sample, work, images, *how)
    if "perception" in phases:  # the round's images, and a copy of those whose groups have a signal
        found["perception"] = peak(base + kept.nbytes + 2 * pixels.nbytes, perceive, work, kept)
    passes = len(split_rows(work.captions(), settings.model.batch_tokens))
    for name, function, many in (("update", update, work.answers()[2]), ("control", captions, passes > 1)):
        base -= sum(p.nbytes for p in model.parameters()) if settings.rl.kl_coef and name == "control" else 0
        if name in phases:
            if many:
                fill()
            found[name] = peak(base + many * gradients, function, work, NoStep())
            found[f"{name}: optimiser"] = peak(base + gradients, optimiser.step, 0, 1)
    return {name: found[name] for name in phases}


def check_estimates(sizes: TinyVLMConfig, settings: Settings, phases: tuple[str, ...]) -> None:
    work = start(sizes, settings)
    wanted = real_peaks(work, phases)
    config = start(sizes, settings_of()).policy.model.config
    only = None if phases == EVERY else [name.partition(":")[0] for name in phases]
    found = {}
    for name in [None] if only is None else dict.fromkeys(only):
        found |= estimate(settings, config, "cpu", only=name, text=DEMO_TEXT).phases
    found = {name: sum(parts.values()) for name, parts in found.items()}
    print({name: (found[name], wanted[name], round(found[name] / wanted[name], 3)) for name in wanted})
    for name in phases:
        assert abs(found[name] - wanted[name]) < 0.1 * wanted[name], (name, found[name], wanted[name])


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_an_estimate_is_within_a_tenth_of_the_allocators_peak(case):
    sizes, overrides, phases = CASES[case]
    check_estimates(sizes, settings_of(*overrides), phases)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE_CASES)
def test_the_same_of_a_model_whose_activations_matter(case):
    check_estimates(WIDE, settings_of(*WIDE_CASES[case]), EVERY)


# ------------------------------------------------------------------------------------------------ a GPU's sizes


@pytest.mark.parametrize("case", ["policy loss, keep 40 %", "log-probs, forward"])
def test_the_lm_head_of_a_gpu_takes_what_its_own_path_counts(case):
    """`benchmarks.costs` runs the GPU's path; here the portable one in the GPU's sizes, 152,064 words wide."""
    _, shape, _ = costs.CASES[case]
    shape = replace(shape, tokens=4096)
    wanted = costs.count(costs.CASES[case][0], shape).peak_bytes
    hidden, weight = (
        shape_of(torch.empty(size, dtype=shape.dtype, device="meta")).requires_grad_()
        for size in ((1, shape.tokens, shape.hidden), (shape.vocab, shape.hidden))
    )
    ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
    response, kept = torch.ones_like(ids).bool(), torch.arange(shape.tokens)[None] < shape.kept
    ledger = Ledger()
    ledger.hold([hidden, weight], WEIGHTS)
    with sized_for("cuda"), ledger:
        if case.startswith("policy"):
            masks = {"response_mask": response, "perception_mask": kept, "old_logps": torch.zeros(1, shape.tokens)}
            linear_policy_loss(hidden, weight, ids, torch.ones(1), **masks).loss.backward()
        else:
            with torch.no_grad():
                linear_logprobs(hidden, weight, ids)
    found = ledger.peak_bytes - hidden.nbytes - weight.nbytes
    assert abs(found - wanted) < 0.1 * wanted, (found, wanted)


# ------------------------------------------------------------------------------------------------ real shapes


PUBLISHED = {"Qwen2.5-VL-3B": 3_754_622_976, "Qwen2.5-VL-7B": 8_292_166_656}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_real_model_has_its_published_parameters_and_takes_their_bytes(shape, tmp_path):
    config = AutoConfig.from_pretrained(write_shape(tmp_path, shape))
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        policy = shape_policy(config, dtype, 980, lambda policy: None)
        assert sum(p.numel() for p in policy.model.parameters()) == PUBLISHED[shape]
        with measured(policy, "cuda") as ledger:
            buffers = sum(b.nbytes for b in policy.model.buffers())
            assert ledger.peak_bytes == size * PUBLISHED[shape] + buffers and buffers < 2000


def test_weights_of_four_bits_are_the_decoders_matrices(tmp_path):
    """By hand: 36 layers of queries, keys, values, output and three matrices of the MLP."""
    config = AutoConfig.from_pretrained(write_shape(tmp_path, "Qwen2.5-VL-3B"))
    policy = shape_policy(config, torch.bfloat16, 980, lambda policy: policy.model.requires_grad_(False))
    matrices = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    rest = PUBLISHED["Qwen2.5-VL-3B"] - matrices
    with measured(policy, "cuda", quantized=True) as ledger:
        assert ledger.live[WEIGHTS] == pytest.approx(2 * rest + FOUR_BITS * matrices, rel=1e-5)


# ------------------------------------------------------------------------------------------------ laws


@pytest.fixture(scope="module")
def config():
    return start(TINY, settings_of()).policy.model.config


@pytest.mark.slow
def test_smaller_passes_and_checkpointing_never_need_more(config):
    def peak(*overrides: str) -> int:
        return estimate(settings_of(HALF, *overrides), config, "cpu", only="update").peak

    for more in ((), (TWICE,)):
        by_tokens = [peak(f"model.batch_tokens={tokens}", *more) for tokens in (150, 500, 3000)]
        assert by_tokens == sorted(by_tokens) and by_tokens[0] < by_tokens[-1]
    assert peak(TWICE) < peak()


def test_the_images_of_a_round_take_nothing_of_a_gpu(config):
    def parts(device_type: str, prompts: int) -> dict[str, int]:
        settings = settings_of(f"rollout.prompts={prompts}", "rollout.batch_size=4", "rollout.keep_hidden_mb=0")
        return estimate(settings, config, device_type, only="sampling").phases["sampling"]

    more, few = parts("cpu", 12), parts("cpu", 3)
    assert sum(more.values()) > sum(few.values()) and more["images of a round"] == 4 * few["images of a round"]
    grids = (12 - 3) * 3 * 8  # of the images: three int64 each
    assert sum(parts("cuda", 12).values()) == sum(parts("cuda", 3).values()) + grids


def test_a_ledger_counts_what_is_alive_and_by_part():
    weight = shape_of(torch.empty(100, 100)).requires_grad_()
    ledger = Ledger()
    ledger.hold([weight], WEIGHTS)
    with ledger:
        ledger.part = "one"
        first = weight * 2
        view = first[:10]
        ledger.part = "two"
        second = torch.empty(1000)
        del second
        third = first.detach() + 1
        ledger.hold([third], "one")
    assert ledger.live == {WEIGHTS: 40_000, "one": 80_000, "two": 0}
    assert ledger.peak == {WEIGHTS: 40_000, "one": 40_000, "two": 40_000} and ledger.peak_bytes == 120_000
    del first, third
    assert ledger.live["one"] == 40_000  # the view holds its storage
    del view
    ledger.restart()
    assert ledger.live["one"] == 0 and ledger.peak_bytes == 40_000
