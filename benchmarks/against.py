"""This checkout's rate beside another's, in turns: a machine that drifts is as kind to both.

git worktree add --detach ../before REVISION && python benchmarks/against.py ../before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
CASES = {"without noise": {"noise_scale": 0.0}, "with noise": {"noise_scale": 1.0}}
"""ShareGPT at 60 requests/s, the first case of `requests_per_second.py`: any checkout knows it."""
RUNS = 3
PROGRAM = """
import json, sys, time
from voltana.experiments.runs import cached_profile, workload_of
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
rates = {}
for name, values in json.loads(sys.argv[1]).items():
    config = make_config(values)
    profile, workload = cached_profile(config.profile), workload_of(config)
    spent_s = []
    for _ in range(int(sys.argv[2])):
        start_s = time.process_time()
        simulate(config, profile, workload)
        spent_s.append(time.process_time() - start_s)
    rates[name] = len(workload) / min(spent_s)
print(json.dumps(rates))
"""


def main() -> None:
    """Print each turn's rates, then the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=8)
    told = parser.parse_args()
    rates: dict[Path, list[dict[str, float]]] = {told.other.resolve(): [], HERE: []}
    for turn in range(told.turns):
        for folder, found in rates.items():
            found.append(rates_of(folder))
            print(turn, folder.name, {k: f"{v:,.0f}" for k, v in found[-1].items()}, flush=True)
    for case in CASES:
        other, ours = (median(turn[case] for turn in found) for found in rates.values())
        print(
            f"{case}: {ours:,.0f} requests per CPU second, {other:,.0f} there: {ours / other:.2f}"
        )


def rates_of(folder: Path) -> dict[str, float]:
    """Requests per CPU second of each case with a checkout's code, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES), str(RUNS)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
