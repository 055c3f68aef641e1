"""The command line: `python -m mmrpt.export CHECKPOINT OUT`.

Makes an ordinary Hugging Face folder of a checkpoint, a copy without the trainer's own state. LoRA adapters are merged
into the weights of the model beneath them, in that model's own type (of 4-bit training: into the weights that were
brought to 4 bits), so that every program that opens the model opens the result:

    python -m mmrpt.export runs/mine/checkpoints/rl mine-7b
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from mmrpt.command_line import tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a checkpoint; 0 when it ended, 2 at an error that a user can mend, which is one message on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrpt.export", description="An ordinary Hugging Face folder of a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, as runs/mine/checkpoints/rl")
    parser.add_argument("out", type=Path, help="folder to make; one that is there must be empty")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.out)
    except (OSError, ValueError, SafetensorError) as error:
        return tell(error, f" ({options.checkpoint} could not be exported)")
    print(f"model: {options.out}")
    return 0


def export(checkpoint: Path, out: Path) -> None:
    """Writes `out`, whole or not at all. Raises OSError or ValueError with the remedy."""
    part = out.with_name(out.name + ".tmp")
    if part.exists() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{part if part.exists() else out} exists already: remove it or choose another folder.")
    import torch  # takes seconds to load, and a folder in the way is told before
    from transformers import AutoConfig

    from mmrpt.checkpoint import STATE_FILE
    from mmrpt.families import model_folder
    from mmrpt.lora import base_folder, merge
    from mmrpt.policy import Policy

    folder = model_folder(checkpoint)
    base = base_folder(folder)
    try:
        if base == folder:
            shutil.copytree(folder, part, ignore=shutil.ignore_patterns(STATE_FILE))
        else:
            policy = Policy.load(folder, AutoConfig.from_pretrained(base).dtype or torch.float32)
            merge(policy.model)
            policy.write_files(part)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
