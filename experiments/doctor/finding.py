"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

State = Literal["ok", "absent", "broken"]
OK: Final = "ok"
ABSENT: Final = "absent"
"""Not here, and nobody said that it should be."""
BROKEN: Final = "broken"
"""Here or asked for, and it does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A line of the report."""

    area: str
    name: str
    state: State
    found: str
    remedy: str = ""
    """What to install or do; empty where all is well."""
