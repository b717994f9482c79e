"""The router in front of stub servers: what it sends, whom it asks, what it counts."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest
import tomli_w
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from tests.hwreplay.stub_worker import HOST, StubFleet, StubTimes, stub_fleet
from voltana.hwreplay.messages.agent_reports import AgentReport, ReportSender
from voltana.hwreplay.messages.events import EventFeed
from voltana.hwreplay.router.config import RouterConfig, read_router_config, read_workers
from voltana.hwreplay.router.service import RouterService
from voltana.hwreplay.router.sink import DECODE_HEADER, PREFILL_HEADER
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config


@dataclass(slots=True, kw_only=True)
class Bench:
    """A router, its stub servers and a client."""

    fleet: StubFleet
    service: RouterService
    client: aiohttp.ClientSession
    url: str

    async def generate(
        self, input_tokens: int = 8, output_tokens: int = 4, **more: object
    ) -> tuple[int, bytes]:
        """Status and whole answer of one streamed request."""
        body = request_body(input_tokens, output_tokens) | more
        async with self.client.post(self.url + "/generate", json=body) as answer:
            return answer.status, await answer.read()

    async def counts(self) -> dict[str, float]:
        """The router's own count by outcome."""
        samples = await self.samples()
        return {
            outcome: samples[("voltana_requests_total", outcome)]
            for outcome in ("completed", "failed", "cancelled", "rejected")
        }

    async def samples(self) -> dict[tuple[str, str], float]:
        """/metrics: (name, labels' values) to value."""
        async with self.client.get(self.url + "/metrics") as answer:
            text = await answer.text()
        return {
            (s.name, "-".join(s.labels[k] for k in sorted(s.labels, reverse=True))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }


def request_body(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_ids": list(range(1, input_tokens + 1)),
        "sampling_params": {"max_new_tokens": output_tokens, "ignore_eos": True},
        "stream": True,
    }


def events(data: bytes) -> list[Any]:
    """The JSON events of a stream, `[DONE]` left out."""
    lines = [line for line in data.split(b"\n\n") if line and line != b"data: [DONE]"]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


@asynccontextmanager
async def bench(
    num_prefill: int = 1,
    num_decode: int = 1,
    *,
    times: StubTimes | None = None,
    router: str = "round-robin",
    metrics: str | None = None,
    **limits: Any,  # noqa: ANN401 (keys of RouterConfig)
) -> AsyncIterator[Bench]:
    async with (
        stub_fleet(num_prefill, num_decode, times, metrics) as fleet,
        serving(fleet.table(metrics), router=router, **limits) as (service, client, url),
    ):
        yield Bench(fleet=fleet, service=service, client=client, url=url)


@asynccontextmanager
async def serving(
    table: dict[str, Any],
    *,
    router: str = "round-robin",
    sim: Mapping[str, object] = MappingProxyType({}),
    **limits: Any,  # noqa: ANN401 (keys of RouterConfig)
) -> AsyncIterator[tuple[RouterService, aiohttp.ClientSession, str]]:
    """A router in front of a `[fleet]` table's servers, a client and the router's URL."""
    config = RouterConfig(
        workers=read_workers(table, "test"),
        sim=make_config({"router": router, **sim}),
        **({"health_period_s": 0.1, "health_timeout_s": 0.5} | limits),
    )
    service = RouterService(config, load_profile(config.sim.profile))
    runner = web.AppRunner(service.app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0, backlog=1024)
    await site.start()
    try:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:
            yield service, client, f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def until(is_true: Callable[[], Awaitable[bool]], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await is_true():
            await asyncio.sleep(0.02)


def test_both_servers_get_the_same_request_and_room() -> None:
    async def play() -> None:
        async with bench() as b:
            status, data = await b.generate(8, 4)
            sent = [w.seen for w in b.fleet.workers]
            assert status == 200
            assert [e["meta_info"]["completion_tokens"] for e in events(data)] == [1, 2, 3, 4]
            assert sent[0] == sent[1]
            (body,) = sent[0]
            assert body["bootstrap_host"] == HOST
            assert body["bootstrap_port"] == 8998
            assert 0 <= body["bootstrap_room"] < 2**63
            assert body["input_ids"] == list(range(1, 9))
            await b.generate(8, 4)
            assert sent[0][0]["bootstrap_room"] != sent[0][1]["bootstrap_room"]

    asyncio.run(play())


def test_a_client_cannot_name_its_own_prefill_server() -> None:
    async def play() -> None:
        async with bench() as b:
            await b.generate(bootstrap_host="203.0.113.9", bootstrap_room=5)
            assert b.fleet.decode[0].seen[0]["bootstrap_host"] == HOST

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3}),
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 3}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
        ),
        ("/generate", {"text": "Once", "sampling_params": {"max_new_tokens": 3}}),
    ],
)
def test_every_interface_streams_and_answers_whole(path: str, body: dict[str, Any]) -> None:
    async def play() -> None:
        async with bench() as b:
            async with b.client.post(b.url + path, json=body | {"stream": True}) as answer:
                assert answer.content_type == "text/event-stream"
                assert len(events(await answer.read())) == 3
            async with b.client.post(b.url + path, json=body) as answer:
                assert answer.content_type == "application/json"
                assert isinstance(await answer.json(), dict)
            assert (await b.counts())["completed"] == 2

    asyncio.run(play())


