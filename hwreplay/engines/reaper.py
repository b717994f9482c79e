"""Ends server processes whose owner was killed by what no handler sees (SIGKILL).

A small process beside the owner is told of each server's process group and of the files that it has
in /dev/shm, one line each. When the owner has gone it kills the groups that it was told of and not
untold, and removes their shared memory.

    owner    spawn ── hello? ── "+ GROUP" ── "+ FILE" … ── "- FILE" ── "- GROUP" ── close
    reaper           hello ──── read ──────────────────── (end of file: kill what is left)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

from voltana.hwreplay.engines.shared_memory import SHARED_MEMORY, find_shared_memory
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.owner import (
    HELLO_TIMEOUT_S,
    end_guard,
    has_said_hello,
    receive_until_gone,
    say_hello,
    start_guard,
)

END_S: Final = 10.0
POLL_S: Final = 0.02


class Reaper:
    """The owner's handle on its reaper process; closing it ends what it still guards."""

    def __init__(self) -> None:
        """Start the process and wait for its hello, so that it stands before the first server.

        Raises:
            VoltanaError: It did not come up.
        """
        self._files: dict[int, set[Path]] = {}
        self._process = start_guard("voltana.hwreplay.engines.reaper")
        if not has_said_hello(self._process):
            raise VoltanaError(
                f"the servers' reaper must start within {HELLO_TIMEOUT_S:.0f} s, it did not: no "
                "server was started; see its message above"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def guard(self, group: int, files: Iterable[Path] = ()) -> None:
        """From now on the owner's death ends this process group and removes these files."""
        self._files.setdefault(group, set()).update(files)
        self._send("+", group, files)

    def release(self, group: int) -> None:
        """The group has ended, and its files are gone."""
        self._send("-", group, self._files.pop(group, ()))

    def close(self) -> None:
        """End the process."""
        end_guard(self._process)

    def _send(self, sign: str, group: int, files: Iterable[Path]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        lines = [f"{sign} {group}\n", *(f"{sign} {path}\n" for path in files)]
        try:
            os.write(stdin.fileno(), "".join(lines).encode())
        except BrokenPipeError:
            sys.stderr.write(
                f"voltana: the servers' reaper (pid {self.pid}) has died: kill -9 of this process "
                "would leave servers behind\n"
            )


def _listen(parent_pid: int) -> set[str]:
    """What is guarded when the owner has gone: groups and paths, as text."""
    guarded: set[str] = set()
    rest = b""
    for received in receive_until_gone(parent_pid):
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            sign, _, target = os.fsdecode(line).partition(" ")
            (guarded.add if sign == "+" else guarded.discard)(target)
    return guarded


def _reap(guarded: Iterable[str]) -> None:
    """Kill the groups, wait for their end, then remove the files: a living one would write on."""
    groups = [int(target) for target in guarded if target.isdigit()]
    files = {Path(target) for target in guarded if target.startswith(SHARED_MEMORY)}
    for group in groups:
        files.update(find_shared_memory(group))
        _signal(group, signal.SIGKILL)
    deadline_s = time.monotonic() + END_S
    while any(_signal(group, 0) for group in groups) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for path in files:
        path.unlink(missing_ok=True)


def _signal(group: int, number: int) -> bool:
    """Signal a process group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    """Run the reaper; it hears of its owner's end by its pipe alone, so that signals do nothing."""
    parent_pid = os.getppid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    say_hello()
    _reap(_listen(parent_pid))
    return 0


if __name__ == "__main__":
    sys.exit(main())
