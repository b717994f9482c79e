"""Whether two runs are a pair: the same requests, each ended, and what each found in a cache."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np

from voltana.sim.records import (
    CANCELLED,
    FAILED,
    IN_FLIGHT,
    STATUS_NAMES,
    RequestTable,
    RunRecord,
)

SAME_ARRIVAL_S: Final = 0.05
"""Arrivals within this are the same workload's: a real sender is late by milliseconds."""
_NOT_ENDED: Final = (IN_FLIGHT, FAILED, CANCELLED)
"""A request that a limit of the model rejects has ended; one that broke off has not."""


def pair_requests(
    simulated: RequestTable, observed: RequestTable
) -> tuple[RequestTable, RequestTable]:
    """The requests of both in one order: the workload's, where both say it.

    Turns that wait for answers arrive in an order that each run makes.
    """
    if simulated.workload_row is None or observed.workload_row is None:
        return simulated, observed
    return _in_workload_order(simulated), _in_workload_order(observed)


def _in_workload_order(table: RequestTable) -> RequestTable:
    assert table.workload_row is not None
    order = np.argsort(table.workload_row, kind="stable")
    every = ((f.name, getattr(table, f.name)) for f in dataclasses.fields(table))
    columns: dict[str, Any] = {n: column[order] for n, column in every if column is not None}
    return RequestTable(**columns)


def find_faults(simulated: RunRecord, observed: RunRecord) -> list[str]:
    """Why the runs are no pair to compare; empty if they are one."""
    faults = _workload_faults(*pair_requests(simulated.requests, observed.requests))
    if observed.settings.get("send_times") == "unknown":
        faults.insert(0, "the observed run does not say when its requests were sent")
    for name, run in (("simulated", simulated), ("observed", observed)):
        counts = np.bincount(run.requests.status, minlength=len(STATUS_NAMES))
        left = [f"{counts[s]} {STATUS_NAMES[s]}" for s in _NOT_ENDED if counts[s]]
        if run.settings.get("is_complete") is False:
            left.append(str(run.settings.get("incomplete_reason", "it was cut off")))
        if left:
            faults.append(f"the {name} run is incomplete ({', '.join(left)})")
    return faults


def _workload_faults(ours: RequestTable, theirs: RequestTable) -> list[str]:
    if len(ours) != len(theirs):
        return [f"different workloads: {len(ours)} requests simulated, {len(theirs)} observed"]
    if not (
        np.array_equal(ours.input_tokens, theirs.input_tokens)
        and np.array_equal(ours.output_tokens, theirs.output_tokens)
    ):
        return ["different workloads: request lengths differ"]
    worst_s = _worst_arrival_s(ours, theirs)
    has_rows = ours.workload_row is not None and theirs.workload_row is not None
    if worst_s > SAME_ARRIVAL_S and not has_rows:
        return [f"different workloads: arrival times differ by up to {worst_s:.3f} s"]
    return []


def _worst_arrival_s(ours: RequestTable, theirs: RequestTable) -> float:
    return float(np.abs(ours.arrival_s - theirs.arrival_s).max(initial=0.0))


def compare_caches(simulated: RequestTable, observed: RequestTable) -> dict[str, float]:
    """How the tokens agree that each request found in a cache; empty where a run has none.

    Returns:
        `requests`, how many of them found the `same` number, the `simulated` and `observed` tokens
        in sum, by how many tokens the others differ in sum (`apart`), and by how much arrivals do
        (`arrivals_apart_s`).
    """
    ours, theirs = pair_requests(simulated, observed)
    has_both = ours.cached_tokens is not None and theirs.cached_tokens is not None
    if not has_both or len(ours) != len(theirs):
        return {}
    assert ours.cached_tokens is not None
    assert theirs.cached_tokens is not None
    apart = np.abs(ours.cached_tokens - theirs.cached_tokens)
    return {
        "requests": len(apart),
        "same": int((apart == 0).sum()),
        "simulated": int(ours.cached_tokens.sum()),
        "observed": int(theirs.cached_tokens.sum()),
        "apart": int(apart.sum()),
        "arrivals_apart_s": _worst_arrival_s(ours, theirs),
    }


def cache_notes(found: dict[str, float]) -> list[str]:
    """The same in words."""
    if not found:
        return []
    same = (
        f"{found['same']} of {found['requests']} requests found the same number of tokens in a "
        f"cache, the others differ by {found['apart']:,} of {found['observed']:,} tokens"
    )
    return [same, f"requests come up to {found['arrivals_apart_s']:.2f} s apart in the two runs"]
