"""The router between strange servers and strange clients: what is counted, who is blamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.hwreplay.router.scripted_server import Scripted, chunked, scripted
from tests.hwreplay.router.test_router import Bench, bench, events, request_body, serving, until
from tests.hwreplay.stub_worker import HOST, StubTimes
from voltana.hwreplay.router.config import RouterConfig, read_workers
from voltana.hwreplay.router.errors import ClientGoneError
from voltana.hwreplay.router.servers import fleet as fleet_module
from voltana.hwreplay.router.sink import ClientSink
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.sim.config import make_config

TOKEN = b'data: {"text":"a","meta_info":{"finish_reason":null}}\n\n'
DONE = b"data: [DONE]\n\n"
REFUSAL = b'data: {"error":{"message":"too long","code":400}}\n\n'


@asynccontextmanager
async def between(
    prefill: list[bytes],
    decode: list[bytes],
    **limits: Any,  # noqa: ANN401 (keys of RouterConfig)
) -> AsyncIterator[tuple[Bench, Scripted, Scripted]]:
    """A router between two scripted servers and a client."""
    async with scripted(*prefill) as first, scripted(*decode) as second:
        table = {"prefill": [first.url], "decode": [second.url]}
        async with serving(table, **({"max_attempts": 1, "vocab_size": 512} | limits)) as (
            service,
            client,
            url,
        ):
            # no stub fleet is behind it
            b = Bench(fleet=None, service=service, client=client, url=url)  # type: ignore[arg-type]
            yield b, first, second


async def raw(b: Bench, request: bytes) -> bytes:
    """Status line and head that some bytes are answered with."""
    host, port = b.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    try:
        async with asyncio.timeout(2):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


def test_headers_that_are_no_text() -> None:
    body = json.dumps(request_body(2, 1)).encode()

    def request(*headers: bytes) -> bytes:
        lines = b"".join(h + b"\r\n" for h in headers)
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + lines
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def play() -> None:
        stream = chunked(TOKEN, DONE)
        async with between(stream, stream, token="abc") as (b, first, second):
            assert b" 401 " in await raw(b, request(b"Authorization: Bearer \xff\xfe"))
            good = b"Authorization: Bearer abc"
            assert b" 200 " in await raw(b, request(good, b"X-Odd: \xffodd"))
            assert len(first.seen) == len(second.seen) == 1

    asyncio.run(play())


def test_what_cannot_be_let_in_is_refused_unread() -> None:
    """No byte of these bodies is ever sent: an answer means that none was waited for."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    unknown = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def play() -> None:
        slow = StubTimes(prefill_base_s=0.5)
        limits: dict[str, Any] = {"max_body_bytes": 1000, "max_bodies_bytes": 1500}
        async with bench(times=slow, max_open=1, max_queued=0, **limits) as b:
            assert b" 413 " in await raw(b, head % 1001)
            served = asyncio.create_task(b.generate(2, 1))
            await asyncio.sleep(0.1)
            assert b" 429 " in await raw(b, head % 10)
            assert (await served)[0] == 200
        async with bench(**limits) as b:
            sending = asyncio.create_task(raw(b, head % 600))
            await asyncio.sleep(0.1)
            assert b" 429 " in await raw(b, head % 901)
            assert b" 429 " in await raw(b, unknown)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

            async def is_free() -> bool:
                return (await b.counts())["cancelled"] == 1

            await until(is_free)
            assert (await b.generate(2, 1))[0] == 200

    asyncio.run(play())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([TOKEN], "decode-0 ends its stream early"),
        ([TOKEN, DONE[:-8]], "decode-0 ends its stream early"),
        ([TOKEN, DONE, TOKEN], "decode-0 ends its stream early"),
        ([TOKEN + REFUSAL[:25], REFUSAL[25:] + DONE], "the server answers 400"),
        ([TOKEN, REFUSAL[:8], REFUSAL[8:12], REFUSAL[12:-2]], "the server answers 400"),
    ],
)
def test_a_stream_that_does_not_end_well_is_no_completed_request(
    pieces: list[bytes], message: str
) -> None:
    async def play() -> None:
        async with between(chunked(TOKEN, DONE), chunked(*pieces)) as (b, _, _):
            status, data = await b.generate(2, 1)
            assert status == 200
            assert data.startswith(TOKEN)
            assert DONE not in data
            last = data.rstrip(b"\n").rpartition(b"\n\n")[2]
            assert message in events(last)[0]["error"]["message"]
            assert (await b.counts())["failed"] == 1
            reason = "engine_error" if "early" in message else "refused"
            assert (await b.samples())[("voltana_failures_total", reason)] == 1

    asyncio.run(play())


def test_a_client_that_leaves_with_its_whole_answer_has_completed() -> None:
    """Though the prefill server has not said its last word: the client need not wait for that."""

    async def play() -> None:
        prefill = [*chunked(TOKEN, is_ended=False), *[b""] * 20]  # 0.4 s of silence
        async with between(prefill, chunked(TOKEN, DONE)) as (b, _, _):
            body = json.dumps(request_body(2, 1)).encode()
            head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            host, port = b.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + body)
            async with asyncio.timeout(5):
                await reader.readuntil(b"0\r\n\r\n")
            writer.transport.abort()
            await asyncio.sleep(0.1)
            assert (await b.counts())["completed"] == 1

    asyncio.run(play())


