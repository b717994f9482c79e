"""Which mechanism moves what, and how large awake power is: each against the published panel.

    python -m voltana.experiments.paper.mechanisms --panel CSV --data DIR --out DIR

Every row is the panel with one thing changed and nothing fitted again. What the panel cannot see
(a small model's host time, ranks that wait for each other) is shown on another model, for which
nothing published is at hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.experiments.paper.calibrate import AWAKE_TOP_W, read_fitted, trial_profile
from voltana.experiments.paper.panel import (
    BASELINE,
    FITTED,
    PANEL_KEYS,
    VALUES,
    as_panel,
    below_overload,
    panel_points,
    read_panel,
    residuals,
    with_saving_pct,
)
from voltana.experiments.script import run_script
from voltana.experiments.sweep.grid import CONFIGS, Point, read_sweep
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.build.a100 import AS_SOURCES, Tuning
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.config import make_config

_SHOWN: Final = {
    "ministral-3b": ("Ministral-3B", "ShareGPT", 140),
    "qwen3-32b-tp2": ("Qwen3-32B", "ShareGPT", 40),
}
"""One cell of a model that the panel does not have: model, data set, requests/s."""
_KEPT: Final = "both (kept)"
_HOST: Final = "… and 0.05 ms host a decoding request, hidden"
_RANKS: Final = "… and ranks that wait 1 ms an iteration"
_SHOWN_FOR: Final = (_KEPT, _HOST, _RANKS)
"""Rows that show these cells."""
_RATES: Final = (50, 70, 85)
"""Rates of the table."""
_DEMO: Final = CONFIGS / "demo.toml"
_DEMO_RATES: Final = (36,)
_LOW_RPS: Final = 65
"""The load split: rates up to this, and those above it and below overload."""


def variants() -> dict[str, Tuning]:
    """What is compared, in the order of the table."""
    fitted = read_fitted(FITTED)
    first, kept = fitted.tuning, fitted.with_mechanisms
    return {
        "first prediction": first,
        "awake power alone": replace(first, awake_top_w=kept.awake_top_w),
        "prefill draws 1.23 of the limit, alone": replace(kept, awake_top_w=0.0),
        _KEPT: kept,
        "… and decode attention as its source has it": replace(kept, attention_multiplier=1.0),
        "… and decode attention × 0.7": replace(kept, attention_multiplier=0.7),
        "… and 0.3 ms host a prompt": replace(kept, prompt_host_s=3e-4),
        "… and 7 ms host a prefill batch": replace(kept, prefill_host_s=7e-3),
        "… and 1 ms host a decode step, not hidden": replace(kept, decode_host_s=1e-3),
        _HOST: replace(kept, request_host_s=5e-5),
        _RANKS: replace(kept, rank_sync_s=1e-3),
    }


def awake_top_w(without: pd.DataFrame, per_w: pd.DataFrame, kept: pd.Series[bool]) -> float:
    """Awake power in W a GPU that explains best what the energy of the kept cells lacks.

    Args:
        without: Residuals of a profile without awake power.
        per_w: Energy in kJ that each watt of it adds, as `energy_kj_ours`; rows as `without`.
        kept: The rows to go by.
    """
    added = per_w["energy_kj_ours"]
    rows = kept & without["energy_kj_error"].notna()
    lacking = -without.loc[rows, "energy_kj_error"]
    return float((lacking * added[rows]).sum() / (added[rows] ** 2).sum())


def errors_with(
    without: pd.DataFrame, per_w: pd.DataFrame, watts: pd.Series[float]
) -> tuple[pd.Series[float], pd.Series[float]]:
    """Errors of each cell with awake power: of the saving in points, of the energy in percent.

    Args:
        without: Residuals without awake power, one row a cell of the panel.
        per_w: The same cells, their energy what one watt of awake power adds.
        watts: Awake power of each cell, in W.
    """
    ours = without["energy_kj_ours"] + watts * per_w["energy_kj_ours"]
    table = without.assign(energy_kj=ours)[[*PANEL_KEYS, "energy_kj"]]
    saving = with_saving_pct(table)["saving_pct"] - without["saving_pct_published"]
    return saving, 100 * (ours / without["energy_kj_published"] - 1)


def validate_awake(without: pd.DataFrame, per_w: pd.DataFrame) -> list[list[str]]:
    """Mean absolute errors of saving and energy where awake power was derived elsewhere."""
    rate = without["rps"]
    below = rate.isin(below_overload(_published(without)))
    low, high = below & (rate <= _LOW_RPS), below & (rate > _LOW_RPS)
    left_out = pd.Series(np.nan, index=without.index)
    for one in sorted(set(rate[below])):
        left_out[rate == one] = awake_top_w(without, per_w, below & (rate != one))
    cases: Mapping[str, tuple[pd.Series[float] | float, pd.Series[bool]]] = {
        "all rates below overload": (awake_top_w(without, per_w, below), below),
        "each rate from the others": (left_out, below),
        f"above {_LOW_RPS} from the rates up to it": (awake_top_w(without, per_w, low), high),
        f"up to {_LOW_RPS} from the rates above": (awake_top_w(without, per_w, high), low),
        "as kept": (AWAKE_TOP_W, below),
        "none": (0.0, below),
    }
    rows = []
    for name, (watts, judged) in cases.items():
        per_row = watts if isinstance(watts, pd.Series) else pd.Series(watts, index=rate.index)
        found = [part[judged].abs().mean() for part in errors_with(without, per_w, per_row)]
        rows.append([name, f"{per_row[judged].mean():.1f}", *(f"{v:.1f}" for v in found)])
    return rows


def _published(compared: pd.DataFrame) -> pd.DataFrame:
    named = {f"{value}_published": value for value in VALUES}
    return compared[[*PANEL_KEYS, *named]].rename(columns=named)


class _Study:
    """Profiles and runs of the variants, kept in a folder."""

    def __init__(self, published: pd.DataFrame, data: Path, out: Path, jobs: int | None) -> None:
        self.published, self._data, self._out, self._jobs = published, data, out, jobs

    def runs(
        self, tuning: Tuning, rates: Sequence[int], model: str = "llama-3.1-8b"
    ) -> pd.DataFrame:
        """Results of the panel, or of the one cell of another model.

        Args:
            tuning: The mechanisms in force.
            rates: Loads of the panel, requests/s; another model has its own.
            model: Whose profile is built and run.
        """
        profile = trial_profile(self._data, self._out / "profiles", tuning, model)
        name, dataset = self.published.iloc[0][["model", "dataset"]]
        if model in _SHOWN:
            name, dataset, rate = _SHOWN[model]
            rates = [rate]
        points = panel_points(name, dataset, rates=rates, changes={"profile": str(profile)})
        return run_sweep(points, self._out / "runs", jobs=self._jobs)

    def compared(self, tuning: Tuning, rates: Sequence[int]) -> pd.DataFrame:
        """Residuals of the panel."""
        return residuals(as_panel(self.runs(tuning, rates)), self.published)

    def row(self, name: str, tuning: Tuning) -> list[str]:
        """Mean absolute errors, and VoltanaLLM in the other cells."""
        found = self.compared(tuning, _RATES)
        found["energy_pct_error"] = 100 * found["energy_kj_error"] / found["energy_kj_published"]
        values = ("saving_pct", "ttft_attainment_pct", "itl_attainment_pct", "energy_pct")
        cells = [name, *(f"{found[f'{value}_error'].abs().mean():.1f}" for value in values)]
        for model in _SHOWN:
            if name not in _SHOWN_FOR:
                cells.append("")
                continue
            panel = with_saving_pct(as_panel(self.runs(tuning, (), model)))
            ours = panel[panel["series"] == "voltanallm"].iloc[0]
            cells.append(", ".join(f"{ours[v]:.1f}" for v in values[:3]))
        return cells

    def demo(self) -> str:
        """Savings in the demo against static-max, without awake power and with it."""
        profiles = {
            "as shipped": AS_SOURCES,
            "awake": replace(AS_SOURCES, awake_top_w=AWAKE_TOP_W),
        }
        policies = ("static-max", "static-1005", "ecofreq + ecoroute")
        chosen = [
            p for p in read_sweep(_DEMO)
            if p.labels["policy"] in policies and p.config.rate_rps in _DEMO_RATES
        ]  # fmt: skip
        columns: dict[str, pd.DataFrame] = {}
        for name, tuning in profiles.items():
            profile = trial_profile(self._data, self._out / "profiles", tuning)
            points = [
                Point(
                    labels=p.labels,
                    config=make_config({**p.config.as_dict(), "profile": str(profile)}),
                )
                for p in chosen
            ]
            table = run_sweep(points, self._out / "runs", jobs=self._jobs)
            energy = table.pivot_table(index="policy", columns="rate_rps", values="energy_j")
            columns[name] = 100 * (1 - energy / energy.loc[policies[0]])
        rows = [
            [policy, str(rate), *(f"{table[rate][policy]:.1f}" for table in columns.values())]
            for policy in policies[1:]
            for rate in _DEMO_RATES
        ]
        return markdown_table(["demo's saving (%)", "requests/s", *columns], rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--panel", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    study = _Study(read_panel(options.panel), options.data, options.out, options.jobs)
    every = variants()
    cells = [f"{model}, {dataset}, {rate}/s" for model, dataset, rate in _SHOWN.values()]
    rows = [study.row(name, tuning) for name, tuning in every.items()]
    print(markdown_table(  # noqa: T201
        ["mechanism", "saving", "TTFT", "ITL", "energy (%)", *cells], rows
    ))  # fmt: skip
    kept, rates = every[_KEPT], below_overload(study.published)
    bare = study.runs(replace(kept, awake_top_w=0.0), rates)
    without = residuals(as_panel(bare), study.published)
    of_kept = study.compared(kept, rates)
    added = of_kept["energy_kj_ours"] - without["energy_kj_ours"]
    per_w = of_kept.assign(energy_kj_ours=added / kept.awake_top_w)
    print(markdown_table(  # noqa: T201
        ["awake power from", "W a GPU", "saving", "energy (%)"], validate_awake(without, per_w)
    ))  # fmt: skip
    resting_kj = as_panel(bare).assign(resting_kj=bare["idle_energy_j"] / 1e3)
    joined = without.merge(resting_kj[[*PANEL_KEYS, "resting_kj"]], on=list(PANEL_KEYS))
    ratio = (-joined["energy_kj_error"] / joined["resting_kj"])[joined["series"] == BASELINE]
    print(study.demo())  # noqa: T201
    span = f"{ratio.min():.1f} to {ratio.max():.1f}"
    print(f"{BASELINE}: lacking energy is {span} times that at rest")  # noqa: T201


if __name__ == "__main__":
    run_script(main)
