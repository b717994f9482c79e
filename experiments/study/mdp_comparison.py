"""The mdp router beside others on two fleets: the table of docs/mdp.md.

python -m voltana.experiments.study.mdp_comparison --out results/mdp

trains the policies that are missing, runs what has not been run and prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.compare.policies import (
    BEST_PAIR,
    add_saving,
    best_pairs,
    is_static_pair,
    keeps_slo,
)
from voltana.experiments.script import run_script
from voltana.experiments.study.train import TrainingPlan, train
from voltana.experiments.sweep.grid import Point, expand
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.config import make_config

SEEDS: Final = (21, 22, 23)
ROUTERS: Final = ("round-robin", "ecoroute", "min-delta-energy", "least-added-power")
REFERENCE: Final = "ecofreq + ecoroute"
BASE: Final = {
    "workload": "sharegpt", "duration_s": 120, "slo_ttft_s": 0.6, "slo_itl_s": 0.045,
    "controller": "ecofreq",
}  # fmt: skip
PAIR_CLOCKS_MHZ: Final = (1005, 1095, 1410)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A fleet, the loads it is compared at, and the policies trained for it."""

    name: str
    num_prefill: int
    num_decode: int
    rates_rps: tuple[float, ...]
    width_requests: int = 4
    """Batch buckets of its model; pairs of pairs are solved many times over, so these are wider."""

    @property
    def base(self) -> dict[str, Any]:
        """Configuration keys of every run."""
        return {**BASE, "num_prefill": self.num_prefill, "num_decode": self.num_decode}


SETTINGS: Final = (
    Setting(name="2P2D", num_prefill=2, num_decode=2, rates_rps=(20, 30, 36)),
    Setting(name="1P4D", num_prefill=1, num_decode=4, rates_rps=(15, 20, 25), width_requests=8),
)


def compare_setting(setting: Setting, out: Path, *, jobs: int | None = None) -> pd.DataFrame:
    """Train, run and average over seeds: one row a rate and policy.

    Args:
        setting: Fleet, loads and promises.
        out: Takes the trained policy and the runs.
        jobs: Processes; all cores by default.
    """
    policy = out / f"{setting.name}.npz"
    if not policy.exists():
        plan = TrainingPlan(
            config=make_config(setting.base),
            rates_rps=setting.rates_rps,
            width_requests=setting.width_requests,
        )
        train(plan, policy)
    frame = run_sweep(_points(setting, policy), out / setting.name, jobs=jobs)
    numbers = ["energy_j", "ttft_attainment", "itl_attainment", "energy_per_output_token_j"]
    means = frame.groupby(["rate_rps", "policy"], sort=False)[numbers].mean().reset_index()
    means = means.assign(keeps_slo=keeps_slo(means))
    rows = [_at_rate(at_rate) for _, at_rate in means.groupby("rate_rps", sort=True)]
    return pd.concat(rows, ignore_index=True)


def _points(setting: Setting, policy: Path) -> list[Point]:
    routers = {f"ecofreq + {name}": name for name in ROUTERS}
    routers["ecofreq + mdp"] = f"mdp:policy={policy}"
    data = {
        "base": setting.base,
        "grid": {
            "rate_rps": list(setting.rates_rps),
            "seed": list(SEEDS),
            "policy": [{"name": name, "router": router} for name, router in routers.items()],
        },
        "static_pairs": {"clocks_mhz": list(PAIR_CLOCKS_MHZ), "router": "ecoroute"},
    }
    return expand(data, "mdp comparison")


def _at_rate(frame: pd.DataFrame) -> pd.DataFrame:
    """The policies, the best static pair last; savings against `REFERENCE`."""
    is_pair = is_static_pair(frame)
    best = best_pairs(frame[is_pair], ["rate_rps"])
    best = best.assign(policy=f"{BEST_PAIR} + ecoroute (" + best["clocks"] + ")")
    rows = pd.concat([frame[~is_pair], best], ignore_index=True)
    return add_saving(rows, ["rate_rps"], "policy", REFERENCE)


def markdown(setting: Setting, frame: pd.DataFrame) -> str:
    """The table of one fleet."""
    head = [
        f"{setting.name}, requests/s", "policy", "energy kJ", "J/token", "saving %", "TTFT ok",
        "ITL ok", "keeps SLO",
    ]  # fmt: skip
    rows = [
        [
            f"{row['rate_rps']:g}", str(row["policy"]), f"{row['energy_j'] / 1e3:.1f}",
            f"{row['energy_per_output_token_j']:.4f}", f"{row['saving_pct']:.1f}",
            f"{100 * row['ttft_attainment']:.2f} %", f"{100 * row['itl_attainment']:.2f} %",
            "yes" if row["keeps_slo"] else "no",
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    return markdown_table(head, rows, numbers=(0, *range(2, 7)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="The mdp router beside others.")
    parser.add_argument("--out", type=Path, default=Path("results/mdp"))
    parser.add_argument("--jobs", type=int, default=None)
    chosen = parser.parse_args(arguments)
    for setting in SETTINGS:
        frame = compare_setting(setting, chosen.out, jobs=chosen.jobs)
        sys.stdout.write(f"{markdown(setting, frame)}\n\n")


if __name__ == "__main__":
    run_script(main)
