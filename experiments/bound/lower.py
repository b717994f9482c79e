"""A lower bound on the energy of a run: what no policy of this simulator can go below.

**Claim.** For a run that is played to its end, `energy_j` (all instances from time 0 to the
makespan, busy and idle) is at least `lower_bound(...).energy_j`. With `attainment` = a > 0 the
claim is about those runs only in which at least that share of all requests keeps both promises.

**Proof sketch.** Let w be the least power of the profile: of idling at any clock, or of any
iteration. Every instance draws at least w at every instant, so that with N instances

    energy = N·w·makespan + Σ idle (P - w)·dt + Σ iterations (P - w)·T,

and the idle sum is >= 0. Of unlike cards each has its own w, times and powers: N·w is then the
sum over all instances, and what is said below of every iteration has to hold of those of every
kind of card that its phase has, so that each minimum is over the kinds, too; nothing is assumed
of which of them a request meets. A clock change splits an iteration into parts of its work at
several clocks; its time and energy are then weighted means of those at each clock, and all that is
said of iterations below is linear in (energy, time), so that it need be shown for whole ones only.

*Makespan.* The last request of all that arrives still needs one prefill iteration and all of its
decode iterations, none shorter than the shortest of the profile.

*Prefill.* Every prompt token is in exactly one iteration (tokens of a chunked prompt too), so the
sum is at least tokens × min (P - w)·T/tokens. Where the minimum lies: for a fixed clock and row,
between two knots P - w = c + d·t and T = a + b·t, so that (c + d·t)(a + b·t)/t has its minimum at
a knot or at sqrt(a·c/(b·d)). Across rows P and T are linear in 1/batch for fixed tokens and not
negative: a product of two such functions is either concave or monotone, so that its minimum is at
a row. Left of the first row time and power are no less than on it; right of the last they are
held. All supported clocks are listed, so that nothing is interpolated there.

*Decode.* Every output token is one place in one iteration (the first one too if `first_token` is
"decode"), and a request's context grows by one with each. Suppose that numbers α, β, λ >= 0 and
α' satisfy, for every clock, every whole batch size b and every context sum t that can occur,

    (P - w)·T >= α·b + β·t        and        (P - w)·T + λ·b·(T - S) >= α'·b + β·t,      (1)

with S the ITL promise. Take an iteration with k requests that keep their promises in the end (and
of which this is not the first token) and b - k others. As (1) is linear in k it follows that
(P - w)·T + λ·k·(T - S) >= α'·k + α·(b - k) + β·t. Summed over all iterations the λ-terms are <= 0:
TPOT <= S says that for each such request the iterations after its first token last at most S on
average. So decode costs at least α'·K + α·(tokens - K) + β·(sum of contexts), where K counts the
tokens after the first of the requests that keep their promises; the least it can be is found by
giving up the longest ones. With β and λ chosen, the largest α and α' of (1) are minima over
finitely many pieces, on each of which the difference of the sides is a quadratic in t: at an end
or, if it is convex, at its vertex. Between two profiled batch sizes time and power at fixed t are
linear in b, and every whole b is tried. Any β and λ >= 0 give a bound; a search picks good ones.

*Batch sizes.* No more requests decode at one time than have arrived, than the engine admits, or,
given a, than can be there: a request that keeps its promises decodes only between its arrival and
arrival + S_TTFT + S·(tokens - 1), and at most (1 - a)·n do not keep them.

*Noise.* Iteration times vary around the table's by factors of mean 1 that no policy knows
beforehand, so that all above holds of the mean. In one run the sum of (m - 1)·c over iterations,
where c is what (1) says of one, is a martingale; its variance is at most s²·c_max·Σc, with s the
largest spread and c_max the costliest iteration. `_SIGMAS` deviations of it are taken off each
part, and of the last request's iterations off the makespan: a bound for all but a few runs in
millions. That a request's keeping its promises depends on the noise, too, is left aside. Sags and
stalls only add time and energy. At rest an instance draws at least w, in use or not.

What it leaves out, and why real policies stay above it: nobody has to wait for requests to fill a
batch, clocks change at no cost, and the future is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.experiments.bound.surface import DecodeSurface, decode_surface, joined, prefill_knots
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import DECODE, PREFILL
from voltana.sim.workload.workload import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_SIGMAS: Final = 5.0
"""Deviations of a run's noise that the bound allows for."""
_ROUNDING: Final = 1e-9
"""Relative; the simulator's sums of iterations are rounded, and so are those here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyBound:
    """A lower bound on `energy_j` and the parts it is made of."""

    idle_floor_j: float
    """Least powers of all instances × least makespan."""
    prefill_j: float
    """Above that floor."""
    decode_j: float
    """Above that floor."""
    makespan_s: float
    attainment: float
    """The bound holds for runs that attain at least this; 0: for every run."""

    @property
    def energy_j(self) -> float:
        """The bound."""
        total = self.idle_floor_j + self.prefill_j + self.decode_j
        return max(total, 0.0) * (1.0 - _ROUNDING)


def lower_bound(
    config: SimConfig,
    profile: Profile,
    workload: Workload,
    *,
    attainment: float = 0.0,
    others: Mapping[str, Profile] | None = None,
) -> EnergyBound:
    """Energy that no run of this workload on this fleet can go below; see the module's proof.

    Args:
        config: Fleet, limits and promises; its policies do not count.
        profile: The truth about times and power, of every instance that has none of its own.
        workload: The requests.
        attainment: Share of requests in [0, 1] that are known to keep both promises. A bound for
            a positive share says nothing of runs that attain less.
        others: Profiles of a mixed fleet, by the names that the configuration has for them.

    Raises:
        VoltanaError: `attainment` is out of range, the configuration cuts runs short or is
            no plain fleet, prompts need not be computed whole, or a turn waits.
    """
    if not 0.0 <= attainment <= 1.0:
        raise VoltanaError(f"attainment of a bound must be in [0, 1], got {attainment}")
    config.require_plain("the bound", knows=("prefill_profiles", "decode_profiles"))
    if config.run_limit_s is not None:
        raise VoltanaError("a bound is for runs played to their end: leave out run_limit_s")
    if config.caches or workload.turns is not None:
        raise VoltanaError(
            "the bound computes prompts whole, at the workload's arrivals, and shares no memory: "
            "leave out prefix_cache_tokens and decode_cache, and let no turn wait "
            "(chat:waits=false)"
        )
    of_prefill, of_decode = (
        [(others or {})[name] for name in config.mixed_profiles[phase]]
        if phase in config.mixed_profiles
        else [profile] * config.counts[phase]
        for phase in (PREFILL, DECODE)
    )
    longest = min(config.kv_capacity_tokens or p.meta.engine.kv_capacity_tokens for p in of_decode)
    admitted = workload.input_tokens + workload.output_tokens <= longest
    work = _Work.of(config, workload, admitted, attainment)
    if work is None:
        return EnergyBound(
            idle_floor_j=0.0, prefill_j=0.0, decode_j=0.0, makespan_s=0.0, attainment=attainment
        )
    floor_w = sum(_floor_w(p) + (config.host_power_w or 0.0) for p in (*of_prefill, *of_decode))
    surface = joined([_surface(p, config, work) for p in dict.fromkeys(of_decode)])
    prefill = _PrefillCosts.least([_prefill_costs_of(p, config) for p in dict.fromkeys(of_prefill)])
    noise = {
        phase: _SIGMAS * config.noise_scale * max(p.spread().largest(phase) for p in profiles)
        for phase, profiles in ((PREFILL, of_prefill), (DECODE, of_decode))
    }
    steps = np.maximum(work.steps - noise[DECODE] * np.sqrt(work.steps), 0.0)
    first_s = prefill.shortest_s * max(1.0 - noise[PREFILL], 0.0)
    makespan_s = float((work.arrival_s + first_s + steps * surface.shortest_s).max())
    prefill_j = prefill.per_token_j * float(work.input_tokens.sum())
    return EnergyBound(
        idle_floor_j=floor_w * makespan_s,
        prefill_j=prefill_j - noise[PREFILL] * math.sqrt(prefill.most_j * max(prefill_j, 0.0)),
        decode_j=_decode_j(surface, work, config.slo_itl_s, noise[DECODE]),
        makespan_s=makespan_s,
        attainment=attainment,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What has to be done, whoever does it: admitted requests only, arrays of shape (n,)."""

    arrival_s: FloatArray
    input_tokens: IntArray
    steps: IntArray
    """Decode iterations of each."""
    kept_steps: float
    """Least number of steps whose mean duration the promise bounds."""
    most_together: int
    """Requests that can be in decode at one instant."""

    @classmethod
    def of(
        cls, config: SimConfig, workload: Workload, admitted: npt.NDArray[np.bool_], share: float
    ) -> _Work | None:
        arrival_s = workload.arrival_s[admitted]
        if not len(arrival_s):
            return None
        outputs = workload.output_tokens[admitted]
        steps = outputs if config.first_token == "decode" else outputs - 1
        gaps = np.sort(outputs - 1)
        # requests that may break their promises, the rejected ones among them
        broken = len(workload) - math.ceil(share * len(workload) - 1e-9)
        free = min(max(broken - int((~admitted).sum()), 0), len(gaps))
        latest_s = arrival_s + config.slo_ttft_s + config.slo_itl_s * (outputs - 1)
        together = _peak(arrival_s, latest_s * (1.0 + _ROUNDING)) + free
        return cls(
            arrival_s=arrival_s,
            input_tokens=workload.input_tokens[admitted],
            steps=steps,
            kept_steps=float(gaps[: len(gaps) - free].sum()),
            most_together=min(together, len(arrival_s)),
        )

    @property
    def contexts(self) -> float:
        """Sum over all steps of the request's context at it: input, input + 1 and so on."""
        steps = self.steps.astype(np.float64)
        return float((steps * self.input_tokens + 0.5 * steps * (steps - 1.0)).sum())


