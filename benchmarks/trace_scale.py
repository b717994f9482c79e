"""A day of traffic: cost per request against the number of requests and of instances, and memory.

python benchmarks/trace_scale.py [--day]        (with a compiled simulator: make fast-scale)

A sinusoidal day of ShareGPT lengths, squeezed into as many seconds as the requests need at
1.8 requests/s an instance, so that every case sees the same load curve. A quarter of the instances
prefill. Router: two-choices, whose work does not depend on the number of instances; controller:
ecofreq. `--day` adds the full case: ten million requests over 24 h on 64 instances.
Every case runs in a process of its own, after a warm-up run; seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass

from requests_per_second import raw_simpy_rate

from voltana.experiments.runs import cached_profile
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.workload.generate import stream_diurnal

RATE_PER_INSTANCE_RPS = 10_000_000 / 86_400.0 / 64
WARM_UP_REQUESTS = 2_000
REPEATS = 3
DAY = (10_000_000, 64)
BY_REQUESTS = [(10_000, 64), (100_000, 64), (1_000_000, 64)]
BY_INSTANCES = [(100_000, count) for count in (4, 8, 16, 32, 64, 128, 256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one case took."""

    cpu_s: float
    wall_s: float
    simulated_s: float
    peak_mib: float
    energy_mj: float
    attainment: float


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--day", action="store_true", help="also ten million requests (minutes)")
    raw = raw_simpy_rate()
    print(f"raw SimPy: {raw:,.0f} timeouts per CPU second")
    by_requests = BY_REQUESTS + ([DAY] if parser.parse_args().day else [])
    table("By requests, without noise", by_requests, raw, noise_scale=0.0)
    table("By requests, with noise", by_requests, raw, noise_scale=1.0)
    table("By instances, without noise", BY_INSTANCES, raw, noise_scale=0.0)
    table("By instances, with noise", BY_INSTANCES, raw, noise_scale=1.0)


def table(title: str, cases: list[tuple[int, int]], raw: float, *, noise_scale: float) -> None:
    """Run and print the cases, then how far the costs lie from their middle.

    Args:
        title: Of the table.
        cases: Number of requests and of instances of each.
        raw: Timeouts per CPU second of bare SimPy, for comparison.
        noise_scale: Of iteration times.
    """
    print(f"\n{title}")
    print("  requests  instances  requests/CPU s  simulated s/wall s  peak RSS MiB  "
          "raw timeouts/request  attainment")  # fmt: skip
    costs_s = []
    for requests, instances in cases:
        done = measure(requests, instances, noise_scale)
        cost_s = done.cpu_s / requests
        costs_s.append(cost_s)
        print(
            f"{requests:10,} {instances:10} {1 / cost_s:15,.0f} "
            f"{done.simulated_s / done.wall_s:19,.0f} {done.peak_mib:13,.0f} "
            f"{raw * cost_s:21.0f} {done.attainment:11.4f}",
            flush=True,
        )
    low, high = min(costs_s), max(costs_s)
    print(f"cost per request: {0.5e6 * (low + high):.1f} us ± {(high - low) / (high + low):.0%}")


def measure(requests: int, instances: int, noise_scale: float) -> Outcome:
    """Best of several runs, each in a fresh process (one run where it is long).

    Args:
        requests: How many arrive.
        instances: A quarter of them prefill.
        noise_scale: Of iteration times.
    """
    repeats = REPEATS if requests <= 100_000 else 1
    spawn = multiprocessing.get_context("spawn")
    outcomes = []
    for _ in range(repeats):
        with spawn.Pool(1) as pool:
            outcomes.append(pool.apply(run_case, (requests, instances, noise_scale)))
    return min(outcomes, key=lambda outcome: outcome.cpu_s)


def run_case(requests: int, instances: int, noise_scale: float) -> Outcome:
    """One case in this process; arguments as of `measure`."""
    simulate_day(WARM_UP_REQUESTS, instances, noise_scale)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    simulated_s, energy_j, attainment = simulate_day(requests, instances, noise_scale)
    return Outcome(
        cpu_s=time.process_time() - cpu_s,
        wall_s=time.monotonic() - wall_s,
        simulated_s=simulated_s,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        energy_mj=energy_j * 1e-6,
        attainment=attainment,
    )


def simulate_day(requests: int, instances: int, noise_scale: float) -> tuple[float, float, float]:
    """Makespan in s, energy in J and attainment of one squeezed day; arguments as of `measure`."""
    config = make_config(
        {
            "num_prefill": instances // 4,
            "num_decode": instances - instances // 4,
            "router": "two-choices",
            "metrics": "sketch",
            "noise_scale": noise_scale,
        }
    )
    rate_rps = RATE_PER_INSTANCE_RPS * instances
    duration_s = requests / rate_rps
    stream = stream_diurnal(
        "sharegpt", mean_rps=rate_rps, duration_s=duration_s, period_s=duration_s, seed=1
    )
    summary = summarise(simulate(config, cached_profile(config.profile), stream))
    return summary["makespan_s"], summary["energy_j"], summary["attainment"]


if __name__ == "__main__":
    main()
