"""PerceptionGRPOTrainer with models of seven families and their own processors: whose images it perturbs, and how."""

from __future__ import annotations

import importlib
import warnings
import zlib
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")

from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from mmrpt.families import make_image_processor  # noqa: E402
from mmrpt.integrations.trl import PerceptionGRPOTrainer  # noqa: E402
from mmrpt.settings import PerceptionSettings  # noqa: E402
from mmrpt.world.tiny_vlm import CHAT_TEMPLATE  # noqa: E402
from tests.trainer.family_policies import MARKER, PATCH, build_model, make_tokenizer, pictures  # noqa: E402

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "smolvlm", "gemma3")
QWEN = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
SQUARE = {"height": 16, "width": 16}
# The processor, its image processor without torchvision, and settings of the two for the tiny models.
OTHERS = {
    "llava": (
        "LlavaProcessor",
        "llava.image_processing_pil_llava.LlavaImageProcessorPil",
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
    ),
    "internvl": (
        "InternVLProcessor",
        "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
        {"image_seq_length": 4, "video_processor": None},
        {"size": SQUARE},
    ),
    "smolvlm": (
        "SmolVLMProcessor",
        "smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil",
        {"image_seq_len": 4, "video_processor": SimpleNamespace(num_frames=1, fps=1)},
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
    ),
    "gemma3": (
        "Gemma3Processor",
        "gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
        {"image_seq_length": 4},
        {"size": SQUARE},
    ),
}
START, END = "<|vision_start|>", "<|vision_end|>"
# What the families' own tokenizers know.
TOKENS = {"image_token": MARKER, "context_image_token": MARKER, "video_token": "<|video_pad|>"}
TOKENS |= {"start_image_token": START, "end_image_token": END, "boi_token": START, "eoi_token": END}
IMAGES = pictures((32, 32), (32, 16))
SHOWN = ([0], [1, 0])  # images of a row
ROWS = (0, 0, 1, 1)
ORDER = [image for row in ROWS for image in SHOWN[row]]
TILES = {"internvl": (5, 3), "smolvlm": (5, 3)}  # of each image: 16 x 16 pixels, and the whole once more


def make_processor(family: str, tokenizer):
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for name, token in TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    # Gemma's processor puts all of the image's tokens in the place of its first.
    template = CHAT_TEMPLATE.replace(START + MARKER + END, START) if family == "gemma3" else CHAT_TEMPLATE
    if family in QWEN:
        name, settings = QWEN[family], {"video_processor": None}
        image_processor = make_image_processor(PATCH, 64 * 64)
    else:
        name, image_class, settings, image_settings = OTHERS[family]
        module, image_class = f"transformers.models.{image_class}".rsplit(".", 1)
        image_processor = getattr(pytest.importorskip(module), image_class)(**image_settings)
    # The video part needs torchvision: a stand-in or None must do.
    unchecked = {"check_argument_for_proper_class": lambda self, name, part: None}
    cls = type(name, (getattr(transformers, name),), unchecked)
    numbers = nullcontext()
    if family == "smolvlm":  # which counts a video's frames in words, and refuses to start without them
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        numbers = mock.patch.object(module, "num2words", str)
    with numbers:
        return cls(image_processor=image_processor, tokenizer=tokenizer, chat_template=template, **settings)


def reward(completion_ids, **_) -> list[float]:
    return [float(zlib.crc32(str(ids).encode()) % 7) for ids in completion_ids]


def make_dataset() -> Dataset:
    texts = ("restore: a card", "describe")
    rows = [
        {"prompt": [{"role": "user", "content": text}], "shown": shown}
        for text, shown in zip(texts, SHOWN, strict=True)
    ]

    def with_images(batch):
        return batch | {"images": [[IMAGES[i] for i in shown] for shown in batch["shown"]]}

    return Dataset.from_list(rows).with_transform(with_images)


