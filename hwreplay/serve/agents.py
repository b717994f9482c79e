"""The agents of a service: started, kept up, told of a new policy, ended."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from voltana.hwreplay.agent.agent import AgentConfig, agents_environment, ready_file, write_agents
from voltana.hwreplay.agent.process import RELOAD
from voltana.hwreplay.messages.log_lines import say
from voltana.hwreplay.replay.parts import Run, agent_groups
from voltana.hwreplay.serve.config import ServeConfig
from voltana.hwreplay.serve.part import BACKOFF_S, Deaths, Part
from voltana.profiles.common.errors import VoltanaError

LOG: Final = logging.getLogger("voltana.serve")
START_S: Final = 60.0
NICE: Final = 5
"""Beyond the service's own. Where cores are short, requests come first: each event wakes an agent,
and the router waited."""
DOWN: Final = 3
"""An agent that has died so often within a minute is not expected back."""
UNLOCKED: Final = "an agent died, its clock is unlocked"


class AgentParts:
    """One process an instance, or one for all under a policy that looks at the whole fleet."""

    def __init__(self, run: Run, config: ServeConfig, changed: Callable[[], None]) -> None:
        """Nothing is started yet.

        Args:
            run: Whose agents; its configuration may change before `reload`.
            config: Guard, energy and log of each.
            changed: Called when `down` has changed.
        """
        self.down: dict[str, str] = {}
        """Agents that are not up and have died too often to expect it, and what they said last."""
        self._changed = changed
        self._run = run
        self._own: dict[str, Any] = {"guard": config.guard, "dcgm": config.dcgm}
        self._log_level = config.log_level
        self._groups: list[list[AgentConfig]] = []
        self._parts: list[Part | None] = []
        """What runs each group; None while it is being started."""
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all and wait until each is ready.

        Cancelled, it ends those that are up or on their way.

        Raises:
            VoltanaError: One has ended instead.
        """
        self._groups = self._make_groups()
        self._parts = [None] * len(self._groups)
        loop = asyncio.get_running_loop()
        first: list[asyncio.Future[None]] = [loop.create_future() for _ in self._groups]
        self._tasks = [asyncio.create_task(self._keep(i, ready)) for i, ready in enumerate(first)]
        try:
            await asyncio.gather(*first)
        except asyncio.CancelledError:
            await self.end()
            raise

    async def reload(self) -> None:
        """Tell all of the run's new policy; who does not take it is logged."""
        groups = self._make_groups()
        if len(groups) != len(self._groups):  # the whole fleet in one process, or no more so
            await self.end()
            self.down.clear()
            self._changed()
            with suppress(VoltanaError):  # logged by its task, which goes on trying
                await self.start()
            return
        self._groups = groups
        await asyncio.gather(*(self._tell(index) for index in range(len(groups))))

    async def end(self) -> None:
        """End all; their clocks are given back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_groups(self) -> list[list[AgentConfig]]:
        return [
            [dataclasses.replace(config, keeps_files=False, **self._own) for config in group]
            for group in agent_groups(self._run)
        ]

    async def _tell(self, index: int) -> None:
        group, part = self._groups[index], self._parts[index]
        if part is None:
            return  # it starts with the new policy
        write_agents(group, self._run.directory)
        try:
            with suppress(ProcessLookupError):
                part.process.send_signal(RELOAD)
            await part.await_file(ready_file(group[-1], self._run.directory), START_S)
        except VoltanaError as error:
            say(LOG, logging.ERROR, "an agent keeps its policy", name=part.name, error=str(error))

    async def _keep(self, index: int, first: asyncio.Future[None]) -> None:
        """One process, started again when it dies; ends with this task."""
        died = Deaths()
        try:
            while True:
                name = self._groups[index][0].name
                try:
                    self._parts[index] = part = await self._start(self._groups[index])
                    if not first.done():
                        first.set_result(None)
                    else:
                        say(LOG, logging.WARNING, "part is back", name=name)
                        if self.down.pop(name, None) is not None:
                            self._changed()
                    raise await part.ended()
                except (VoltanaError, OSError) as error:  # no room for its file, no process left
                    self._parts[index] = None
                    failure = str(error)
                    say(LOG, logging.ERROR, UNLOCKED, name=name, error=failure)
                    if not first.done():
                        first.set_exception(VoltanaError(failure))
                wait_s = died.add() or BACKOFF_S[-1]
                if len(died) >= DOWN:
                    self.down[name] = failure
                    self._changed()
                await asyncio.sleep(wait_s)
        finally:
            if (part_now := self._parts[index]) is not None:
                await part_now.end()

    async def _start(self, group: list[AgentConfig]) -> Part:
        directory, name = self._run.directory, group[0].name
        command = write_agents(group, directory)
        part = await Part.start(name, command, agents_environment(), self._log_level)
        give_way(part.process.pid)
        try:
            await part.await_file(ready_file(group[-1], directory), START_S)
        except BaseException:
            await part.end()
            raise
        return part


def give_way(pid: int) -> None:
    """Let all else that has this process's niceness go first."""
    with suppress(ProcessLookupError):  # gone already, which its owner notices
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
