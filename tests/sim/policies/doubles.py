"""Predictors and contexts small enough to work decisions out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from voltana.sim.policies.base import (
    Cluster,
    InstanceState,
    Phase,
    PolicyContext,
    PowerModel,
    Predictor,
)

CLOCKS = (1000, 1200, 1400)


def require_point(phase: str, clock_mhz: int, batch_size: int, tokens: int) -> None:
    """Refuse what no profile answers, also where a double's answer does not depend on it."""
    assert phase in ("prefill", "decode"), phase
    assert min(clock_mhz, batch_size, tokens) >= 0, (clock_mhz, batch_size, tokens)


class Formula:
    """A predictor that is the given function of (phase, clock, batch, tokens)."""

    def __init__(self, function: Callable[[str, int, int, int], float]) -> None:
        self._function = function

    def predict_s(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return self._function(phase, clock_mhz, batch_size, tokens)


class LineFormula(Formula):
    """1 ms a request and 1 µs a token at 1000 MHz, in proportion to 1/f; a line in tokens."""

    def __init__(self) -> None:
        super().__init__(lambda p, f, b, t: (1e-3 * b + 1e-6 * t) * 1000 / f)

    def predict_line(self, phase: Phase, clock_mhz: int, batch_size: int) -> tuple[float, float]:
        require_point(phase, clock_mhz, batch_size, 0)
        return 1e-3 * batch_size * 1000 / clock_mhz, 1e-6 * 1000 / clock_mhz


class FlatPower:
    """100 W busy, 50 W idle."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return 100.0

    def idle_power_w(self, clock_mhz: int) -> float:
        assert clock_mhz >= 0, clock_mhz
        return 50.0


class Known:
    """A predictor and a power model taken for the truth."""

    def __init__(self, predictor: Predictor, power: PowerModel) -> None:
        self._predictor = predictor
        self._power = power

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        point = phase, clock_mhz or CLOCKS[-1], round(batch_size), round(tokens)
        require_point(*point)
        return self._predictor.predict_s(*point), self._power.power_w(*point)

    def idle_power_w(self, clock_mhz: int) -> float:
        return self._power.idle_power_w(clock_mhz)


def make_cluster(num_prefill: int = 1, num_decode: int = 1) -> Cluster:
    """A fleet with nothing to do."""
    cluster = Cluster()
    cluster.prefill = [InstanceState(instance_id=i, phase="prefill") for i in range(num_prefill)]
    cluster.decode = [InstanceState(instance_id=i, phase="decode") for i in range(num_decode)]
    return cluster


def make_context(
    predictor: Formula | None = None,
    *,
    phase: Phase = "decode",
    slo_itl_s: float = 0.05,
    slo_ttft_s: float = 0.5,
    clocks_mhz: tuple[int, ...] = CLOCKS,
    levels_mhz: tuple[int, ...] = (1000, 1400),
) -> PolicyContext:
    predictor = predictor or LineFormula()
    return PolicyContext(
        predictor=predictor,
        power=FlatPower(),
        clocks_mhz=clocks_mhz,
        default_levels_mhz=levels_mhz,
        slo_ttft_s=slo_ttft_s,
        slo_itl_s=slo_itl_s,
        profile_hash="0",
        kv_capacity_tokens=100_000,
        rng=np.random.default_rng(0),
        phase=phase,
        truth=Known(predictor, FlatPower()),
        cluster=make_cluster(),
    )


def decode_state(
    *, batch: int = 0, tokens: int = 0, waiting: int = 0, opened: int = 0, kv: int = 0,
    clock: int = 1400, index: int = 0,
) -> InstanceState:  # fmt: skip
    return InstanceState(
        instance_id=index,
        phase="decode",
        last_batch_size=batch,
        last_tokens=tokens,
        num_waiting=waiting,
        open_requests=opened,
        kv_tokens=kv,
        clock_mhz=clock,
    )
