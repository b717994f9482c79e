"""Time series of chosen runs: kept by the run itself, or simulated again from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from experiments.report.collect import ID, SUMMARY, Results
from experiments.runs import run
from profiles.errors import VoltanaError
from sim.config import KEYS, SimConfig, make_config
from sim.records import FloatArray
from sim.results import read_json

SAMPLES: Final = 600
"""Samples of a run that is simulated again: about one per two pixels of a wide screen."""
MAX_RUNS: Final = 6
MAX_WALL_S: Final = 20.0
"""Runs that took longer are simulated again only if they are named."""
ENERGY_TOLERANCE: Final = 1e-9
"""Relative; sampling splits the energy sum, so its last bits may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeries:
    """What one run did over time."""

    label: str
    timeline: pd.DataFrame
    """Columns of `RunRecord.timeline`."""
    ttft: pd.DataFrame | None
    """`arrival_s` and `ttft_s`, one row a request; None if the run keeps no rows."""
    slo_ttft_s: float
    note: str


def choose(results: Results, wanted: Sequence[str]) -> list[pd.Series[Any]]:
    """Rows whose time series are shown.

    Args:
        results: What was collected.
        wanted: Beginnings of ids. Empty takes the runs that kept a time series, or of a sweep the
            policies at the highest load at which one of them keeps the SLO.

    Raises:
        VoltanaError: No run has such an id.
    """
    table = results.table
    if wanted:
        return [_row_of(table, text) for text in wanted]
    if results.run_directories:
        return [row for _, row in table.iterrows()]
    point = results.busiest() or results.load_points()[-1][0]
    rows = dict(results.load_points())[point]
    quick = rows[~results.is_static_pair.loc[rows.index] & (rows["wall_s"] <= MAX_WALL_S)]
    named = quick.drop_duplicates(results.series).head(MAX_RUNS)
    return [row for _, row in named.iterrows()]


def _row_of(table: pd.DataFrame, text: str) -> pd.Series[Any]:
    found = table[table[ID].astype(str).str.startswith(text)]
    if found.empty:
        raise VoltanaError(
            f"no run whose id begins with {text!r}: the table of the report lists the ids"
        )
    return found.iloc[0]


def series_of(results: Results, row: pd.Series[Any]) -> RunSeries:
    """Read or simulate the time series of one row.

    Raises:
        VoltanaError: The run kept none and cannot be simulated again here.
    """
    directory = results.run_directories.get(str(row[ID]))
    label = _label(results, row)
    if directory is not None:
        kept = directory / "timeline.parquet"
        settings = read_json(directory / "settings.json")
        if kept.exists():
            return RunSeries(
                label=label, timeline=pd.read_parquet(kept), slo_ttft_s=settings["slo_ttft_s"],
                ttft=_kept_ttft(directory / "requests.parquet"), note="as the run kept it",
            )  # fmt: skip
        config = _config(settings, str(directory))
        makespan_s = read_json(directory / SUMMARY)["makespan_s"]
    else:
        values = {k: _plain(row[k]) for k in KEYS if k in row.index and not pd.isna(row[k])}
        config, makespan_s = _config(values, label), float(row["makespan_s"])
    return _again(config, label, makespan_s, float(row["energy_j"]))


def _again(config: SimConfig, label: str, makespan_s: float, energy_j: float) -> RunSeries:
    record = run(
        dataclasses.replace(
            config,
            metrics="exact",
            timeline_interval_s=makespan_s / SAMPLES,
            timeline_max_samples=2 * SAMPLES,
        )
    )
    energy_now_j = sum(i.busy_energy_j + i.idle_energy_j for i in record.instances)
    same = abs(energy_now_j - energy_j) <= ENERGY_TOLERANCE * energy_j
    note = "simulated again from its configuration"
    if not same:
        note += (
            f"; its energy now is {energy_now_j:,.0f} J, in the table {energy_j:,.0f} J: "
            "simulator or profile have changed since"
        )
    return RunSeries(
        label=label,
        timeline=pd.DataFrame(dict(record.timeline or {})),
        ttft=_ttft(record.requests.arrival_s, record.requests.first_token_s),
        slo_ttft_s=config.slo_ttft_s,
        note=note,
    )


def _config(values: dict[str, Any], where: str) -> SimConfig:
    if "controller" not in values or not set(values) <= set(KEYS):
        raise VoltanaError(f"{where} kept no time series and is no simulated run")
    return make_config(values, where=where)


def _kept_ttft(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    frame = pd.read_parquet(path, columns=["arrival_s", "first_token_s"])
    return _ttft(frame["arrival_s"].to_numpy(), frame["first_token_s"].to_numpy())


def _ttft(arrival_s: FloatArray, first_token_s: FloatArray) -> pd.DataFrame:
    return pd.DataFrame({"arrival_s": arrival_s, "ttft_s": first_token_s - arrival_s}).dropna()


def _label(results: Results, row: pd.Series[Any]) -> str:
    name = str(row[results.series])
    return f"{name}, {results.load_name(row)}" if results.loads else name


def _plain(value: Any) -> Any:  # noqa: ANN401 (numpy scalars of a CSV)
    return value.item() if hasattr(value, "item") else value
