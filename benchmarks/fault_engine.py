"""The fault bench with one pair of real SGLang servers over emulated cards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.fault_bench import PROFILE, Bench
from voltana.hwreplay.emulated.card import Card, Cards
from voltana.hwreplay.emulated.fleet import emulated_arguments
from voltana.hwreplay.emulated.machine import Machine
from voltana.hwreplay.engines.launch import PAIR, restart, run_fleet
from voltana.hwreplay.engines.plan import Installation
from voltana.hwreplay.engines.server import Server
from voltana.sim.config import make_config

START_S = 600.0
"""Longest start of a server, on a machine that is busy."""
SEED = 11


class EngineBench(Bench):
    """Servers that are up already; a killed one is started again on its ports."""

    is_silent_at_rest = False

    def __init__(self, directory: Path, cards: Mapping[str, Card], servers: list[Server]) -> None:
        super().__init__(directory, cards, SEED)
        self._servers = servers

    def _server(self, name: str) -> Server:
        return next(s for s in self._servers if s.plan.name == name)

    async def _start_server(self, name: str) -> None:
        server = self._server(name)
        if server.process.poll() is not None:
            server = await asyncio.to_thread(restart, self._servers, server, start_s=START_S)
        self._processes[f"server {name}"] = server.process

    def _server_table(self, name: str) -> dict[str, Any]:
        server = self._server(name)
        table: dict[str, Any] = {"url": server.plan.url, "metrics": server.plan.metrics}
        if server.plan.bootstrap_port is not None:
            table["bootstrap_port"] = server.plan.bootstrap_port
        return table

    def _metrics(self, name: str) -> str:
        address = self._server(name).plan.metrics
        assert address is not None
        return address


@contextmanager
def engine_bench(directory: Path, engine: Path, cards: Cards) -> Iterator[EngineBench]:
    """Start 1P1D; the cards are shown to this process already."""
    sim = make_config({"profile": PROFILE, "num_prefill": 1, "num_decode": 1})
    machine = Machine(profile=PROFILE, counts=PAIR, directory=directory, library=directory)
    started = Installation.in_folder(engine)
    started = replace(
        started,
        arguments=(*emulated_arguments(sim, PROFILE), *started.arguments),
        environment_of=machine.environment_of,
    )
    with run_fleet(started, directory, sockets=directory, start_s=START_S) as servers:
        names = (server.plan.name for server in servers)
        yield EngineBench(directory, dict(zip(names, cards, strict=False)), servers)
