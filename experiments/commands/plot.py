"""`voltana plot`: the energy-against-SLO figure of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plot", short_help="Draw energy against rate and attainment")(plot)


def plot(
    directory: Annotated[Path, typer.Argument(help="Results of a sweep", metavar="DIR")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the figure; made if missing [default: DIR]")
    ] = None,
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Attainment that counts as keeping the SLO")
    ] = 0.99,
    json: AsJson = False,
) -> None:
    """Draw energy against request rate and attainment: OUT/energy_vs_slo.png and .svg.

    Needs a policy axis with an entry named static-max; static pairs are reduced to the best one.
    """
    from voltana.experiments.compare.policies import compare
    from voltana.experiments.draw.plots import energy_vs_slo, save
    from voltana.experiments.show import print_result
    from voltana.experiments.sweep.run import read_results

    frame = compare(read_results(directory), target=target)
    files = list(
        map(str, save(energy_vs_slo(frame, target=target), out or directory, "energy_vs_slo"))
    )
    print_result({"files": files}, *files, as_json=json)
