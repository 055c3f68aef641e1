"""What `import verl` loads of this package, in every worker (entry point group "verl.plugins").

Does nothing unless MMRPT_VERL=1. verl writes the errors of its plugins to the debug log and goes on; a run that asked
for the fused head and cannot have it must not go on without it, so an error here ends the process and says why.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "MMRPT_VERL"


def load() -> bool:
    """Enable the fused head if MMRPT_VERL asks for it; whether it did. Raises SystemExit where that fails."""
    asked = os.environ.get(VARIABLE, "0")
    if asked in ("", "0"):
        return False
    if asked != "1":
        raise SystemExit(f"{VARIABLE}: got {asked!r}, expected 1 (use mmrpt's fused head in verl) or 0 (do not)")
    try:
        from mmrpt_kernels.integrations.verl import enable_fused_head

        enable_fused_head()
    except Exception as error:
        logging.getLogger(__name__).exception("mmrpt's fused head could not be enabled in verl")
        raise SystemExit(f"{VARIABLE}=1 asks for mmrpt's fused head, which cannot be enabled: {error}") from error
    logging.getLogger(__name__).warning("verl computes log-probabilities by mmrpt_kernels.linear_logprobs")
    return True


load()
