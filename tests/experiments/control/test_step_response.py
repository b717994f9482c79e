"""The plant against differential equations solved step by step; measures of known signals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import signal

from voltana.experiments.control.plant import Gains, Plant, linearise, margins, tune_pi
from voltana.experiments.control.step_response import END_S, START_S, disturbed, measure
from voltana.experiments.runs import cached_profile
from voltana.profiles.common.errors import VoltanaError

PLANT = Plant(
    clock_mhz=1000, batch_size=100, time_s=0.02, gain_s_per_mhz=-2e-5, elasticity_ratio=0.5,
    residence_s=4.0, dead_time_s=0.5,
)  # fmt: skip


class Affine:
    """T = (10 ms + 0.1 ms·b)·1000/f, and 4 ms more from 65 requests on."""

    def time_and_power(
        self, phase: str, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        stair = 4e-3 if batch_size > 64 else 0.0
        return (10e-3 + 1e-4 * batch_size + stair) * 1000 / clock_mhz, 100.0

    def idle_power_w(self, clock_mhz: int) -> float:
        return 50.0


def at(batch: int) -> Plant:
    return linearise(
        Affine(), clock_mhz=1000, step_mhz=10, batch_size=batch, context_tokens=100.0,
        output_tokens=200.0, dead_time_s=0.1,
    )  # fmt: skip


def test_slopes_by_hand() -> None:
    """50 requests: 15 ms; ∂T/∂f = -15 ms/1000 MHz (difference to 1e-4); e = 50/15·0.1 = 1/3;
    L·T = 3 s; pole -(2/3)/3 = -0.222/s; 4.5 s; settled gain -15 µs/(2/3) = -22.5 µs/MHz."""
    plant = at(50)
    assert plant.gain_s_per_mhz == pytest.approx(-1.5e-5, rel=1.1e-4)
    assert plant.elasticity_ratio == pytest.approx(1 / 3, rel=1e-9)
    assert plant.time_constant_s == pytest.approx(4.5, rel=1e-9)
    assert plant.settled_gain_s_per_mhz == pytest.approx(-2.25e-5, rel=1.1e-4)


def test_on_a_stair_the_batch_runs_away() -> None:
    """64 requests: 16.4 ms, one more 4.1 ms longer: e = 64/16.4·4.1 = 16."""
    plant = at(64)
    assert plant.elasticity_ratio == pytest.approx(16.0, rel=1e-9)
    assert plant.pole_per_s == pytest.approx(15.0 / (200 * 0.0164), rel=1e-9)
    with pytest.raises(VoltanaError, match="stable plant"):
        margins(plant, Gains(kp_mhz=1.0, ki_mhz_per_s=1.0), 0.02)


def test_the_shipped_profile_is_unstable_at_its_stair_at_any_clock() -> None:
    truth = cached_profile("a100-80g-sxm/llama-3.1-8b").truth(extrapolate=True)
    for clock in (1005, 1200, 1395):
        for batch, is_stable in ((250, True), (256, False)):
            plant = linearise(
                truth, clock_mhz=clock, step_mhz=15, batch_size=batch, context_tokens=474.0,
                output_tokens=325.0, dead_time_s=0.5,
            )  # fmt: skip
            assert (plant.pole_per_s < 0) is is_stable


def test_the_transfer_function_is_the_differential_equation() -> None:
    """A step of +10 MHz, by Euler's rule in steps of a millisecond, from db/dt = λ - b/(L·T)."""
    base, step_s = at(50), 1e-3
    output_tokens, clock = 200.0, 1010.0
    arrivals = 50 / base.residence_s
    batch, seen = 50.0, []
    for _ in range(20_000):
        time_s = (10e-3 + 1e-4 * batch) * 1000 / clock
        seen.append(time_s - base.time_s)
        batch += step_s * (arrivals - batch / (output_tokens * time_s))
    _, linear = signal.step(base.transfer(), T=np.arange(20_000) * step_s)
    np.testing.assert_allclose(10 * linear, seen, rtol=0.02)  # 1 % of clock: second order 1 %


def test_margins_of_a_loop_worked_by_hand() -> None:
    """An integrator with dead time, k·exp(-θs)/s: phase margin 90° - k·θ, gain margin π/(2·k·θ).

    A plant without a batch (e = 0: zero and pole cancel) of gain -20 µs/MHz, setpoint 20 ms: 1e-3
    per MHz; Ki = 1000 gives k = 1, θ = 0.5: 90° - 28.65°, and π.
    """
    plain = Plant(
        clock_mhz=1000, batch_size=100, time_s=0.02, gain_s_per_mhz=-2e-5, elasticity_ratio=0.0,
        residence_s=4.0, dead_time_s=0.5,
    )  # fmt: skip
    found = margins(plain, Gains(kp_mhz=0.0, ki_mhz_per_s=1000.0), 0.02)
    assert found.phase_deg == pytest.approx(90 - math.degrees(0.5), abs=0.2)
    assert found.gain_ratio == pytest.approx(math.pi, rel=0.01)
    assert found.crossover_rad_per_s == pytest.approx(1.0, rel=0.01)


def test_gains_by_the_model_have_the_margins_asked_for() -> None:
    gains = tune_pi(PLANT, 0.02, phase_deg=60.0, gain_ratio=2.0)
    found = margins(PLANT, gains, 0.02)
    assert found.phase_deg >= 60.0
    assert found.gain_ratio == pytest.approx(2.0, rel=0.02)
    stronger = Gains(kp_mhz=2.1 * gains.kp_mhz, ki_mhz_per_s=2.1 * gains.ki_mhz_per_s)
    assert margins(PLANT, stronger, 0.02).gain_ratio < 1.0


def test_measures_of_an_exponential_and_of_a_pulse() -> None:
    """1 - exp(-t/τ), τ = 10 s: 10 to 90 % in τ·ln 9 = 22 s; within a tenth of 2 after
    τ·ln 5 = 16.1 s. Means over 5 s and bins of 1 s blur both by some 3 s."""
    t = np.arange(END_S) + 0.5 - START_S
    rising = 1.0 + np.where(t > 0, 1.0 - np.exp(-t / 10.0), 0.0)
    found = measure(rising)
    assert found["rise_s"] == pytest.approx(22.0, abs=3.0)
    assert found["settling_s"] == pytest.approx(16.1, abs=4.0)
    assert found["overshoot_pct"] == pytest.approx(0.0, abs=0.01)
    pulse = np.where((t > 0) & (t < 10), 1.5, 1.0)
    found = measure(pulse)
    assert math.isnan(found["rise_s"])
    assert found["overshoot_pct"] == pytest.approx(50.0)
    assert found["settling_s"] == pytest.approx(13.0, abs=2.0)


def test_disturbances_start_where_they_say() -> None:
    before = disturbed("prompts", 1).sliced(0.0, START_S)
    for shape in ("step", "ramp", "pulse"):
        np.testing.assert_array_equal(
            disturbed(shape, 1).sliced(0.0, START_S).arrival_s, before.arrival_s
        )
    late = {s: len(disturbed(s, 1).sliced(START_S, END_S)) for s in ("step", "ramp", "pulse")}
    base = len(disturbed("prompts", 1).sliced(START_S, END_S))
    assert late["step"] - base == pytest.approx(7 * 120, rel=0.1)
    assert late["ramp"] - base == pytest.approx(7 * 90, rel=0.1)
    assert late["pulse"] - base == pytest.approx(120, rel=0.3)
