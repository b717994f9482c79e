"""What the router adds: time outside the servers through it, minus the same when asked directly.

Stub servers, router and client are three processes on one machine; the same arrivals are sent
directly and through the router in turns, so that a drift of the machine hits both. Run alone:

    python -m benchmarks.router_overhead --rate 200 --seconds 15 --output-tokens 8

Direct means what the router does, done by the client: the same body to a prefill and a decode
server, the stream read from decode. Servers and client cost as little as they can: what they use of
a small machine's cores is missing elsewhere. The servers stamp each piece with when the later of
both was asked and when they wrote it, so that each request's way there and back is known without
what the servers took, whose batches differ from run to run. Requests are paired by their arrival.

The router has the feeds of a replay: it follows each server's metrics, tells an agent an instance
of every step, and takes their reports. With --service it is `voltana serve`, whose agents are real
and whose access log is written.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tomli_w
import uvloop
import zmq

from tests.hwreplay.stub_worker import VOCAB_SIZE
from voltana.hwreplay.messages.agent_reports import AgentReport, ReportSender
from voltana.hwreplay.messages.events import topic_of
from voltana.hwreplay.router.servers.upstream import Upstream
from voltana.sim.policies.base import Phase

ROOT = Path(__file__).parents[1]
GOAL_MS = 2.0
QUANTILES = (0.5, 0.9, 0.99)
PARTS = ("router", "servers", "client", "service and agents")
CONNECT_S = 5.0
TICK_S = 0.05
"""How often an agent reports."""
STAMPS = re.compile(rb'"asked_ns":(\d+),"written_ns":(\d+)')


class Answer(NamedTuple):
    """One request's stream as it came."""

    sent_ns: int
    pieces: list[tuple[int, bytes]]


class Deployment(NamedTuple):
    """What is measured."""

    fleet: dict[str, list[dict[str, str]]]
    url: str
    router_pid: int
    stub_pid: int
    other_pids: tuple[int, ...] = ()
    """The service itself and its agents; without --service the client plays the agents."""

    def used_s(self) -> tuple[float, float, float, float]:
        """Processor time of router, servers, client, and service and agents together."""
        others_s = sum(map(cpu_s, self.other_pids))
        return cpu_s(self.router_pid), cpu_s(self.stub_pid), time.process_time(), others_s


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Send = Callable[[], Coroutine[Any, Any, Answer]]