def _peak(start_s: FloatArray, end_s: FloatArray) -> int:
    """Most intervals [start, end] that share an instant."""
    starts, ends = np.sort(start_s), np.sort(end_s)
    return int((np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, "left")).max())


@lru_cache(maxsize=16)
def _floor_w(profile: Profile) -> float:
    """The least power of the profile, idle or busy, at any clock."""
    truth = profile.truth()
    idle_w = min(truth.rest_power_w(clock) for clock in (0, *profile.clocks_mhz))
    busy_w = min(float(profile.prefill["power_w"].min()), float(profile.decode["power_w"].min()))
    return min(idle_w, busy_w)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrefillCosts:
    """Of one iteration of prefill, at any clock."""

    per_token_j: float
    """Least (P - w)·T per token."""
    most_j: float
    """Largest (P - w)·T."""
    shortest_s: float

    @classmethod
    def least(cls, kinds: Sequence[_PrefillCosts]) -> _PrefillCosts:
        """Of an iteration on any kind of card."""
        return cls(
            per_token_j=min(k.per_token_j for k in kinds),
            most_j=max(k.most_j for k in kinds),
            shortest_s=min(k.shortest_s for k in kinds),
        )


def _prefill_costs_of(profile: Profile, config: SimConfig) -> _PrefillCosts:
    budget = config.max_prefill_tokens or profile.meta.engine.max_prefill_tokens
    return _prefill_costs(
        profile, _floor_w(profile), budget, config.max_prefill_requests, config.extrapolate
    )


