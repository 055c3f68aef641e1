"""What the command lines share: options, the folder of a run, and errors that a user can mend as one message each."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mmrpt.engines.trl_options import grpo_options
from mmrpt.processes import one_at_a_time, part_of
from mmrpt.settings import (
    Settings,
    SettingsError,
    flatten,
    given_settings,
    load_settings,
    save_settings,
    settings_help,
    to_yaml,
)
from mmrpt.settings.scale import TINY_MODEL

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

CONFIG_FILE = "config.yaml"
ERROR_FILE = "error.txt"
JOINING = ".joining.lock"


def option_parser(prog: str, description: str, *, resume: bool = True) -> argparse.ArgumentParser:
    """The options of every command line; `--help` lists all settings. `resume` False: nothing can be gone on with."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of settings; what it leaves out keeps its default")
    if resume:
        parser.add_argument(
            "--resume", action="store_true", help="go on with the run of that name where it was cut off"
        )
    parser.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example rl.steps=50 name=mine")
    return parser


def run_command(options: argparse.Namespace, work: Callable[[Run], Path | None]) -> int:
    """Opens the run that the options name and does `work` on it: 0 when it ended, 2 at an error that a user can mend.

    One process at a time works in a run's folder, or all those that torchrun started together. The traceback of an
    error after the start goes to error.txt there.
    """
    part, parts = part_of(None)
    several = parts > 1
    try:
        settings = load_settings(options.config, options.overrides)
        if options.show:
            print(to_yaml(settings), end="")
            return 0
        given = flatten(given_settings(options.config, options.overrides))
        if settings.engine == "trl":
            if importlib.util.find_spec("trl") is None:
                raise SettingsError(
                    "engine is trl, which is not installed: pip install 'mmrpt[trl]', or engine=native."
                )
            grpo_options(settings, "", parts)  # before there is a folder
        elif several:
            raise SettingsError(
                f"{parts} processes were started and engine is {settings.engine}, which is one: set "
                "engine=trl, or start one process."
            )
        settings = joined_run(settings, given) if several else resolve_run(settings, resume=options.resume, given=given)
    except (OSError, ValueError) as error:
        return tell(error)
    # Only now: torch takes seconds to load, and a misspelt setting is told before.
    from torch import OutOfMemoryError

    from mmrpt.engines.run import open_run
    from mmrpt.run_folder import RunError, RunFolder

    folder = RunFolder(settings.run_dir)
    try:
        if not several or part == 0:
            folder.lock()
        try:
            with _first_process_first(settings, several):
                run = open_run(settings)
        except (OSError, ValueError) as error:
            if not (options.resume or several):  # the mended command must find its name free
                give_back(settings.run_dir)
            return tell(error)
        # What torch and transformers keep is never garbage: without this, looking through it takes 4 % of a small run.
        gc.freeze()
        run.stop.install()
        (folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            if report := work(run):
                print(f"report: {report}")
        finally:
            run.folder.trackers.close()
        return 0
    except RunError as error:
        return tell(error)
    except (OSError, ValueError, OutOfMemoryError) as error:
        (folder / ERROR_FILE).write_text(traceback.format_exc())
        return tell(error, f" (traceback in {folder / ERROR_FILE}; go on with --resume)")
    finally:
        folder.unlock()


@contextmanager
def _first_process_first(settings: Settings, several: bool) -> Iterator[None]:
    """Starts the process group of several processes, and lets the first of them make what is in the run's folder."""
    if not several:
        yield
        return
    import torch
    from accelerate import PartialState

    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    # The first process may warm up or evaluate for hours while the others wait; torchrun ends all when one fails.
    with PartialState(cpu=on_cpu, timeout=timedelta(days=2)).main_process_first():
        yield


def tell(error: BaseException, where: str = "") -> int:
    print(f"error: {error}{where}", file=sys.stderr)
    return 2


def resolve_run(settings: Settings, *, resume: bool, given: Collection[str]) -> Settings:
    """Which folder the run uses, and with which settings it goes on. `given` are the dotted names that were set.

    A new run never writes into a folder that exists: an unnamed one takes the next free number, a named one is refused.
    A resumed run uses the settings saved with it; overrides that say otherwise are refused, because the weights would
    no longer be those of one run.
    """
    named = "name" in given
    if resume:
        return _stored_settings(settings, named, given)
    folder = settings.run_dir
    if folder.exists() and any(folder.iterdir()):
        if named:
            raise SettingsError(f"{folder} exists already: add --resume to go on with it, or choose another name=...")
        settings = _next_free(settings)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    save_settings(settings, settings.run_dir / CONFIG_FILE)
    return settings


def joined_run(settings: Settings, given: Collection[str], lock: str = JOINING) -> Settings:
    """The run that several processes work on: the first makes its folder, all must have been given its settings.

    `lock`: the name of the file in the folder that lets one process in at a time.
    """
    if "name" not in given:
        raise SettingsError("several processes need the name of their common run: add name=...")
    saved = settings.run_dir / CONFIG_FILE
    if not saved.is_file():
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(settings.run_dir / lock):
            if not saved.is_file():
                save_settings(settings, saved)
    return resolve_run(settings, resume=True, given=given)


def _stored_settings(settings: Settings, named: bool, given: Collection[str]) -> Settings:
    folder = settings.run_dir if named else _newest(settings)
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        raise SettingsError(f"there is no run to resume at {folder}: start one without --resume, or give name=...")
    try:
        stored = load_settings(saved)
    except SettingsError as error:
        raise SettingsError(
            f"the settings saved in {saved} are not of this version: resume the run with the version that began it, "
            f"or start a new one under another name. {error}"
        ) from error
    stored = replace(stored, output=settings.output, name=folder.name)
    if different := _differ(settings, stored, given):
        raise SettingsError(
            f"the settings differ from those saved in {saved}: {', '.join(different)}. Resume without them, or start "
            "a new run under another name."
        )
    return stored


def give_back(folder: Path) -> None:
    """Removes the folder of a run that has not begun; what such a run does not write stays, and the folder with it."""
    for name in (CONFIG_FILE, "corpus.json", "rejected.jsonl", ".lock"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TINY_MODEL, ignore_errors=True)
    for part in (folder / "checkpoints", folder):
        with suppress(OSError):
            part.rmdir()


def _differ(new: Settings, stored: Settings, given: Collection[str]) -> list[str]:
    """Dotted names of settings that were given and are not what the run has."""
    ours, theirs = flatten(asdict(new)), flatten(asdict(stored))
    return [name for name in ours if name in given and ours[name] != theirs[name]]


def _numbered(settings: Settings) -> list[tuple[int, Path]]:
    """(number, folder) of the runs of this name, the unnumbered one as 1."""
    root = Path(settings.output)
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        tail = path.name.removeprefix(f"{settings.name}-")
        if path.name == settings.name or (tail != path.name and tail.isdigit()):
            found.append((1 if path.name == settings.name else int(tail), path))
    return sorted(found)


def _newest(settings: Settings) -> Path:
    found = _numbered(settings)
    return found[-1][1] if found else settings.run_dir


def _next_free(settings: Settings) -> Settings:
    """The settings under the next free number, whose folder is made: two starts in one instant take two."""
    base, number = settings.name, _numbered(settings)[-1][0] + 1
    while True:
        settings = replace(settings, name=f"{base}-{number}")
        try:
            settings.run_dir.mkdir(parents=True)
            return settings
        except FileExistsError:
            number += 1
