"""A link whose bandwidth those under way divide equally; it counts what each has left."""

from __future__ import annotations

from collections.abc import Callable

Then = Callable[[float], None]


class Cable:
    """Each transfer is what to call when it is over, and bytes left."""

    def __init__(self, bytes_per_s: float, at: Callable[[float, Then], None]) -> None:
        self._bytes_per_s, self._at = bytes_per_s, at
        self._left: list[tuple[Then, float]] = []
        self._now_s = 0.0
        self._version = 0

    def begin(self, then: Then, num_bytes: float, now_s: float) -> None:
        self._pass(now_s)
        self._left.append((then, num_bytes))
        self._expect()

    def _each_per_s(self) -> float:
        return self._bytes_per_s / len(self._left)

    def _pass(self, now_s: float) -> None:
        if self._left:
            moved = (now_s - self._now_s) * self._each_per_s()
            self._left = [(then, left - moved) for then, left in self._left]
        self._now_s = now_s

    def _expect(self) -> None:
        self._version += 1
        version, least = self._version, min(left for _, left in self._left)
        end_s = self._now_s + max(least, 0.0) / self._each_per_s()
        self._at(end_s, lambda at_s: self._end(version, at_s))

    def _end(self, version: int, now_s: float) -> None:
        if version != self._version:
            return
        self._pass(now_s)
        ended = [then for then, left in self._left if left < 1.0]  # a byte, of a token's thousands
        self._left = [(then, left) for then, left in self._left if left >= 1.0]
        if self._left:
            self._expect()
        for then in ended:
            then(now_s)
