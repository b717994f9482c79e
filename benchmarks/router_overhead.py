"""What the router adds: latency through it minus latency of asking the same servers directly.

Stub servers, router and client are three processes on one machine; the same arrivals are sent
directly and through the router in turns, so that a drift of the machine hits both. Run alone:

    python benchmarks/router_overhead.py --rate 200 --seconds 15

Direct means what the router does, done by the client: the same body to a prefill and a decode
server, the stream read from decode.
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
from typing import Any

import aiohttp
import numpy as np
import tomli_w
import uvloop

ROOT = Path(__file__).parents[1]
GOAL_S = 0.002
Send = Callable[[aiohttp.ClientSession, dict[str, Any]], Coroutine[Any, Any, list[float]]]
"""Sends one request; returns the times of its pieces, time 0 the sending."""


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


async def read(answer: aiohttp.ClientResponse, start_ns: int) -> list[float]:
    """Times of the pieces of a stream."""
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {await answer.text()}")
    times = []
    while await answer.content.readany():
        times.append((time.monotonic_ns() - start_ns) * 1e-9)
    return times


def direct_to(fleet: dict[str, list[dict[str, str]]]) -> Send:
    """Ask a pair in turn, without a router."""
    pairs = itertools.cycle(itertools.product(fleet["prefill"], fleet["decode"]))
    rooms = itertools.count(1)

    async def drain(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        async with session.post(url, json=body) as answer:
            await answer.read()

    async def send(session: aiohttp.ClientSession, body: dict[str, Any]) -> list[float]:
        prefill, decode = (worker["url"] + "/generate" for worker in next(pairs))
        body = body | {"bootstrap_room": next(rooms), "bootstrap_host": "x", "bootstrap_port": 1}
        start_ns = time.monotonic_ns()
        other = asyncio.create_task(drain(session, prefill, body))
        async with session.post(decode, json=body) as answer:
            times = await read(answer, start_ns)
        await other
        return times

    return send


def through(url: str) -> Send:
    """Ask the router."""

    async def send(session: aiohttp.ClientSession, body: dict[str, Any]) -> list[float]:
        start_ns = time.monotonic_ns()
        async with session.post(url + "/generate", json=body) as answer:
            return await read(answer, start_ns)

    return send


async def play(
    send: Send, arrival_s: np.ndarray[Any, Any], body: dict[str, Any]
) -> list[list[float]]:
    """Send open loop."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=connector) as session:
        start_s = time.monotonic()
        tasks = []
        for at_s in arrival_s:
            await asyncio.sleep(max(start_s + float(at_s) - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(send(session, body)))
        return list(await asyncio.gather(*tasks))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Play both ways in turns and compare."""
    rng = np.random.default_rng(arguments.seed)
    count = int(arguments.rate * arguments.seconds)
    body = {
        "input_ids": rng.integers(3, 512, arguments.input_tokens).tolist(),
        "sampling_params": {"max_new_tokens": arguments.output_tokens, "ignore_eos": True},
        "stream": True,
    }
    stub = ("tests.hwreplay.stub_worker", "--prefill", "2", "--decode", "2",
            "--prefill-s", "0.005", "--decode-s", "0.005")  # fmt: skip
    found: dict[str, list[list[float]]] = {"direct": [], "router": []}
    used: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with process(*stub, stream="stdout") as (line, stub_pid):
            fleet = json.loads(line)
            config = Path(folder) / "router.toml"
            config.write_text(
                tomli_w.dumps({"fleet": fleet, "simulate": {"router": arguments.router}})
            )
            router = ("experiments.cli", "router", "--config", str(config), "--port", "0")
            async with process(*router, stream="stderr") as (line, router_pid):
                url = line.split()[-1]
                ways = {"direct": direct_to(fleet), "router": through(url)}
                for round_id in range(arguments.rounds + 1):
                    size = count if round_id else int(2 * arguments.rate)
                    gaps = rng.exponential(1 / arguments.rate, size)
                    for name, send in ways.items():
                        before = cpu_s(router_pid), cpu_s(stub_pid), time.process_time()
                        answers = await play(send, np.cumsum(gaps), body)
                        if round_id:  # the first round warms up
                            found[name] += answers
                        after = cpu_s(router_pid), cpu_s(stub_pid), time.process_time()
                        used[name] = [
                            (b - a) / len(answers) * 1e3 for a, b in zip(before, after, strict=True)
                        ]
                async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as a:
                    own = await a.text()
    names = ("router", "servers", "client")
    cpu = {way: dict(zip(names, values, strict=True)) for way, values in used.items()}
    return report(found, own, arguments) | {"cpu_ms_per_request": cpu}


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(
    found: dict[str, list[list[float]]], own: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Quantiles in ms: first piece and last piece, both ways, and their differences."""
    result: dict[str, Any] = {
        "rate_rps": arguments.rate, "requests": len(found["router"]), "cores": os.cpu_count(),
        "output_tokens": arguments.output_tokens,
    }  # fmt: skip
    for name, pick in (("first", 0), ("last", -1)):
        quantiles = {
            way: np.quantile([times[pick] for times in answers], [0.5, 0.9, 0.99]) * 1e3
            for way, answers in found.items()
        }
        for way, values in quantiles.items():
            result[f"{name}_piece_{way}_ms"] = dict(
                zip(("p50", "p90", "p99"), values.round(3), strict=True)
            )
        added = quantiles["router"] - quantiles["direct"]
        result[f"{name}_piece_added_ms"] = dict(
            zip(("p50", "p90", "p99"), added.round(3), strict=True)
        )
    buckets = re.findall(r'voltana_routing_seconds_bucket{le="([^"]+)"} (\S+)', own)
    total = float(buckets[-1][1])
    result["arrival_to_both_asked"] = {
        f"<= {edge} s": round(float(n) / total, 4) for edge, n in buckets if float(n) / total < 1
    }
    result["meets_goal"] = bool(result["first_piece_added_ms"]["p99"] < GOAL_S * 1e3)
    return result


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=15.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=2)
    parser.add_argument("--router", default="ecoroute")
    parser.add_argument("--seed", type=int, default=1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure(parser.parse_args())), indent=1, default=float))


if __name__ == "__main__":
    main()
