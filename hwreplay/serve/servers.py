"""Servers that the service has started: one that dies is started again, on the same ports."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Final

from voltana.hwreplay.engines.launch import CPU_START_S, GPU_START_S, restart
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.messages.log_lines import say
from voltana.hwreplay.replay.parts import Run
from voltana.profiles.common.errors import VoltanaError

LOG: Final = logging.getLogger("voltana.serve")
LOOK_S: Final = 0.5
PAUSE_S: Final = 5.0
"""Between two attempts: a server that dies at its start is no busy loop."""


async def keep_server(run: Run, server: Server) -> None:
    """Watch one server until cancelled. The router takes it out and back by its health check."""
    limit_s = GPU_START_S if run.config.gpus and run.config.emulate is None else CPU_START_S
    while True:
        while server.process.poll() is None:
            await asyncio.sleep(LOOK_S)
        code, name = server.process.returncode, server.plan.name
        say(LOG, logging.ERROR, "server died", name=name, code=code, log=str(server.log))
        await asyncio.sleep(PAUSE_S)
        try:
            # in a thread: it waits for the server's first answer, which takes minutes
            server = await asyncio.to_thread(restart, run.servers, server, start_s=limit_s)
        except asyncio.CancelledError:
            _newest(run, server).signal(signal.SIGKILL)  # which ends the thread's wait
            raise
        except VoltanaError as error:
            say(LOG, logging.ERROR, "server is not back", name=name, error=str(error))
            server = _newest(run, server)
        else:
            say(LOG, logging.WARNING, "server is back", name=name)


def _newest(run: Run, server: Server) -> Server:
    """The one that has taken a server's place."""
    return next(found for found in run.servers if found.plan == server.plan)
