"""Faults on the real engine: servers killed, agents frozen, metrics dropped, rude clients.

Whatever happens the router and the agents stay up, and every request sent ends as completed,
failed, cancelled or rejected, by the client's count and by the router's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from tests.hwreplay.actuator.conftest import eventually
from tests.hwreplay.conftest import EngineFleet
from tests.hwreplay.engines.gate import (
    BACK_S,
    LONG_S,
    STALL_S,
    VOCAB_SIZE,
    Gate,
    body,
    clocks_of,
    gate,
    steady,
    still_serves,
)
from tests.hwreplay.engines.test_engine_pair import (
    PROMPT,
    agent_config,
    agents,
    through,
)
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from voltana.hwreplay.agent.loop_record import StaleLimits
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.engines.launch import restart
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.messages.metrics_feed import MetricsFeed
from voltana.hwreplay.replay.load import LoadReport

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_500_streams_at_once_some_of_which_leave(engine_fleet: EngineFleet, tmp_path: Path) -> None:
    """Each tenth client goes away after its first piece; every other one gets all its tokens."""
    sent, output_tokens = 500, 8
    before = through(engine_fleet.prefill, engine_fleet.decode[0], PROMPT)

    async def one(client: aiohttp.ClientSession, url: str, number: int) -> str:
        async with client.post(url + "/generate", json=body(16, output_tokens)) as answer:
            assert answer.status == 200, await answer.read()
            if number % 10 == 0:
                await answer.content.readany()
                answer.close()
                return "left"
            data = await answer.read()
        assert data.endswith(b"data: [DONE]\n\n")
        assert f'"completion_tokens":{output_tokens},'.encode() in data
        return "whole"

    async def play(found: Gate) -> tuple[Counter[str], dict[str, int]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:
            ends = await asyncio.gather(*(one(client, found.url, n) for n in range(sent)))
        return Counter(ends), await found.settled(sent)

    with gate(engine_fleet, tmp_path) as found:
        ends, counts = asyncio.run(play(found))
    assert ends == {"whole": 450, "left": 50}
    assert sum(counts.values()) == sent
    assert (counts["failed"], counts["rejected"]) == (0, 0)
    assert counts["completed"] >= 450  # one that left may have had all its tokens under way
    assert through(engine_fleet.prefill, engine_fleet.decode[0], PROMPT) == before


def test_a_client_that_stops_reading_is_dropped_and_its_work_with_it(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """Logprobs make its answer longer than what the kernel's buffers take (some 4 MB)."""

    async def play(found: Gate) -> dict[str, int]:
        whole = body(16, 3500, return_logprob=True, top_logprobs_num=128)
        data = json.dumps(whole).encode()
        host, port = found.url.removeprefix("http://").split(":")
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(head.encode() + data)
            async with aiohttp.ClientSession() as client:
                async with client.post(found.url + "/generate", json=body(16, 20)) as answer:
                    assert (await answer.read()).endswith(b"data: [DONE]\n\n")
                counts = await found.settled(2)
                async with asyncio.timeout(60):
                    while sum([await num_running(client, d) for d in found.fleet.decode]):
                        await asyncio.sleep(0.1)
        return counts

    with gate(engine_fleet, tmp_path, client_stall_s=STALL_S) as found:
        counts = asyncio.run(play(found))
    assert counts == {"completed": 1, "failed": 0, "cancelled": 1, "rejected": 0}
    assert still_serves(engine_fleet)


async def num_running(client: aiohttp.ClientSession, server: Server) -> int:
    """By the engine's own word."""
    async with client.get(server.plan.url + "/v1/loads?include=core") as answer:
        loads = (await answer.json())["loads"]
    return sum(int(load["num_running_reqs"] + load["num_waiting_reqs"]) for load in loads)