@asynccontextmanager
async def process(*arguments: str, stream: str) -> AsyncIterator[tuple[str, int]]:
    """Run a Python module; gives its first line and its process id."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, cwd=ROOT,
        **{stream: subprocess.PIPE},  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        pipe = getattr(child, stream)
        yield (await pipe.readline()).decode(), child.pid
    finally:
        child.terminate()
        await child.wait()


async def ask(server: Upstream, data: bytes) -> Answer:
    """Send a request and take its stream; nothing is parsed meanwhile."""
    sent_ns, pieces = time.monotonic_ns(), []
    async with server.post("/generate", data, lambda: None) as answer:
        while piece := await answer.readany():
            pieces.append((time.monotonic_ns(), piece))
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {pieces}")
    return Answer(sent_ns, pieces)


def direct_to(fleet: dict[str, list[dict[str, str]]], body: dict[str, Any]) -> Send:
    """Ask a pair in turn, without a router."""
    servers = ([Upstream(w["url"], CONNECT_S) for w in fleet[p]] for p in ("prefill", "decode"))
    pairs = itertools.cycle(itertools.product(*servers))
    rooms = itertools.count(1)

    async def send() -> Answer:
        prefill, decode = next(pairs)
        bootstrap = {"bootstrap_room": next(rooms), "bootstrap_host": "x", "bootstrap_port": 1}
        data = msgspec.json.encode(body | bootstrap)
        other = asyncio.create_task(ask(prefill, data))
        found = await ask(decode, data)
        await other
        return found

    return send


def through(url: str, body: dict[str, Any]) -> Send:
    """Ask the router."""
    router = Upstream(url, CONNECT_S)

    async def send() -> Answer:
        return await ask(router, msgspec.json.encode(body))

    return send


async def play(send: Send, arrival_s: np.ndarray[Any, Any]) -> list[Answer]:
    """Send open loop."""
    start_s = time.monotonic()
    tasks = []
    for at_s in arrival_s:
        await asyncio.sleep(max(start_s + float(at_s) - time.monotonic(), 0.0))
        tasks.append(asyncio.create_task(send()))
    return list(await asyncio.gather(*tasks))


class Agents:
    """What the agents of a replay do to the router: hear each instance's events, report to it."""

    def __init__(self, folder: str, instances: list[tuple[Phase, int]]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._instances = instances
        self._senders = [ReportSender(f"ipc://{folder}/reports") for _ in instances]
        self._events = [self._context.socket(zmq.SUB) for _ in instances]
        for socket, instance in zip(self._events, instances, strict=True):
            socket.setsockopt(zmq.SUBSCRIBE, topic_of(*instance))
            socket.connect(f"ipc://{folder}/events")

    async def run(self) -> None:
        """Report at an agent's rate; the events are taken by ZMQ's own thread."""
        for count in itertools.count():
            for sender, instance in zip(self._senders, self._instances, strict=True):
                sender.send(AgentReport(*instance, time.monotonic(), 1005, float(count), count))
            await asyncio.sleep(TICK_S)

    def close(self) -> None:
        """Leave."""
        for sender in self._senders:
            sender.close()
        for socket in self._events:
            socket.close(linger=0)
        self._context.term()


@asynccontextmanager
async def deployment(arguments: argparse.Namespace) -> AsyncIterator[Deployment]:
    """Stub servers, router and agents."""
    with tempfile.TemporaryDirectory() as folder:
        stub = (
            "benchmarks.lean_servers", "--input-tokens", str(arguments.input_tokens),
            "--output-tokens", str(arguments.output_tokens),
            "--iteration-s", str(arguments.iteration_s),
            "--metrics", f"ipc://{folder}/{{phase}}-{{index}}",
        )  # fmt: skip
        async with process(*stub, stream="stdout") as (line, stub_pid):
            fleet = json.loads(line)
            if arguments.service:
                async with service(Path(folder), fleet, arguments.router) as (url, pid, others):
                    yield Deployment(fleet, url, pid, stub_pid, others)
                return
            config = {
                "fleet": fleet,
                "simulate": {"router": arguments.router},
                "router": {
                    "vocab_size": VOCAB_SIZE,
                    **{n: f"ipc://{folder}/{n}" for n in ("events", "reports")},
                },
            }
            path = Path(folder) / "router.toml"
            path.write_text(tomli_w.dumps(config))
            router = ("voltana.experiments.cli", "router", "--config", str(path), "--port", "0")
            async with process(*router, stream="stderr") as (line, router_pid):
                phases: tuple[Phase, Phase] = ("prefill", "decode")
                agents = Agents(folder, [(p, i) for p in phases for i in range(len(fleet[p]))])
                reports = asyncio.create_task(agents.run())
                yield Deployment(fleet, line.split()[-1], router_pid, stub_pid)
                reports.cancel()
                agents.close()


@asynccontextmanager
async def service(
    folder: Path, fleet: dict[str, Any], policy: str
) -> AsyncIterator[tuple[str, int, tuple[int, ...]]]:
    """`voltana serve`; gives its address, its router's process, and its own and its agents'."""
    whole = {
        "simulate": {"router": policy, "controller": "ecofreq", "prefill_metrics": "after"},
        "fleet": fleet,
        "router": {"port": 0, "vocab_size": VOCAB_SIZE},
        "serve": {"power_w": 100.0},
    }
    path, log = folder / "fleet.toml", folder / "service.log"
    path.write_text(tomli_w.dumps(whole))
    with log.open("wb") as out:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "voltana.experiments.cli",
            "serve",
            str(path),
            cwd=ROOT,
            stderr=out,
        )
    try:
        while not (up := re.search(r'"event":"serving","url":"([^"]+)"', log.read_text())):
            assert child.returncode is None, log.read_text()
            await asyncio.sleep(0.1)
        parts = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in parts}
        router = next(p for p, words in commands.items() if b"voltana.hwreplay.router" in words)
        agents = [p for p, words in commands.items() if b"voltana.hwreplay.agent" in words]
        yield up[1], router, (child.pid, *agents)
    finally:
        child.terminate()
        await child.wait()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Play both ways in turns and compare."""
    rng = np.random.default_rng(arguments.seed)
    body = {
        "input_ids": rng.integers(3, 512, arguments.input_tokens).tolist(),
        "sampling_params": {"max_new_tokens": arguments.output_tokens, "ignore_eos": True},
        "stream": True,
    }
    found: dict[str, list[Answer]] = {"direct": [], "router": []}
    used: dict[str, list[list[float]]] = {"direct": [], "router": []}
    async with deployment(arguments) as d:
        ways = {"direct": direct_to(d.fleet, body), "router": through(d.url, body)}
        for round_id in range(arguments.rounds + 1):
            size = int(arguments.rate * (arguments.seconds if round_id else 2))
            gaps = rng.exponential(1 / arguments.rate, size)
            for name, send in ways.items():
                before = d.used_s()
                answers = await play(send, np.cumsum(gaps))
                cpu_s = [b - a for a, b in zip(before, d.used_s(), strict=True)]
                if round_id:  # the first round warms up
                    found[name] += answers
                    used[name].append([s / len(answers) * 1e3 for s in cpu_s])
    cpu_ms = {
        way: dict(zip(PARTS, np.mean(rows, axis=0), strict=True)) for way, rows in used.items()
    }
    return report(found, arguments) | {"cpu_ms_per_request": cpu_ms}


def outside_ms(answers: list[Answer]) -> np.ndarray[Any, Any]:
    """A row a request: milliseconds outside the servers, to the first and to the last piece."""
    rows = []
    for answer in answers:
        pieces = [(at_ns, STAMPS.findall(data)) for at_ns, data in answer.pieces]
        stamped = [(at_ns, stamps) for at_ns, stamps in pieces if stamps]
        first_ns = stamped[0][0] - int(stamped[0][1][0][1])
        last_ns = stamped[-1][0] - int(stamped[-1][1][-1][1])
        there_ns = int(stamped[0][1][0][0]) - answer.sent_ns
        rows.append(((there_ns + first_ns) * 1e-6, (there_ns + last_ns) * 1e-6))
    return np.array(rows)


def report(found: dict[str, list[Answer]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantiles in ms both ways, and what the router adds to each.

    The tail of a request's own (paired) difference holds the machine's noise of both ways, with a
    router that adds nothing too; it is printed beside the difference of the tails.
    """
    result: dict[str, Any] = {
        "rate_rps": arguments.rate, "requests": len(found["router"]), "cores": os.cpu_count(),
        "output_tokens": arguments.output_tokens,
    }  # fmt: skip
    direct, router = outside_ms(found["direct"]), outside_ms(found["router"])
    for column, piece in enumerate(("first", "last")):
        ways = {"direct": direct, "router": router, "paired": router - direct}
        found_ms = {name: np.quantile(v[:, column], QUANTILES) for name, v in ways.items()}
        found_ms["added"] = found_ms["router"] - found_ms["direct"]
        for name, quantiles in found_ms.items():
            result[f"{piece}_piece_{name}_ms"] = dict(
                zip(("p50", "p90", "p99"), quantiles.round(3), strict=True)
            )
    result["meets_goal"] = all(
        result[f"{piece}_piece_added_ms"]["p99"] < GOAL_MS for piece in ("first", "last")
    )
    return result


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=15.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=2)
    parser.add_argument("--iteration-s", type=float, default=0.005, help="of each server")
    parser.add_argument("--router", default="ecoroute")
    parser.add_argument("--service", action="store_true", help="measure voltana serve")
    parser.add_argument("--seed", type=int, default=1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure(parser.parse_args())), indent=1, default=float))


if __name__ == "__main__":
    main()