@lru_cache(maxsize=64)
def _prefill_costs(
    profile: Profile, floor_w: float, most_tokens: int, most_requests: int, extrapolate: bool
) -> _PrefillCosts:
    best_j, shortest_s, most_j = math.inf, math.inf, 0.0
    for knots, time_s, power_w in prefill_knots(profile, most_tokens, most_requests, extrapolate):
        above_w = power_w - floor_w
        shortest_s = min(shortest_s, float(time_s.min()))
        most_j = max(most_j, float(above_w.max() * time_s.max()))
        best_j = min(best_j, float((above_w * time_s / knots).min()))
        width = np.diff(knots)
        b, d = np.diff(time_s) / width, np.diff(above_w) / width
        a, c = time_s[:-1] - b * knots[:-1], above_w[:-1] - d * knots[:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            turn = np.sqrt(a * c / (b * d))
        inside = np.isfinite(turn) & (turn > knots[:-1]) & (turn < knots[1:])
        at = turn[inside]
        if len(at):
            value = (a[inside] + b[inside] * at) * (c[inside] + d[inside] * at) / at
            best_j = min(best_j, float(value.min()))
    return _PrefillCosts(per_token_j=best_j, most_j=most_j, shortest_s=shortest_s)


def _surface(profile: Profile, config: SimConfig, work: _Work) -> DecodeSurface:
    """Decode's iterations of one kind of card, their powers above its floor."""
    engine = profile.meta.engine
    capacity = config.kv_capacity_tokens or engine.kv_capacity_tokens
    most = config.max_running_requests or engine.max_running_requests
    surface = decode_surface(profile, most, config.extrapolate, capacity)
    return surface.up_to(work.most_together).above(_floor_w(profile))


def _decode_j(surface: DecodeSurface, work: _Work, slo_s: float, noise: float) -> float:
    """The largest bound that a coordinate search over (β, λ) finds; every trial is a bound.

    `noise` is the relative deviation of one iteration that is allowed for.
    """
    total, kept, contexts = float(work.steps.sum()), work.kept_steps, work.contexts

    def table_j(beta: float, lam: float) -> float:
        free_j = surface.least_per_request(beta, 0.0)
        if lam == 0.0 or kept == 0.0:
            return free_j * total + beta * contexts
        kept_j = surface.least_per_request(beta, lam) - lam * slo_s
        # a promise that is not kept costs nothing less: then λ·(T - S) helps nobody
        return free_j * (total - kept) + max(kept_j, free_j) * kept + beta * contexts

    def bound_j(beta: float, lam: float) -> float:
        mean_j = table_j(beta, lam)
        if noise == 0.0:
            return mean_j
        sum_j = max(mean_j + lam * slo_s * kept, 0.0)
        return mean_j - noise * math.sqrt(surface.most_j(lam) * sum_j)

    if total == 0.0:
        return 0.0
    scale = surface.mean_slope_j()
    best, at = bound_j(0.0, 0.0), (0.0, 0.0)
    for factor in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        best, at = max((best, at), (bound_j(factor * scale, 0.0), (factor * scale, 0.0)))
    watts = surface.mean_power_w() / max(work.most_together, 1)
    for lam in watts * np.geomspace(0.01, 100.0, 13) if kept > 0.0 else ():
        best, at = max((best, at), (bound_j(at[0], float(lam)), (at[0], float(lam))))
    steps = [0.5 * scale, 0.5 * at[1]]
    for _ in range(8):
        for i, step in enumerate(steps):
            for sign in (1.0, -1.0):
                tried = [*at]
                tried[i] = max(tried[i] + sign * step, 0.0)
                best, at = max((best, at), (bound_j(*tried), (tried[0], tried[1])))
            steps[i] = 0.6 * step
    return best
