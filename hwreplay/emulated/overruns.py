"""Whether the machine kept up with the cards that it emulates: passes that lasted too long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from voltana.hwreplay.emulated.plan import read_passes

OVERRAN: Final = 0.01
"""A pass that lasted longer than it should by more than this share of its time overran."""
MOST_FRAC: Final = 0.01
"""A run whose passes lasted longer by more than this in sum is not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overruns:
    """Of all passes of a run."""

    num_passes: int
    num_overran: int
    late_s: float
    """Sum of what all passes lasted too long, emulated seconds."""
    due_s: float
    """Sum of what they should have lasted."""
    worst_s: float

    @property
    def late_frac(self) -> float:
        return self.late_s / self.due_s if self.due_s else 0.0

    @property
    def fault(self) -> str | None:
        """Why the run is not valid; None if it is."""
        if self.late_frac <= MOST_FRAC:
            return None
        return (
            f"the machine did not keep up: passes lasted {self.late_frac:.1%} longer than on the"
            f" emulated card, {self.num_overran} of {self.num_passes} overran; raise dilation"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"late_frac": self.late_frac}


def count_overruns(paths: Iterable[Path], start_s: float, end_s: float) -> Overruns:
    """Look at the passes that began within a time.

    Args:
        paths: Files that the engine's plug-in has written.
        start_s: On CLOCK_MONOTONIC.
        end_s: The same.
    """
    late, due = [np.zeros(0)], [np.zeros(0)]
    for path in paths:
        rows = read_passes(path)
        rows = rows[(rows["begin_s"] >= start_s) & (rows["begin_s"] <= end_s)]
        late.append(np.maximum(rows["end_s"] - rows["due_s"], 0.0))
        due.append(rows["due_s"] - rows["begin_s"])
    late_s, due_s = np.concatenate(late), np.concatenate(due)
    return Overruns(
        num_passes=len(late_s),
        num_overran=int((late_s > OVERRAN * due_s).sum()),
        late_s=float(late_s.sum()),
        due_s=float(due_s.sum()),
        worst_s=float(late_s.max(initial=0.0)),
    )
