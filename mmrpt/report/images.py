"""Pictures for the report: small copies of the examples that it shows, plain, blanked and with blackened patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmrpt.data.images import blacken_patches, blank, seed_of
from mmrpt.data.jsonl import read_jsonl
from mmrpt.report.read import image_name
from mmrpt.types import PairSource

PICTURES_PER_SOURCE = 6
MAX_SIDE = 256  # pixels


def write_images(
    folder: Path, train: PairSource, held_out: Mapping[str, PairSource], *, patch_size: int, probability: float
) -> None:
    """images/<id>.png, <id>_blanked.png and <id>_perturbed.png, at most 256 pixels wide and high.

    Training examples come from samples.jsonl (its last steps), held-out ones from answers.jsonl (first of each set).
    Patches are blackened before a picture is made small, as they are in training.
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
        seed = seed_of("gallery", example_id)
        perturbed = blacken_patches(image, seed=seed, patch_size=patch_size, probability=probability)
        for suffix, shown in (("", image), ("_blanked", blank(image)), ("_perturbed", perturbed)):
            small = shown.copy()
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            small.save(folder / "images" / image_name(example_id, suffix))


def _ids(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["example_id"] for row in rows))
