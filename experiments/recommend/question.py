"""What is asked: the load, the promises, how much hardware, and on which requests is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from voltana.experiments.frontier.contenders import Contender, parse_contender
from voltana.experiments.frontier.study import check_settings
from voltana.experiments.runs import DEFAULT_DURATION_S, cached_profile, trace_of
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import CLOCKLESS
from voltana.sim.policies.registry import check_policies

POLICIES: Final = (
    "ecomin + consolidate", "ecomin + ecoroute", "ecofreq + ecoroute", "pid + round-robin",
)  # fmt: skip
"""Dynamic policies that take part, unless others are named."""
ROUTERS: Final = ("round-robin", "consolidate")
"""Routers of fixed clocks."""
TUNING_SEEDS: Final = (1, 2, 3)
JUDGING_SEED: Final = 11
RESERVE_SEED: Final = 101
"""First seed of each further round, where what was chosen broke its promise when judged."""
DURATION_S: Final = 60.0
"""Of a repeat of a generated workload."""
SCREENING: Final = 0.6
"""The first tuning repeat, on which all is tried, is shorter by that factor."""
WINDOW_REQUESTS: Final = 3000
"""Of a trace at most about so many make a repeat: windows, evenly spaced over the trace."""
WINDOWS: Final = 10
LEAST_WINDOW_S: Final = 30.0
_OURS: Final = (
    "num_prefill", "num_decode", "active_prefill", "active_decode", "num_colocated",
    "active_colocated", "controller", "prefill_controller", "decode_controller", "router",
    "aim_ratio", "seed", "profile_draw", "trace_start_s",
)  # fmt: skip
Repeats = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One profile, load and limit of hardware."""

    base: Mapping[str, Any]
    """Configuration keys of all runs: profile, workload or trace, rate, promises."""
    gpus: int
    """How many there are."""
    watts: float | None
    """What all instances together may draw at once."""
    target: float
    contenders: tuple[Contender, ...]
    routers: tuple[str, ...]
    clocks_mhz: tuple[int, ...]
    tuning: Repeats
    judging: Repeats
    reserves: tuple[Repeats, ...]
    """Further judging repeats, each used once where the ones before went into the choice."""
    draws: int
    """From the profile's errors; 0: none are stated, or none were asked for."""
    is_capped: bool = False
    """Whether power caps are searched, too."""

    @property
    def choice_target(self) -> float:
        """What a choice has to attain on all tuning repeats together: three quarters of the misses.

        Of the settings that just reach the target on a few repeats half will miss it on others.
        """
        return self.target + 0.25 * (1.0 - self.target)

    @property
    def profile(self) -> Profile:
        """The nominal one."""
        return cached_profile(str(self.base["profile"]))

    @property
    def tensor_parallel(self) -> int:
        """GPUs of an instance."""
        return self.profile.meta.model.tensor_parallel

    @property
    def instances(self) -> int:
        """How many the GPUs make."""
        return self.gpus // self.tensor_parallel

    def at_load(self, factor: float) -> dict[str, Any]:
        """Configuration keys of that many times the asked load."""
        config = make_config(self.base)
        if config.trace is not None:
            return {"time_scale": config.time_scale * factor}
        return {"rate_rps": config.rate_rps * factor}

    def peak_w(self, phase: str, clock_mhz: int) -> float:
        """The most that an instance draws at a clock, in any iteration that its tables have."""
        return peak_w(self.profile, phase, clock_mhz)

    def cap_w(self, phase: str, clock_mhz: int) -> int:
        """The power cap of an instance that slows nothing that this clock would not, in whole W."""
        return math.ceil(cap_w(self.profile, phase, clock_mhz))


@lru_cache
def peak_w(profile: Profile, phase: str, clock_mhz: int) -> float:
    """The most that an instance of a profile draws at a clock or below, in W, all its GPUs.

    Args:
        profile: Its tables.
        phase: "prefill" or "decode".
        clock_mhz: Any; between two clocks of the tables the upper one counts.
    """
    frame = profile.prefill if phase == "prefill" else profile.decode
    tables = sorted(frame["frequency_mhz"].unique())
    above = next((c for c in tables if c >= clock_mhz), tables[-1])
    return float(frame.loc[frame["frequency_mhz"] <= above, "power_w"].max())


@lru_cache
def cap_w(profile: Profile, phase: str, clock_mhz: int) -> float:
    """As `peak_w`, but linear between two clocks of the tables. Args: as of `peak_w`."""
    frame = profile.prefill if phase == "prefill" else profile.decode
    most = frame.groupby("frequency_mhz")["power_w"].max().cummax()
    return float(np.interp(clock_mhz, most.index, most))


