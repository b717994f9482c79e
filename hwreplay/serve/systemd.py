"""What systemd is told of a service of `Type=notify`: one datagram, nothing without a listener.

Source: sd_notify(3), "Notes" on the protocol.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

SOCKET: Final = "NOTIFY_SOCKET"


def notify(state: str) -> None:
    """Tell the service manager a state such as READY=1."""
    address = os.environ.get(SOCKET)
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    if state == "RELOADING=1":
        state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
        try:
            speaker.sendto(state.encode(), address)
        except OSError:  # a manager that does not listen is no reason to stop
            return
