"""`voltana actuator`: the privileged helper of the replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("actuator")(actuator)


def actuator(
    socket: Annotated[Path, typer.Argument(help="Unix socket to make (mode 0600)", metavar="SOCK")],
    gpu: Annotated[list[int], typer.Option(help="GPU that may be set, repeatable")],
    uid: Annotated[
        int | None, typer.Option(help="User that may ask; default: who called sudo, or yourself")
    ] = None,
    clocks: Annotated[
        str | None, typer.Option(help="Clocks that may be locked, MHz, e.g. 1005,1410; all if none")
    ] = None,
    power_cap: Annotated[
        bool, typer.Option("--power-cap", help="Lower power limits where clocks cannot be locked")
    ] = False,
    previous_clock: Annotated[
        int | None, typer.Option(help="Lock to return to, MHz; default: the driver's control")
    ] = None,
    silence_s: Annotated[
        float, typer.Option(help="A client silent for so long loses its clocks, s")
    ] = 2.0,
    max_rate: Annotated[float, typer.Option(help="Changes a GPU may see, per s")] = 500.0,
    dry_run: Annotated[
        Path | None, typer.Option(help="Touch nothing: record each change in this JSONL file")
    ] = None,
) -> None:
    """Set clocks for replay agents that may not: run this as root, and only this.

    It listens on a socket that one user can open, takes 16-byte messages, and touches only the
    GPUs and clocks named here. Silence, a closed connection, Ctrl-C, a crash and even kill -9
    give the clocks back.

    Example: sudo voltana actuator /run/voltana.sock --gpu 0 --gpu 1 --clocks 1005,1410
    """
    import os

    from hwreplay.actuator.backends import open_backend
    from hwreplay.actuator.helper import HelperConfig, run_helper

    if uid is None:
        uid = int(os.environ.get("SUDO_UID", os.geteuid()))
    config = HelperConfig(
        socket_path=socket,
        allowed_uids=frozenset({uid}),
        owner_uid=uid,
        silence_s=silence_s,
        max_rate_per_s=max_rate,
    )
    backend = open_backend(
        frozenset(gpu),
        clocks_mhz=_parse_clocks(clocks),
        previous_clock_mhz=previous_clock,
        is_power_cap=power_cap,
        dry_run=dry_run,
    )
    run_helper(
        backend, config, ready=lambda: typer.echo(f"listening on {socket} for user {uid}", err=True)
    )


def _parse_clocks(text: str | None) -> frozenset[int] | None:
    from profiles.errors import VoltanaError

    if text is None:
        return None
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise VoltanaError(
            f"--clocks must be whole MHz with commas, got {text!r}: e.g. 1005,1410"
        ) from None
