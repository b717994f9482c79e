"""What a frontier search found as one table: a line a load, router, controller and knob."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.bound.lower import lower_bound
from voltana.experiments.compare.intervals import Interval, saving_pct, t_interval
from voltana.experiments.frontier.search import STATIC_FLEET, STATIC_MAX, STATIC_PAIR, Found, Study
from voltana.experiments.frontier.static.like import counts_name
from voltana.experiments.frontier.trial import pooled
from voltana.experiments.runs import other_profiles, profile_of, workload_of
from voltana.experiments.sweep.executors import make_pool
from voltana.experiments.sweep.identity import bound_key
from voltana.sim.config import KEYS, SimConfig, make_config
from voltana.sim.results import read_json, write_json

COLUMNS: Final = (
    "workload", "fleet", "load", "router", "controller", "knob", "tuning_attainment", "attainment",
    "energy_kj", "ci_kj", "saving_vs_static_max_pct", "saving_vs_best_pair_same_router_pct",
    "ci_pct", "times_bound",
)  # fmt: skip
"""Attainments are shares. `tuning_attainment`: of the worst tuning repeat, by which was chosen.
`attainment`: of all requests of the judging repeats together, which all further columns are of.
`ci_*`: half widths of 95 % intervals (Student's t over the repeats), `ci_pct` that of the saving
against the best pair. Empty: nothing to be said at equal attainment."""
_GRAIN: Final = 200
"""Attainments of bounds are rounded down to half a percent: fewer bounds, each still one."""


def frontier_table(
    study: Study, found: Sequence[Found], directory: Path, jobs: int | None = None
) -> pd.DataFrame:
    """The lines of one load, with savings where, and only where, the target is kept.

    A saving stands where the policy keeps the target on the judging repeats and, if its knob was
    chosen, on each tuning repeat. static-max is that of the study's first router, whatever it
    keeps: a scale. The best pair is the best static fleet under the same router, a pair with all
    instances included; where that falls, the one chosen in hindsight; none if there is none.

    Args:
        study: What was compared.
        found: Of one load, as `search_frontier` yields them.
        directory: Bounds are kept there, by what they depend on.
        jobs: Processes.
    """
    kept = [f for f in found if _attainment(study, f) >= study.target]
    shared = {**study.base, **_settings(study, found[0].load)}.get("max_running_requests")
    frames = [f.judged.rows.assign(max_running_requests=shared) for f in kept]
    bounds = _bounds(frames, directory, jobs)  # of any policy: a cap is the static pair's own
    top = _reference(found, STATIC_MAX, study.routers[0])
    top_j = top.judged.energies_j if top is not None else ()
    rows = []
    for each in found:
        pair = _reference(found, STATIC_FLEET, each.router)
        is_kept = pair is not None and keeps(study, pair)
        rows.append(
            _row(study, each, top_j, pair.judged.energies_j if is_kept and pair else (), bounds)
        )
    return pd.DataFrame(rows, columns=[*COLUMNS])


def keeps(study: Study, found: Found) -> bool:
    """Whether it kept the target where it was chosen and where it was judged."""
    return found.is_reached(study.target) and _attainment(study, found) >= study.target


def carries(study: Study, found: Sequence[Found]) -> bool:
    """Whether the top clocks keep the target under one router at least."""
    return any(keeps(study, f) for f in found if f.controller == STATIC_MAX)


def _attainment(study: Study, found: Found) -> float:
    return math.nan if found.judged.error else pooled(found.judged.rows, study.attainment)


def _reference(found: Iterable[Found], controller: str, router: str) -> Found | None:
    """The last of this name: a static fleet found in hindsight follows one that failed."""
    wanted = (controller, router)
    return next((f for f in [*found][::-1] if (f.controller, f.router) == wanted), None)


def _row(
    study: Study,
    found: Found,
    top_j: tuple[float, ...],
    pair_j: tuple[float, ...],
    bounds: Mapping[str, float],
) -> dict[str, Any]:
    judged = found.judged
    energy = t_interval([] if judged.error else judged.energies_j)
    none = Interval(math.nan, math.nan)
    of_top = of_pair = none
    ratio = math.nan
    if keeps(study, found):
        of_top = saving_pct(judged.energies_j, top_j) if top_j else none
        is_pair = found.controller in (STATIC_PAIR, STATIC_FLEET)
        of_pair = saving_pct(judged.energies_j, pair_j) if pair_j and not is_pair else none
        keys = _keys(judged.rows)
        if all(bounds[key] > 0.0 for key in keys):  # noise may leave nothing of a tiny run's
            pairs = zip(judged.energies_j, keys, strict=True)
            ratio = t_interval([energy_j / bounds[key] for energy_j, key in pairs]).mean
    config = make_config({**study.base, **_settings(study, found.load)})
    values = (
        _workload(config), fleet_name(config), found.load, found.router,
        found.controller, found.knob,
        math.nan if found.tuned is None else found.tuned.worst_attainment,
        _attainment(study, found), energy.mean / 1e3, energy.half / 1e3, of_top.mean, of_pair.mean,
        of_pair.half, ratio,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def fleet_name(config: SimConfig) -> str:
    """As people write it: 2P2D, or 4C of colocated instances."""
    if config.num_colocated:
        return f"{config.num_colocated}C"
    return counts_name(config.num_prefill, config.num_decode)


def _settings(study: Study, load: str) -> Mapping[str, Any]:
    return next(x.settings for x in study.loads if x.name == load)


def _workload(config: SimConfig) -> str:
    if config.trace is None:
        return config.workload
    return Path(config.trace).name.partition(".")[0]


def _keys(rows: pd.DataFrame) -> list[str]:
    """The bound that each run is held against: its workload and fleet, its own attainment."""
    floors = (rows["attainment"] * _GRAIN + 1e-9).astype(int) / _GRAIN
    return [f"{h} {a:.3f}" for h, a in zip(rows["hash"], floors, strict=True)]


def _bounds(frames: Sequence[pd.DataFrame], directory: Path, jobs: int | None) -> dict[str, float]:
    """Lower bounds by key, kept in the directory; a bound does not depend on the policy."""
    store = directory / "bounds"
    store.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, tuple[SimConfig, float]] = {}
    of_key: dict[str, str] = {}
    for frame in frames:
        for values, key in zip(frame.to_dict("records"), _keys(frame), strict=True):
            config = make_config({k: v for k, v in values.items() if k in KEYS and v == v})
            attainment = float(key.split()[1])
            of_key[key] = name = bound_key(config, attainment)
            if not (store / f"{name}.json").exists():
                wanted[name] = (config, attainment)
    if wanted:
        workers = min(jobs or os.cpu_count() or 1, len(wanted))
        with make_pool(workers) as pool:
            for name, energy_j in zip(wanted, pool.map(_bound_j, wanted.values()), strict=True):
                write_json({"energy_j": energy_j}, store / f"{name}.json")
    found = {k: read_json(store / f"{n}.json")["energy_j"] for k, n in of_key.items()}
    return {k: math.nan if energy_j is None else float(energy_j) for k, energy_j in found.items()}


def _bound_j(task: tuple[SimConfig, float]) -> float:
    config, attainment = task
    workload = workload_of(config)
    if config.num_colocated or config.caches or workload.turns is not None:
        return math.nan  # the bound does not know them
    others = other_profiles(config)
    bound = lower_bound(config, profile_of(config), workload, attainment=attainment, others=others)
    return bound.energy_j
