"""`voltana serve` under load, held for minutes: `python -m benchmarks.service_load [--kills]`.

Without --kills: so many streams at once, each replaced when it ends; every stream must be whole,
and the memory of each process flat. With --kills: requests all the time while actuator, agents,
router and servers are killed (SIGKILL) at random moments; every request must end in a way that its
client was told, no token may come twice, clocks must come back, and memory must be flat in what was
not killed. Real: the service and all its parts, the actuator, its watchdog. Emulated: the cards.
Stubs: the servers' computation. The exit status is the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tomli_w

from benchmarks.fault_bench import (
    PAIRS,
    PROFILE,
    SETTINGS,
    Bench,
    NotInTimeError,
    free_port,
    no_watchdog_left,
    until,
)
from tests.hwreplay.stub_worker import VOCAB_SIZE
from voltana.hwreplay.emulated.build import build_library, show_here
from voltana.hwreplay.emulated.card import Card
from voltana.hwreplay.emulated.state import create_cards, open_cards
from voltana.hwreplay.replay.load import COUNT
from voltana.profiles.common.signals import stops_as_interrupts

SEED = 11
WARM_S = 60.0
"""Memory of a process counts from this age on: caches and pools fill first."""
LOOK_S = 2.0
FLAT = 0.05
UNLOCK_S = 20.0
ROUTER_GAP_S = 13.0
"""Between two deaths of the router: a service whose router dies six times a minute gives up."""
LOST_S = 60.0


@dataclass(slots=True)
class Memory:
    """Resident memory of processes over time, in MiB."""

    since_s: dict[str, float] = field(default_factory=dict)
    seen: dict[str, list[float]] = field(default_factory=dict)

    def look(self, processes: dict[str, int]) -> None:
        """Read each once that is old enough: one that took another's place warms up as it did."""
        now_s = time.monotonic()
        for part, pid in processes.items():
            name = f"{part} ({pid})"
            if now_s - self.since_s.setdefault(name, now_s) < WARM_S:
                continue
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
                self.seen.setdefault(name, []).append(mib)

    def rows(self) -> dict[str, dict[str, float]]:
        """By process: how much, and how far it went from its middle in all that time."""
        found = {}
        for name, mib in self.seen.items():
            if len(mib) * LOOK_S < WARM_S:
                continue  # was killed, or is young
            middle = (min(mib) + max(mib)) / 2
            spread = (max(mib) - min(mib)) / 2 / middle
            found[name] = {"first_mib": mib[0], "last_mib": mib[-1], "spread": spread}
        return found


