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
    allow_writable_code: Annotated[
        bool,
        typer.Option("--allow-writable-code", help="Run as root though others may edit the code"),
    ] = False,
) -> None:
    """Set clocks for replay agents that may not: run this as root, and only this.

    It listens on a socket that one user can open, takes 16-byte messages, and touches only the
    GPUs and clocks named here. Silence, a closed connection, Ctrl-C, a crash and even kill -9
    give the clocks back. As root it refuses code that others may change (docs/replay.md).

    Example: sudo voltana actuator /run/voltana.sock --gpu 0 --gpu 1 --clocks 1005,1410
    """
    from hwreplay.actuator.start import Options, start

    start(
        Options(
            socket=socket,
            gpus=frozenset(gpu),
            uid=uid,
            clocks=clocks,
            is_power_cap=power_cap,
            previous_clock_mhz=previous_clock,
            silence_s=silence_s,
            max_rate_per_s=max_rate,
            dry_run=dry_run,
            allows_writable_code=allow_writable_code,
        )
    )
