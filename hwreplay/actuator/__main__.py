"""`python -I -m hwreplay.actuator SOCK --gpu N`: `voltana actuator` with nothing but what it needs.

It imports the standard library, NVML's bindings and this package, so that an installation of root's
is small, and `-I` keeps the user's environment and folders out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hwreplay.actuator.start import Options, start
from profiles.errors import VoltanaError


def main(arguments: Sequence[str]) -> int:
    """Run the actuator; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="hwreplay.actuator", description="Sets clocks for replay agents that may not."
    )
    add = parser.add_argument
    add("socket", type=Path, help="Unix socket to make (mode 0600)")
    add("--gpu", type=int, action="append", required=True, help="GPU that may be set, repeatable")
    add("--uid", type=int, help="user that may ask; default: who called sudo")
    add("--clocks", help="clocks that may be locked, MHz, e.g. 1005,1410; default: all")
    add("--power-cap", action="store_true", help="lower power limits instead of clocks")
    add("--previous-clock", type=int, help="lock to return to, MHz; default: the driver's control")
    add("--silence-s", type=float, default=2.0, help="a client silent for so long loses its clocks")
    add("--max-rate", type=float, default=500.0, help="changes a GPU may see, per s")
    add("--dry-run", type=Path, help="touch nothing: record each change in this JSONL file")
    add("--allow-writable-code", action="store_true", help="run as root though others may edit it")
    found = parser.parse_args(arguments)
    options = Options(
        socket=found.socket,
        gpus=frozenset(found.gpu),
        uid=found.uid,
        clocks=found.clocks,
        is_power_cap=found.power_cap,
        previous_clock_mhz=found.previous_clock,
        silence_s=found.silence_s,
        max_rate_per_s=found.max_rate,
        dry_run=found.dry_run,
        allows_writable_code=found.allow_writable_code,
    )
    try:
        start(options)
    except VoltanaError as error:
        sys.stderr.write(f"voltana actuator: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
