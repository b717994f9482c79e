"""What an agent's loop did: counts, latencies, safe states; and when metrics count as stale."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

BUCKETS_S: Final = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 2, 5))
"""Upper edges of the latency histogram: 10 µs to 5 s."""
MAX_KEPT: Final = 100_000
"""Durations kept one by one, 8 bytes each."""
MAX_SAFE_STATES: Final = 1000
"""Safe states kept one by one; `counts` counts all of them."""


class Latencies:
    """Durations of the loop: all counted, `MAX_KEPT` of them kept, each with the same chance.

    Below that number quantiles are exact; a server that runs for months needs no more memory.
    """

    def __init__(self) -> None:
        self.kept_s = array("d")
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._num = 0
        self._max_s = 0.0
        self._rng = np.random.default_rng(0)

    def add(self, value_s: float) -> None:
        """Count one."""
        self._num += 1
        self._max_s = max(self._max_s, value_s)
        self._counts[bisect_right(BUCKETS_S, value_s)] += 1
        if self._num <= MAX_KEPT:
            self.kept_s.append(value_s)
        elif (position := int(self._rng.integers(self._num))) < MAX_KEPT:
            self.kept_s[position] = value_s

    def __len__(self) -> int:
        return self._num

    def as_dict(self) -> dict[str, Any]:
        """Quantiles and a histogram: {"p99_s": …, "histogram": [[upper edge in s, count], …]}.

        The last edge is None: everything above.
        """
        if not self.kept_s:
            return {"num": 0}
        values = np.asarray(self.kept_s)
        edges = [*BUCKETS_S, None]
        quantiles = {f"p{q}_s": float(np.quantile(values, q / 100)) for q in (50, 90, 99)}
        return {
            "num": self._num,
            **quantiles,
            "max_s": self._max_s,
            "histogram": [[edge, n] for edge, n in zip(edges, self._counts, strict=True) if n],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleLimits:
    """How long the engine may be silent before its metrics count as stale."""

    num_iterations: float = 5.0
    """Under load: so many expected iterations after the one that runs, or records lost in a row."""
    least_s: float = 0.1
    """Shortest allowance: an engine that gets no CPU for a moment is not dead."""
    most_s: float = 1.0
    """Nor longer."""
    dead_s: float = 3.0
    """At rest: an idle engine repeats a heartbeat every second."""
    router_s: float = 3.0
    """The router repeats every second which requests are here; its word holds for so long."""

    def allowed_s(self, expected_s: float, *, is_busy: bool) -> float:
        """Longest silence that is believed.

        Args:
            expected_s: Duration of the iteration that should be running.
            is_busy: Whether one should be.

        Example:
            >>> StaleLimits().allowed_s(0.1, is_busy=True)
            0.6
        """
        if not is_busy:
            return self.dead_s
        grace_s = max(self.num_iterations * expected_s, self.least_s)
        return expected_s + min(grace_s, self.most_s)


@dataclass(slots=True, kw_only=True)
class SafeState:
    """Why and when the clock was unlocked, in s on the run's clock."""

    at_s: float
    reason: str
    until_s: float | None = None
    """None while it lasts."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"at_s": self.at_s, "until_s": self.until_s, "reason": self.reason}


@dataclass(slots=True)
class LoopReport:
    """What the loop did."""

    counts: Counter[str] = field(default_factory=Counter)
    latency: Latencies = field(default_factory=Latencies)
    """From taking a message off its socket to the decision handed to the kernel, each decision."""
    written: Latencies = field(default_factory=Latencies)
    """The same, of decisions that asked for another clock."""
    notice: Latencies = field(default_factory=Latencies)
    """From the plug-in's sending, inside the engine, to the decision handed to the kernel."""
    safe: list[SafeState] = field(default_factory=list)
    learnt: Mapping[str, float] = field(default_factory=dict)
    """What the controller had found out at the end."""

    def enter_safe(self, at_s: float, reason: str) -> SafeState:
        """Begin a safe state."""
        self.counts["safe_states"] += 1
        state = SafeState(at_s=at_s, reason=reason)
        if len(self.safe) < MAX_SAFE_STATES:
            self.safe.append(state)
        return state

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "counts": dict(self.counts),
            "loop_latency": self.latency.as_dict(),
            "loop_latency_written": self.written.as_dict(),
            "notice_latency": self.notice.as_dict(),
            "learnt": dict(self.learnt),
            "safe_states": [state.as_dict() for state in self.safe],
        }
