"""The command line: `python -m mmrpt.train [--config file.yaml] [--resume] [key=value ...]`.

With no argument it runs the whole method on the drawn world with a tiny model, on the CPU, in minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

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

CONFIG_FILE = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or resumes a run; 0 when it ended, 2 when a setting or an input cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrpt.train",
        description="Train on image-caption pairs; without arguments, the demo on the CPU.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of settings; what it leaves out keeps its default")
    parser.add_argument("--resume", action="store_true", help="go on with the run of that name where it was cut off")
    parser.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example rl.steps=50 name=mine")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = load_settings(options.config, options.overrides)
        if options.show:
            print(to_yaml(settings), end="")
            return 0
        settings = resolve_run(
            settings, resume=options.resume, given=flatten(given_settings(options.config, options.overrides))
        )
        from transformers.utils import logging as transformers_logging

        from mmrpt.trainer import Trainer

        transformers_logging.disable_progress_bar()  # its bars for every small file would bury ours

        try:
            trainer = Trainer(settings)
        except (OSError, ValueError):
            if not options.resume:  # the mended command must find its name free
                _give_back(settings.run_dir)
            raise
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = trainer.run()
    print(f"report: {report}")
    return 0


def resolve_run(settings: Settings, *, resume: bool, given: Collection[str]) -> Settings:
    """Which folder the run uses, and with which settings it goes on. `given` are the dotted names that were set.

    A new run never writes into a folder that exists: an unnamed one takes the next free number, a named one is refused.
    A resumed run uses the settings saved with it; overrides that say otherwise are refused, because the weights would
    no longer be those of one run.
    """
    named = "name" in given
    if resume:
        folder = settings.run_dir if named else _newest(settings)
        saved = folder / CONFIG_FILE
        if not saved.is_file():
            raise SettingsError(f"there is no run to resume at {folder}: start one without --resume, or give name=...")
        try:
            stored = load_settings(saved)
        except SettingsError as error:
            raise SettingsError(
                f"the settings saved in {saved} are not of this version: resume the run with the version "
                f"that began it, or start a new one under another name. {error}"
            ) from error
        stored = replace(stored, output=settings.output, name=folder.name)
        if different := _differ(settings, stored, given):
            raise SettingsError(
                f"the settings differ from those saved in {saved}: {', '.join(different)}. Resume without them, or "
                "start a new run under another name."
            )
        return stored
    folder = settings.run_dir
    if folder.exists() and any(folder.iterdir()):
        if named:
            raise SettingsError(f"{folder} exists already: add --resume to go on with it, or choose another name=...")
        settings = replace(settings, name=_next_free(settings))
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    save_settings(settings, settings.run_dir / CONFIG_FILE)
    return settings


def _give_back(folder: Path) -> None:
    """Removes the folder of a run that has not begun; what such a run does not write stays, and the folder with it."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        (folder / "checkpoints").rmdir()
        folder.rmdir()


def _differ(new: Settings, stored: Settings, given: Collection[str]) -> list[str]:
    """Dotted names of settings that were given and are not what the run has."""
    ours, theirs = flatten(asdict(new)), flatten(asdict(stored))
    return [name for name in ours if name in given and ours[name] != theirs[name]]


def _numbered(settings: Settings) -> list[Path]:
    root = Path(settings.output)
    found = [p for p in root.glob(f"{settings.name}*") if p.name == settings.name or _number(p, settings.name)]
    return sorted(found, key=lambda p: _number(p, settings.name))


def _number(path: Path, name: str) -> int:
    tail = path.name.removeprefix(f"{name}-")
    return int(tail) if tail.isdigit() else 0


def _newest(settings: Settings) -> Path:
    found = _numbered(settings)
    return found[-1] if found else settings.run_dir


def _next_free(settings: Settings) -> str:
    numbers = [_number(path, settings.name) for path in _numbered(settings)]
    return f"{settings.name}-{max([1, *numbers]) + 1}"


if __name__ == "__main__":
    sys.exit(main())
