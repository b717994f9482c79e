"""`voltana serve` as its own process, in front of stub servers of this one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import tomli_w

from tests.hwreplay.stub_worker import VOCAB_SIZE, StubFleet
from tests.profiles.device.standin import ROOT

START_S = 120.0


@dataclass(slots=True, kw_only=True)
class Served:
    """The process, its address and what it has logged so far."""

    process: asyncio.subprocess.Process
    file: Path
    url: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def until(self, is_true: Callable[[], bool], limit_s: float = START_S) -> None:
        async with asyncio.timeout(limit_s):
            while not is_true():
                assert self.process.returncode is None, self.lines
                await asyncio.sleep(0.02)

    async def reload(self, old: str, new: str) -> dict[str, Any]:
        """Change the file, send SIGHUP, and give the line that answers."""
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))
        before = len(self._answers())
        self.process.send_signal(signal.SIGHUP)
        await self.until(lambda: len(self._answers()) > before)
        return self._answers()[-1]

    def _answers(self) -> list[dict[str, Any]]:
        return [x for x in self.lines if x["part"] == "serve" and x["event"].startswith("reload")]

    async def end(self) -> int:
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), START_S)


def write_fleet(path: Path, fleet: StubFleet, metrics: str, **tables: Mapping[str, Any]) -> None:
    """A service's file for stub servers."""
    simulate = {"controller": "ecofreq", "router": "round-robin", "prefill_metrics": "after"}
    whole = {
        "simulate": simulate | dict(tables.get("simulate", {})),
        "fleet": fleet.table(metrics),
        "router": {"port": 0, "vocab_size": VOCAB_SIZE} | dict(tables.get("router", {})),
        "serve": dict(tables.get("serve", {})),
    }
    path.write_text(tomli_w.dumps(whole))


@asynccontextmanager
async def served(
    path: Path, environment: Mapping[str, str] = os.environ
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession]]:
    """Run `voltana serve` on a file until the block is left, and a client of it."""
    async with started(path, environment) as found:
        await found.until(lambda: bool(found.events("serving")))
        found.url = found.events("serving")[0]["url"]
        async with aiohttp.ClientSession() as client:
            yield found, client


@asynccontextmanager
async def started(path: Path, environment: Mapping[str, str] = os.environ) -> AsyncIterator[Served]:
    """The same from its start, before anything is up."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "voltana.experiments.cli", "serve", str(path)),
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    found = Served(process=process, file=path)
    reading = asyncio.create_task(_read(found))
    try:
        yield found
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), START_S)
        await reading


async def _read(found: Served) -> None:
    """Every line must be one of the log."""
    assert found.process.stderr is not None
    while line := await found.process.stderr.readline():
        found.lines.append(json.loads(line))
        assert {"time", "level", "part", "event"} <= found.lines[-1].keys()
