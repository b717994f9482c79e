"""The service's process: starts its parts, keeps them up, drains and reloads.

SIGTERM, SIGINT  new requests are refused, open ones end, clocks are given back, servers end: 0
                 the same while parts start: what is up ends at once
SIGHUP           the file is read again: policy and promises change, or all stays as it was;
                 while parts start, once they are up
a part that dies is started again; a router that keeps dying ends the service: 1
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

import uvloop

from voltana.hwreplay.messages.log_lines import ENVIRONMENT, say, start_log
from voltana.hwreplay.replay.parts import Run, observes_fleet, write_router_file
from voltana.hwreplay.replay.replay import fleet
from voltana.hwreplay.router.config import LOOPBACK, open_listener
from voltana.hwreplay.serve.agents import AgentParts
from voltana.hwreplay.serve.config import ServeConfig, check_reload, read_serve_config
from voltana.hwreplay.serve.part import Deaths, Part
from voltana.hwreplay.serve.servers import keep_server
from voltana.hwreplay.serve.systemd import notify
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.common.folders import claim
from voltana.profiles.common.signals import handled, stops_as_interrupts

LOG: Final = logging.getLogger("voltana.serve")
MARGIN_S: Final = 5.0
"""What a router may take to end beyond its drain."""
OK: Final = 0
FAILED: Final = 1
STOPPED: Final = "stopped while starting"
STARTING: Final = "it starts: not every agent is up"


def serve(path: Path, directory: Path | None = None) -> int:
    """Serve until a signal ends it; returns the exit code.

    Args:
        path: The service's file.
        directory: Takes the servers' logs and the parts' files; None: a temporary one.

    Raises:
        VoltanaError: The configuration is wrong. What fails later is logged, and the code is 1.
    """
    hups: list[int] = []
    with (
        handled([signal.SIGHUP], lambda number, frame: hups.append(number)),
        stops_as_interrupts(),
        tempfile.TemporaryDirectory(prefix="voltana-serve-") as temporary,
    ):
        try:
            config = read_serve_config(path)
            if directory is not None:
                claim(directory, "service")
            observes_fleet(config.fleet)  # a policy that cannot be made is a wrong file too
            os.environ[ENVIRONMENT] = config.log_level
            start_log("serve")
            code = _serve(path, config, directory or Path(temporary), hups)
        except KeyboardInterrupt:  # before the loop could handle the signal: nothing served yet
            say(LOG, logging.INFO, STOPPED)
            return OK
    say(LOG, logging.INFO, "ended", code=code)
    return code


def _serve(path: Path, config: ServeConfig, folder: Path, hups: Sequence[int]) -> int:
    """Start the servers, serve, end the servers; what fails is logged."""
    try:
        with fleet(config.fleet, folder, _progress) as run:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                code = runner.run(Service(run, config, path, hups).run())
            say(LOG, logging.INFO, "ending the servers", servers=len(run.servers))
    except VoltanaError as error:
        say(LOG, logging.ERROR, "failed", error=str(error))
        return FAILED
    return code


def _progress(stage: str, _: int) -> None:
    say(LOG, logging.INFO, stage)


class Service:
    """Router, agents and servers of one run, while it serves."""

    def __init__(self, run: Run, config: ServeConfig, path: Path, hups: Sequence[int]) -> None:
        """The servers run already; `run` starts the rest.

        Args:
            run: What the parts share.
            config: As read from the file.
            path: The file, for a reload.
            hups: SIGHUPs that have come before the loop could take them.
        """
        self._run = run
        self._config = config
        self._path = path
        self._profile = load_profile(config.fleet.sim.profile)
        self._stop, self._hup = asyncio.Event(), asyncio.Event()
        self._is_whole = False
        """Every part has come up."""
        self._router: Part | None = None
        self._listener: socket.socket | None = None
        """The router's: who connects while a new one starts waits, and is not refused."""
        self._hups = hups
        self._state_file = run.directory / "service.state"
        self._agents = AgentParts(run, config, self._tell_state)

    async def run(self) -> int:
        """Serve to the end; returns the exit code.

        Raises:
            VoltanaError: A part does not come up, or the router does not stay up.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hup)
        if self._hups:
            self._on_hup()
        self._tell_state()
        async with AsyncExitStack() as stack:
            host = str(self._config.fleet.router_limits.get("host", LOOPBACK))
            self._listener = stack.enter_context(open_listener(host, self._config.port))
            stack.push_async_callback(self._agents.end)
            keep = await self._unless_stopped(self._start(stack))
            if keep is None:
                notify("STOPPING=1")
                say(LOG, logging.INFO, STOPPED)
                return OK
            for server in self._run.servers:
                task = asyncio.create_task(keep_server(self._run, server))
                stack.callback(task.cancel)
            self._is_whole = True
            self._tell_state()
            notify("READY=1")
            say(LOG, logging.INFO, "serving", url=self._url, agents=len(self._run.workers))
            await self._serve(keep)
            notify("STOPPING=1")
        return OK

    async def _start(self, stack: AsyncExitStack) -> asyncio.Task[None]:
        """Start router and agents; returns what keeps the router up."""
        router = await self._start_router()
        stack.push_async_callback(self._end_router)
        keep = asyncio.create_task(self._keep_router(router))
        stack.callback(keep.cancel)
        await self._agents.start()
        return keep

    async def _unless_stopped(
        self, start: Coroutine[Any, Any, asyncio.Task[None]]
    ) -> asyncio.Task[None] | None:
        """What a start gives, or None: somebody asked for the end first, and it was cut short."""
        starting = asyncio.create_task(start)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            starting.cancel()
            await asyncio.wait({starting})
            return None
        stopped.cancel()
        return starting.result()

    def _tell_state(self) -> None:
        """Write down what the router's health check is to say."""
        reasons = [f"{name} is down: {error}" for name, error in self._agents.down.items()]
        if not self._is_whole:
            reasons.append(STARTING)
        lines = (" ".join(reason.split()) + "\n" for reason in reasons)
        try:
            write_text("".join(lines), self._state_file)
        except OSError as error:  # who keeps parts up goes on
            say(LOG, logging.ERROR, "the health check tells what was before", error=str(error))

    def _on_hup(self) -> None:
        if not self._is_whole:
            say(LOG, logging.INFO, "a reload waits until every part is up")
        self._hup.set()

    def _on_stop(self) -> None:
        """The first one drains, a second one cuts that short."""
        if self._stop.is_set() and self._router is not None:
            with suppress(ProcessLookupError):
                self._router.process.terminate()
        self._stop.set()

    async def _serve(self, keep: asyncio.Task[None]) -> None:
        """Reload as asked, until told to stop or the router is given up."""
        while not self._stop.is_set():
            waits = [asyncio.create_task(e.wait()) for e in (self._stop, self._hup)]
            await asyncio.wait({keep, *waits}, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if keep.done():
                keep.result()
            if self._hup.is_set() and not self._stop.is_set():
                self._hup.clear()
                await self._reload()

    async def _start_router(self) -> Part:
        path = self._write_router_file()
        command = [sys.executable, "-P", "-m", "voltana.hwreplay.router", str(path)]
        if self._config.token_file is not None:
            command.append(str(self._config.token_file))
        assert self._listener is not None
        fds = (self._listener.fileno(),)
        part = await Part.start("router", command, os.environ, self._config.log_level, fds)
        self._router = part
        try:
            self._url = await part.first_line()
        except BaseException:
            await part.end()
            raise
        return part

    def _write_router_file(self) -> Path:
        assert self._listener is not None
        return write_router_file(
            self._run,
            port=self._listener.getsockname()[1],
            listen_fd=self._listener.fileno(),
            drain_s=self._config.drain_s,
            access_log=self._config.has_access_log,
            state_file=str(self._state_file),
        )

    async def _keep_router(self, part: Part) -> None:
        """Start it again when it dies.

        Raises:
            VoltanaError: It keeps dying.
        """
        died = Deaths()
        while True:
            error = await part.ended()
            say(LOG, logging.ERROR, "part died", name=part.name, error=str(error))
            if (wait_s := died.add()) is None:
                raise error
            await asyncio.sleep(wait_s)
            try:
                part = await self._start_router()
            except VoltanaError:  # it died while it started, which counts as well
                assert self._router is not None
                part = self._router
                continue
            say(LOG, logging.WARNING, "part is back", name=part.name)

    async def _end_router(self) -> None:
        """Let it drain. The agents hold their clocks until the last request has ended."""
        if self._router is not None:
            await self._router.end(self._config.drain_s + MARGIN_S)
        if self._listener is not None:
            self._listener.close()  # nobody will take those who wait

    async def _reload(self) -> None:
        """Take over the file's policy and promises, or say why not and leave all as it is."""
        try:
            new = read_serve_config(self._path)
            check_reload(self._config, new, str(self._path))
            config = dataclasses.replace(self._run.config, sim=new.fleet.sim)
            has_fleet_view = observes_fleet(config, self._profile)
        except VoltanaError as error:
            say(LOG, logging.ERROR, "reload refused, all stays as it was", error=str(error))
            return
        notify("RELOADING=1")
        self._config = new
        self._run.config, self._run.has_fleet_view = config, has_fleet_view
        assert self._router is not None
        self._write_router_file()
        with suppress(ProcessLookupError):  # it has just died: it starts with the new file
            self._router.process.send_signal(signal.SIGHUP)
        await self._agents.reload()
        notify("READY=1")
        sim = new.fleet.sim
        policy = {"prefill": sim.prefill_controller_spec, "decode": sim.decode_controller_spec}
        promises = {"slo_ttft_s": sim.slo_ttft_s, "slo_itl_s": sim.slo_itl_s}
        say(LOG, logging.INFO, "reloaded", router=sim.router, **policy, **promises)
