"""What every group of settings is made with: a frozen dataclass whose values pydantic checks."""

from __future__ import annotations

from pydantic import ConfigDict

# Of a group's dataclass: unknown names are refused, and so are numbers that are not finite, which would pass any range
# and end as NaN weights.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class SettingsError(ValueError):
    """A setting that cannot work: the message says which, what was expected and how to mend it."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
