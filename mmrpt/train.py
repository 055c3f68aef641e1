"""The command line: `python -m mmrpt.train [--config file.yaml] [--resume] [key=value ...]`.

With no argument it runs the whole method on the drawn world with a tiny model, in minutes on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmrpt.command_line import option_parser, run_command

if TYPE_CHECKING:
    from mmrpt.engines.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or resumes a run; 0 when it ended, 2 at an error that a user can mend, which is one message on stderr."""
    description = "Train on image-caption pairs; without arguments, the demo."
    return run_command(
        option_parser("python -m mmrpt.train", description).parse_intermixed_args(arguments), whole_method
    )


def whole_method(run: Run) -> Path:
    from mmrpt.engines import native

    return native.train(run)


if __name__ == "__main__":
    sys.exit(main())
