"""Does the default keep its promises on each seed, up to 95 % of what the top clocks carry?

python -m voltana.experiments.study.capacity --out results/capacity

finds the capacity at top clocks, the highest rate (in steps of `STEP_RPS`) at which static-max
keeps 99 % of requests on each of 20 seeds, and runs policies at 95 % of it: as a constant load, and
as the crest of a day. Prints Markdown; what has been run is kept and not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from voltana.experiments.frontier.trial import Bench, Load, Trial
from voltana.experiments.script import run_script
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.markdown import markdown_table

BASE: Final = {
    "profile": "a100-80g-sxm/llama-3.1-8b", "workload": "sharegpt", "router": "consolidate",
    "slo_ttft_s": 0.6, "slo_itl_s": 0.045, "metrics": "sketch",
}  # fmt: skip
CONSTANT: Final = {"duration_s": 120}
SWING: Final = 0.6
DAY: Final = {"duration_s": 900, "arrivals": f"diurnal:swing={SWING}"}
POLICIES: Final = {"ecomin": {"controller": "ecomin"}, "static-max": {"controller": "static"}}
TARGET: Final = 0.99
SHARE: Final = 0.95
STEP_RPS: Final = 0.5
RANGE_RPS: Final = (30.0, 50.0)


def highest(keeps: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """The highest multiple of `step` in [low, high] that keeps, if all below it do.

    Args:
        keeps: Whether a rate is carried.
        low: A rate that is.
        high: A rate that is not, or the highest of interest.
        step: Between two rates.

    Raises:
        VoltanaError: Not even `low` is carried.
    """
    first, last = round(low / step), round(high / step)
    if not keeps(first * step):
        raise VoltanaError(
            f"the top clocks do not keep the promise at {low:g} requests/s: go lower"
        )
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if keeps(middle * step) else (first, middle)
    return first * step


def run_seeds(
    load: dict[str, Any], policy: str, rate_rps: float, out: Path, seeds: int, *, is_search: bool
) -> Trial:
    """One policy on that many seeds; a search stops at the first one that misses.

    Args:
        load: Configuration keys of the load.
        policy: One of `POLICIES`.
        rate_rps: Mean rate.
        out: Where runs are kept.
        seeds: How many, from 1 on.
        is_search: Whether the first miss decides.
    """
    name = f"{rate_rps:g} requests/s"
    bench = Bench(BASE, Load(name=name, settings=load | {"rate_rps": rate_rps}), "attainment", out)
    repeats = [{"seed": seed} for seed in range(1, seeds + 1)]
    below = TARGET if is_search else 0.0
    return bench.run(POLICIES[policy], policy, repeats, stop_below=below)


def table(out: Path, seeds: int) -> str:
    """The capacity and the table beneath it, as Markdown."""

    def keeps(rate_rps: float) -> bool:
        return run_seeds(CONSTANT, "static-max", rate_rps, out, seeds, is_search=True).keeps(TARGET)

    capacity = highest(keeps, *RANGE_RPS, STEP_RPS)
    near = SHARE * capacity
    mean = near / (1.0 + SWING)
    loads: dict[str, tuple[dict[str, Any], float]] = {
        f"constant, {near:g}/s": (CONSTANT, near),
        f"day, swing {SWING:g}, crest {near:g}/s": (DAY, round(mean, 3)),
    }
    heads = (
        "load",
        "policy",
        "worst seed",
        "it keeps %",
        "seeds that keep 99 %",
        "energy kJ, mean",
    )
    rows = []
    for name, (load, rate_rps) in loads.items():
        for policy in POLICIES:
            trial = run_seeds(load, policy, rate_rps, out, seeds, is_search=False)
            if trial.error:
                raise VoltanaError(trial.error)
            worst = min(range(seeds), key=lambda i: trial.attainments[i])
            kept = sum(a >= TARGET for a in trial.attainments)
            rows.append((name, policy, f"{worst + 1}", f"{100 * trial.attainments[worst]:.2f}",
                         f"{kept} of {seeds}", f"{trial.energy_j / 1e3:.1f}"))  # fmt: skip
    head = f"Capacity at top clocks, {seeds} seeds: {capacity:g} requests/s\n\n"
    return head + markdown_table(heads, rows, numbers=range(2, len(heads)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the capacity and the table."""
    parser = argparse.ArgumentParser(description="Each seed, up to 95 % of the capacity.")
    parser.add_argument("--out", type=Path, default=Path("results/capacity"))
    parser.add_argument("--seeds", type=int, default=20)
    chosen = parser.parse_args(arguments)
    sys.stdout.write(table(chosen.out, chosen.seeds) + "\n")


if __name__ == "__main__":
    run_script(main)