def make_question(
    settings: Mapping[str, Any],
    *,
    gpus: int | None,
    watts: float | None,
    target: float = 0.99,
    policies: Sequence[str] = (),
    seeds: int = 5,
    draws: int = 0,
    clocks_mhz: Sequence[int] = (),
    routers: Sequence[str] = ROUTERS,
    is_capped: bool = False,
) -> Question:
    """Check what is asked.

    Args:
        settings: Configuration keys; fleet, policies and seeds are the search's own.
        gpus: How many there are; None: as many as the watts allow, 16 at most.
        watts: What all of them may draw at once; None: no limit.
        target: Share of requests that keep both promises.
        policies: Dynamic ones, as `voltana.experiments.frontier.contenders` reads them.
        seeds: Judging repeats.
        draws: From the profile's stated errors.
        clocks_mhz: The only fixed clocks; empty: all of the profile.
        routers: Of fixed clocks.
        is_capped: Search power caps, too.

    Raises:
        VoltanaError: A key that is the search's own, a bad value, or too little hardware.
    """
    for key in settings:
        if key in _OURS:
            raise VoltanaError(f"--set {key} is what the search decides: leave it out")
    check_settings(settings, [], ("seed",), "voltana recommend")
    config = make_config(settings)
    profile = cached_profile(config.profile)
    if not 0.0 < target < 1.0:
        raise VoltanaError(f"the target must be in (0, 1), got {target:g}: 0.99 is usual")
    if draws and profile.meta.errors is None:
        draws = 0
    clocks = tuple(c for c in profile.clocks_mhz if not clocks_mhz or c in clocks_mhz)
    if not clocks:
        raise VoltanaError(f"no clock of {[*clocks_mhz]} is one of {config.profile}")
    contenders = tuple(parse_contender(p) for p in policies or POLICIES)
    if len(clocks) == 1 and not policies:
        contenders = ()  # nothing to choose
    for contender in contenders:
        _require_choice(profile, contender)
    for router in routers:
        check_policies("static", router)
    tuning, judging, reserves = _repeats(settings, seeds)
    tensor_parallel = profile.meta.model.tensor_parallel
    return Question(
        base={**settings, "profile": config.profile},
        gpus=_gpus(profile, clocks, gpus, watts, tensor_parallel), watts=watts, target=target,
        contenders=contenders, routers=tuple(routers), clocks_mhz=clocks, tuning=tuning,
        judging=judging, reserves=reserves, draws=draws, is_capped=is_capped and len(clocks) > 1,
    )  # fmt: skip


def _require_choice(profile: Profile, contender: Contender) -> None:
    if len(profile.clocks_mhz) == 1 and contender.controller.partition(":")[0] not in CLOCKLESS:
        raise VoltanaError(
            f"policy {contender.controller!r} must choose among clocks, and {profile.name!r} has "
            f"{profile.clocks_mhz[0]} MHz alone: import it with --power-from and --clock-shape"
        )


def _gpus(
    profile: Profile, clocks: Sequence[int], gpus: int | None, watts: float | None, width: int
) -> int:
    if gpus is None and watts is None:
        raise VoltanaError("name the hardware: --gpus N, or --watts W for all of them together")
    least_w = sum(peak_w(profile, phase, clocks[0]) for phase in ("prefill", "decode"))
    if watts is not None and watts < least_w:
        raise VoltanaError(
            f"--watts must allow a prefill and a decode instance at {clocks[0]} MHz, which draw up "
            f"to {least_w:.0f} W, got {watts:g}"
        )
    if gpus is None:
        assert watts is not None
        gpus = min(16, int(2 * watts / least_w)) * width
    if gpus < 2 * width:
        raise VoltanaError(
            f"--gpus must be >= {2 * width}, a prefill and a decode instance of {width} each, "
            f"got {gpus}"
        )
    return gpus


def _repeats(
    settings: Mapping[str, Any], seeds: int
) -> tuple[Repeats, Repeats, tuple[Repeats, ...]]:
    """Seeds, or windows of a trace: of a trace every seed would send the same requests."""
    config = make_config(settings)
    if config.trace is None:
        if config.metrics == "sketch":
            raise VoltanaError("metrics=sketch is for one long run: leave it out")
        more = {} if config.duration_s else {"duration_s": DURATION_S}

        def of(first: int, count: int) -> Repeats:
            return [{**more, "seed": s} for s in range(first, first + count)]

        reserves = tuple(of(RESERVE_SEED + 20 * i, seeds) for i in range(2))
        tuning = of(TUNING_SEEDS[0], len(TUNING_SEEDS))
        shorter_s = SCREENING * (config.duration_s or DURATION_S)
        return (
            [{**tuning[0], "duration_s": shorter_s}, *tuning[1:]],
            of(JUDGING_SEED, seeds),
            reserves,
        )
    return _windows(settings, seeds)


def _windows(
    settings: Mapping[str, Any], seeds: int
) -> tuple[Repeats, Repeats, tuple[Repeats, ...]]:
    """Windows of a trace: the busiest and two others to choose on, the rest to judge on."""
    config = make_config(settings)
    trace = trace_of(config)
    whole_s = min(trace.duration_s, config.duration_s or trace.duration_s)
    rate = len(trace) / max(trace.duration_s, 1e-9)
    window_s = min(whole_s / WINDOWS, max(WINDOW_REQUESTS / max(rate, 1e-9), LEAST_WINDOW_S))
    if window_s * rate * WINDOWS < WINDOWS * 20:
        raise VoltanaError(
            f"a trace must have 200 requests or more to choose on a part of it and judge on "
            f"another, got {len(trace)}: give its lengths as --workload, with --rate"
        )
    starts = [i * (whole_s - window_s) / (WINDOWS - 1) for i in range(WINDOWS)]
    counts = [
        int(((trace.arrival_s >= s) & (trace.arrival_s < s + window_s)).sum()) for s in starts
    ]
    parts = [
        {"trace_start_s": s, "duration_s": window_s, "seed": JUDGING_SEED + i}
        for i, s in enumerate(starts)
    ]
    filled = [i for i in range(WINDOWS) if counts[i]]
    if len(filled) < 4:
        raise VoltanaError(f"{config.trace}: nearly all of it is silence: cut out the busy part")
    busiest = max(filled, key=lambda i: counts[i])
    others = [i for i in filled if i != busiest]
    tuning = [busiest, others[len(others) // 4], others[(3 * len(others)) // 4]]
    judging = [i for i in filled if i not in tuning]
    return [parts[i] for i in dict.fromkeys(tuning)], [parts[i] for i in judging[:seeds]], ()


def duration_s(question: Question) -> float:
    """Of one judging repeat."""
    found = question.judging[0].get("duration_s") or question.base.get("duration_s")
    return float(found or DEFAULT_DURATION_S)
