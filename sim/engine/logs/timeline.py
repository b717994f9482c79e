"""Time series of every instance, sampled at a fixed interval in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from voltana.sim.config import SimConfig
from voltana.sim.engine.instance import Instance

_COLUMNS = (
    "time_s", "phase", "instance_id", "clock_mhz", "batch_size", "num_waiting", "kv_tokens",
    "power_w",
)  # fmt: skip


class Timeline:
    """Samples all instances; when full, drops every other sample and doubles its interval."""

    def __init__(
        self, instances: Sequence[Instance], *, interval_s: float, max_samples: int
    ) -> None:
        """See the class.

        Args:
            instances: All that are sampled.
            interval_s: Between two samples, at first.
            max_samples: Of each instance; more than one.
        """
        self._instances = instances
        self._interval_s = interval_s
        self._max_samples = max(2, max_samples)
        self._samples: list[list[tuple[float | int | str, ...]]] = []

    @classmethod
    def make(cls, config: SimConfig, instances: Sequence[Instance]) -> Timeline | None:
        """A timeline if the configuration asks for one; the fleet calls its `sample`."""
        if config.timeline_interval_s is None:
            return None
        return cls(
            instances,
            interval_s=config.timeline_interval_s,
            max_samples=config.timeline_max_samples,
        )

    def sample(self, now_s: float) -> float:
        """Take one sample; returns when to take the next."""
        self._samples.append([self._row(i, now_s) for i in self._instances])
        if len(self._samples) >= self._max_samples:
            del self._samples[1::2]
            self._interval_s *= 2
        return now_s + self._interval_s

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """All samples as columns, in time order."""
        rows = [row for sample in self._samples for row in sample]
        if not rows:
            return {name: np.array([]) for name in _COLUMNS}
        return {
            name: np.array(column)
            for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True)
        }

    @staticmethod
    def _row(instance: Instance, now_s: float) -> tuple[float | int | str, ...]:
        instance.look(now_s)
        state = instance.state
        return (
            now_s, state.phase, state.instance_id, state.clock_mhz, state.num_running,
            state.num_waiting, state.kv_tokens, instance.track.power_w,
        )  # fmt: skip
