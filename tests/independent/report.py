"""Every number of NOMENCLATURE.md, from the time stamps of single tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.independent.colocated_cache import Keeping
from tests.independent.decode_cache import Remembering
from tests.independent.fleet import Fleet
from tests.independent.job import Job

Numbers = dict[str, float]


def report(fleet: Fleet, jobs: Sequence[Job]) -> Numbers:
    """The same keys as `voltana`'s summary, samples flattened ("ttft_s p99")."""
    jobs = [j for j in jobs if j.is_rejected or j.decode >= 0]  # a session may end before its end
    promise_ttft_s, promise_itl_s = fleet.settings["slo_ttft_s"], fleet.settings["slo_itl_s"]
    done = [j for j in jobs if len(j.token_s) == j.wanted]
    ttft_s = np.array([j.token_s[0] - j.arrival_s for j in done])
    gaps_s = np.concatenate([np.diff(j.token_s) for j in done])
    tpot_s = np.array([(j.token_s[-1] - j.token_s[0]) / max(j.wanted - 1, 1) for j in done])
    tokens = sum(j.wanted for j in done)
    kept = int(((ttft_s <= promise_ttft_s) & (tpot_s <= promise_itl_s)).sum())
    numbers = {
        "requests_total": len(jobs),
        "requests_completed": len(done),
        "requests_rejected": sum(j.is_rejected for j in jobs),
        "gaps_total": len(gaps_s),
        "makespan_s": fleet.end_s,
        "ttft_attainment": int((ttft_s <= promise_ttft_s).sum()) / len(jobs),
        "itl_attainment": float((gaps_s <= promise_itl_s).mean()),
        "attainment": kept / len(jobs),
        "goodput_rps": kept / fleet.end_s,
        "throughput_tokens_per_s": tokens / fleet.end_s,
        "retractions": sum(d.retractions for d in fleet.decode),
        **_sample("ttft_s", ttft_s),
        **_sample("itl_s", gaps_s),
        **_sample(
            "tpot_s", np.array([t for t, j in zip(tpot_s, done, strict=True) if j.wanted > 1])
        ),
        **_sample("e2e_s", np.array([j.token_s[-1] - j.arrival_s for j in done])),
        **_energy(fleet),
    }
    caches = [p.cache for p in fleet.prefill if p.cache is not None]
    if caches:
        found = sum(j.cached for j in jobs)
        numbers["cached_tokens"] = found
        numbers["cached_share"] = found / sum(j.prompt for j in jobs if not j.is_rejected)
        numbers["evicted_tokens"] = sum(c.evicted for c in caches)
    remembering = [s.cache for s in fleet.decode if isinstance(s, Remembering)]
    if remembering:
        numbers["unsent_tokens"] = sum(j.unsent for j in jobs)
        numbers["evicted_tokens"] = sum(c.evicted for c in (*caches, *remembering))
    keeping = [s for s in fleet.decode if isinstance(s, Keeping)]
    if keeping:
        found = sum(s.found for s in keeping)
        numbers["cached_tokens"] = found
        numbers["cached_share"] = found / (found + sum(s.computed for s in keeping))
        numbers["evicted_tokens"] = sum(s.cache.evicted for s in keeping)
    numbers["goodput_per_j"] = kept / numbers["energy_j"]
    numbers["energy_per_request_j"] = numbers["energy_j"] / len(done)
    numbers["energy_per_output_token_j"] = numbers["energy_j"] / tokens
    return numbers


def _sample(name: str, values: np.ndarray) -> Numbers:
    levels = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    quantiles = {
        f"{name} {level}": float(np.quantile(values, q, method="inverted_cdf"))
        for level, q in levels.items()
    }
    return {f"{name} mean": float(values.mean()), **quantiles}


def _energy(fleet: Fleet) -> Numbers:
    servers = (*fleet.prefill, *fleet.decode)
    cards = [s.card for s in servers]
    numbers = {
        "prefill_energy_j": sum(s.card.busy_j for s in fleet.prefill),
        "decode_energy_j": sum(s.card.busy_j for s in fleet.decode if s.phase == "decode"),
        "idle_energy_j": sum(c.idle_j for c in cards),
        "energy_busy_window_j": sum(c.window_j[1] - c.window_j[0] for c in cards if c.window_j),
        "clock_changes": sum(c.changes for c in cards),
        "iterations": sum(c.iterations for c in cards),
    }
    parts = ["prefill", "decode", "idle"]
    both = [s for s in fleet.decode if s.phase == "colocated"]
    if both:
        numbers["colocated_energy_j"] = sum(s.card.busy_j for s in both)
        parts.append("colocated")
    if fleet.staff is not None:
        numbers["away_energy_j"] = sum(c.away_j for c in cards)
        parts.append("away")
        whole_s = fleet.end_s * len(cards) - sum(c.lent_s for c in cards)
        share = sum(c.away_s for c in cards) / whole_s
        numbers["in_service_share"] = 1.0 - share
        numbers["wake_ups"] = fleet.staff.wake_ups
    if fleet.settings.get("host_power_w") is not None:
        numbers["host_energy_j"] = fleet.settings["host_power_w"] * len(servers) * fleet.end_s
        parts.append("host")
    numbers["energy_j"] = sum(numbers[f"{part}_energy_j"] for part in parts)
    for phase in ("prefill", "decode", "colocated"):
        of = [s for s in servers if s.phase == phase]
        total_s = sum(sum(s.card.busy_s.values()) for s in of)
        for clock in {c for s in of for c in s.card.busy_s}:
            busy_s = sum(s.card.busy_s.get(clock, 0.0) for s in of)
            numbers[f"{phase} at {clock}"] = busy_s / total_s
    return numbers
