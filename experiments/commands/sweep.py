"""`voltana sweep`: a grid of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson, RequireSlo


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("sweep", short_help="Every point of a grid, into one tidy table")(sweep)


def sweep(
    config: Annotated[
        Path, typer.Argument(help="Sweep file, as described above", metavar="CONFIG.toml")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the results")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    engine: Annotated[
        str, typer.Option(help="processes, or ray: the cluster that RAY_ADDRESS names")
    ] = "processes",
    store: Annotated[
        str | None,
        typer.Option(help="Folder or fsspec URL of the points' results, to be shared"),
    ] = None,
    json: AsJson = False,
    require_slo: RequireSlo = False,
) -> None:
    """Run every point of a grid and write one tidy table, DIR/results.csv.

    The file has [base] with any configuration key, and [grid] with lists of values; a free axis
    such as [[grid.policy]] holds tables with a name. [static_pairs] clocks_mhz = [...] adds all
    pairs of fixed clocks. Finished points are kept by the hash of their configuration: run the
    command again to go on after an interruption, or on several machines with one --store.
    """
    from voltana.experiments.promise import end_with, overloads
    from voltana.experiments.show import print_result
    from voltana.experiments.sweep.grid import read_sweep
    from voltana.experiments.sweep.run import RESULTS, run_sweep

    points = read_sweep(config)
    table = run_sweep(points, out, jobs=jobs, executor=engine, store=store)
    overloaded = overloads(points, out, jobs=jobs, executor=engine, store=store)
    told = {
        "points": len(table),
        "results": str(out / RESULTS),
        "overloads": [each.as_dict() for each in overloaded],
    }
    print_result(told, f"{len(table)} points in {out / RESULTS}", as_json=json)
    end_with(overloaded, require_slo=require_slo)