def make_trainer(family: str, folder) -> PerceptionGRPOTrainer:
    tokenizer = make_tokenizer()
    settings = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(ROWS),
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return PerceptionGRPOTrainer(
        build_model(family, tokenizer),
        [reward],
        args=settings,
        train_dataset=make_dataset(),
        processing_class=make_processor(family, tokenizer),
        perception=PerceptionSettings(patch_size=8),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def batch(request, tmp_path_factory):
    """The family's trainer, and a batch of its rows as TRL makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(request.param, tmp_path_factory.mktemp(request.param))
        trainer.model.train()
        rows = [trainer.train_dataset[i] for i in ROWS]
        out = GRPOTrainer._generate_and_score_completions(trainer, rows)
    return SimpleNamespace(family=request.param, trainer=trainer, rows=rows, out=out)


def of_each_image(batch, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The pixels of the batch's images, in the order of ORDER, without padding."""
    if "image_grid_thw" in batch.out:
        return pixels.split(batch.out["image_grid_thw"].prod(-1).tolist())
    if batch.family == "smolvlm":  # rows of tiles, padded
        pixels = pixels[batch.out["pixel_attention_mask"].flatten(2).any(-1)]
    tiles = TILES.get(batch.family, (1, 1))
    return pixels.split([tiles[image] for image in ORDER])


def test_patches_keep_the_shape_and_belong_to_image_and_step(batch, monkeypatch):
    trainer, clean = batch.trainer, batch.out["pixel_values"]
    now = trainer._perturbed_pixels(batch.out, batch.rows)
    monkeypatch.setattr(trainer.state, "global_step", trainer.state.global_step + 1)
    later = trainer._perturbed_pixels(batch.out, batch.rows)
    assert now.shape == later.shape == clean.shape and now.dtype == later.dtype == clean.dtype
    parts = list(zip(*(of_each_image(batch, pixels) for pixels in (clean, now, later)), strict=True))
    for image, views in zip(ORDER, parts, strict=True):
        for view, first in zip(views, parts[ORDER.index(image)], strict=True):
            assert torch.equal(view, first)
        assert len({view.numpy().tobytes() for view in views}) == 3


def test_a_black_patch_is_black_and_padding_stays_padding(batch, monkeypatch):
    monkeypatch.setattr(batch.trainer, "perception", PerceptionSettings(probability=1.0))
    pixels = batch.trainer._perturbed_pixels(batch.out, batch.rows)
    processor = batch.trainer.processing_class.image_processor
    black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
    for part in of_each_image(batch, pixels):
        part = part.reshape(len(part), 3, -1)
        torch.testing.assert_close(part, black[:, None].expand_as(part), rtol=1e-5, atol=1e-6)
    if batch.family == "smolvlm":
        mask = batch.out["pixel_attention_mask"].bool()
        assert not mask.all() and not pixels.masked_fill(mask[:, :, None], 0.0).any()


def test_the_model_says_something_else_of_the_black_patches(batch):
    """Every response's first token, whose words the two views have in common."""
    trainer, out = batch.trainer, batch.out
    black = trainer._perturbed_pixels(out, batch.rows)
    with torch.no_grad():
        true, blind = (trainer._score(out | view, compute_entropy=False)[0] for view in ({}, {"pixel_values": black}))
    assert (true - blind)[:, 0].abs().min() > 100 * torch.finfo(torch.float32).eps
    scores, logps = trainer._token_perception(out, batch.rows)
    response = out["completion_mask"].bool()
    torch.testing.assert_close(logps[response], true[response], rtol=1e-4, atol=1e-5)
    assert scores[:, 0].min() > 1e-5


@pytest.mark.parametrize("batch", ["smolvlm"], indirect=True)
def test_rows_stay_padded_to_what_a_longer_row_left(batch):
    """As when that row's group was exchanged for another."""
    wanted = batch.trainer._perturbed_pixels(batch.out, batch.rows)
    kept = [0, 1, 1, 0]
    out = batch.out | {name: batch.out[name][kept] for name in ("pixel_values", "pixel_attention_mask")}
    assert out["pixel_attention_mask"].flatten(2).any(-1).sum(-1).tolist() == [5] * 4 and wanted.shape[1] == 8
    assert torch.equal(batch.trainer._perturbed_pixels(out, [batch.rows[i] for i in kept]), wanted[kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training(family, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(family, tmp_path)
        trainer.train()
    (step,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert step["perception/score"] > 0 and 0 < step["perception/kept"] < 1 and step["grad_norm"] > 0
