"""From a configuration to a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.uncertainty import draw_profile
from voltana.sim.config import SimConfig
from voltana.sim.engine.simulate import simulate
from voltana.sim.memory import require_room
from voltana.sim.policies.base import DECODE, PREFILL
from voltana.sim.records import RunRecord
from voltana.sim.workload.generate import make_workload, stream_arrivals
from voltana.sim.workload.sessions.generate import is_session_workload
from voltana.sim.workload.traces import open_trace
from voltana.sim.workload.workload import Workload

DEFAULT_DURATION_S = 120.0
"""The reference's benchmark sends 120 s × rate requests."""

cached_profile = lru_cache(maxsize=8)(load_profile)


@lru_cache(maxsize=8)
def _drawn(name: str, number: int) -> Profile:
    return draw_profile(cached_profile(name), number)


def profile_of(config: SimConfig) -> Profile:
    """The profile that a configuration runs on: the named one, or a draw from its errors."""
    return _cached(config.profile, config.profile_draw)


def _cached(name: str, draw: int | None) -> Profile:
    return cached_profile(name) if draw is None else _drawn(name, draw)


def workload_of(config: SimConfig) -> Workload:
    """The requests that a configuration asks for: a trace, or a generated workload."""
    if config.trace is None:
        require_room(
            config.rate_rps * (config.duration_s or DEFAULT_DURATION_S),
            "lower rate_rps or duration_s, or set metrics=sketch, which keeps no request",
        )
        make = _kept_workload if is_session_workload(config.workload) else make_workload
        made = make(
            config.workload,
            rate_rps=config.rate_rps,
            duration_s=config.duration_s or DEFAULT_DURATION_S,
            seed=config.seed,
            arrivals=config.arrivals,
        )
    else:
        made = trace_of(config)
        start_s = config.trace_start_s or 0.0
        if config.duration_s is not None or start_s > 0.0:
            end_s = math.inf if config.duration_s is None else start_s + config.duration_s
            made = made.sliced(start_s, end_s)
    return made if config.time_scale == 1.0 else made.scaled(config.time_scale)


def trace_of(config: SimConfig) -> Workload:
    """The requests of a configuration's trace, before a part is cut out or played faster."""
    assert config.trace is not None
    sample_frac = config.trace_sample_frac or 1.0
    return _cached_trace(
        str(Path(config.trace)), config.trace_unit, bool(config.trace_drop_failed),
        sample_frac, config.seed if sample_frac < 1 else 0,
    )  # fmt: skip


def phase_profiles(config: SimConfig) -> tuple[dict[str, Profile], dict[str, Profile]]:
    """Of prefill's instances and of decode's, the profiles by name; of colocated ones twice theirs.

    In the order of the first instance of each kind.
    """
    prefill, decode = (
        dict.fromkeys(config.mixed_profiles.get(phase, [config.profile]))
        for phase in (PREFILL, DECODE)
    )
    return (
        {name: _cached(name, config.profile_draw) for name in prefill},
        {name: _cached(name, config.profile_draw) for name in decode},
    )


def other_profiles(config: SimConfig) -> dict[str, Profile]:
    """Those of a mixed fleet by name, as `voltana.sim.engine.simulate` takes them."""
    names = {name for of_phase in config.mixed_profiles.values() for name in of_phase}
    return {name: _cached(name, config.profile_draw) for name in names}


def stream_of(config: SimConfig) -> Iterator[Workload] | None:
    """The same requests part by part in bounded memory; None where only `workload_of` has them.

    A streamed workload needs metrics=sketch, see `voltana.sim.engine.simulate`.
    """
    if config.metrics != "sketch" or config.trace is not None:
        return None
    if is_session_workload(config.workload):
        return None
    parts = stream_arrivals(
        config.workload,
        rate_rps=config.rate_rps,
        duration_s=config.duration_s or DEFAULT_DURATION_S,
        seed=config.seed,
        arrivals=config.arrivals,
    )
    return parts if config.time_scale == 1.0 else (p.scaled(config.time_scale) for p in parts)


def run(
    config: SimConfig,
    *,
    spill: Path | None = None,
    watch: Callable[[Iterator[Workload]], Iterator[Workload]] = iter,
) -> RunRecord:
    """Load what the configuration names and simulate it.

    Args:
        config: What to run.
        spill: See `voltana.sim.engine.simulate.simulate`.
        watch: Looks at the parts of a streamed workload as they go by; for progress.
    """
    profile = profile_of(config)
    parts = stream_of(config)
    requests = workload_of(config) if parts is None else watch(parts)
    return simulate(config, profile, requests, spill=spill, others=other_profiles(config))


_kept_workload = lru_cache(maxsize=1)(make_workload)
"""Of sessions, which take longer to draw than a short run takes: a sweep's policies share them."""


@lru_cache(maxsize=4)
def _cached_trace(
    name: str, unit: str | None, drop_failed: bool, sample_frac: float, seed: int
) -> Workload:
    return open_trace(name, unit=unit, drop_failed=drop_failed, sample_frac=sample_frac, seed=seed)
