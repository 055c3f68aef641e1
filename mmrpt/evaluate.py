"""The command line: `python -m mmrpt.evaluate FOLDER_OR_HUB [more ...] [--samples N] [--sampled K] [--out folder] ...`.

Asks models to restore hidden words of held-out pairs with the image, with it blanked and with another's. It takes
train's settings, of which it reads data, prompts, evaluation, rollout.max_new_tokens, model.dtype, device and threads:

    python -m mmrpt.evaluate runs/demo/checkpoints/warmup runs/demo/checkpoints/rl --config runs/demo/config.yaml

prints a table and leaves evaluation.md, evaluation.json and answers.jsonl in runs/evaluate. Several processes share the
work where torchrun starts them, or --shard i/n, with one --out FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrpt.command_line import give_back, joined_run, option_parser, resolve_run, tell
from mmrpt.processes import one_at_a_time, part_of
from mmrpt.settings import Settings, SettingsError, flatten, given_settings, load_settings, to_yaml

if TYPE_CHECKING:
    import torch

    from mmrpt.corpus import RejectedRows
    from mmrpt.held_out import Sets
    from mmrpt.policy import Policy
    from mmrpt.sharded_evaluation import Parts
    from mmrpt.sources import Sources
    from mmrpt.types import MaskedSample, PairSource

NAME = "evaluate"  # of the folder, where --out names none
RESULT, REJECTED = "evaluation.json", "rejected.jsonl"
TABLES = "evaluation.md"  # written last
# Of several processes: what lets one in at a time, what they were asked besides settings, and their files.
LOCK, ASKED, PARTS = ".evaluation.lock", "asked.json", "parts"
OVERRIDE = re.compile(r"[\w.]+=.*", re.DOTALL)  # a folder with = in its name is given as ./name=1


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates models; 0 when it ended, 2 at an error that a user can mend, which is one message on stderr."""
    parser = option_parser("python -m mmrpt.evaluate", "How much models see of the image.", resume=False)
    parser.usage = f"{parser.prog} FOLDER_OR_HUB [more ...] [options] [key=value ...]"
    parser.add_argument("--samples", type=int, metavar="N", help="questions of each held-out set, or of --masked")
    parser.add_argument("--sampled", type=int, metavar="K", help="also K answers each at temperature 1, as avg@K")
    parser.add_argument("--masked", metavar="FILE", help="ask the questions of this masked.jsonl of data.pairs")
    parser.add_argument("--out", metavar="FOLDER", help="where the results go; default: a new one inside output")
    parser.add_argument(
        "--shard", metavar="i/n", help="answer as process i of n, all with one --out; the last to end finishes it"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        part, parts = part_of(options.shard)
        shared = parts > 1 or options.shard is not None
        overrides = _overrides(options)
        settings = _settings(options, overrides, shared)
        if options.show:
            print(to_yaml(settings), end="")
            return 0
        models = _models(options)
        from mmrpt.families import model_folder  # torch takes seconds to load, and a misspelt setting is told before

        folders = {name: model_folder(name) for name in models}  # all, before the first is asked
        if shared:
            given = {"name", *flatten(given_settings(options.config, overrides))}
            settings = joined_run(settings, given, LOCK)
            _evaluate_part(settings, folders, options, part, parts)
            return 0
        settings = resolve_run(settings, resume=False, given=())
        try:
            _evaluate(settings, folders, options)
        except (OSError, ValueError) as error:
            if (settings.run_dir / RESULT).exists():
                return tell(error, f" (what the models before it gave is in {settings.run_dir})")
            give_back(settings.run_dir)  # the mended command must find the folder free
            raise
    except (OSError, ValueError) as error:
        return tell(error)
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings among the arguments, --samples and --sampled among them."""
    overrides = [text for text in options.overrides if OVERRIDE.fullmatch(text)]
    given = flatten(given_settings(None, overrides))
    if "name" in given or (options.out and "output" in given):
        raise SettingsError("name=... and output=... name the folder of a run: give --out FOLDER for the results.")
    for name in ("samples", "sampled"):
        if (count := getattr(options, name)) is not None:
            overrides.append(f"evaluation.{name}={count}")
    return overrides


def _settings(options: argparse.Namespace, overrides: Sequence[str], shared: bool) -> Settings:
    """The settings, whose run folder is that of the results: a settings file's name is that of the run it is from.

    `shared`: other processes may have made that folder.
    """
    settings = load_settings(options.config, overrides)
    if options.out is None:
        if shared:
            raise SettingsError("several processes need the folder of their common results: add --out FOLDER.")
        return replace(settings, name=NAME)
    out = Path(options.out).absolute()
    joined = shared and (out / LOCK).exists()
    if out.exists() and not joined and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"--out {options.out} exists already: choose another folder.")
    return replace(settings, output=str(out.parent), name=out.name)


def _models(options: argparse.Namespace) -> list[str]:
    models = [str(Path(text)) for text in options.overrides if not OVERRIDE.fullmatch(text)]
    if not models:
        raise SettingsError("no model was given: python -m mmrpt.evaluate FOLDER_OR_HUB, as runs/demo/checkpoints/rl.")
    if twice := sorted({model for model in models if models.count(model) > 1}):
        raise SettingsError(f"{', '.join(twice)} was given more than once.")
    return models


def _evaluate(settings: Settings, folders: Mapping[str, Path], options: argparse.Namespace) -> None:
    """Asks every model, writing after each what there is so far, then prints the tables."""
    from tqdm import tqdm

    from mmrpt.corpus import RejectedRows
    from mmrpt.held_out import CONDITIONS, evaluate_policy

    device = _device(settings)
    folder, sampled = settings.run_dir, settings.evaluation.sampled
    sources, sets = _questions(settings, options, RejectedRows(folder / REJECTED, settings.data.max_rejected))
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    with tqdm(total=len(CONDITIONS) * len(sets) * len(folders), desc="evaluate", unit="set") as bar:
        for name, model, policy in _opened(settings, folders, sources, device):
            with _memory_told(name):
                new_rows, new_answers = evaluate_policy(policy, name, sets, model, bar.update, sampled=sampled)
            del policy  # gone from memory before the next one comes
            rows, answers = rows + new_rows, answers + new_answers
            _write(folder, rows, answers)
    _finish(folder, list(folders))


def _evaluate_part(
    settings: Settings, folders: Mapping[str, Path], options: argparse.Namespace, part: int, parts: int
) -> None:
    """Asks every model this process's part, and where all parts are there leaves what one process would have left."""
    from tqdm import tqdm

    from mmrpt.corpus import RejectedRows
    from mmrpt.held_out import question_batches
    from mmrpt.sharded_evaluation import Parts

    folder, sampled = settings.run_dir, settings.evaluation.sampled
    with one_at_a_time(folder / LOCK):
        _hold_to(folder / ASKED, {"models": list(folders), "masked": options.masked})
    if (folder / TABLES).exists():
        print(f"evaluation: {folder} (finished before)")
        return
    device, shares = _device(settings), Parts(folder / PARTS, part, parts)
    own = replace(settings, output=str(shares.own.parent), name=shares.own.name)  # where its rejected rows are named
    sources, sets = _questions(own, options, RejectedRows(own.run_dir / REJECTED, settings.data.max_rejected))
    keys: dict[str, str] = {}
    count = len(range(part, len(question_batches(sets, settings)), parts))
    with tqdm(total=count * len(folders), desc=f"evaluate {part}/{parts}", unit="batch") as bar:
        for name, model, policy in _opened(settings, folders, sources, device):
            with _memory_told(name):
                keys[name] = shares.answer(policy, sets, model, bar.update, sampled=sampled)
            del policy
    with one_at_a_time(folder / LOCK):
        if (folder / TABLES).exists():  # another process was the last, and this one came too late for its files
            shares.remove()
            return
        _join(shares, folder, keys, sets, settings)


def _join(shares: Parts, folder: Path, keys: Mapping[str, str], sets: Sets, settings: Settings) -> None:
    """Makes the results of all parts and removes those, or says which are not there."""
    from mmrpt.sharded_evaluation import MissingParts

    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    try:
        for name, key in keys.items():
            new_rows, new_answers = shares.joined(key, name, sets, settings, sampled=settings.evaluation.sampled)
            rows, answers = rows + new_rows, answers + new_answers
    except MissingParts as missing:
        print(
            f"part {shares.part}/{shares.parts} is answered. {missing} The process that ends last goes on. Where one "
            "was lost, run the same again, or with --shard 0/1 in one process: no question is answered twice."
        )
        return
    for name in (REJECTED, "corpus.json"):  # every process made the same
        if (shares.own / name).exists():
            os.replace(shares.own / name, folder / name)
    _write(folder, rows, answers)
    _finish(folder, list(keys))
    shares.remove()


def _hold_to(path: Path, asked: dict[str, Any]) -> None:
    """Writes into `path` what is asked; raises SettingsError where other processes were asked something else."""
    from mmrpt.corpus import write_json

    if not path.exists():
        write_json(path, asked)
    if (theirs := json.loads(path.read_text(encoding="utf-8"))) != asked:
        raise SettingsError(f"{path} says {theirs}, and this process was given {asked}: choose another --out folder.")


def _device(settings: Settings) -> torch.device:
    from mmrpt.engines.run import device_of_process, prepare_machine

    return prepare_machine(settings, device_of_process(settings.device))


def _opened(
    settings: Settings, folders: Mapping[str, Path], sources: Sources, device: torch.device
) -> Iterator[tuple[str, Settings, Policy]]:
    """Each model with its name and the settings that it is asked under."""
    from mmrpt.engines.run import start_policy

    for name, path in folders.items():
        whole = replace(settings.model.lora, rank=0)  # a folder of adapters says itself what it holds
        model = replace(settings, model=replace(settings.model, path=str(path), revision=None, lora=whole))
        yield name, model, start_policy(model, sources, device)


@contextmanager
def _memory_told(name: str) -> Iterator[None]:
    """Says of a model that needs too much memory what to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"{name}: {reason} Lower evaluation.batch_size, or take model.dtype=bfloat16.") from error


def _write(folder: Path, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    from mmrpt.corpus import write_json, write_jsonl

    write_jsonl(folder / "answers.jsonl", answers)
    write_json(folder / RESULT, {"rows": rows})


def _finish(folder: Path, models: Sequence[str]) -> None:
    """Writes and prints the tables."""
    from mmrpt.corpus import write_text

    text = _tables(folder, models)
    write_text(folder / TABLES, text)
    print(f"{text}\nevaluation: {folder}")
    if (folder / REJECTED).exists():
        print(f"rows that cannot be used: {folder / REJECTED}")


def _questions(settings: Settings, options: argparse.Namespace, rejected: RejectedRows) -> tuple[Sources, Sets]:
    """The questions of --masked, or else those of the held-out sets."""
    from mmrpt.held_out import held_out_questions
    from mmrpt.sources import Sources, open_given, open_sources

    if options.masked is not None:
        pairs = open_sources(settings).train if settings.data.pairs is None else open_given(settings)
        samples = _masked_samples(Path(options.masked), pairs, rejected, options.samples)
        return Sources(pairs, pairs, {}, None), {"masked": (pairs, samples)}
    sources = open_sources(settings)
    sets = held_out_questions(sources.held_out, settings)
    if empty := [name for name, (_, samples) in sets.items() if not samples]:
        raise SettingsError(f"no word of {', '.join(empty)} can be asked: bring captions that say something.")
    return sources, sets


def _masked_samples(path: Path, pairs: PairSource, rejected: RejectedRows, count: int | None) -> list[MaskedSample]:
    """The samples of a masked.jsonl, `count` of them evenly spaced, without those whose row cannot be used."""
    from mmrpt.corpus import BadRow, read_jsonl
    from mmrpt.types import MaskedSample

    try:
        samples = [MaskedSample(**row) for row in read_jsonl(path)]
    except TypeError as error:
        raise SettingsError(f"--masked {path}: expected what mmrpt.mask or mmrpt.train writes ({error}).") from error
    if count is not None and count < len(samples):
        samples = [samples[i * len(samples) // count] for i in range(count)]
    usable, examples = set(), dict.fromkeys(sample.example_id for sample in samples)
    for example_id in examples:
        try:
            pairs.image(example_id)
        except BadRow as error:
            rejected.add(error, example_id)
        except KeyError as error:
            raise SettingsError(
                f"--masked {path} asks about pairs that are not there: {error.args[0]} Give the data.pairs that it was "
                "made of."
            ) from error
        else:
            usable.add(example_id)
    rejected.check(len(examples))
    if not usable:
        raise SettingsError(f"--masked {path} holds no question about a row that can be used.")
    return [sample for sample in samples if sample.example_id in usable]


def _tables(folder: Path, models: Sequence[str]) -> str:
    """The results in `folder` as Markdown, made by the report's own functions; two models or more also compared."""
    from mmrpt.report.markdown import escape
    from mmrpt.report.numbers import numbers_of
    from mmrpt.report.page import HOW_ASKED, accuracies, headline
    from mmrpt.report.read import read_run

    pairs = {(one, other): f"{escape(one)} − {escape(other)}" for other, one in combinations(models, 2)}
    run = read_run(folder)
    numbers = numbers_of(run, pairs)
    parts = [headline(run, numbers, pairs), HOW_ASKED, *accuracies(run, numbers, pairs)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
