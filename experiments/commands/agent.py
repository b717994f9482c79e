"""`voltana agent`: one instance's controller by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("agent", short_help="Control one instance's clock")(agent)


def agent(
    file: Annotated[
        Path, typer.Argument(help="JSON file of the agent's configuration", metavar="FILE.json")
    ],
) -> None:
    """Control one instance's clock until Ctrl-C; `voltana replay` starts agents by itself.

    FILE.json holds the keys of voltana.hwreplay.agent.agent.AgentConfig: the phase and number of
    the instance, the simulated configuration, the engine's metrics address, the actuator's socket.
    Decisions, latencies and safe states are written beside it.

    Example: voltana agent runs/agent-decode-0.json
    """
    import os

    with needs("replay", "voltana agent"):
        from voltana.hwreplay.agent.process import run_agents

    run_agents([file], os.getppid())
