"""Models of iteration times and power: one set a kind of instance, and deliberately wrong ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import InstanceState, Phase, PolicyContext, PowerModel, Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is believed of one kind of instance."""

    predictor: Predictor
    power: PowerModel
    clocks_mhz: tuple[int, ...]
    """Supported clocks, ascending."""


OF_INSTANCES: Final = "models of instances"
"""Name under which a driver of a mixed fleet shares a `Models` for each (phase, instance_id)."""


class ModelsOf:
    """The models of any instance; of a fleet of one kind the context's own.

    Args:
        context: Of a router, or of another policy that sees several instances.
    """

    __slots__ = ("_of", "_own")

    def __init__(self, context: PolicyContext) -> None:
        self._own = Models(
            predictor=context.predictor, power=context.power, clocks_mhz=context.clocks_mhz
        )
        cluster = context.cluster
        self._of: Mapping[tuple[Phase, int], Models] = (
            cluster.share(OF_INSTANCES, dict) if cluster is not None else {}
        )

    def __call__(self, state: InstanceState) -> Models:
        return self._of.get((state.phase, state.instance_id), self._own)


class ScaledPredictor:
    """A predictor that is wrong by a constant factor: for tests of robustness."""

    __slots__ = ("_factor", "_predictor")

    def __init__(self, predictor: Predictor, factor: float) -> None:
        self._predictor = predictor
        self._factor = factor

    @classmethod
    def wrap(cls, predictor: Predictor, factor: float) -> Predictor:
        """The predictor itself where there is nothing to scale."""
        return predictor if factor == 1.0 else cls(predictor, factor)

    def predict_s(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return self._factor * self._predictor.predict_s(phase, clock_mhz, batch_size, tokens)


class SkewedPower:
    """A power model that is wrong above idle: idle + (P - idle)·scale·(f/top)^clock_error.

    At the top clock it is wrong by the scale alone. A clock error above 0 makes low clocks look
    cheaper than they are, one below 0 makes them look dearer. Idle power is not changed.

    Args:
        power: The true power model.
        scale: Factor on power above idle; 1 is right.
        clock_error: Exponent of clock / top clock; 0 is right.
        top_mhz: The profile's top clock.
    """

    __slots__ = ("_clock_error", "_power", "_scale", "_top_mhz")

    def __init__(
        self, power: PowerModel, *, scale: float, clock_error: float, top_mhz: int
    ) -> None:
        self._power = power
        self._scale = scale
        self._clock_error = clock_error
        self._top_mhz = top_mhz

    @classmethod
    def wrap(
        cls, power: PowerModel, *, scale: float, clock_error: float, top_mhz: int
    ) -> PowerModel:
        """A skewed model, or the model itself where there is nothing to change.

        Args:
            power: The true power model.
            scale: As of the class.
            clock_error: As of the class.
            top_mhz: The profile's top clock.
        """
        if scale == 1.0 and clock_error == 0.0:
            return power
        return cls(power, scale=scale, clock_error=clock_error, top_mhz=top_mhz)

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        idle_w = self._power.idle_power_w(clock_mhz)
        above_w = self._power.power_w(phase, clock_mhz, batch_size, tokens) - idle_w
        relative = (clock_mhz or self._top_mhz) / self._top_mhz
        return idle_w + above_w * self._scale * math.pow(relative, self._clock_error)

    def idle_power_w(self, clock_mhz: int) -> float:
        return self._power.idle_power_w(clock_mhz)
