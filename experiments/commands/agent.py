"""`voltana agent`: controllers beside running servers, whoever routes to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("agent", short_help="Control the clocks of running servers, or say what it would")(
        agent
    )


def agent(
    file: Annotated[
        Path,
        typer.Argument(help="TOML file: [simulate], [fleet] and [serve]", metavar="FLEET.toml"),
    ],
    act: Annotated[
        bool, typer.Option("--act", help="Set clocks through [serve] actuator; else touch nothing")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for each decision and clock; default: not kept")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of /metrics; 0: a free one")] = 9470,
    host: Annotated[
        str, typer.Option(help="Address of /metrics; 0.0.0.0 shows it beyond this machine")
    ] = "127.0.0.1",
) -> None:
    """Watch running SGLang servers by their forward-pass metrics, under any router.

    A shadow by default: it decides, estimates what its clocks would save against the top clock,
    and touches nothing. [fleet] names the servers' metrics: decode = [{metrics =
    "ipc:///tmp/decode-0.0"}]. A controller that looks at what only voltana's router knows is
    refused. `voltana serve` and `voltana replay` start agents by themselves.

    With --act a guard gives a clock back while fewer than guard_floor of the last minute's samples
    kept the promise. SIGTERM and Ctrl-C give all clocks back.

    Example: voltana agent fleet.toml
    """
    with needs("replay", "voltana agent"):
        from voltana.hwreplay.agent.attach import attach

    attach(file, acts=act, port=port, directory=out, host=host)
