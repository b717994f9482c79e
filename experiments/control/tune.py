"""Gains for the PID controller, found in the simulator.

Differential evolution over (target, Kp, Ki, Kd) of one phase at a time, decode first, against

    cost = energy / energy of static-max + 30 · max(0, wanted attainment - attainment),

the mean over the tuning seeds; 1 % of missed attainment weighs as much as 30 % of the energy of
static-max. The default gains are in the first generation, so that the answer is never worse than
them on the tuning seeds; on others it may be, and the held-out seeds are there to tell. Gains are
rounded to three digits before they are tried: what is printed is what was run. A generation runs
in parallel and every run is kept by the hash of its configuration: an interrupted search, started
again, goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import Bounds, differential_evolution

from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.policies.controllers.pid import PidParameters
from voltana.sim.policies.registry import check_policies

FloatArray = npt.NDArray[np.float64]

PHASES: Final = ("decode", "prefill")
"""In the order in which they are tuned."""
RANGES: Final = {
    "target_ratio": (0.4, 1.0), "kp_mhz": (10.0, 5000.0), "ki_mhz_per_s": (5.0, 5000.0),
    "kd_mhz_s": (0.5, 500.0),
}  # fmt: skip
"""Searched; gains on a logarithmic scale."""
_KEYS: Final = ("target", "kp", "ki", "kd")
_PENALTY: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Mean energy and attainment of one setting over some seeds, and its cost."""

    energy_j: float
    attainment: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The gains found, as configuration keys, and how they and the default ones did."""

    settings: Mapping[str, str]
    """`prefill_controller` and `decode_controller`: ready policy specs."""
    tuning: Mapping[str, Judged]
    """By "default" and "tuned", on the tuning seeds."""
    held_out: Mapping[str, Judged]
    """The same on seeds that the search has not seen."""
    static_max: Judged
    """Top clocks on the held-out seeds: what no gains can surpass."""


class PidTuner:
    """Searches gains on given runs.

    Args:
        base: Configuration keys of the runs: profile, workload, rate, fleet, promises, router.
        directory: Of the runs, see `voltana.experiments.sweep.run.run_sweep`.
        seeds: To tune on.
        held_out: Others, to judge by; at least one, none of them tuned on.
        target: Attainment (requests that keep both promises) that is wanted.
        population: Settings a generation.
        generations: Beyond the first.
        jobs: Processes.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        directory: Path,
        *,
        seeds: Sequence[int] = (11, 12),
        held_out: Sequence[int] = (21, 22, 23),
        target: float = 0.99,
        population: int = 16,
        generations: int = 6,
        jobs: int | None = None,
    ) -> None:
        if not seeds or not held_out or set(seeds) & set(held_out):
            raise VoltanaError(
                f"tuning and held-out seeds must be given and differ, got {list(seeds)} and "
                f"{list(held_out)}"
            )
        if population < 5 or generations < 1:
            raise VoltanaError(
                f"a search needs population >= 5 and generations >= 1, got {population} and "
                f"{generations}"
            )
        self._base = {k: v for k, v in base.items() if "controller" not in k}
        checked = make_config(self._base, where="tune")
        check_policies("pid", checked.router)
        self._directory = directory
        self._seeds, self._held_out = tuple(seeds), tuple(held_out)
        self._target = target
        self._population, self._generations = population, generations
        self._jobs = jobs
        self._points: list[Point] = []

    def tune(self) -> Tuned:
        """Tune decode, then prefill with the decode found; judge both on the held-out seeds."""
        settings = dict.fromkeys((f"{phase}_controller" for phase in PHASES), "pid")
        default = dict(settings)
        self.judge([default], self._seeds)  # what cannot run says so here, and not inside SciPy
        for phase in PHASES:
            settings |= self._tune_phase(f"{phase}_controller", settings)
        both = {"default": default, "tuned": settings}
        return Tuned(
            settings=settings,
            tuning=dict(zip(both, self.judge(list(both.values()), self._seeds), strict=True)),
            held_out=dict(zip(both, self.judge(list(both.values()), self._held_out), strict=True)),
            static_max=self.judge([{"controller": "static"}], self._held_out)[0],
        )

    def judge(self, settings: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> list[Judged]:
        """Run every setting on every seed, in parallel, and reduce each to its outcome."""
        frame = self._run([{"controller": "static"}, *settings], seeds)
        energy_j = frame["energy_j"].to_numpy(float).reshape(-1, len(seeds)).mean(axis=1)
        attained = frame["attainment"].to_numpy(float).reshape(-1, len(seeds)).mean(axis=1)
        missed = np.maximum(self._target - attained, 0.0)
        costs = energy_j / energy_j[0] + _PENALTY * missed
        rows = zip(energy_j[1:], attained[1:], costs[1:], strict=True)
        return [Judged(energy_j=float(e), attainment=float(a), cost=float(c)) for e, a, c in rows]

    def _tune_phase(self, key: str, others: Mapping[str, str]) -> dict[str, str]:
        low, high = np.array([_coded(r) for r in zip(*RANGES.values(), strict=True)])
        rng = np.random.default_rng(1)
        first = low + (high - low) * rng.random((self._population, len(low)))
        standard = PidParameters()
        first[0] = _coded([getattr(standard, name) for name in RANGES])

        def costs(columns: Any, /) -> Any:  # noqa: ANN401 (SciPy's type is of one point)
            tried = [{**others, key: _spec(column)} for column in columns.T]
            return np.array([o.cost for o in self.judge(tried, self._seeds)])

        found = differential_evolution(
            costs, Bounds(low, high), init=first, maxiter=self._generations, seed=2,
            polish=False, vectorized=True, updating="deferred", tol=0.0,
        )  # fmt: skip
        return {key: _spec(found.x)}

    def _run(self, settings: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> pd.DataFrame:
        made = [
            Point(labels={}, config=make_config({**self._base, **each, "seed": seed}))
            for each in settings
            for seed in seeds
        ]
        self._points += made
        frame = run_sweep(self._points, self._directory, jobs=self._jobs, kind="tuning")
        return frame.iloc[-len(made) :]


def _coded(values: Sequence[float]) -> FloatArray:
    """The target as it is, gains as logarithms."""
    return np.array([values[0], *np.log(values[1:])])


def _spec(coded: FloatArray) -> str:
    values = [float(coded[0]), *np.exp(coded[1:])]
    pairs = [f"{key}={value:.3g}" for key, value in zip(_KEYS, values, strict=True)]
    return "pid:" + ",".join(pairs)
