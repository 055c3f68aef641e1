"""The command line: `python -m mmrpt.train [--config file.yaml] [--resume] [key=value ...]`.

With no argument it runs the whole method on the drawn world with a tiny model, in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmrpt.command_line import option_parser, run_command, tell
from mmrpt.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from mmrpt.engines.run import Run
    from mmrpt.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or resumes a run; 0 when it ended, 2 at an error that a user can mend, which is one message on stderr."""
    parser = option_parser("python -m mmrpt.train", "Train on image-caption pairs; without arguments, the demo.")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that the run needs and stop")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="--dry-run for a GPU that this machine lacks")
    options = parser.parse_intermixed_args(arguments)
    if options.gpu_memory is not None and not (options.dry_run and options.gpu_memory > 0):
        return tell(SettingsError(f"--gpu-memory {options.gpu_memory:g}: expected a size above 0, with --dry-run."))
    if options.dry_run and not options.show:
        return _dry_run(options)
    return run_command(options, whole_method)


def _dry_run(options: argparse.Namespace) -> int:
    def with_overrides(*more: str) -> Settings:
        return load_settings(options.config, [*options.overrides, *more])

    try:
        settings = with_overrides()
        from mmrpt.engines.dry_run import dry_run  # torch takes seconds to load, and a misspelt setting is told before

        dry_run(settings, with_overrides, gpu_memory=options.gpu_memory)
    except (OSError, ValueError) as error:
        return tell(error)
    return 0


def whole_method(run: Run) -> Path | None:
    if run.settings.engine == "trl":
        from mmrpt.engines import trl  # an extra

        return trl.train(run)
    from mmrpt.engines import native

    return native.train(run)


if __name__ == "__main__":
    sys.exit(main())
