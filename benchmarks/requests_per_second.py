"""Simulated requests per CPU second, and the same machine's raw SimPy rate beside it.

python benchmarks/requests_per_second.py
The Azure trace is read from the folder VOLTANA_DATA names, or left out with a note.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Generator

import simpy

from voltana.experiments.runs import cached_profile, workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config
from voltana.sim.engine.simulate import simulate

REPEATS = 5
RAW_EVENTS = 500_000


def main() -> None:
    """Print one line a case."""
    raw = raw_simpy_rate()
    print(f"raw SimPy: {raw:,.0f} timeouts per CPU second")
    cases = {
        "ShareGPT, 60 requests/s": {},
        "ShareGPT, 2 requests/s": {"rate_rps": 2, "duration_s": 600},
        "Azure conversation trace": {"trace": "azure-conv-2023"},
        "Conversations that wait for answers, cache of prefixes, 24 requests/s": {
            "workload": "chat",
            "rate_rps": 24,
            "duration_s": 600,
            "prefix_cache_tokens": 457_600,
            "router": "prefix-affinity",
        },
    }
    for title, values in cases.items():
        for noise, scale in (("without noise", 0.0), ("with noise", 1.0)):
            try:
                config = make_config({**values, "noise_scale": scale})
                report(
                    f"{title}, {noise}, 2P2D, {config.controller} + {config.router}", config, raw
                )
            except VoltanaError as error:
                print(f"{title}, {noise}: left out ({error})")


def report(title: str, config: SimConfig, raw: float) -> None:
    """Run a configuration several times and print its best rate (least disturbed).

    Args:
        title: Of the line.
        config: What to run.
        raw: Timeouts per CPU second of bare SimPy, for comparison.
    """
    profile, workload = cached_profile(config.profile), workload_of(config)
    best_s, least_wall_s = float("inf"), float("inf")
    for _ in range(REPEATS):
        start_s = time.process_time()
        record = simulate(config, profile, workload)
        best_s = min(best_s, time.process_time() - start_s)
        least_wall_s = min(least_wall_s, record.wall_s)
    iterations = sum(i.num_iterations for i in record.instances)
    rate = len(workload) / best_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{title}: {rate:,.0f} requests per CPU second ({len(workload):,} requests, "
        f"{iterations:,} iterations, {record.makespan_s:,.0f} simulated s in {best_s:.2f} CPU s, "
        f"{record.makespan_s / least_wall_s:,.0f} simulated s per wall s, "
        f"1 request per {raw / rate:.0f} raw timeouts, peak RSS so far {peak_mib:,.0f} MiB)"
    )


def raw_simpy_rate() -> float:
    """Timeouts per CPU second of a bare SimPy process."""
    env = simpy.Environment()

    def tick() -> Generator[simpy.Event, None, None]:
        for _ in range(RAW_EVENTS):
            yield env.timeout(1.0)

    env.process(tick())
    start_s = time.process_time()
    env.run()
    return RAW_EVENTS / (time.process_time() - start_s)


if __name__ == "__main__":
    main()
