"""A router before the real engine, and what the tests with faults ask of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tomli_w
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.hwreplay.conftest import EngineFleet
from tests.hwreplay.engines.test_engine_pair import (
    OUTPUT_TOKENS,
    PROMPT,
    through,
)
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.replay.load import LoadConfig, LoadGenerator, LoadReport
from voltana.sim.workload.workload import Workload

VOCAB_SIZE = 512
BACK_S = 300.0
"""The tests' machine may be busy: a server needs 20 to 100 s to start."""
STALL_S = 1.5
LONG_S = 3.0
"""A silence that no busy machine makes; where staleness begins, test_control.py says."""


class Gate:
    """The router's process in front of the fleet."""

    def __init__(self, url: str, process: subprocess.Popen[str], fleet: EngineFleet) -> None:
        self.url = url
        self.process = process
        self.fleet = fleet

    async def counts(self) -> dict[str, int]:
        """The router's count by outcome."""
        return {
            labels["outcome"]: int(value)
            for name, labels, value in await self._samples()
            if name == "voltana_requests_total"
        }

    async def health(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as client, client.get(self.url + "/health") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def settled(self, sent: int) -> dict[str, int]:
        """The counts once every request has ended; nothing is in flight then."""
        async with asyncio.timeout(120):
            while sum((await self.counts()).values()) < sent:
                await asyncio.sleep(0.1)
        in_flight = {n: v for n, _, v in await self._samples() if n in IN_FLIGHT}
        assert in_flight == dict.fromkeys(IN_FLIGHT, 0.0)
        assert self.process.poll() is None
        return await self.counts()

    async def suspects(self) -> set[str]:
        """Servers that get new requests last."""
        return {
            f"{labels['phase']}-{labels['instance']}"
            for name, labels, value in await self._samples()
            if name == "voltana_suspect" and value
        }

    async def until_healthy(self) -> None:
        async with asyncio.timeout(BACK_S):
            while (await self.health())["out"]:
                await asyncio.sleep(0.2)

    async def play(self, workload: Workload, path: Path) -> LoadReport:
        config = LoadConfig(url=self.url, drain_s=240.0)
        return await LoadGenerator(workload, config, RunClock(), path).run()

    async def _samples(self) -> list[tuple[str, dict[str, str], float]]:
        async with aiohttp.ClientSession() as client, client.get(self.url + "/metrics") as answer:
            text = await answer.text()
        return [
            (s.name, s.labels, s.value)
            for family in text_string_to_metric_families(text)
            for s in family.samples
        ]


IN_FLIGHT = ("voltana_in_flight", "voltana_queued")


@contextmanager
def gate(fleet: EngineFleet, directory: Path, **limits: Any) -> Iterator[Gate]:  # noqa: ANN401
    tables: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    for server in fleet.servers:
        table: dict[str, Any] = {"url": server.plan.url, "metrics": server.plan.metrics}
        if server.plan.bootstrap_port is not None:
            table["bootstrap_port"] = server.plan.bootstrap_port
        tables[server.plan.phase].append(table)
    whole = {
        "simulate": {
            "router": "round-robin", "kv_capacity_tokens": 8192, "max_running_requests": 16
        },
        "fleet": tables,
        "router": {"port": 0, "health_timeout_s": 20.0} | limits,  # the servers tell the vocabulary
    }  # fmt: skip
    path = directory / "router.toml"
    path.write_text(tomli_w.dumps(whole))
    with (directory / "router.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "voltana.hwreplay.router", str(path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, (directory / "router.log").read_text()
        yield Gate(url, process, fleet)
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def body(input_tokens: int, output_tokens: int, **more: object) -> dict[str, Any]:
    ids = [3 + i % (VOCAB_SIZE - 3) for i in range(input_tokens)]
    params = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": params, "stream": True} | more


def steady(count: int, rate_per_s: float, input_tokens: int, output_tokens: int) -> Workload:
    """Equal requests at equal distances, from half a second on."""
    return Workload(
        arrival_s=0.5 + np.arange(count) / rate_per_s,
        input_tokens=np.full(count, input_tokens),
        output_tokens=np.full(count, output_tokens),
    )


def clocks_of(directory: Path, name: str) -> list[int]:
    """What an agent in a dry run has asked for."""
    lines = (directory / f"agent-{name}.decisions.jsonl").read_text().splitlines()
    return [json.loads(line)["clock_mhz"] for line in lines]


def still_serves(fleet: EngineFleet) -> bool:
    """Both pairs agree on the tokens of a prompt."""
    found = [through(fleet.prefill, decode, PROMPT) for decode in fleet.decode]
    return found[0] == found[1] and len(found[0][1]) == OUTPUT_TOKENS