def test_a_server_that_takes_no_connection_has_not_died_with_the_request() -> None:
    """One of two refuses before any health check tells: the other is still tried, by those too that
    were about to connect when another was refused."""

    async def play() -> None:
        async with bench(2, 1, max_lost=1, health_period_s=60.0) as b:
            await asyncio.sleep(0.2)  # the first checks find all well
            await b.fleet.prefill[0].die()
            answers = await asyncio.gather(*(b.generate(2, 1) for _ in range(20)))
            assert {status for status, _ in answers} == {200}
            assert (await b.samples())[("voltana_retries_total", "")] >= 1

    asyncio.run(play())


def test_an_end_that_comes_in_pieces_is_an_end() -> None:
    async def play() -> None:
        for cut in (1, 6, len(DONE) - 2, len(DONE) - 1):
            stream = chunked(TOKEN, DONE[:cut], DONE[cut:])
            async with between(chunked(TOKEN, DONE), stream) as (b, _, _):
                assert await b.generate(2, 1) == (200, TOKEN + DONE)
                assert (await b.counts())["completed"] == 1

    asyncio.run(play())


def test_a_refusal_inside_a_stream_is_json() -> None:
    async def play() -> None:
        async with between(chunked(TOKEN, DONE), chunked(REFUSAL, DONE)) as (b, _, _):
            async with b.client.post(b.url + "/generate", json=request_body(2, 1)) as answer:
                assert (answer.status, answer.content_type) == (400, "application/json")
                assert (await answer.json())["error"]["message"] == "too long"
            assert (await b.counts())["rejected"] == 1

    asyncio.run(play())


HEAD_OF_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("sent", [b"", HEAD_OF_WHOLE + b"{"])
def test_the_wait_for_a_first_token_has_an_end(sent: bytes, is_stream: bool) -> None:
    """Whatever is missing: the head, the first event, the rest of an answer that is no stream."""
    if is_stream and sent:
        sent = chunked()[0]
    silence = [b""] * 200  # 4 s

    async def play() -> None:
        prefill = chunked(TOKEN, DONE)
        limit = {"first_token_s": 0.3}
        async with between(prefill, [sent, *silence], **limit) as (b, _, _):
            status, data = await b.generate(2, 1, stream=is_stream)
            assert status == 502
            assert b"decode-0 makes no token in 0.3 s" in data
        async with between(silence, silence, **limit) as (b, _, _):
            assert b"prefill-0 makes no token in 0.3 s" in (await b.generate(2, 1))[1]
            assert (await b.samples())[("voltana_failures_total", "timeout")] == 1

    asyncio.run(play())


def test_a_client_that_is_gone_is_nobody_elses_fault() -> None:
    """A write to a lost client says so in its own words, and a failure then can still be told."""
    workers = read_workers({"prefill": ["http://h:1"], "decode": ["http://h:2"]}, "test")
    config = RouterConfig(workers=workers, sim=make_config({}))
    found: list[Exception] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        sink = ClientSink(request, config, is_stream=True)
        nowhere: Any = [type("W", (), {"config": worker}) for worker in workers]
        await sink.begin(200, "text/event-stream", nowhere)
        await sink.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.abort()
        for _ in range(2):
            try:
                await sink.write(b"data: 2\n\n")
            except ClientGoneError as error:
                found.append(error)
            await asyncio.sleep(0.05)
        return await sink.fail("a server is lost")

    async def play() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app, handler_cancellation=False)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        async with aiohttp.ClientSession() as client:
            with pytest.raises(aiohttp.ClientError):
                async with client.get(f"http://{HOST}:{runner.addresses[0][1]}/") as answer:
                    await answer.read()
        await asyncio.sleep(0.3)
        await runner.cleanup()
        assert len(found) == 2

    asyncio.run(play())


def test_routing_ends_when_both_servers_have_been_asked() -> None:
    async def play() -> None:
        async with between(chunked(TOKEN, DONE), chunked(TOKEN, DONE)) as (b, _, _):
            await b.generate(2, 1)
            assert (await b.samples())[("voltana_routing_seconds_count", "")] == 1
            upstream = b.service.fleet.workers["decode"][0].upstream
            upstream.close()
            upstream.port = 1  # nobody listens there
            await b.generate(2, 1)
            assert (await b.samples())[("voltana_routing_seconds_count", "")] == 1

    asyncio.run(play())


def test_a_job_that_dies_is_told_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet_module, "RESTART_S", 0.2)
    told: list[object] = []
    real = InstanceTracker.on_iteration

    def fail_once(self: InstanceTracker, record: Any) -> None:  # noqa: ANN401
        if self.state.phase == "decode" and not told:
            told.append(record)
            raise RuntimeError("a bug")
        real(self, record)

    monkeypatch.setattr(InstanceTracker, "on_iteration", fail_once)

    async def play() -> None:
        async with bench(metrics=f"ipc://{tmp_path}/{{phase}}-{{index}}") as b:
            await asyncio.sleep(0.3)  # until the subscription stands
            await b.generate(4, 3)
            await asyncio.sleep(0.6)
            async with b.client.get(b.url + "/health") as answer:
                assert (await answer.json())["died"] == {"metrics of decode-0": 1}
            await b.generate(4, 3)
            await asyncio.sleep(0.2)
            assert b.service.fleet.workers["decode"][0].tracker.num_iterations == 3

    asyncio.run(play())
    assert "metrics of decode-0: the job died and is started again" in caplog.text
