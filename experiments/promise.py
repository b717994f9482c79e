"""Can top clocks keep the promise? If not, no controller saves anything, and a command says so.

What keeps its promise proves that the load can be carried, and costs nothing to know. Only where no
run of a load does, static-max (every clock at its top, round-robin, as in every comparison) plays
the same requests, unless it is among the runs already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer

from voltana.experiments.compare.policies import (
    STATIC_MAX,
    TARGET,
    attainments_of,
    keeps_promise,
)
from voltana.experiments.progress import note
from voltana.experiments.runs import run
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import POINTS, run_missing
from voltana.experiments.sweep.store import open_store
from voltana.sim.config import SimConfig
from voltana.sim.metrics import summarise

_SHOWN: Final = 3
MAX_REQUESTS: Final = 200_000
"""A longer run is not played once more: that would be minutes for one line."""
_OF_POLICIES: Final[dict[str, Any]] = {
    f.name: f.default
    for f in dataclasses.fields(SimConfig)
    if f.name in (
        "controller", "prefill_controller", "decode_controller", "router", "aim_ratio",
        "predictor", "predictor_scale", "predictor_power_scale", "prefill_metrics",
        "decode_metrics", "length_oracle", "actuation_latency_s", "clock_stall_s", "engine",
        "timeline_interval_s", "timeline_max_samples", "record_iterations",
    )
}  # fmt: skip
"""Keys that fixed clocks and round-robin do not depend on, or that change no result."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """A load whose promise static-max breaks."""

    load: str
    """In words; empty for the only one."""
    ttft_attainment: float
    itl_attainment: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kept = f"TTFT {_pct(self.ttft_attainment)}, ITL {_pct(self.itl_attainment)}"
        return f"{self.load} ({kept})" if self.load else kept


def overload_line(found: Sequence[Overload]) -> str:
    """One line that says at which loads no choice of clocks helps, and what would."""
    shown = "; ".join(map(str, found[:_SHOWN]))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"overload: even top clocks ({STATIC_MAX}) keep less than {100 * TARGET:g} %, {shown}{more}"
        ": take a lower rate, more instances or a longer promise"
    )


def tell(found: Sequence[Overload]) -> None:
    """Say it on standard error, if there is anything to say."""
    if found:
        note(overload_line(found))


def end_with(found: Sequence[Overload], *, require_slo: bool, says: bool = True) -> None:
    """Say it, and end the command if its `--require-slo` is given.

    Args:
        found: Loads that are too much, if any.
        require_slo: Whether that is an error.
        says: Whether to name them on standard error.

    Raises:
        typer.Exit: With code 1.
    """
    if says:
        tell(found)
    if require_slo and found:
        raise missed("a load is too much for top clocks")


def missed(what: str) -> typer.Exit:
    """The end of a command whose `--require-slo` is not met: one line and exit code 1."""
    typer.echo(f"voltana: {what} (--require-slo)", err=True)
    return typer.Exit(1)


def static_max(config: SimConfig) -> SimConfig:
    """The same requests on the same fleet, every clock at its top, routed round-robin."""
    plain: dict[str, Any] = _OF_POLICIES | {"controller": "static", "router": "round-robin"}
    return dataclasses.replace(config, **plain)


def overload_of(config: SimConfig, summary: Mapping[str, Any]) -> Overload | None:
    """Of one run: the overload, if it missed its promise and static-max does too.

    None as well if that takes too long to know, see `MAX_REQUESTS`.
    """
    if keeps_promise(summary) or summary["requests_total"] > MAX_REQUESTS:
        return None
    return _of_top(config, summary if _is_top(config) else None)


def overloads_at(config: SimConfig, rates_rps: Iterable[float]) -> list[Overload]:
    """The rates, of those given, at which static-max misses the promise; runs it at each."""
    at = {rate: dataclasses.replace(config, rate_rps=rate) for rate in rates_rps}
    found = [_of_top(each, None, f"{rate:g} requests/s") for rate, each in at.items()]
    return [overload for overload in found if overload is not None]


def _of_top(
    config: SimConfig, summary: Mapping[str, Any] | None, load: str = ""
) -> Overload | None:
    found = summarise(run(static_max(config))) if summary is None else summary
    return None if keeps_promise(found) else _overload(load, [found])


def overloads(
    points: Sequence[Point],
    directory: Path,
    *,
    jobs: int | None = None,
    executor: str = "processes",
    store: str | Path | None = None,
) -> list[Overload]:
    """Of a finished sweep: the loads at which no policy and not even static-max keeps the promise.

    A policy is judged by its means over the seeds. Runs of static-max that the sweep lacks are kept
    beside its own.

    Args:
        points: The sweep's.
        directory: The sweep's, as of `voltana.experiments.sweep.run.run_sweep`, like the rest.
        jobs: Processes.
        executor: Where points run.
        store: Where results are kept.
    """
    results = open_store(store or directory / POINTS)
    loads: dict[SimConfig, dict[SimConfig, list[Point]]] = {}
    for point in points:
        unseeded = dataclasses.replace(point.config, seed=0)
        loads.setdefault(static_max(unseeded), {}).setdefault(unseeded, []).append(point)
    missed: dict[SimConfig, list[Point]] = {}
    for load, policies in loads.items():
        runs = [
            [results.get(p.key) for p in own if results.has(p.key)] for own in policies.values()
        ]
        if any(own and min(attainments_of(own)) >= TARGET for own in runs):
            continue
        seeds = {p.config.seed: p.config for own in policies.values() for p in own}
        missed[load] = [Point(labels={}, config=static_max(config)) for config in seeds.values()]
    tops = [point for own in missed.values() for point in own]
    failed = run_missing(tops, results, jobs=jobs, executor=executor)
    found = []
    for load, own in missed.items():
        if not any(point.key in failed for point in own):
            summaries = [results.get(point.key) for point in own]
            if min(attainments_of(summaries)) < TARGET:
                found.append(_overload(_name(load, loads), summaries))
    return found


def _is_top(config: SimConfig) -> bool:
    """Whether the run was static-max itself; keys that change no result aside."""
    policies = (config.prefill_controller_spec, config.decode_controller_spec, config.router)
    return policies == ("static", "static", "round-robin")


def _overload(load: str, summaries: Sequence[Mapping[str, Any]]) -> Overload:
    ttft, itl = attainments_of(summaries)
    return Overload(load=load, ttft_attainment=ttft, itl_attainment=itl)


def _name(load: SimConfig, loads: Iterable[SimConfig]) -> str:
    """A load by the keys in which the loads differ."""
    others = [other.as_dict() for other in loads]
    mine = load.as_dict()
    keys = [k for k in mine if any(other.get(k) != mine[k] for other in others)]
    return ", ".join(
        f"{mine[k]:g} requests/s" if k == "rate_rps" else f"{k} {mine[k]}" for k in keys
    )


def _pct(share: float) -> str:
    return f"{100 * share:.2f} %"
