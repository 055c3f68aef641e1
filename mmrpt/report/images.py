"""Pictures for the report: small copies of the examples that it shows, plain, blanked and with blackened patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from mmrpt.corpus import read_jsonl, seed_of
from mmrpt.perturbation import blank
from mmrpt.report.read import image_name
from mmrpt.types import PairSource

PICTURES_PER_SOURCE = 6
MAX_SIDE = 256  # pixels


def write_images(
    folder: Path,
    train: PairSource,
    held_out: Mapping[str, PairSource],
    perturbed: Callable[[Image.Image, int], Image.Image],
) -> None:
    """images/<id>.png, <id>_blanked.png and <id>_perturbed.png, at most 256 pixels wide and high.

    Training examples come from samples.jsonl (its last steps), held-out ones from answers.jsonl (first of each set).
    `perturbed(image, seed)` is made before a picture is made small.
    """
    (folder / "images").mkdir(exist_ok=True)
    samples, answers = (
        read_jsonl(path) if (path := folder / name).exists() else [] for name in ("samples.jsonl", "answers.jsonl")
    )
    wanted = [(train, _ids(samples)[-PICTURES_PER_SOURCE:])]
    for name, source in held_out.items():
        wanted.append((source, _ids([row for row in answers if row["set"] == name])[:PICTURES_PER_SOURCE]))
    for source, example_id in [(source, one) for source, ids in wanted for one in ids]:
        image = source.image(example_id)
        patched = perturbed(image, seed_of("gallery", example_id))
        for suffix, shown in (("", image), ("_blanked", blank(image)), ("_perturbed", patched)):
            small = shown.copy()
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            small.save(folder / "images" / image_name(example_id, suffix))


def _ids(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["example_id"] for row in rows))
