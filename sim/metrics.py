"""The one definition of every number this project reports, for simulated and real runs alike.

Token gaps come as a weighted sample: in a decode iteration every request of the batch waits the
same time for its next token, so one (length, count) pair stands for all of them, exactly.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voltana.sim.policies.base import COLOCATED
from voltana.sim.records import (
    COMPLETED,
    FAILED,
    IN_FLIGHT,
    REJECTED,
    FloatArray,
    IntArray,
    RunRecord,
)
from voltana.sim.sketches import RunSketch

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


def weighted_quantile(values: FloatArray, weights: IntArray, fraction: float) -> float:
    """Smallest value with at least `fraction` of the weight at or below it (nearest rank).

    Args:
        values: Sample, shape (n,).
        weights: Counts >= 0, shape (n,).
        fraction: In (0, 1].

    Returns:
        NaN for an empty sample, as there is no such value.

    Example:
        >>> weighted_quantile(np.array([3.0, 1.0, 2.0]), np.array([1, 1, 2]), 0.75)
        2.0
    """
    return _quantiles(values, weights, (fraction,))[0]


def _quantiles(
    values: FloatArray, weights: IntArray, fractions: tuple[float, ...]
) -> tuple[float, ...]:
    total = int(weights.sum()) if len(weights) else 0
    if total == 0:
        return tuple(float("nan") for _ in fractions)
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    ranks = [_rank(fraction, total) for fraction in fractions]
    positions = np.searchsorted(cumulative, ranks, side="left")
    return tuple(float(values[order[p]]) for p in positions)


def _rank(fraction: float, total: int) -> int:
    """Least k with k/total >= fraction, in integers: 0.99 of 100 is 99, whatever 0.99 is in binary.

    Example:
        >>> _rank(0.99, 100), _rank(0.99, 10**18 + 1)
        (99, 990000000000000001)
    """
    exact = Fraction(fraction).limit_denominator(_FINEST) * total
    return max(1, math.ceil(exact))


_FINEST: Final = 1_000_000
"""Quantiles are asked for in decimals, at most so many parts fine."""


def describe(values: FloatArray, weights: IntArray | None = None) -> dict[str, float]:
    """Mean and quantiles of a (weighted) sample; NaN throughout when it is empty."""
    counts = np.ones(len(values), dtype=np.int64) if weights is None else weights
    total = counts.sum()
    mean = float(np.dot(values, counts) / total) if total else float("nan")
    levels = _quantiles(values, counts, tuple(QUANTILES.values()))
    return {"mean": mean} | dict(zip(QUANTILES, levels, strict=True))


def ttft_s(record: RunRecord) -> FloatArray:
    """Arrival to first token, NaN for a request that had none. Shape (n,)."""
    return record.requests.first_token_s - record.requests.arrival_s


def tpot_s(record: RunRecord) -> FloatArray:
    """Mean gap between a finished request's tokens; NaN if unfinished, 0 for a single token."""
    requests = record.requests
    gaps = np.maximum(requests.output_tokens - 1, 1)
    return (requests.finish_s - requests.first_token_s) / gaps


def attained(record: RunRecord) -> npt.NDArray[np.bool_]:
    """Requests that kept both promises: TTFT <= its SLO and TPOT <= the ITL SLO. Shape (n,)."""
    with np.errstate(invalid="ignore"):
        kept = (ttft_s(record) <= record.slo_ttft_s) & (tpot_s(record) <= record.slo_itl_s)
    return np.asarray(kept & (record.requests.status == COMPLETED))


