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

HELLO: Final = b"H"
HELLO_TIMEOUT_S: Final = 20.0
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


def has_said_hello(guard: subprocess.Popen[bytes]) -> bool:
    """Wait until the guard is ready; a guard that is not ready in time is killed."""
    assert guard.stdout is not None
    ready, _, _ = select.select([guard.stdout], [], [], HELLO_TIMEOUT_S)
    if ready and os.read(guard.stdout.fileno(), 1) == HELLO:
        return True
    guard.kill()
    end_guard(guard)
    return False


def end_guard(guard: subprocess.Popen[bytes]) -> None:
    """Close the owner's ends, which tells the guard to act on what it still guards, and wait."""
    for pipe in (guard.stdin, guard.stdout):
        assert pipe is not None
        pipe.close()
    guard.wait()


def say_hello() -> None:
    """Tell the owner that the guard is ready."""
    os.write(sys.stdout.fileno(), HELLO)


def receive_until_gone(parent_pid: int) -> Iterator[bytes]:
    """Yield what the owner writes; ends when the owner has gone or has closed its end.

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
