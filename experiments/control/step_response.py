"""`voltana experiment run step-response`: controllers under a step, a ramp, a pulse, new prompts.

One prefill and one decode instance, so that what is seen is the controller and no router. The
base load is Poisson; from `START_S` on more requests are added to it, or prompts are longer.
Signals are means over the seeds in bins of a second: the chance of single arrivals is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.experiments.control.plant import Gains, Margins, Plant, linearise, margins, tune_pi
from voltana.experiments.runs import cached_profile
from voltana.sim.config import SimConfig, make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import DECODE
from voltana.sim.policies.controllers.pid import PidParameters
from voltana.sim.policies.spec import bind_parameters, parse_spec
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.workload import Workload

FloatArray = npt.NDArray[np.float64]

BASE: Final = {
    "profile": "a100-80g-sxm/llama-3.1-8b", "workload": "sharegpt", "num_prefill": 1,
    "num_decode": 1, "router": "round-robin", "slo_ttft_s": 0.6, "slo_itl_s": 0.045,
    "record_iterations": True,
}  # fmt: skip
START_S: Final = 60.0
END_S: Final = 180.0
BASE_RPS: Final = 11.0
MORE_RPS: Final = 7.0
RAMP_S: Final = 60.0
PULSE_RPS: Final = 40.0
PULSE_S: Final = 3.0
LONGER_RATIO: Final = 4
SHAPES: Final = ("step", "ramp", "pulse", "prompts")
CONTROLLERS: Final = {
    "static-max": "static:f=1410", "ecofreq": "ecofreq", "ecomin": "ecomin", "pid": "pid",
    "miad": "miad", "throttllm": "throttllm",
}  # fmt: skip
SEEDS: Final = (1, 2, 3)
OPERATING: Final = {"clock_mhz": 1200, "batch_size": 220}
"""Where the plant is linearised: about what 18 requests/s of these lengths settle at."""
MISMATCH: Final = 1.3
SEARCHED: Final = {
    "decode_controller": "pid:target=0.971,kp=498,ki=185,kd=6.66",
    "prefill_controller": "pid:target=0.996,kp=387,ki=1710,kd=164",
}
"""Found at the operating point's rate by `voltana tune pid --set num_prefill=1 --set num_decode=1
--set router=round-robin --set rate_rps=18 --set duration_s=90 --set slo_itl_s=0.045`."""
_SMOOTH_BINS: Final = 5
_BAND: Final = 0.1
"""Settled: within this part of the final value."""


def disturbed(shape: str, seed: int) -> Workload:
    """The requests of one run; every shape has the same ones up to `START_S`."""
    name = str(BASE["workload"])

    def poisson(rate_rps: float, duration_s: float, stream: int) -> Workload:
        return make_workload(name, rate_rps=rate_rps, duration_s=duration_s, seed=stream)

    base = poisson(BASE_RPS, END_S, seed)
    if shape == "prompts":
        late = base.arrival_s >= START_S
        longer = np.where(late, LONGER_RATIO * base.input_tokens, base.input_tokens)
        return _with(base, base.arrival_s, longer, base.output_tokens)
    if shape == "pulse":
        return base.superposed(_later(poisson(PULSE_RPS, PULSE_S, 1000 + seed)))
    more = poisson(MORE_RPS, END_S - START_S, 1000 + seed)
    if shape == "ramp":  # keep each with the probability that the ramp has reached by then
        chance = np.random.default_rng([seed, 7]).random(len(more))
        kept = chance < more.arrival_s / RAMP_S
        more = _with(more, more.arrival_s[kept], more.input_tokens[kept], more.output_tokens[kept])
    return base.superposed(_later(more))


def _later(workload: Workload) -> Workload:
    arrival_s = workload.arrival_s + START_S
    return _with(workload, arrival_s, workload.input_tokens, workload.output_tokens)


def _with(
    workload: Workload, arrival_s: FloatArray, inputs: npt.NDArray[np.int64],
    outputs: npt.NDArray[np.int64],
) -> Workload:  # fmt: skip
    return Workload(
        arrival_s=arrival_s, input_tokens=inputs, output_tokens=outputs, name=workload.name
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One controller under one disturbance, the mean over the seeds."""

    itl_s: FloatArray
    """Mean gap between tokens, second by second."""
    clock_mhz: FloatArray
    """Mean decode clock, second by second."""
    violation_s: float
    """Time spent in decode iterations longer than the promise."""
    ttft_attainment: float
    energy_j: float
    clock_changes: float


def respond(
    controller: str | Mapping[str, str], shape: str, seeds: Sequence[int] = SEEDS
) -> Response:
    """Run a controller under a disturbance.

    Args:
        controller: As in a configuration; or one for each phase, by configuration key.
        shape: Of the disturbance, one of `SHAPES`.
        seeds: Runs to average over.
    """
    keys = {"controller": controller} if isinstance(controller, str) else controller
    runs = [_run(make_config({**BASE, **keys, "seed": s}), shape) for s in seeds]
    return Response(
        itl_s=np.nanmean([r.itl_s for r in runs], axis=0),
        clock_mhz=np.nanmean([r.clock_mhz for r in runs], axis=0),
        violation_s=float(np.mean([r.violation_s for r in runs])),
        ttft_attainment=float(np.mean([r.ttft_attainment for r in runs])),
        energy_j=float(np.mean([r.energy_j for r in runs])),
        clock_changes=float(np.mean([r.clock_changes for r in runs])),
    )


def _run(config: SimConfig, shape: str) -> Response:
    record = simulate(config, cached_profile(config.profile), disturbed(shape, config.seed))
    summary, table = summarise(record), record.iterations
    assert table is not None
    is_decode = table.phase == DECODE
    start_s, duration_s = table.start_s[is_decode], table.duration_s[is_decode]
    batch, clock = table.batch_size[is_decode], table.clock_mhz[is_decode]
    return Response(
        itl_s=_binned(start_s, duration_s, batch),
        clock_mhz=_binned(start_s, clock, duration_s),
        violation_s=float(duration_s[duration_s > config.slo_itl_s].sum()),
        ttft_attainment=summary["ttft_attainment"],
        energy_j=summary["energy_j"],
        clock_changes=summary["clock_changes"],
    )


def _binned(
    at_s: FloatArray, values: npt.NDArray[np.number], weights: npt.NDArray[np.number]
) -> FloatArray:
    """Weighted means in bins of a second up to `END_S`; NaN where nothing ran."""
    edges = np.arange(0.0, END_S + 0.5)
    total = np.histogram(at_s, edges, weights=weights)[0]
    summed = np.histogram(at_s, edges, weights=values * weights)[0]
    mean = np.full(len(total), np.nan)
    np.divide(summed, total, out=mean, where=total > 0)
    return mean


def measure(signal: FloatArray) -> dict[str, float]:
    """Rise time, overshoot and settling time of a signal that is disturbed at `START_S`.

    Before is its mean over 20 s before, after its mean over the last 20 s, of means over 5 s. Rise:
    from 10 to 90 % of the way, NaN where the two differ by less than a tenth. Overshoot: how far
    its farthest point lies beyond `after`, away from `before`, in % of `after`. Settling: from the
    start until it stays within a tenth of `after`.
    """
    smooth = pd.Series(signal).interpolate().rolling(_SMOOTH_BINS, min_periods=1).mean().to_numpy()
    first = int(START_S)
    before, after = float(smooth[first - 20 : first].mean()), float(smooth[-20:].mean())
    tail = smooth[first:]
    way = after - before
    rise_s = float("nan")
    if abs(way) >= _BAND * before:
        progress = (tail - before) / way
        rise_s = float(np.argmax(progress >= 0.9) - np.argmax(progress >= 0.1))
    beyond = float((tail - after).max()) if way >= 0 else float((after - tail).max())
    outside = np.nonzero(np.abs(tail - after) > _BAND * after)[0]
    return {
        "rise_s": rise_s,
        "overshoot_pct": 100.0 * max(beyond, 0.0) / after,
        "settling_s": float(outside[-1] + 1) if len(outside) else 0.0,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PidDesign:
    """Gains of `pid` in decode and the margins that the model says they have."""

    name: str
    gains: Gains
    margins: Margins
    controller: str | Mapping[str, str]
    """As a policy for both phases, or by configuration key."""


def operating_plant() -> Plant:
    """The plant that `pid` meets, with its window of a second as dead time (NOMENCLATURE: p99).

    The highest of a window shows a rise at once and a fall a whole window late; the latter counts.
    """
    config = make_config(BASE)
    time_s = 1.0 + config.actuation_latency_s + 0.04
    return linearise(
        cached_profile(config.profile).truth(extrapolate=True),
        step_mhz=15,
        context_tokens=474.0,
        output_tokens=325.6,
        dead_time_s=time_s,
        **OPERATING,
    )


def pid_designs() -> list[PidDesign]:
    """Default gains, gains by the model and by search, and the model's with a plant 30 % off."""
    plant, slo_s = operating_plant(), float(str(BASE["slo_itl_s"]))
    setpoint_s = 0.9 * slo_s
    by_model = tune_pi(plant, setpoint_s)
    sets: Mapping[str, Gains] = {
        "pid, default gains": Gains(kp_mhz=600.0, ki_mhz_per_s=400.0),
        "pid, by the model": by_model,
        "pid, plant 30 % stronger": _scaled(by_model, MISMATCH),
        "pid, plant 30 % weaker": _scaled(by_model, 1.0 / MISMATCH),
    }
    made = [
        PidDesign(
            name=name,
            gains=gains,
            margins=margins(plant, gains, setpoint_s),
            controller=f"pid:kp={gains.kp_mhz:.4g},ki={gains.ki_mhz_per_s:.4g},kd=0",
        )
        for name, gains in sets.items()
    ]
    found = bind_parameters(parse_spec(SEARCHED["decode_controller"]), PidParameters)
    by_search = Gains(kp_mhz=found.kp_mhz, ki_mhz_per_s=found.ki_mhz_per_s)
    return [
        *made,
        PidDesign(
            name="pid, by search",
            gains=by_search,
            margins=margins(plant, by_search, found.target_ratio * slo_s),
            controller=SEARCHED,
        ),
    ]


def _scaled(gains: Gains, factor: float) -> Gains:
    """A plant whose gain is that much larger is the same loop as gains that are."""
    return Gains(kp_mhz=gains.kp_mhz * factor, ki_mhz_per_s=gains.ki_mhz_per_s * factor)


def run_all(seeds: Sequence[int] = SEEDS) -> tuple[pd.DataFrame, dict[tuple[str, str], Response]]:
    """Every controller under every disturbance, and the designs of `pid` under the step.

    Returns:
        The table of measures, one row a run, and the responses by (disturbance, controller).
    """
    specs: dict[tuple[str, str], str | Mapping[str, str]] = {
        (shape, name): spec for shape in SHAPES for name, spec in CONTROLLERS.items()
    }
    specs |= {("step", d.name): d.controller for d in pid_designs()}
    responses = {key: respond(spec, key[0], seeds) for key, spec in specs.items()}
    rows = [
        {"disturbance": shape, "controller": name, **measure(r.itl_s), **_totals(r)}
        for (shape, name), r in responses.items()
    ]
    return pd.DataFrame(rows), responses


def _totals(response: Response) -> dict[str, float]:
    return {
        "violation_s": response.violation_s,
        "ttft_kept_pct": 100.0 * response.ttft_attainment,
        "energy_kj": response.energy_j / 1e3,
        "clock_changes": response.clock_changes,
    }


def describe_plant() -> str:
    """The plant at its operating point and on a stair, and the margins of each design, as text."""
    plant = operating_plant()
    at_once, settled = 1e6 * plant.gain_s_per_mhz, 1e6 * plant.settled_gain_s_per_mhz
    time_ms = 1e3 * plant.time_s
    lines = [
        f"plant at {plant.clock_mhz} MHz, {plant.batch_size} requests: T {time_ms:.1f} ms",
        f"gain at once {at_once:.1f} µs/MHz, settled {settled:.1f} µs/MHz",
        f"time constant {plant.time_constant_s:.1f} s, dead time {plant.dead_time_s:.2f} s",
    ]
    for design in pid_designs():
        found = design.margins
        lines.append(
            f"{design.name}: Kp {design.gains.kp_mhz:.0f} MHz, Ki {design.gains.ki_mhz_per_s:.0f} "
            f"MHz/s, gain margin {found.gain_ratio:.2f}, phase margin {found.phase_deg:.0f}°"
        )
    return "\n".join(lines)
