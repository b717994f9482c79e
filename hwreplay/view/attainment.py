"""The share of samples that kept a promise over the last while, in bounded memory."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 60.0
SLICE_S: Final = 1.0
"""What falls out of the window does so in pieces of this length."""


class Attainment:
    """Counts kept and missed samples of the last `WINDOW_S`.

    Example:
        >>> seen = Attainment()
        >>> seen.add(0.0, kept=3, total=4)
        >>> seen.add(59.0, kept=6, total=6)
        >>> seen.share(59.5), seen.share(61.5), seen.share(200.0)
        (0.9, 1.0, None)
    """

    def __init__(self) -> None:
        self._slices: deque[tuple[float, int, int]] = deque()
        """Start of each slice in s, kept and total samples in it."""
        self._kept = self.num = 0
        """Samples in the window, as of the last look."""

    def add(self, now_s: float, *, kept: int, total: int) -> None:
        """Count samples that have ended now; `now_s` never falls."""
        self._kept += kept
        self.num += total
        if self._slices and now_s - self._slices[-1][0] < SLICE_S:
            start_s, old_kept, old_total = self._slices.pop()
            self._slices.append((start_s, old_kept + kept, old_total + total))
        else:
            self._slices.append((now_s, kept, total))

    def share(self, now_s: float) -> float | None:
        """Kept samples of all; None where there were none."""
        while self._slices and now_s - self._slices[0][0] > WINDOW_S:
            _, kept, total = self._slices.popleft()
            self._kept -= kept
            self.num -= total
        return self._kept / self.num if self.num else None