def judged(record: RunRecord) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Requests whose TTFT, and whose both promises, are decided by the end of the run.

    A request that has ended is decided, however it ended. If a run is cut, some requests are still
    in flight. The TTFT of such a request is decided if it has made its first token, or has waited
    for longer than the promise. Both promises together are decided only if TTFT is broken. A
    request that is not decided counts neither as kept nor as missed. Shapes (n,).
    """
    first = ttft_s(record)
    ended = record.requests.status != IN_FLIGHT
    with np.errstate(invalid="ignore"):
        kept = first <= record.slo_ttft_s
    overdue = record.makespan_s - record.requests.arrival_s > record.slo_ttft_s
    return ended | kept | overdue, ended | (~kept & overdue)


def summarise(record: RunRecord) -> dict[str, Any]:
    """Reduce a run to the reported numbers; NOMENCLATURE.md defines each key.

    Attainment is a share of the requests that `judged` names; in a run that was played to its end
    these are all. A request that was rejected or failed has broken its promises. Without any token
    gap the ITL attainment is 1, and without any decided request the other attainments are 1.
    """
    counts, samples = _sampled(record) if record.sketch is None else _sketched(record.sketch)
    tokens_out = counts.pop("output_tokens")
    energy = _energy(record)
    attained_count, gaps = counts.pop("both_kept"), counts["gaps_total"]
    ttft_kept, gaps_kept = counts.pop("ttft_kept"), counts.pop("gaps_kept")
    ttft_judged, both_judged = counts.pop("ttft_judged"), counts.pop("both_judged")
    done = counts["requests_completed"]
    return {
        **counts,
        "makespan_s": record.makespan_s,
        **energy,
        **samples,
        "ttft_attainment": _share(ttft_kept, ttft_judged),
        "itl_attainment": _share(gaps_kept, gaps),
        "attainment": _share(attained_count, both_judged),
        "goodput_rps": _ratio(attained_count, record.makespan_s),
        "goodput_per_j": _ratio(attained_count, energy["energy_j"]),
        "throughput_tokens_per_s": _ratio(tokens_out, record.makespan_s),
        "energy_per_request_j": _ratio(energy["energy_j"], done),
        "energy_per_output_token_j": _ratio(energy["energy_j"], tokens_out),
        "clock_changes": sum(i.num_clock_changes for i in record.instances),
        "retractions": sum(i.num_retractions for i in record.instances),
        "iterations": sum(i.num_iterations for i in record.instances),
        **_reuse(record),
        **_scaling(record),
        "clock_residency": clock_residency(record),
        "wall_s": record.wall_s,
    }


Sampled = tuple[dict[str, int], dict[str, dict[str, float]]]
"""Counts of requests and gaps, and the described samples of latencies."""


def _sampled(record: RunRecord) -> Sampled:
    requests = record.requests
    status = requests.status
    done = status == COMPLETED
    first, tpot = ttft_s(record), tpot_s(record)
    with np.errstate(invalid="ignore"):
        in_time = first <= record.slo_ttft_s
    ttft_judged, both_judged = judged(record)
    counts = {
        "requests_total": len(requests),
        "requests_completed": int(done.sum()),
        "requests_rejected": int((status == REJECTED).sum()),
        "requests_failed": int((status >= FAILED).sum()),
        "requests_in_flight": int((status == IN_FLIGHT).sum()),
        "output_tokens": int(requests.output_tokens[done].sum()),
        "both_kept": int(attained(record).sum()),
        "both_judged": int(both_judged.sum()),
        "ttft_kept": int((in_time & (done | (status == IN_FLIGHT))).sum()),
        "ttft_judged": int(ttft_judged.sum()),
        "gaps_total": int(record.itl_weight.sum()),
        "gaps_kept": int(record.itl_weight[record.itl_s <= record.slo_itl_s].sum()),
    }
    samples = {
        "ttft_s": describe(first[~np.isnan(first)]),
        "itl_s": describe(record.itl_s, record.itl_weight),
        "tpot_s": describe(tpot[done & (requests.output_tokens > 1)]),
        "e2e_s": describe((requests.finish_s - requests.arrival_s)[done]),
    }
    return counts, samples


def _sketched(sketch: RunSketch) -> Sampled:
    kept = sketch.counts
    ended = kept["completed"] + kept["rejected"]
    counts = {
        "requests_total": kept["arrived"],
        "requests_completed": kept["completed"],
        "requests_rejected": kept["rejected"],
        "requests_failed": 0,
        "requests_in_flight": kept["arrived"] - ended,
        "gaps_total": kept["gaps"],
        **{name: kept[name] for name in _PRIVATE_COUNTS},
    }
    return counts, {name: s.describe(QUANTILES) for name, s in sketch.samples.items()}


_PRIVATE_COUNTS = (
    "output_tokens", "both_judged", "both_kept", "ttft_judged", "ttft_kept", "gaps_kept",
)  # fmt: skip


def _share(kept: int, judged: int) -> float:
    return kept / judged if judged else 1.0


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else float("nan")


def _energy(record: RunRecord) -> dict[str, float]:
    """Energy by part: busy by phase + idle (+ away, + hosts) = total, exactly these sums.

    NaN without any instance: a client's record, which no meter took part in.
    """
    if not record.instances:
        return dict.fromkeys(_ENERGIES, float("nan"))
    busy = {"prefill": 0.0, "decode": 0.0, "colocated": 0.0}
    for instance in record.instances:
        busy[instance.phase] += instance.busy_energy_j
    idle = sum(i.idle_energy_j for i in record.instances)
    away = sum(sum(i.away_energy_j.values()) for i in record.instances)
    host_w = record.settings.get("host_power_w")
    has_colocated = any(i.phase == COLOCATED for i in record.instances)
    host = (host_w or 0.0) * len(record.instances) * record.makespan_s
    return {
        "energy_j": sum(busy.values()) + idle + away + host,
        "energy_busy_window_j": sum(i.busy_window_energy_j for i in record.instances),
        "prefill_energy_j": busy["prefill"],
        "decode_energy_j": busy["decode"],
        **({"colocated_energy_j": busy["colocated"]} if has_colocated else {}),
        "idle_energy_j": idle,
        **({"away_energy_j": away} if record.settings.get("scaler") is not None else {}),
        **({} if host_w is None else {"host_energy_j": host}),
    }


_ENERGIES = (
    "energy_j", "energy_busy_window_j", "prefill_energy_j", "decode_energy_j", "idle_energy_j",
)  # fmt: skip


def _reuse(record: RunRecord) -> dict[str, float]:
    """What a cache of prefixes saved and lost; nothing for a run without one."""
    found: dict[str, float] = {}
    caches = [i for i in record.instances if i.cached_tokens is not None]
    if caches:
        cached = sum(i.cached_tokens or 0 for i in caches)
        computed = sum(i.computed_tokens or 0 for i in caches)
        found = {"cached_tokens": cached, "cached_share": _ratio(cached, cached + computed)}
    at_decode = [i.unsent_tokens for i in record.instances if i.unsent_tokens is not None]
    if at_decode:
        found["unsent_tokens"] = sum(at_decode)
    evicted = [i.evicted_tokens for i in record.instances if i.evicted_tokens is not None]
    if evicted:
        found["evicted_tokens"] = sum(evicted)
    return found


def _scaling(record: RunRecord) -> dict[str, float]:
    """How much of the fleet was in service; nothing for a run without a scaler."""
    if record.settings.get("scaler") is None:
        return {}
    lent_s = sum(i.away_s.get("lent", 0.0) for i in record.instances)  # in service elsewhere
    away_s = sum(sum(i.away_s.values()) for i in record.instances) - lent_s
    whole_s = record.makespan_s * len(record.instances) - lent_s
    return {
        "in_service_share": 1.0 - _ratio(away_s, whole_s),
        "wake_ups": sum(i.num_wake_ups for i in record.instances),
    }


def clock_residency(record: RunRecord) -> dict[str, dict[str, float]]:
    """Share of busy time at each clock, by phase: {"decode": {"1005": 0.8, …}}; sums to 1."""
    shares: dict[str, dict[str, float]] = {}
    for phase in sorted({"prefill", "decode", *(i.phase for i in record.instances)}, reverse=True):
        seconds: dict[int, float] = {}
        for instance in record.instances:
            if instance.phase == phase:
                for clock, busy_s in instance.clock_busy_s.items():
                    seconds[clock] = seconds.get(clock, 0.0) + busy_s
        total = sum(seconds.values())
        shares[phase] = {str(c): s / total for c, s in sorted(seconds.items()) if total > 0}
    return shares
