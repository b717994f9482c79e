"""What a fault campaign plays with: real actuator, watchdog, agents and router on emulated cards.

Every part is a process of its own, so that it can be killed; the servers are stubs, which speak
SGLang's HTTP and metrics. Requests come all the time, and each must come to an end that is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tomli_w

from voltana.hwreplay.agent.agent import AgentConfig, start_agents
from voltana.hwreplay.agent.agent import ready_file as ready_file_of
from voltana.hwreplay.agent.loop_record import StaleLimits
from voltana.hwreplay.emulated.card import Card
from voltana.hwreplay.replay.load import COUNT
from voltana.sim.config import make_config
from voltana.sim.policies.base import DECODE, PREFILL

ROOT = Path(__file__).parents[1]
PROFILE = "a100-80g-sxm/llama-3.1-8b"
SETTINGS = {
    "profile": PROFILE,
    "controller": "ecofreq",
    "router": "round-robin",
    "prefill_metrics": "after",  # stubs announce no batches
}
PAIRS = ("prefill-0", "decode-0", "prefill-1", "decode-1")
POLL_S = 0.005
START_S = 180.0
LOST_S = 30.0
"""A request that has no end after so long is lost."""
PERIOD_S = 0.1
"""Between two requests."""
STALE = StaleLimits(dead_s=0.5, router_s=2.0)
"""Stub servers send no heartbeat at rest: so soon an agent whose server rests unlocks."""


class NotInTimeError(Exception):
    """Something that must become true has not."""


async def until(is_so: Callable[[], bool], what: str, limit_s: float = START_S) -> float:
    """Wait; gives the seconds it took."""
    start_s = time.monotonic()
    while not is_so():
        if time.monotonic() - start_s > limit_s:
            raise NotInTimeError(f"{what} (waited {limit_s:g} s)")
        await asyncio.sleep(POLL_S)
    return time.monotonic() - start_s


@dataclass(slots=True)
class Traffic:
    """Sends requests to a router without end, and knows how each came out."""

    rng: np.random.Generator
    url: str = ""
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        """Requests without an end."""
        return self.outcomes["lost"]

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Send meanwhile; afterwards all have ended, or are lost."""
        tasks: set[asyncio.Task[None]] = set()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=LOST_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def send_all() -> None:
                while True:
                    tasks.add(asyncio.create_task(self._one(session)))
                    await asyncio.sleep(PERIOD_S)

            sender = asyncio.create_task(send_all())
            try:
                yield
            finally:
                sender.cancel()
                await asyncio.gather(*tasks)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        self.sent += 1
        num_tokens = int(self.rng.integers(2, 30))
        body = {
            "input_ids": [5] * int(self.rng.integers(4, 60)),
            "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True},
            "stream": True,
        }
        try:
            async with session.post(self.url + "/generate", json=body) as answer:
                data = await answer.read()
                self.outcomes[_outcome(answer.status, data, num_tokens)] += 1
        except TimeoutError:
            self.outcomes["lost"] += 1
        except (aiohttp.ClientError, OSError):
            self.outcomes["connection broke"] += 1


