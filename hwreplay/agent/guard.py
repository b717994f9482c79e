"""Releases an instance's clock while too few of its samples keep the promise.

A policy may be wrong about its machine. What it decides is measured here by other means: the share
of kept promises over the last minute. Below the floor the clock is the driver's, whatever the
policy says, until the share has come back above the floor by a margin: with the driver's clock the
promises of the last minute must be kept first, or a machine that is simply too small would see its
clock go up and down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.hwreplay.actuator.client import ClockSetter
from voltana.hwreplay.view.attainment import Attainment
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import UNLOCKED_MHZ

FLOOR: Final = 0.95
RESUME: Final = 0.98


def token_gap_s(
    record: IterationMetrics, previous: IterationMetrics | None, iteration_s: float
) -> float:
    """What the requests of a decode batch have waited for this token.

    From one iteration's end to the next one's where the same requests went on: as many, each with
    one more token of context. A host that is slow between two passes is slow for its clients too,
    which the pass alone does not show. Where requests came or went: the iteration.

    Args:
        record: Of the iteration.
        previous: The record before it.
        iteration_s: The iteration's own duration.
    """
    if previous is None or record.sequence != previous.sequence + 1:
        return iteration_s
    number = previous.num_decode_requests
    goes_on = (record.num_decode_requests, record.sum_decode_kv_tokens) == (
        number, previous.sum_decode_kv_tokens + number,
    )  # fmt: skip
    return max(iteration_s, record.received_s - previous.received_s) if goes_on else iteration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """When a clock is released, and when it is taken up again."""

    floor: float = FLOOR
    """Release below this share of the last minute."""
    resume: float = RESUME
    """Take up again at this share or above."""
    least: int = 100
    """Fewer samples than this in the minute say nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor < self.resume <= 1:
            raise VoltanaError(
                "a guard's floor must be >= 0 and below its resume, which must be <= 1, got "
                f"{self.floor} and {self.resume}"
            )


class Guard:
    """Watches one instance's attainment."""

    def __init__(self, limits: GuardLimits) -> None:
        self.attainment = Attainment()
        self.share: float | None = None
        """Of the last minute, as of the last look; None with too few samples."""
        self.is_released = False
        self._limits = limits

    def look(self, now_s: float) -> bool:
        """Judge the last minute; returns whether the clock is to change hands."""
        share = self.attainment.share(now_s)
        self.share = share if self.attainment.num >= self._limits.least else None
        was = self.is_released
        if self.share is not None:
            limits = self._limits
            self.is_released = self.share < (limits.resume if was else limits.floor)
        return self.is_released != was


class GuardedClock:
    """A clock setter that obeys the guard first: the last wish waits while it has released."""

    def __init__(self, setter: ClockSetter, guard: Guard) -> None:
        self._setter = setter
        self._guard = guard

    @property
    def clock_mhz(self) -> int:
        return self._setter.clock_mhz

    @property
    def num_refused(self) -> int:
        return self._setter.num_refused

    @property
    def last_refusal(self) -> str:
        return self._setter.last_refusal

    def set_clock(self, clock_mhz: int) -> None:
        self._setter.set_clock(UNLOCKED_MHZ if self._guard.is_released else clock_mhz)

    def beat(self) -> None:
        self._setter.beat()

    def collect(self) -> None:
        self._setter.collect()

    def fileno(self) -> int | None:
        return self._setter.fileno()

    def close(self) -> None:
        self._setter.close()
