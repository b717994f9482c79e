"""`voltana router`: the HTTP router in front of a disaggregated fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("router", short_help="Route requests to SGLang prefill and decode servers")(router)


def router(
    config: Annotated[Path, typer.Option(help="TOML file: [simulate], [fleet] and [router]")],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: this machine only")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that requests must carry")
    ] = None,
) -> None:
    """Route requests to SGLang prefill and decode servers by a voltana policy.

    Takes /generate, /v1/completions and /v1/chat/completions; shows /metrics and /health. The
    policy is the one that `voltana simulate` runs with the same [simulate] keys. [fleet] lists the
    servers: prefill = [{url = "http://127.0.0.1:30000", bootstrap_port = 8998}], decode =
    ["http://127.0.0.1:30001"].

    Example: voltana router --config fleet.toml --port 8000
    """
    import dataclasses

    with needs("replay", "voltana router"):
        from voltana.hwreplay.router.config import read_router_config, read_token
        from voltana.hwreplay.router.service import run_router

    made = read_router_config(config, token=read_token(token_file))
    made = dataclasses.replace(
        made,
        host=made.host if host is None else host,
        port=made.port if port is None else port,
    )
    run_router(made, lambda url: typer.echo(f"routing on {url}", err=True))
