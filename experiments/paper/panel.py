"""The published main result: its panel, our runs of it, and the difference between them.

The panel is a CSV read off the reference's figure (model, dataset, rps, series,
ttft_attainment_pct, itl_attainment_pct, energy_kj); a cell that could not be read is empty. Ours
has the same columns. Energy is the reference's accounting: per instance from its first to its last
busy moment. Savings are against static-1410 of the same source, ours against ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pandas as pd

from voltana.experiments.draw.plots import VOLTANALLM
from voltana.experiments.study.suite import PANEL, read_experiment
from voltana.experiments.sweep.grid import CONFIGS, Point
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config

ConfigValue = str | float

MAIN_FIGURE: Final = CONFIGS / "main-figure.toml"
FITTED: Final = CONFIGS / "paper.toml"
BASELINE: Final = "static-1410"
PANEL_KEYS: Final = ("model", "dataset", "rps", "series")
VALUES: Final = ("ttft_attainment_pct", "itl_attainment_pct", "energy_kj")
TOLERANCES: Final = {"saving_pct": 3.0, "ttft_attainment_pct": 8.0, "itl_attainment_pct": 8.0}
"""Largest error that counts as agreement, in points."""
OVERLOAD_ITL_PCT: Final = 95.0
"""Above the rate from which the published static-1410 misses this, the system is overloaded."""


def read_panel(path: Path) -> pd.DataFrame:
    """Read a panel file.

    Raises:
        VoltanaError: It can't be read, lacks a column or has no row of static-1410.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise VoltanaError(f"cannot read the panel {path}: {error}") from None
    missing = [c for c in (*PANEL_KEYS, *VALUES) if c not in frame.columns]
    if missing:
        raise VoltanaError(f"{path}: missing column {', '.join(missing)}")
    if not (frame["series"] == BASELINE).any():
        raise VoltanaError(f"{path}: no series {BASELINE!r}, against which savings are counted")
    return frame[[*PANEL_KEYS, *VALUES]]


def below_overload(panel: pd.DataFrame) -> list[int]:
    """Rates below the first one at which the published static-1410 misses its ITL promise."""
    base = panel[panel["series"] == BASELINE].sort_values("rps")
    misses = base.loc[base["itl_attainment_pct"] < OVERLOAD_ITL_PCT, "rps"]
    limit = misses.min() if len(misses) else np.inf
    return [int(r) for r in base["rps"] if r < limit]


def main_figure_points() -> list[Point]:
    """Every run of the main figure."""
    return read_experiment(MAIN_FIGURE).points


def panel_points(
    model: str,
    dataset: str,
    *,
    rates: Sequence[int] | None = None,
    changes: Mapping[str, ConfigValue] = MappingProxyType({}),
) -> list[Point]:
    """The runs of one panel of the main figure.

    Args:
        model: Model as the figure names it.
        dataset: Data set as the figure names it.
        rates: Keep only these requests/s.
        changes: Configuration keys that replace those of the figure.

    Raises:
        VoltanaError: The figure has no such panel.
    """
    name = f"{model}, {dataset}"
    found = [p for p in main_figure_points() if p.labels[PANEL] == name]
    if not found:
        raise VoltanaError(f"the main figure has no panel {name!r} ({MAIN_FIGURE})")
    return [
        Point(labels=p.labels, config=make_config({**p.config.as_dict(), **changes}))
        for p in found
        if rates is None or p.config.rate_rps in rates
    ]


def as_panel(frame: pd.DataFrame) -> pd.DataFrame:
    """Results of the main figure's runs in the panel's columns."""
    names = frame[PANEL].str.split(", ", n=1, expand=True)
    return pd.DataFrame(
        {
            "model": names[0],
            "dataset": names[1],
            "rps": frame["rate_rps"].astype(int),
            "series": frame["policy"].replace(VOLTANALLM, "voltanallm"),
            "ttft_attainment_pct": 100 * frame["ttft_attainment"],
            "itl_attainment_pct": 100 * frame["itl_attainment"],
            "energy_kj": frame["energy_busy_window_j"] / 1e3,
        }
    )


def panel_residuals(
    published: pd.DataFrame,
    directory: Path,
    *,
    jobs: int | None = None,
    changes: Mapping[str, ConfigValue] = MappingProxyType({}),
) -> pd.DataFrame:
    """Run the published panel's rates and compare; see `panel_points` and `residuals`.

    Args:
        published: The panel, one row a rate and policy.
        directory: Of the runs.
        jobs: Processes; all cores by default.
        changes: Configuration keys to set otherwise.
    """
    row = published.iloc[0]
    points = panel_points(
        str(row["model"]), str(row["dataset"]), rates=sorted(set(published["rps"])), changes=changes
    )
    return residuals(as_panel(run_sweep(points, directory, jobs=jobs)), published)


def with_saving_pct(panel: pd.DataFrame) -> pd.DataFrame:
    """Add `saving_pct` against static-1410 of the same panel and rate; empty for itself."""
    keys = ["model", "dataset", "rps"]
    base = panel[panel["series"] == BASELINE].set_index(keys)["energy_kj"].rename("base_kj")
    joined = panel.join(base, on=keys)
    saving = 100 * (1 - joined["energy_kj"] / joined["base_kj"])
    return panel.assign(saving_pct=saving.where(panel["series"] != BASELINE))


def residuals(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the published values, one row a published rate and series.

    Returns:
        The keys, then for saving, attainments and energy: `X_ours`, `X_published` and `X_error`
        (ours minus published; empty where nothing was published).
    """
    merged = with_saving_pct(published).merge(
        with_saving_pct(ours), on=list(PANEL_KEYS), suffixes=("_published", "_ours"), how="inner"
    )
    columns = list(PANEL_KEYS)
    for value in ("saving_pct", *VALUES):
        merged[f"{value}_error"] = merged[f"{value}_ours"] - merged[f"{value}_published"]
        columns += [f"{value}_ours", f"{value}_published", f"{value}_error"]
    return merged[columns]


def score(compared: pd.DataFrame) -> float:
    """How far the residuals are off, z = error / tolerance: mean of 2·(sqrt(1 + z²) - 1).

    Quadratic near zero and linear far out, so that the cliff of an overloaded series does not
    outweigh all else. Empty cells do not count.
    """
    parts = [
        compared[f"{value}_error"].dropna() / tolerance for value, tolerance in TOLERANCES.items()
    ]
    z = np.concatenate(parts)
    return float(np.mean(2 * (np.sqrt(1 + z * z) - 1)))


def worst(compared: pd.DataFrame) -> pd.DataFrame:
    """Largest absolute error by series, and how many cells keep the tolerance of how many."""
    rows = []
    for series, part in compared.groupby("series", sort=False):
        row: dict[str, Any] = {"series": series}
        for value, tolerance in TOLERANCES.items():
            error = part[f"{value}_error"].dropna().abs()
            row[f"{value}_worst"] = round(float(error.max()), 1) if len(error) else np.nan
            row[f"{value}_kept"] = f"{int((error <= tolerance).sum())}/{len(error)}"
        rows.append(row)
    return pd.DataFrame(rows)
