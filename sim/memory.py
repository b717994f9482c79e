"""What a run will need of the machine's memory, said before it is taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.workload import Workload

REQUEST_BYTES: Final = 1000
"""Of one request that waits or is kept: measured, 460 to 950 bytes (peak of a run of 100,000
requests that the fleet carries, and of one that it does not; CPython 3.11, x86-64)."""
SHARE: Final = 0.5
"""Of the machine's memory, for one run's requests; ours."""
MOST_WAITING: Final = 1_000_000
"""Requests that a streamed run lets wait for each decode instance, memory or not; ours. At
a hundred requests a second the last of them waits for hours."""
_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")


def memory_bytes() -> int:
    """Memory that this process may have: the machine's, or its container's where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine


def max_requests() -> int:
    """How many requests a run may hold at a time."""
    return int(SHARE * memory_bytes() / REQUEST_BYTES)


def require_room(num_requests: float, remedy: str) -> None:
    """Refuse a run whose requests would not fit.

    Raises:
        VoltanaError: They would take more than `SHARE` of the memory; `remedy` ends the message.
    """
    allowed = max_requests()
    if num_requests > allowed:
        raise VoltanaError(
            f"{num_requests:,.0f} requests would take some {_gigabytes(num_requests):,.0f} GB, a "
            f"run may have {_gigabytes(allowed):,.1f} GB ({allowed:,} requests): {remedy}"
        )


def watch_backlog(
    parts: Iterator[Workload], waiting: Callable[[], int], allowed: int
) -> Iterator[Workload]:
    """Pass a stream on for as long as not too many requests wait for their end.

    Args:
        parts: The stream.
        waiting: How many requests have arrived and not ended.
        allowed: How many may.

    Raises:
        VoltanaError: Too many wait: the fleet cannot carry the load.
    """
    for part in parts:
        if waiting() + len(part) > allowed:
            raise VoltanaError(
                f"{waiting():,} requests wait {part.arrival_s[0]:,.4g} s after the start, more "
                f"than the fleet can carry (a run lets {allowed:,} wait): lower rate_rps, or take "
                "more instances"
            )
        yield part


def _gigabytes(num_requests: float) -> float:
    return num_requests * REQUEST_BYTES / 1e9