class ServiceBench(Bench):
    """Servers, actuator and one service on emulated cards; its router and agents are its own."""

    def __init__(self, directory: Path, cards: dict[str, Card], itl_s: float) -> None:
        super().__init__(directory, cards, SEED)
        self.itl_s = itl_s
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        """All of it up; at the end the service ends by itself, with 0, and clocks are free."""
        try:
            for name in self.places:
                await self.start(f"server {name}")
            await self.start("actuator")
            await self.start("router")
            yield self
            service = self._processes.pop("router")
            service.terminate()
            if await asyncio.to_thread(service.wait, 120.0):
                raise NotInTimeError(f"the service must end with 0, got {service.returncode}")
            await until(lambda: not self.locked(), "no clock may stay locked", UNLOCK_S)
        finally:
            for part in reversed(list(self._processes)):
                self.kill(part)

    async def _start_router(self) -> None:
        """The whole service."""
        fleet: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
        gpus: dict[str, list[list[int]]] = {"prefill": [], "decode": []}
        for name in sorted(self.places):
            phase = name.partition("-")[0]
            fleet[phase].append(self._server_table(name))
            gpus[phase].append([self.cards[name].index])
        whole = {
            # within reach of the stubs: here no guard shall give clocks back
            "simulate": SETTINGS | {"slo_itl_s": 3 * self.itl_s, "slo_ttft_s": 5.0},
            "fleet": fleet,
            "router": {"port": self.port, "vocab_size": VOCAB_SIZE, "health_period_s": 0.25,
                       "access_log": False},
            "serve": {"actuator": str(self.directory / "actuator"), "gpus": gpus,
                      "guard_floor": 0.5},
        }  # fmt: skip
        path, log = self.directory / "fleet.toml", self.directory / "service.log"
        path.write_text(tomli_w.dumps(whole))
        self._spawn("router", "voltana.experiments.cli", "serve", str(path), log=log)
        await self._says("router", log, '"event":"serving"')

    async def _start_server(self, name: str) -> None:
        phase = name.partition("-")[0]
        counts = {"prefill": 0, "decode": 0} | {phase: 1}
        log = self.directory / f"server-{self._num_starts}.log"
        self._spawn(
            *(f"server {name}", "tests.hwreplay.stub_worker"),
            *("--prefill", str(counts["prefill"]), "--decode", str(counts["decode"])),
            *("--prefill-s", "0.01", "--decode-s", str(self.itl_s)),
            *("--port", str(self._ports[name]), "--metrics", self._metrics(name)),
            *("--rooms", str(self.directory / "rooms")),
            log=log,
        )
        await self._says(f"server {name}", log, "http://")

    @property
    def service_pid(self) -> int:
        return self._processes["router"].pid

    def children(self) -> dict[str, int]:
        """The service's parts by name: router, prefill-0 and so on."""
        task = f"/proc/{self.service_pid}/task/{self.service_pid}/children"
        found = {}
        for pid in map(int, Path(task).read_text().split()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if "voltana.hwreplay.router" in words:
                    found["router"] = pid
                elif "voltana.hwreplay.agent.process" in words:
                    found[Path(words[-2]).stem.removeprefix("agent-")] = pid
        return found

    def processes(self) -> dict[str, int]:
        """What memory is looked at."""
        actuator = self._processes.get("actuator")
        found = {"service": self.service_pid} | self.children()
        return found if actuator is None else found | {"actuator": actuator.pid}


@dataclass(slots=True)
class Streams:
    """Requests to a service, and how each came out."""

    url: str
    rng: np.random.Generator
    open: int = 0
    most_open: int = 0
    sent: int = 0
    pieces: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    async def one(self, session: aiohttp.ClientSession, num_tokens: int) -> None:
        """Send one and read it to its end."""
        body = {
            "input_ids": [5] * int(self.rng.integers(4, 60)),
            "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True},
            "stream": True,
        }
        self.sent += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            self.outcomes[await self._read(session, body, num_tokens)] += 1
        except TimeoutError:
            self.outcomes["lost"] += 1
        except aiohttp.ClientConnectorError:
            self.outcomes["refused (no connection)"] += 1
        except (aiohttp.ClientError, OSError):
            self.outcomes["connection broke"] += 1
        finally:
            self.open -= 1

    async def _read(
        self, session: aiohttp.ClientSession, body: dict[str, Any], num_tokens: int
    ) -> str:
        due, buffer, has_error, is_done = 1, b"", False, False
        async with session.post(self.url + "/generate", json=body) as answer:
            if answer.status != 200:
                return f"refused ({answer.status})"
            async for data in answer.content.iter_any():
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    self.pieces += 1
                    has_error |= b'"error"' in event
                    is_done |= event == b"data: [DONE]"
                    if found := COUNT.search(event):
                        if int(found[1]) != due:
                            return "wrong: a token twice or missing"
                        due += 1
        if has_error:
            return "failed, with the reason"
        return "completed" if is_done and due == num_tokens + 1 else "lost"


def is_well(streams: Streams) -> bool:
    """Every request has come to an end that its client was told, no token twice."""
    outcomes = streams.outcomes
    wrong = outcomes["lost"] + sum(n for name, n in outcomes.items() if name.startswith("wrong"))
    return not wrong and sum(outcomes.values()) == streams.sent


async def hold(bench: ServiceBench, streams: Streams, arguments: argparse.Namespace) -> Memory:
    """So many streams at once until time is up; those that are open then end by themselves."""
    memory, end_s = Memory(), time.monotonic() + 60.0 * arguments.minutes
    mean_tokens = arguments.stream_s / arguments.itl_s

    async def slot(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(number * 20.0 / arguments.streams)  # they come over 20 s
        while time.monotonic() < end_s:
            length = max(2, int(mean_tokens * streams.rng.uniform(0.5, 1.5)))
            await streams.one(session, length)

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=LOST_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        slots = [asyncio.create_task(slot(session, i)) for i in range(arguments.streams)]
        while any(not task.done() for task in slots):
            await asyncio.sleep(LOOK_S)
            if time.monotonic() < end_s:
                memory.look(bench.processes())
        await asyncio.gather(*slots)
    return memory


@dataclass(slots=True)
class Kills:
    """What was killed, and how long clocks took to come back."""

    counts: Counter[str] = field(default_factory=Counter)
    unlock_s: list[float] = field(default_factory=list)
    router_s: float = 0.0


async def kill_one(bench: ServiceBench, kills: Kills, rng: np.random.Generator) -> None:
    """One part at random; who is ours to start again is."""
    kinds = ["actuator", "agent", "server", "router"]
    if time.monotonic() - kills.router_s < ROUTER_GAP_S:
        kinds.remove("router")
    kind = str(rng.choice(kinds))
    name = str(rng.choice(bench.places))
    children = bench.children()
    if kind in ("agent", "router"):
        pid = children.get(name if kind == "agent" else kind)
        if pid is None:
            return  # it is being started again
        os.kill(pid, signal.SIGKILL)
        at_s = time.monotonic()
        if kind == "agent":
            await until(lambda: name not in bench.locked(), f"{name} must be unlocked", UNLOCK_S)
            kills.unlock_s.append(time.monotonic() - at_s)
        else:
            kills.router_s = at_s
    elif kind == "server":
        at_s = bench.kill(f"server {name}")
        await until(lambda: name not in bench.locked(), f"{name} must be unlocked", UNLOCK_S)
        kills.unlock_s.append(time.monotonic() - at_s)
        await bench.start(f"server {name}")
    else:
        at_s = bench.kill("actuator")
        await until(lambda: not bench.locked(), "all must be unlocked", UNLOCK_S)
        kills.unlock_s.append(time.monotonic() - at_s)
        await restart_actuator(bench)
    kills.counts[kind] += 1


async def restart_actuator(bench: ServiceBench) -> None:
    """As systemd does: again and again, should a machine be too busy for its watchdog's start."""
    for _ in range(5):
        with contextlib.suppress(NotInTimeError):
            return await bench.start("actuator")
    raise NotInTimeError("the actuator must start")


async def kill_all_the_time(
    bench: ServiceBench, streams: Streams, kills: Kills, arguments: argparse.Namespace
) -> Memory:
    """Requests at a rate, a kill every few seconds, until time is up; then all must serve again."""
    memory, end_s = Memory(), time.monotonic() + 60.0 * arguments.minutes
    rng = np.random.default_rng(SEED)
    tasks: set[asyncio.Task[None]] = set()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=LOST_S)

    async def send(session: aiohttp.ClientSession) -> None:
        while True:
            length = int(streams.rng.integers(2, 40))
            tasks.add(task := asyncio.create_task(streams.one(session, length)))
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(streams.rng.exponential(1 / arguments.rate))

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            memory.look(bench.processes())

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        others = [asyncio.create_task(send(session)), asyncio.create_task(look())]
        try:
            await bench.all_locked()
            while time.monotonic() < end_s:
                await asyncio.sleep(rng.uniform(0.5, 3.0))
                await kill_one(bench, kills, rng)
                if not bench.is_alive("router"):
                    raise NotInTimeError("the service must outlive its parts")
            await bench.all_locked()
            before = streams.outcomes["completed"]
            await until(lambda: streams.outcomes["completed"] > before + 20, "all must serve again")
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*tasks, *others, return_exceptions=True)
    return memory


