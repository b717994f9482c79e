"""`voltana doctor`: what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor", short_help="What this machine can do, and what to install")(doctor)


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="File of voltana serve or agent: look for all that it names", metavar="FLEET.toml"
        ),
    ] = None,
    engine: Annotated[
        list[Path] | None,
        typer.Option(
            help="Python with SGLang, repeatable; default: .engine and .engine-gpu here",
            metavar="PYTHON",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object")] = False,
) -> None:
    """Say what this machine can do, and what to install or do for the rest.

    It looks at the program and its extras, at GPUs and who may lock their clocks, SGLang, actuator,
    zeusd and ports. With FLEET.toml also at everything that the file names: servers, metrics,
    cards, DCGM exporter, token, actuator. Nothing is set or started.

    What is merely not here is marked - and is no fault; what is here or asked for and does not work
    is marked ! and makes the exit code 1.

    Example: voltana doctor fleet.toml
    """
    from voltana.experiments.doctor.report import as_json, as_text, examine, is_well

    found = examine(file, engine or [])
    typer.echo(as_json(found) if json else as_text(found))
    if not is_well(found):
        raise typer.Exit(1)
