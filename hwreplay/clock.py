"""The run's clock: seconds since its start, the same instant in every process of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RunClock:
    """Reads CLOCK_MONOTONIC, which all processes of a machine share, against one start."""

    start_ns: int = field(default_factory=time.monotonic_ns)

    def now_s(self) -> float:
        """Seconds since the start; negative before it."""
        return (time.monotonic_ns() - self.start_ns) * 1e-9

    def at_s(self, monotonic_ns: int) -> float:
        """The same of another instant of CLOCK_MONOTONIC."""
        return (monotonic_ns - self.start_ns) * 1e-9