def test_the_policy_chooses_and_the_answer_says_whom() -> None:
    async def play() -> None:
        async with bench(2, 3) as b:
            found = []
            for _ in range(6):
                async with b.client.post(b.url + "/generate", json=request_body(4, 2)) as answer:
                    await answer.read()
                    headers = answer.headers
                    found.append((headers[PREFILL_HEADER], headers[DECODE_HEADER]))
            assert found == [("0", "0"), ("1", "1"), ("0", "2"), ("1", "0"), ("0", "1"), ("1", "2")]
            assert [len(w.seen) for w in b.fleet.workers] == [3, 3, 2, 2, 2]

    asyncio.run(play())


def test_a_client_that_leaves_is_cancelled_upstream() -> None:
    async def play() -> None:
        async with bench(times=StubTimes(decode_base_s=0.02)) as b:
            async with b.client.post(b.url + "/generate", json=request_body(4, 5000)) as answer:
                await answer.content.readany()
                answer.close()
            decode = b.fleet.decode[0]

            async def is_told() -> bool:
                return decode.cancelled == 1 and (await b.counts())["cancelled"] == 1

            await until(is_told)
            assert all(w.tracker.state.open_requests == 0 for w in b.service.fleet.all_workers())

    asyncio.run(play())


def test_bounded_queue() -> None:
    """2 places and 3 waiting: of 10 at once exactly 5 are let in and 5 are told to come later."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=0.2)
        async with bench(times=times, max_open=2, max_queued=3) as b:
            answers = await asyncio.gather(*(b.generate(4, 2) for _ in range(10)))
            assert sorted(status for status, _ in answers) == [200] * 5 + [429] * 5
            assert await b.counts() == {"completed": 5, "failed": 0, "cancelled": 0, "rejected": 5}

    asyncio.run(play())


def test_token_and_size_limits() -> None:
    async def play() -> None:
        async with bench(token="s3cret", max_body_bytes=2000) as b:
            header = {"Authorization": "Bearer s3cret"}
            url = b.url + "/generate"
            async with b.client.post(url, json=request_body(4, 2)) as answer:
                assert answer.status == 401
            async with b.client.post(
                url, json=request_body(4, 2), headers={"Authorization": "Bearer wrong"}
            ) as answer:
                assert answer.status == 401
            async with b.client.get(b.url + "/metrics") as answer:
                assert answer.status == 401
            async with b.client.get(b.url + "/health") as answer:
                assert answer.status == 200
            async with b.client.post(url, json=request_body(4, 2), headers=header) as answer:
                assert answer.status == 200
                await answer.read()
            async with b.client.post(url, data=b"x" * 2001, headers=header) as answer:
                assert answer.status == 413
                assert "2000 bytes" in (await answer.json())["error"]["message"]
            assert len(b.fleet.prefill[0].seen) == 1

    asyncio.run(play())


def test_metrics_name_what_happened() -> None:
    """One request of 4 tokens: one TTFT, three gaps, nothing open at the end.

    The router's times lie within what the client waits."""

    async def play() -> None:
        async with bench(2, 1, times=StubTimes(decode_base_s=0.02)) as b:
            began_s = time.monotonic()
            await b.generate(8, 4)
            waited_s = time.monotonic() - began_s
            found = await b.samples()
            assert found[("voltana_ttft_seconds_count", "")] == 1
            assert found[("voltana_itl_seconds_count", "")] == 3
            itl_s, ttft_s = (found[(f"voltana_{n}_seconds_sum", "")] for n in ("itl", "ttft"))
            assert 0.0 < itl_s < itl_s + ttft_s <= waited_s
            assert found[("voltana_routing_seconds_count", "")] == 1
            for name in ("prefill-0", "prefill-1", "decode-0"):
                assert found[("voltana_healthy", name)] == 1
                assert found[("voltana_open_requests", name)] == 0
                assert found[("voltana_kv_tokens", name)] == 0

    asyncio.run(play())


