"""Pictures for the report: the examples that it shows, whole, blanked and with blackened patches."""

from __future__ import annotations

from pathlib import Path

from mmrpt.data.images import blacken_patches, blank, seed_of
from mmrpt.data.jsonl import read_jsonl
from mmrpt.settings import Settings
from mmrpt.sources import Sources

PICTURES_PER_SOURCE = 6


def write_gallery(folder: Path, sources: Sources, settings: Settings) -> None:
    """images/<id>.png, <id>_blanked.png and <id>_perturbed.png of the first examples of each file that shows some.

    Training examples come from samples.jsonl (its last steps), held-out ones from answers.jsonl (first of each set).
    """
    target = folder / "images"
    target.mkdir(exist_ok=True)
    wanted = [(sources.train, _ids(folder / "samples.jsonl", last=True))]
    for name, source in sources.held_out.items():
        wanted.append((source, _ids(folder / "answers.jsonl", where=("set", name))))
    options = settings.perception
    for source, ids in wanted:
        for example_id in ids:
            image = source.image(example_id)
            stem = target / example_id.replace("/", "_")
            image.save(f"{stem}.png")
            blank(image).save(f"{stem}_blanked.png")
            perturbed = blacken_patches(
                image,
                seed=seed_of("gallery", example_id),
                patch_size=options.patch_size,
                probability=options.probability,
            )
            perturbed.save(f"{stem}_perturbed.png")


def _ids(path: Path, *, last: bool = False, where: tuple[str, str] | None = None) -> list[str]:
    rows = read_jsonl(path) if path.exists() else []
    if where is not None:
        rows = [r for r in rows if r[where[0]] == where[1]]
    ids = list(dict.fromkeys(r["example_id"] for r in rows))
    return ids[-PICTURES_PER_SOURCE:] if last else ids[:PICTURES_PER_SOURCE]
