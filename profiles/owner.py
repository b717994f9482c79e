"""Both ends of a small process that acts when its owner has gone, however the owner went.

The process holds the read end of a pipe. The owner's end closes when it dies, SIGKILL included. A
forked child of the owner may keep the pipe open, so the parent's id is looked at every half second
as well.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final

PARENT_POLL_S: Final = 0.5
READ_BYTES: Final = 4096


def start_guard(module: str, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start a module as a guard of this process, in a session of its own, with pipes both ways.

    The owner may be root in a folder where others put modules: -P keeps that folder out, and a
    guard of an isolated owner (-I) is isolated too.
    """
    environment = dict(os.environ)
    if not sys.flags.isolated:
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )


def receive_until_gone(parent_pid: int) -> Iterator[bytes]:
    """What the owner writes, as it comes; ends when it has gone or closed its end.

    Args:
        parent_pid: The owner, as `os.getppid` told at the start.
    """
    while True:
        ready, _, _ = select.select([sys.stdin.buffer], [], [], PARENT_POLL_S)
        if ready:
            received = os.read(sys.stdin.fileno(), READ_BYTES)
            if not received:
                return
            yield received
        elif os.getppid() != parent_pid:
            return
