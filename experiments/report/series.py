"""Time series of chosen runs: kept by the run itself, or simulated again from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.report.collect import ID, RUN, SUMMARY, Results
from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import KEYS, SimConfig, make_config
from voltana.sim.records import FloatArray
from voltana.sim.results import read_frame, read_json

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
    """Columns of `RunRecord.timeline`, `num_waiting` and `kv_tokens` only if they are known."""
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
    if results.series == RUN:  # what a load generator wrote has none
        return [row for _, row in table.iterrows() if str(row[ID]) in results.run_directories]
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
    """The time series of one row: as the run kept it, simulated again, or from its iterations.

    Raises:
        VoltanaError: There is none of these, or its configuration names what is not here.
    """
    label = _label(results, row)
    directory = results.run_directories.get(str(row[ID]))
    if directory is None:
        values = {k: _plain(row[k]) for k in KEYS if k in row.index and not pd.isna(row[k])}
        return _again(make_config(values, where=label), label, row["makespan_s"], row["energy_j"])
    settings = read_json(directory / "settings.json")
    if (directory / "timeline.parquet").exists():
        frame = read_frame(directory / "timeline.parquet")
        return _kept(directory, label, frame, settings["slo_ttft_s"], "as the run kept it")
    if "controller" in settings and set(settings) <= set(KEYS):
        config = make_config(settings, where=str(directory))
        summary = read_json(directory / SUMMARY)
        return _again(config, label, summary["makespan_s"], summary["energy_j"])
    if (directory / "iterations.parquet").exists():
        frame = from_iterations(read_frame(directory / "iterations.parquet"))
        note = "from its iterations: batch and power while they run, queues are not known"
        return _kept(directory, label, frame, settings["slo_ttft_s"], note)
    raise VoltanaError(f"{directory} kept neither time series nor iterations")


def from_iterations(iterations: pd.DataFrame) -> pd.DataFrame:
    """Time series from one row an iteration: bins of equal length, an instance each.

    Args:
        iterations: Columns of `IterationTable`.

    Returns:
        `time_s` (start of the bin), `phase`, `instance_id`, `clock_mhz` (last), `batch_size` (mean
        over time) and `power_w` (energy over busy time) of the bins in which an iteration began.
    """
    width_s = max(float((iterations["start_s"] + iterations["duration_s"]).max()), 1e-9) / SAMPLES
    rows = iterations.assign(
        time_s=(iterations["start_s"] // width_s) * width_s,
        weight=iterations["batch_size"] * iterations["duration_s"],
    )
    bins = rows.groupby(["phase", "instance_id", "time_s"]).agg(
        clock_mhz=("clock_mhz", "last"), weight=("weight", "sum"),
        energy_j=("energy_j", "sum"), busy_s=("duration_s", "sum"),
    )  # fmt: skip
    busy_s = bins["busy_s"].where(bins["busy_s"] > 0)
    found = bins.assign(batch_size=bins["weight"] / busy_s, power_w=bins["energy_j"] / busy_s)
    return found.drop(columns=["weight", "energy_j", "busy_s"]).reset_index()


def _kept(
    directory: Path, label: str, timeline: pd.DataFrame, slo_ttft_s: float, note: str
) -> RunSeries:
    return RunSeries(
        label=label, timeline=timeline, slo_ttft_s=slo_ttft_s, note=note,
        ttft=_kept_ttft(directory / "requests.parquet"),
    )  # fmt: skip


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


def _kept_ttft(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    frame = read_frame(path, ["arrival_s", "first_token_s"])
    return _ttft(frame["arrival_s"].to_numpy(), frame["first_token_s"].to_numpy())


def _ttft(arrival_s: FloatArray, first_token_s: FloatArray) -> pd.DataFrame:
    return pd.DataFrame({"arrival_s": arrival_s, "ttft_s": first_token_s - arrival_s}).dropna()


def _label(results: Results, row: pd.Series[Any]) -> str:
    name = str(row[results.series])
    return f"{name}, {results.load_name(row)}" if results.loads else name


def _plain(value: Any) -> Any:  # noqa: ANN401 (numpy scalars of a CSV)
    return value.item() if hasattr(value, "item") else value
