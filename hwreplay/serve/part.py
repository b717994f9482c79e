"""One child of a service: a process whose every line comes into the service's log."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from voltana.hwreplay.messages.log_lines import ENVIRONMENT, MAX_TEXT, is_line
from voltana.hwreplay.replay.parts import END_S, end_process
from voltana.profiles.common.errors import VoltanaError

LOG: Final = logging.getLogger("voltana.serve")
READY_POLL_S: Final = 0.05
MAX_LINE_BYTES: Final = 2**20
BACKOFF_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Before a part is started again, by how often it has died in the last `STEADY_S`."""
STEADY_S: Final = 60.0


class Part:
    """A child process. Start it with `start`; `end` leaves nothing of it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.last_line = ""
        """What it said last, for the message when it ends."""
        assert process.stdout is not None
        assert process.stderr is not None
        self._first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pumps = [
            asyncio.create_task(self._take_lines(process.stderr)),
            asyncio.create_task(self._take_lines(process.stdout, self._first)),
        ]

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_level: str,
        pass_fds: Sequence[int] = (),
    ) -> Part:
        """Start a command.

        Args:
            name: In the log.
            command: Program and arguments.
            environment: The whole of it.
            log_level: Least level of its lines.
            pass_fds: Open files that it inherits, by their numbers.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the service, which ends its parts in order
            env={**environment, ENVIRONMENT: log_level},
            limit=MAX_LINE_BYTES,
            pass_fds=tuple(pass_fds),
        )
        return cls(name, process)

    async def first_line(self) -> str:
        """The first line of its output; raises VoltanaError if it ends instead."""
        if line := await self._first:
            return line
        raise await self.ended()

    async def await_file(self, path: Path, limit_s: float) -> None:
        """Wait until it has made a file.

        Raises:
            VoltanaError: It has ended, or was too late.
        """
        try:
            async with asyncio.timeout(limit_s):
                while not path.exists():
                    if self.process.returncode is not None:
                        raise await self.ended()
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise VoltanaError(f"{self.name} must be ready within {limit_s:g} s") from None

    async def ended(self) -> VoltanaError:
        """What to say of its end, which it waits for."""
        code = await self.process.wait()
        await asyncio.gather(*self._pumps)
        said = f": {self.last_line}" if self.last_line else ""
        return VoltanaError(f"{self.name} must stay up, it ended with {code}{said}")

    async def end(self, limit_s: float = END_S) -> None:
        """End it, by force after `limit_s`."""
        await end_process(self.process, limit_s)
        await asyncio.gather(*self._pumps)

    async def _take_lines(
        self, stream: asyncio.StreamReader, first: asyncio.Future[str] | None = None
    ) -> None:
        """Log every line to the end; the first one goes to `first`, which is empty without any."""
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than any line of ours
                continue
            if first is not None and not first.done():
                first.set_result(line.decode(errors="replace").strip())
            elif line.strip():
                self._log(line.strip())
            if not line:
                return

    def _log(self, line: bytes) -> None:
        """Lines of the log pass as they are; others become the event of one."""
        if is_line(line):
            os.write(2, line + b"\n")
            return
        self.last_line = line.decode(errors="replace")[:MAX_TEXT]
        LOG.warning(self.last_line, extra={"part": self.name})


class Deaths:
    """How often a part has died of late."""

    def __init__(self) -> None:
        self._at_s: list[float] = []

    def __len__(self) -> int:
        return len(self._at_s)

    def add(self) -> float | None:
        """One more; how long to wait before the next start, or None: too often."""
        now_s = asyncio.get_running_loop().time()
        self._at_s = [at_s for at_s in self._at_s if now_s - at_s < STEADY_S]
        self._at_s.append(now_s)
        number = len(self._at_s)
        return BACKOFF_S[number - 1] if number <= len(BACKOFF_S) else None