def _outcome(status: int, data: bytes, num_tokens: int) -> str:
    """In a word; a stream that simply stops, or is short, is lost: nobody said why."""
    if status != 200:
        return f"refused ({status})"
    if b'"error"' in data:
        return "failed, with the reason"
    counts = [int(count) for count in COUNT.findall(data)]
    is_whole = data.endswith(b"data: [DONE]\n\n") and counts[-1:] == [num_tokens]
    return "completed" if is_whole else "lost"


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """Instances on a card each; `kill` and `start` any part by its name."""

    is_silent_at_rest = True
    """Servers send no heartbeat: without requests their agents unlock."""

    def __init__(self, directory: Path, cards: Mapping[str, Card], seed: int) -> None:
        self.directory = directory
        self.cards = cards
        num_each = sum(name.startswith(PREFILL) for name in cards)
        self._settings = SETTINGS | {"num_prefill": num_each, "num_decode": num_each}
        self.traffic = Traffic(np.random.default_rng(seed))
        self._ports = {name: free_port() for name in self.cards}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._num_starts = 0
        (directory / "rooms").mkdir()

    @property
    def places(self) -> list[str]:
        """Names of the instances, e.g. decode-0."""
        return list(self.cards)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        """Everything up and every card locked by its agent; at the end all of it killed."""
        try:
            for name in self.places:
                await self.start(f"server {name}")
            await self.start("router")
            await self.start("actuator")
            await asyncio.gather(*(self.start(f"agent {name}") for name in self.places))
            yield self
        finally:
            for task in self._starting.values():
                task.cancel()
            for part in reversed(list(self._processes)):
                self.kill(part)

    def kill(self, part: str) -> float:
        """SIGKILL; gives when, on the monotonic clock."""
        process = self._processes.pop(part)
        at_s = time.monotonic()
        process.send_signal(signal.SIGKILL)
        process.wait()
        return at_s

    def restart(self, part: str) -> None:
        """Start it meanwhile; `up` waits for it."""
        self._starting[part] = asyncio.create_task(self.start(part))

    async def up(self, part: str | None = None) -> None:
        """Wait for what is being started again (all of it)."""
        for name in list(self._starting) if part is None else [part]:
            if name in self._starting:
                await self._starting.pop(name)

    def is_alive(self, part: str) -> bool:
        return self._processes[part].poll() is None

    async def start(self, part: str) -> None:
        """Start it, or start it again, and wait until it serves."""
        kind, _, name = part.partition(" ")
        self._num_starts += 1
        if kind == "agent":
            await self._start_agent(name)
        elif kind == "server":
            await self._start_server(name)
        elif kind == "router":
            await self._start_router()
        else:
            await self._start_actuator()

    def locked(self) -> list[str]:
        """Instances whose card has a lock, or will have one."""
        looks = {name: card.look() for name, card in self.cards.items()}
        return [name for name, look in looks.items() if look.wanted_mhz or look.locked_mhz]

    async def all_locked(self, names: list[str] | None = None) -> float:
        """Wait until the agents of these (all) have their clocks."""
        wanted = set(self.places if names is None else names)
        return await until(lambda: wanted <= set(self.locked()), f"the agents must lock {wanted}")

    async def counts(self) -> dict[str, float]:
        """The router's own, by outcome, and what is still on its way."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.traffic.url + "/metrics") as answer,
        ):
            lines = (await answer.text()).splitlines()
        found = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in found if "requests_total" in name}

    def _spawn(self, part: str, *module: str, log: Path) -> None:
        with log.open("wb") as out:
            self._processes[part] = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    async def _says(self, part: str, log: Path, word: str) -> str:
        def is_up() -> bool:
            if not self.is_alive(part):
                raise NotInTimeError(f"{part} ended: {log.read_text()[-300:]}")
            return word in log.read_text()

        await until(is_up, f"{part} must start")
        return log.read_text()

    async def _start_actuator(self) -> None:
        log = self.directory / f"actuator-{self._num_starts}.log"
        gpus = [word for card in self.cards.values() for word in ("--gpu", str(card.index))]
        self._spawn(
            *("actuator", "voltana.hwreplay.actuator", str(self.directory / "actuator"), *gpus),
            *("--allow-writable-code",),
            log=log,
        )
        await self._says("actuator", log, "listening on")

    async def _start_server(self, name: str) -> None:
        phase = name.partition("-")[0]
        counts = {PREFILL: 0, DECODE: 0} | {phase: 1}
        log = self.directory / f"server-{self._num_starts}.log"
        self._spawn(
            *(f"server {name}", "tests.hwreplay.stub_worker"),
            *("--prefill", str(counts[PREFILL]), "--decode", str(counts[DECODE])),
            *("--prefill-s", "0.01", "--decode-s", "0.005", "--port", str(self._ports[name])),
            *("--metrics", self._metrics(name), "--rooms", str(self.directory / "rooms")),
            log=log,
        )
        await self._says(f"server {name}", log, "http://")

    def _server_table(self, name: str) -> dict[str, Any]:
        """As the router's configuration names it."""
        return {"url": f"http://127.0.0.1:{self._ports[name]}", "metrics": self._metrics(name)}

    def _metrics(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}.metrics"

    async def _start_router(self) -> None:
        fleet: dict[str, list[dict[str, Any]]] = {PREFILL: [], DECODE: []}
        for name in sorted(self.places):
            fleet[name.partition("-")[0]].append(self._server_table(name))
        limits = {
            "port": 0, "events": self._ipc("events"), "reports": self._ipc("reports"),
            "health_period_s": 0.25, "start_ns": time.monotonic_ns(),
        }  # fmt: skip
        whole = {"simulate": make_config(self._settings).as_dict()}
        path = self.directory / "router.toml"
        path.write_text(tomli_w.dumps(whole | {"fleet": fleet, "router": limits}))
        log = self.directory / f"router-{self._num_starts}.log"
        self._spawn("router", "voltana.hwreplay.router", str(path), log=log)
        said = await self._says("router", log, "http://")
        self.traffic.url = next(line for line in said.splitlines() if line.startswith("http://"))

    def _ipc(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    async def _start_agent(self, name: str) -> None:
        phase, _, index = name.partition("-")
        config = AgentConfig(
            phase=PREFILL if phase == PREFILL else DECODE,
            instance_id=int(index),
            start_ns=time.monotonic_ns(),
            settings=make_config(self._settings).as_dict(),
            metrics_address=self._metrics(name),
            event_address=self._ipc("events"),
            report_address=self._ipc("reports"),
            actuator_socket=str(self.directory / "actuator"),
            gpus=(self.cards[name].index,),
            stale=STALE,
        )
        part = f"agent {name}"
        process = self._processes[part] = start_agents([config], self.directory)
        ready = ready_file_of(config, self.directory)

        def is_ready() -> bool:
            if process.poll() is not None:
                log = self.directory / f"{config.name}.log"
                raise NotInTimeError(f"{part} ended: {log.read_text()[-300:]}")
            return ready.exists()

        await until(is_ready, f"{part} must start")


@contextlib.contextmanager
def no_watchdog_left() -> Iterator[None]:
    """Afterwards no watchdog of this campaign may be alive: each ends with whom it guards."""
    yield
    deadline_s = time.monotonic() + 10.0
    while left := _watchdogs():
        if time.monotonic() > deadline_s:
            raise NotInTimeError(f"watchdogs outlived their actuators: {left}")
        time.sleep(0.1)


def _watchdogs() -> list[int]:
    """By our cards' file in their environment."""
    cards, found = os.environ["VOLTANA_EMULATED_CARDS"].encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_watchdog = b"voltana.profiles.device.watchdog" in (path / "cmdline").read_bytes()
            if is_watchdog and cards in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found