def test_a_prompt_outside_the_vocabulary_reaches_no_server(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """SGLang checks no id: its prefill server would end, and a retry would end the next one."""
    prompts = [[99_999], [[99_999]], [5, VOCAB_SIZE], [5, -1], [5, 2**40], [1.5]]

    async def play(found: Gate) -> tuple[list[int], dict[str, int]]:
        statuses = []
        async with aiohttp.ClientSession() as client:
            for prompt in prompts:
                whole = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
                async with client.post(found.url + "/v1/completions", json=whole) as answer:
                    await answer.read()
                    statuses.append(answer.status)
            last = body(4, 4) | {"input_ids": [5, VOCAB_SIZE - 1]}
            async with client.post(found.url + "/generate", json=last) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert (await found.health())["out"] == []
        return statuses, await found.settled(len(prompts) + 1)

    with gate(engine_fleet, tmp_path) as found:
        statuses, counts = asyncio.run(play(found))
    assert statuses == [400] * 6
    assert counts == {"completed": 1, "failed": 0, "cancelled": 0, "rejected": 6}
    assert still_serves(engine_fleet)


def test_a_decode_server_that_waits_for_prefill_is_silent_and_stays_in(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """The prefill server stands still for 4 s, 13 times `stale_s`, with a request that decode waits
    for. SGLang says nothing at all meanwhile: its heartbeats come when no queue holds anything."""
    prefill = engine_fleet.prefill

    async def play(found: Gate) -> tuple[list[bool], dict[str, int], bytes]:
        clock = RunClock()
        assert engine_fleet.decode[0].plan.metrics is not None
        async with (
            aiohttp.ClientSession() as client,
            MetricsFeed(engine_fleet.decode[0].plan.metrics, clock) as feed,
        ):
            for _ in range(2):  # both decode servers have run an iteration
                async with client.post(found.url + "/generate", json=body(8, 4)) as answer:
                    assert (await answer.read()).endswith(b"[DONE]\n\n")
            async with asyncio.timeout(20):
                while not (await feed.receive()).is_heartbeat:
                    pass
            os.killpg(prefill.process.pid, signal.SIGSTOP)
            try:
                asked = asyncio.create_task(client.post(found.url + "/generate", json=body(8, 4)))
                await asyncio.sleep(1.5)  # a heartbeat may have been on its way
                heard = asyncio.create_task(feed.receive())
                await asyncio.sleep(2.5)
                is_silent = not heard.done()
                state = await found.suspects()
                health = await found.health()
            finally:
                os.killpg(prefill.process.pid, signal.SIGCONT)
            heard.cancel()
            async with asyncio.timeout(60), await asked as answer:
                data = await answer.read()
        in_place = [is_silent, "decode-0" not in health["out"], "decode-0" not in state]
        return in_place, await found.settled(3), data

    with gate(engine_fleet, tmp_path, stale_s=0.3, health_period_s=0.1) as found:
        in_place, counts, data = asyncio.run(play(found))
    assert in_place == [True, True, True]
    assert data.endswith(b"[DONE]\n\n")
    assert counts == {"completed": 3, "failed": 0, "cancelled": 0, "rejected": 0}
    assert still_serves(engine_fleet)


def params(**more: object) -> dict[str, Any]:
    whole = body(8, 4)
    return whole | {"sampling_params": whole["sampling_params"] | more}


STRANGE = [
    body(5000, 4),  # longer than the model's context
    params(max_new_tokens=10**9), params(max_new_tokens=10**30), params(temperature=-1),
    params(temperature="warm"), params(top_p=5), params(top_k=-7), params(stop=["a"]),
    params(stop_token_ids=["x"]), params(min_new_tokens=100), params(nonsense=1),
    params(repetition_penalty=-1), params(logit_bias={"999999": 5}),
    body(8, 4, rid=["a", "b"]), body(8, 4, bootstrap_room="x", bootstrap_host=7),
    body(8, 4, return_logprob=True, top_logprobs_num=10**6),
    body(8, 4, return_logprob=True, logprob_start_len=-100),
    body(8, 4, return_logprob=True, token_ids_logprob=[10**6]),
    body(8, 4, priority="high"), body(8, 4, return_logprob="yes"), body(8, 4, lora_path="none"),
    body(8, 4, session_params={"id": "x"}), body(8, 4, data_parallel_rank=7),
]  # fmt: skip


def test_malformed_requests_end_and_the_engine_goes_on(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """Fuzzed JSON, huge bodies, ids out of the vocabulary, and what only the engine can refuse."""
    rng = np.random.default_rng(11)
    good = json.dumps(body(6, 2)).encode()
    bodies = [json.dumps(strange).encode() for strange in STRANGE]
    bodies += [b"", b"{", b"[" * 100_000, b"\xff" * 50, b'{"input_ids":' + b"1" * 10_000 + b"}"]
    bodies += [json.dumps(body(6, 2) | {"input_ids": [5, 10**6]}).encode(), b" " * 300_000]
    for _ in range(60):
        data = bytearray(good)
        for position in rng.integers(0, len(data), rng.integers(1, 5)):
            data[position] = rng.integers(0, 256)
        bodies.append(bytes(data))

    async def play(found: Gate) -> tuple[Counter[int], dict[str, int]]:
        statuses: Counter[int] = Counter()
        async with aiohttp.ClientSession() as client:
            for data in bodies:
                async with (
                    asyncio.timeout(60),
                    client.post(found.url + "/generate", data=data) as answer,
                ):
                    await answer.read()
                    statuses[answer.status] += 1
        assert (await found.health())["out"] == []
        return statuses, await found.settled(len(bodies))

    with gate(engine_fleet, tmp_path, max_body_bytes=250_000) as found:
        statuses, counts = asyncio.run(play(found))
    assert sum(counts.values()) == sum(statuses.values()) == len(bodies)
    assert statuses[413] == 1
    assert statuses[400] > len(STRANGE) // 2
    assert still_serves(engine_fleet)


def test_a_killed_decode_server_fails_what_it_had_begun(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """The other server goes on alone, and both serve when the killed one is back. Its agent has
    unlocked the clock meanwhile."""
    sent = 60
    server = engine_fleet.decode[0]
    config = agent_config(
        server,
        settings={"controller": "static:f=1005"},
        stale=StaleLimits(least_s=LONG_S, most_s=LONG_S),
    )

    async def play(found: Gate) -> tuple[LoadReport, dict[str, int], LoadReport]:
        run = asyncio.create_task(found.play(steady(sent, 15, 24, 150), tmp_path / "rows"))
        await asyncio.sleep(2.5)
        await asyncio.to_thread(engine_fleet.decode[0].kill)
        report = await run
        counts = await found.settled(sent)
        assert (await found.health())["out"] == ["decode-0"]
        assert await asyncio.to_thread(
            eventually, lambda: clocks_of(tmp_path, "decode-0") == [1005, 0]
        )
        old = engine_fleet.decode[0]
        await asyncio.to_thread(restart, engine_fleet.servers, old, start_s=BACK_S)
        await found.until_healthy()
        again = await found.play(steady(10, 10, 24, 8), tmp_path / "again")
        return report, counts, again

    with gate(engine_fleet, tmp_path) as found, agents([config], tmp_path):
        report, counts, again = asyncio.run(play(found))
        assert eventually(lambda: clocks_of(tmp_path, "decode-0") == [1005, 0, 1005])
    assert report.is_complete
    assert sum(report.counts.values()) == sum(counts.values()) == sent
    assert report.counts == {k: v for k, v in counts.items() if v}
    assert 0 < counts["failed"] < sent
    assert counts["completed"] > sent // 3
    assert [reason for reason in report.reasons if "decode-0" not in reason] == []
    assert again.counts == {"completed": 10}
    assert still_serves(engine_fleet)


def test_a_killed_prefill_server_stops_new_requests_until_it_is_back(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """It was the only one: nothing new can start, what decodes already goes on to its end."""
    sent = 60

    async def play(found: Gate) -> tuple[LoadReport, dict[str, int], LoadReport]:
        run = asyncio.create_task(found.play(steady(sent, 15, 24, 150), tmp_path / "rows"))
        await asyncio.sleep(2.5)
        await asyncio.to_thread(engine_fleet.prefill.kill)
        report = await run
        counts = await found.settled(sent)
        assert (await found.health())["out"] == ["prefill-0"]
        old = engine_fleet.prefill
        await asyncio.to_thread(restart, engine_fleet.servers, old, start_s=BACK_S)
        await found.until_healthy()
        again = await found.play(steady(10, 10, 24, 8), tmp_path / "again")
        return report, counts, again

    with gate(engine_fleet, tmp_path) as found:
        report, counts, again = asyncio.run(play(found))
    assert report.is_complete
    assert sum(report.counts.values()) == sum(counts.values()) == sent
    assert report.counts == {k: v for k, v in counts.items() if v}
    assert counts["completed"] > 0
    assert counts["failed"] > 0
    assert [reason for reason in report.reasons if "prefill" not in reason] == []
    assert again.counts == {"completed": 10}
    assert still_serves(engine_fleet)