async def run(directory: Path, arguments: argparse.Namespace) -> bool:
    """Play, and print what was found as one JSON object."""
    with open_cards(directory / "cards", directory) as cards:
        bench = ServiceBench(directory, dict(zip(PAIRS, cards, strict=True)), arguments.itl_s)
        streams, kills = Streams(bench.url, np.random.default_rng(SEED)), Kills()
        start_s = time.monotonic()
        async with bench.running():
            if arguments.kills:
                memory = await kill_all_the_time(bench, streams, kills, arguments)
            else:
                memory = await hold(bench, streams, arguments)
    rows = memory.rows()
    flat = bool(rows) and all(row["spread"] <= FLAT for row in rows.values())
    found: dict[str, Any] = {
        "minutes": round((time.monotonic() - start_s) / 60, 2), "cores": os.cpu_count(),
        "requests": streams.sent, "outcomes": streams.outcomes, "pieces": streams.pieces,
        "most_open": streams.most_open, "memory": rows, "is_flat": flat,
        "is_accounted": is_well(streams),
    }  # fmt: skip
    if arguments.kills:
        took_ms = np.quantile(kills.unlock_s, (0.5, 1.0)) * 1e3
        found |= {
            "kills": kills.counts,
            "unlock_ms": dict(zip(("p50", "max"), took_ms, strict=True)),
        }
    print(json.dumps(found, indent=1, default=float))
    return flat and is_well(streams)


def main() -> int:
    """Run it; 1 if a request was lost or memory was not flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=500, help="at once, without --kills")
    parser.add_argument("--stream-s", type=float, default=60.0, help="how long one takes, mean")
    parser.add_argument("--itl-s", type=float, default=0.2, help="between two tokens of a stream")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--rate", type=float, default=10.0, help="requests/s, with --kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        directory = Path(scratch)
        build_library(directory)
        show_here(directory, create_cards(directory / "cards", PROFILE, len(PAIRS), directory))
        with no_watchdog_left(), stops_as_interrupts():
            return 0 if asyncio.run(run(directory, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
