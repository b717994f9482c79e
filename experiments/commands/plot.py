"""`voltana plot`: the energy-against-SLO figure of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plot", short_help="Draw energy against rate and attainment")(plot)


def plot(
    directory: Annotated[Path, typer.Argument(help="Results of a sweep", metavar="DIR")],
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Attainment that counts as keeping the SLO")
    ] = 0.99,
) -> None:
    """Draw energy against request rate and attainment: DIR/energy_vs_slo.png and .svg.

    Needs a policy axis with an entry named static-max; static pairs are reduced to the best one.
    """
    from voltana.experiments.compare.policies import compare
    from voltana.experiments.draw.plots import energy_vs_slo, save
    from voltana.experiments.sweep.run import read_results

    frame = compare(read_results(directory), target=target)
    for path in save(energy_vs_slo(frame, target=target), directory, "energy_vs_slo"):
        typer.echo(str(path))
