"""From the actuator's options to its end, whichever command line gave them."""

from __future__ import annotations

import os
import sys

from voltana.hwreplay.actuator.actuator import ActuatorConfig, run_actuator
from voltana.hwreplay.actuator.backends import open_backend
from voltana.hwreplay.actuator.options import Options
from voltana.hwreplay.actuator.trust import check_code
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import find_cards


def start(options: Options) -> None:
    """Serve until a signal ends it.

    Raises:
        VoltanaError: A wrong option, code that others may change, or no such socket or GPU.
    """
    if not options.allows_writable_code:
        check_code()
    uid = options.uid
    if uid is None:
        uid = int(os.environ.get("SUDO_UID", os.geteuid()))
    config = ActuatorConfig(
        socket_path=options.socket,
        allowed_uids=frozenset({uid}),
        owner_uid=uid,
        silence_s=options.silence_s,
        max_rate_per_s=options.max_rate_per_s,
    )
    backend = open_backend(
        _find(options),
        clocks_mhz=_parse_clocks(options.clocks),
        previous_clock_mhz=options.previous_clock_mhz,
        is_power_cap=options.is_power_cap,
        restores_first=options.restores_first,
        zeusd=options.zeusd,
        dry_run=options.dry_run,
    )
    greeting = f"listening on {options.socket} for user {uid}\n"
    run_actuator(backend, config, ready=lambda: _tell(greeting))


def _find(options: Options) -> list[int]:
    """The cards; without a driver, in a dry run, only numbers name them."""
    if options.dry_run is not None and not all(name.isdecimal() for name in options.gpus):
        raise VoltanaError(f"--gpu must be numbers in a dry run, got {options.gpus}")
    return find_cards(options.gpus)


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _parse_clocks(text: str | None) -> frozenset[int] | None:
    if text is None:
        return None
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise VoltanaError(
            f"--clocks must be whole MHz with commas, got {text!r}: e.g. 1005,1410"
        ) from None
