"""What the commands print: ms where people read, SI in JSON."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from typing import Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from voltana.sim.config import SimConfig
from voltana.sim.results import finite

_WIDEST = 118
"""Where nobody's terminal is known: a file, a pipe."""
_NARROWEST = 72


def summary_json(summary: Mapping[str, Any]) -> str:
    """The summary as strict JSON (a value that does not exist is null)."""
    return json.dumps(finite(summary), indent=1)


def print_result(told: Mapping[str, Any], *lines: object, as_json: bool) -> None:
    """Print a command's result: as JSON, or its lines for people.

    Args:
        told: What JSON has; tables are lists of rows.
        lines: For people.
        as_json: Which of the two.
    """
    if as_json:
        typer.echo(summary_json(told))
        return
    for line in lines:
        typer.echo(line)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows for JSON; an empty cell is null."""
    return [dict(row) for row in json.loads(frame.to_json(orient="records"))]


def summary_table(config: SimConfig, summary: Mapping[str, Any]) -> str:
    """One run as a short table."""
    table = Table(title=f"{config.profile}  {config.trace or config.workload}", show_header=False)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    parts = ["colocated", "idle"] if config.num_colocated else ["prefill", "decode", "idle"]
    controllers = [
        ("prefill controller", config.prefill_controller_spec),
        ("decode controller", config.decode_controller_spec),
    ]
    rows = [
        *([("controller", config.controller)] if config.num_colocated else controllers),
        ("router", config.router),
        ("requests completed / total",
         f"{summary['requests_completed']} / {summary['requests_total']}"),
        ("energy", f"{summary['energy_j']:,.0f} J over {summary['makespan_s']:.1f} s"),
        (f"  {' + '.join(parts)}",
         " + ".join(f"{summary[f'{part}_energy_j']:,.0f}" for part in parts) + " J"),
        ("energy per output token", f"{summary['energy_per_output_token_j']:.3f} J"),
        ("TTFT p50 / p90 / p99", _quantiles(summary["ttft_s"])),
        ("ITL p50 / p90 / p99", _quantiles(summary["itl_s"])),
        (f"TTFT attainment ({config.slo_ttft_s * 1e3:g} ms)",
         f"{100 * summary['ttft_attainment']:.2f} %"),
        (f"ITL attainment ({config.slo_itl_s * 1e3:g} ms)",
         f"{100 * summary['itl_attainment']:.2f} %"),
        ("both, per request", f"{100 * summary['attainment']:.2f} %"),
        ("goodput", f"{summary['goodput_rps']:.2f} requests/s"),
    ]  # fmt: skip
    if "away_energy_j" in summary:
        rows.append(("  + out of service", f"{summary['away_energy_j']:,.0f} J"))
        share = f"{100 * summary['in_service_share']:.1f} %, {summary['wake_ups']} wake-ups"
        rows.append(("instances in service", share))
    if "host_energy_j" in summary:
        rows.append(("of it hosts", f"{summary['host_energy_j']:,.0f} J"))
    if "cached_share" in summary:
        found = f"{100 * summary['cached_share']:.1f} % of prompt tokens"
        rows.append(("in prefill's caches", found))
    for row in rows:
        table.add_row(*row)
    return render(table)


def policy_table(frame: pd.DataFrame, title: str) -> str:
    """Policies of one load point: energy, saving against static-max, attainments, energy a token.

    Args:
        frame: Columns policy, energy_j, saving_pct, ttft_attainment, itl_attainment,
            energy_per_output_token_j, keeps_slo.
        title: Printed above.
    """
    table = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="")
    table.add_column("policy")  # breaks between words where the terminal is narrow
    for name in ("energy J", "saving %", "TTFT ok", "ITL ok", "J/token", "keeps SLO"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        table.add_row(
            str(row["policy"]),
            f"{row['energy_j']:,.0f}",
            f"{row['saving_pct']:.1f}",
            f"{100 * row['ttft_attainment']:.2f} %",
            f"{100 * row['itl_attainment']:.2f} %",
            f"{row['energy_per_output_token_j']:.3f}",
            "yes" if row["keeps_slo"] else "no",
        )
    return render(table)


def width() -> int:
    """Columns to print in: the terminal's, within reason."""
    return min(max(shutil.get_terminal_size((_WIDEST, 24)).columns, _NARROWEST), _WIDEST)


def render(table: Table) -> str:
    """A rich table as plain text, no wider than the terminal: its cells break between words."""
    stream = io.StringIO()
    Console(file=stream, width=width()).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).rstrip("\n")


def _quantiles(values: Mapping[str, float]) -> str:
    return " / ".join(f"{1e3 * values[q]:.1f}" for q in ("p50", "p90", "p99")) + " ms"