def test_agents_reports_reach_metrics_and_policy(tmp_path: Path) -> None:
    async def play() -> None:
        address = f"ipc://{tmp_path}/reports"
        async with bench(1, 2, reports=address) as b:
            sender = ReportSender(address)
            sender.send(AgentReport("decode", 1, 2.5, 1005, 321.5, 17))
            sender.send(AgentReport("decode", 9, 2.5, 1005, 321.5, 17))  # no such instance: ignored

            async def is_there() -> bool:
                return (await b.samples()).get(("voltana_decisions_total", "decode-1")) == 17

            await until(is_there)
            found = await b.samples()
            assert found[("voltana_clock_mhz", "decode-1")] == 1005
            assert found[("voltana_energy_joules_total", "decode-1")] == 321.5
            state = b.service.fleet.workers["decode"][1].tracker.state
            assert (state.clock_mhz, state.energy_j) == (1005, 321.5)
            sender.close()

    asyncio.run(play())


def test_engine_records_reach_the_policy(tmp_path: Path) -> None:
    """With the servers' own metrics the router counts iterations, not pieces of streams."""

    async def play() -> None:
        template = f"ipc://{tmp_path}/{{phase}}-{{index}}"
        async with bench(metrics=template, times=StubTimes(decode_base_s=0.02)) as b:
            await asyncio.sleep(0.3)  # until the subscription stands
            await b.generate(8, 6)
            tracker = b.service.fleet.workers["decode"][0].tracker

            async def is_counted() -> bool:
                return tracker.num_iterations == 6

            await until(is_counted)
            assert tracker.state.last_tokens == 8 + 5
            assert tracker.state.open_requests == 0

    asyncio.run(play())


def test_agents_hear_of_every_step_of_a_request(tmp_path: Path) -> None:
    async def play() -> None:
        address = f"ipc://{tmp_path}/events"
        async with bench(events=address) as b:
            feed = EventFeed(address, ("decode", 0))
            await asyncio.sleep(0.3)
            await b.generate(8, 4)
            kinds = []
            async with asyncio.timeout(5):
                while "finished" not in kinds:
                    event = await feed.receive()
                    if event.kind != "open":
                        kinds.append(event.kind)
            feed.close()
            assert kinds == ["assigned", "prefilled", "first_token", "finished"]

    asyncio.run(play())


@pytest.mark.slow
def test_the_command_serves_until_told_to_end(tmp_path: Path) -> None:
    async def play() -> None:
        async with stub_fleet() as fleet:
            config = tmp_path / "fleet.toml"
            config.write_text(tomli_w.dumps({"fleet": fleet.table(), "simulate": {"seed": 3}}))
            token = tmp_path / "token"
            token.write_text("abc\n")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "voltana.experiments.cli", "router", "--config", str(config),
                "--port", "0", "--token-file", str(token), stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert process.stderr is not None
            async with asyncio.timeout(60):
                line = (await process.stderr.readline()).decode()
            assert line.startswith(f"routing on http://{HOST}:")
            headers = {"Authorization": "Bearer abc"}
            async with aiohttp.ClientSession(headers=headers) as client:
                url = line.split()[-1] + "/generate"
                async with client.post(url, json=request_body(4, 3)) as answer:
                    assert len(events(await answer.read())) == 3
            process.terminate()
            async with asyncio.timeout(20):
                assert await process.wait() == 0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fleet]\nprefill = []", "prefill must be a list of URLs"),
        ('[fleet]\nprefill = ["ftp://h"]\ndecode = ["http://h:1"]', "must be http://HOST:PORT"),
        ('[fleet]\nprefill = [{url = "http://h:1", bootstrp_port = 1}]', "did you mean"),
        (
            '[fleet]\nprefill = ["http://h:1"]\ndecode = ["http://h:2"]\n[router]\nport = "x"',
            "port",
        ),
        (
            '[fleet]\nprefill = ["http://h:1"]\ndecode = ["http://h:2"]\n[router]\nmax_open = 0',
            "max_open must be > 0",
        ),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(VoltanaError, match=message) as found:
        read_router_config(path)
    assert "\n" not in str(found.value)
