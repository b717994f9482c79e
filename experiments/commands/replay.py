"""`voltana replay`: a simulated configuration on real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("replay")(replay)


def replay(
    config: Annotated[
        Path, typer.Option(help="TOML file: [simulate], [fleet], [router] and [replay]")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to write")],
    finish: Annotated[
        bool, typer.Option("--finish", help="Only write the results of a replay that was killed")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Replay a configuration on SGLang prefill and decode servers.

    The workload, the router and the controllers are those of `voltana simulate` with the same
    [simulate] keys, and so are the files that it writes: compare them with `voltana validate`.
    [fleet] starts servers (engine = ".engine") or lists running ones. Without [replay] actuator
    the clocks are left alone and decisions are recorded. Ctrl-C keeps what has ended.

    Example: voltana replay --config replay.toml --out results/replayed
    """
    from experiments.replaying import run_replay
    from experiments.show import summary_json, summary_table

    made, summary = run_replay(config, out, only_finish=finish)
    typer.echo(summary_json(summary) if json else summary_table(made.sim, summary))
