"""The actuator's options, written once: for `voltana actuator` and for root's own entry.

Nothing but the standard library: an installation of root's has no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

DESCRIPTION: Final = """Set clocks for replay agents that may not: run this as root, and only this.

It listens on a socket that one user can open, takes 16-byte messages, and touches only the GPUs and
clocks named here. Silence, a closed connection, Ctrl-C, a crash and even kill -9 give the clocks
back. As root it refuses code that others may change (docs/replay.md)."""
EXAMPLE: Final = (
    "Example: sudo voltana actuator /run/voltana.sock --gpu 0 --gpu 1 --clocks 1005,1410"
)


def _option(name: str, text: str, **parse: object) -> dict[str, object]:
    """What argparse is told of one."""
    return {"name": name, "help": text} | parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    socket: Path = field(
        metadata=_option("socket", "Unix socket to make (mode 0600)", metavar="SOCK", type=Path)
    )
    gpus: list[str] = field(
        metadata=_option(
            "--gpu",
            "GPU that may be set, by number or UUID, repeatable; all: every one",
            action="append",
            required=True,
        )
    )
    uid: int | None = field(
        metadata=_option(
            "--uid", "user that may ask; default: who called sudo, or yourself", type=int
        )
    )
    clocks: str | None = field(
        metadata=_option("--clocks", "clocks that may be locked, MHz, e.g. 1005,1410; all if none")
    )
    is_power_cap: bool = field(
        metadata=_option(
            "--power-cap", "lower power limits where clocks cannot be locked", action="store_true"
        )
    )
    previous_clock_mhz: int | None = field(
        metadata=_option(
            "--previous-clock", "lock to return to, MHz; default: the driver's control", type=int
        )
    )
    restores_first: bool = field(
        metadata=_option(
            "--restore-first",
            "give clocks back at the start: in containers, where a kill takes the watchdog too",
            action="store_true",
        )
    )
    zeusd: str | None = field(
        metadata=_option(
            "--zeusd",
            "let zeusd set the clocks, at this socket or HOST:PORT; needs no root here",
        )
    )
    silence_s: float = field(
        metadata=_option(
            "--silence-s",
            "a client silent for so long loses its clocks, s",
            type=float,
            default=2.0,
        )
    )
    max_rate_per_s: float = field(
        metadata=_option("--max-rate", "changes a GPU may see, per s", type=float, default=500.0)
    )
    dry_run: Path | None = field(
        metadata=_option(
            "--dry-run", "touch nothing: record each change in this JSONL file", type=Path
        )
    )
    allows_writable_code: bool = field(
        metadata=_option(
            "--allow-writable-code",
            "run as root though others may edit the code",
            action="store_true",
        )
    )


def parse_options(program: str, arguments: Sequence[str]) -> Options:
    """Read a command line; what is wrong with it ends the process with 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in fields(Options):
        values = dict(option.metadata)
        name = values.pop("name")
        dest: dict[str, Any] = {"dest": option.name} if name.startswith("-") else {}
        parser.add_argument(name, **dest, **values)
    return Options(**vars(parser.parse_args(arguments)))
