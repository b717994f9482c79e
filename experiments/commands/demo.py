"""`voltana demo`: the default comparison, start to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana.experiments.options import AsJson, RequireSlo

if TYPE_CHECKING:
    import pandas as pd


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("demo", short_help="Compare shipped policies on an A100 in half a minute")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the results")] = Path("results/demo"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    json: AsJson = False,
    require_slo: RequireSlo = False,
) -> None:
    """Compare the shipped policies on Llama-3.1-8B, A100, ShareGPT; about a minute on two cores.

    Writes results.csv, energy_vs_slo.png and .svg and the resolved config.toml, and prints one
    table per request rate. The profile is calibrated, not measured: see its profile.toml.
    """
    from voltana.experiments.compare.policies import TARGET, compare
    from voltana.experiments.draw.plots import energy_vs_slo, save
    from voltana.experiments.promise import end_with, overloads
    from voltana.experiments.show import policy_table, print_result, rows_of
    from voltana.experiments.sweep.grid import read_sweep
    from voltana.experiments.sweep.run import run_sweep

    config = Path(__file__).parent.parent / "configs" / "demo.toml"
    points = read_sweep(config)
    frame = compare(run_sweep(points, out, jobs=jobs))
    tables = []
    for rate, rows in frame.groupby("rate_rps", sort=True):
        title = (
            f"{rows['profile'].iloc[0]}, {rows['workload'].iloc[0]}, {rate:g} requests/s, TTFT "
            f"{1e3 * rows['slo_ttft_s'].iloc[0]:g} ms, ITL {1e3 * rows['slo_itl_s'].iloc[0]:g} ms"
        )
        tables.append(policy_table(_with_clocks(rows), title) + "\n")
    files = [*map(str, save(energy_vs_slo(frame), out, "energy_vs_slo")), str(out / "results.csv")]
    print_result(
        {"policies": rows_of(frame), "files": files},
        *tables,
        f"keeps SLO: at least {TARGET:.0%} TTFT and ITL attainment. A saving counts only there.",
        " ".join(files),
        as_json=json,
    )
    end_with(overloads(points, out, jobs=jobs), require_slo=require_slo)


def _with_clocks(rows: pd.DataFrame) -> pd.DataFrame:
    names = rows["policy"].where(rows["clocks"].isna(), rows["policy"] + " " + rows["clocks"])
    return rows.assign(policy=names)
