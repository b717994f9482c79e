"""`voltana serve`: a fleet behind one address, left running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("serve", short_help="Serve with a fleet: router, agents, servers")(serve)


def serve(
    file: Annotated[
        Path,
        typer.Argument(
            help="TOML file: [simulate], [fleet], [router], [serve]", metavar="FLEET.toml"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the servers' logs and the parts' files; default: a temporary one"
        ),
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C: OpenAI's interface in front, agents on the clocks.

    [fleet] starts servers (engine = ".engine") or lists running ones; [serve] names the cards
    (gpus) and the actuator's socket (actuator), without which clocks are left alone. The log goes
    to stderr, one JSON object a line. The address has /healthz and /metrics.

    SIGTERM refuses new requests, lets open ones end and gives the clocks back: exit code 0. SIGHUP
    reads the file again and takes over policy and promises. 2 is a wrong configuration, 1 what
    failed later. docs/deploy.md has more.

    Example: voltana serve fleet.toml
    """
    with needs("replay", "voltana serve"):
        from voltana.hwreplay.serve.service import serve as run

    raise typer.Exit(run(file, out))
