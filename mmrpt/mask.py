"""The command line: `python -m mmrpt.mask [--shard i/n] [--parquet] [--config file.yaml] [--resume] [key=value ...]`.

Turns image-caption pairs into masked samples with any vision-language model. It takes train's settings, of which it
reads data, model, prompts and masking:

    python -m mmrpt.mask data.pairs=rows.jsonl model.path=Qwen/Qwen2.5-VL-3B-Instruct device=cuda name=mine

leaves masked.jsonl, scores.jsonl, rejected.jsonl, masking.json, card.md and card.html in runs/mine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmrpt.command_line import give_back, joined_run, option_parser, resolve_run, tell
from mmrpt.processes import one_at_a_time, part_of
from mmrpt.settings import Settings, flatten, given_settings, load_settings, to_yaml

if TYPE_CHECKING:
    import torch

    from mmrpt.masking.forward import CaptionModel
    from mmrpt.masking.shards import Shards
    from mmrpt.types import PairSource

LOCK = ".masking.lock"


def main(arguments: Sequence[str] | None = None) -> int:
    """Masks a corpus, or one process's part of it; 0 when it ended, 2 at an error that a user can mend."""
    parser = option_parser("python -m mmrpt.mask", "Hide the words of captions that need their image.")
    parser.add_argument("--parquet", action="store_true", help="also write masked.parquet, with the pictures")
    parser.add_argument(
        "--shard", metavar="i/n", help="work as process i of n on the run of that name; the last to end finishes it"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = load_settings(options.config, options.overrides)
        if options.show:
            print(to_yaml(settings), end="")
            return 0
        part, parts = part_of(options.shard)
        given = flatten(given_settings(options.config, options.overrides))
        settings = (
            joined_run(settings, given) if parts > 1 else resolve_run(settings, resume=options.resume, given=given)
        )
        try:
            job = _open(settings, part, parts)
        except (OSError, ValueError):
            if parts == 1 and not options.resume:  # the mended command must find its name free
                give_back(settings.run_dir)
            raise
        _work(job, parquet=options.parquet)
    except (OSError, ValueError) as error:
        return tell(error)
    return 0


@dataclass(frozen=True)
class Job:
    """What one process masks: the shards whose number is `part` modulo `parts`."""

    settings: Settings
    source: PairSource
    shards: Shards
    model: CaptionModel | None  # None where nothing is left that needs it
    part: int
    parts: int

    def autocast(self) -> AbstractContextManager[Any]:
        """What the model's forward passes run under."""
        import torch

        if self.model is None or self.settings.model.compute == "float32":
            return nullcontext()
        return torch.autocast(self.model.head_weight.device.type, getattr(torch, self.settings.model.compute))


def _open(settings: Settings, part: int, parts: int) -> Job:
    """Opens pairs and model. Raises OSError or ValueError with the remedy."""

    from mmrpt.engines.run import device_of_process, prepare_machine
    from mmrpt.masking.select import SUMMARY
    from mmrpt.masking.shards import Shards

    device = prepare_machine(settings, device_of_process(settings.device))
    source = _open_source(settings)
    shards = Shards(settings.run_dir / "scores", settings.captions_to_score(len(source)))
    needed = bool(shards.missing(part, parts)) or settings.masking.max_blind is not None
    done = (settings.run_dir / SUMMARY).exists()
    model = _open_model(settings, source, device) if needed and not done else None
    return Job(settings, source, shards, model, part, parts)


def _work(job: Job, *, parquet: bool) -> None:
    """Scores the job's shards, and where all are there makes the masked samples and the card."""
    from mmrpt.masking.pipeline import score_corpus
    from mmrpt.masking.select import SUMMARY

    folder = job.settings.run_dir
    if job.model is not None:
        with job.autocast():
            score_corpus(job.model, job.source, job.shards, job.settings, job.part, job.parts)
    missing = job.shards.missing()
    if missing and not (folder / SUMMARY).exists():  # which is written before another process removes the shards
        print(
            f"part {job.part} of {job.parts} is scored, {len(missing)} of {job.shards.count} shards are not: the "
            "process that scores the last one goes on. Or run again with --resume and without --shard."
        )
        return
    with one_at_a_time(folder / LOCK):
        _finish(job, parquet=parquet)


def _finish(job: Job, *, parquet: bool) -> None:
    from mmrpt.masking.card import PAGE, write_card
    from mmrpt.masking.parquet import PARQUET, write_parquet
    from mmrpt.masking.select import MASKED, select_masks

    settings, folder = job.settings, job.settings.run_dir
    with job.autocast():
        summary = select_masks(job.model, job.source, job.shards, settings, folder)
    if not (folder / PAGE).exists():
        write_card(folder, job.source, settings)
    if parquet and not (folder / PARQUET).exists():
        write_parquet(folder, job.source, settings.prompts)
    job.shards.remove()
    if summary["warning"]:
        print(f"warning: {summary['warning']}", file=sys.stderr)
    rejected = sum(summary["rejected"].values())
    print(f"{summary['samples']:,} masked samples of {summary['captions']:,} captions ({rejected:,} rows rejected)")
    print(f"samples: {folder / MASKED}\ncard: {folder / PAGE}")


def _open_source(settings: Settings) -> PairSource:
    """All pairs of a corpus, those that training would hold out included; of the demo's world its training pairs."""
    from mmrpt.sources import open_given, open_sources

    return open_sources(settings).train if settings.data.pairs is None else open_given(settings)


def _open_model(settings: Settings, source: PairSource, device: torch.device) -> CaptionModel:
    from mmrpt.corpus import GoodRows, RejectedRows
    from mmrpt.engines.run import given_policy
    from mmrpt.masking.forward import PolicyModel
    from mmrpt.scale import with_tiny_model
    from mmrpt.sources import Sources
    from mmrpt.world.warm_start import build_start_policy

    given = with_tiny_model(settings).model
    if given.path is not None:
        return PolicyModel(given_policy(given, device))
    print("model.path is null: the tiny model scores untrained, which shows that all works and nothing else.")
    with TemporaryDirectory() as folder:  # each process meets the first bad rows; they are named when all is scored
        if settings.data.pairs is not None:
            source = GoodRows(source, RejectedRows(Path(folder) / "rejected.jsonl", 1.0))
        policy = build_start_policy(settings, Sources(source, source, {}, None))
    policy.model.to(device)
    return PolicyModel(policy)


if __name__ == "__main__":
    sys.exit(main())
