"""The router's own HTTP client, against a server that sends any bytes."""

from __future__ import annotations

import asyncio
import itertools
import socket

import pytest

from tests.hwreplay.router.scripted_server import chunked, scripted
from tests.hwreplay.stub_worker import HOST
from voltana.hwreplay.router.servers import upstream as module
from voltana.hwreplay.router.servers.upstream import (
    MAX_CHUNK_BYTES,
    PAUSE_BYTES,
    ConnectTimeoutError,
    RefusedError,
    Upstream,
    UpstreamError,
)

JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = JSON + b"Content-Length: 5\r\n\r\nhello"


async def ask(upstream: Upstream) -> tuple[int, str, bytes]:
    async with upstream.post("/generate", b"{}", lambda: None) as answer:
        return answer.status, answer.content_type, await answer.read()


@pytest.mark.parametrize(
    "raw",
    [
        WHOLE,
        JSON + b"\r\nhello",  # no length: its end is the connection's
        JSON + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        JSON + b"transfer-encoding: chunked\r\n\r\n1;x=y\r\nh\r\n4\r\nello\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE,
    ],
)
def test_every_framing_however_it_is_cut(raw: bytes) -> None:
    async def cut_at(cut: int) -> None:
        async with scripted(raw[:cut], raw[cut:]) as server:
            found = await ask(Upstream(server.url, 5.0))
            assert found == (200, "application/json", b"hello"), cut

    async def play() -> None:
        await asyncio.gather(*(cut_at(cut) for cut in range(1, len(raw))))

    asyncio.run(play())


def test_the_request_is_written_as_it_should_be() -> None:
    async def play() -> None:
        async with scripted(WHOLE) as server:
            await ask(Upstream(server.url + "/base/", 1.0))
            host = server.url.removeprefix("http://").encode()
            assert server.seen == [
                b"POST /base/generate HTTP/1.1\r\nHost: " + host + b"\r\n"
                b"Content-Type: application/json\r\n"
                b"Content-Length: 2\r\n\r\n{}"
            ]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 OK 200\r\n\r\n", "no HTTP"),
        (JSON + b"Content-Length: -4\r\n\r\nhello", "no HTTP"),
        (JSON + b"Content-Length: 0x5\r\n\r\nhello", "no HTTP"),
        (JSON + b"Content-Length: 0_5\r\n\r\nhello", "no HTTP"),
        (JSON + b"Content-Length: +5\r\n\r\nhello", "no HTTP"),
        (JSON + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "Duplicate"),
        (JSON + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\nhello", "Duplicate"),
        (JSON + CHUNKED[:-2] + b"Content-Length: 5\r\n\r\nhello", "can't be present"),
        (JSON + b"Content-Encoding: gzip\r\n\r\nhello", "a content encoding of b'gzip'"),
        (
            JSON + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "a transfer encoding of b'gzip, chunked'",
        ),
        (JSON + b"Transfer-Encoding: gzip\r\n\r\nhello", "a transfer encoding of b'gzip'"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "switches protocols"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "no end"),
        (JSON + b"Content-Length: 6\r\n\r\nhello", "connection lost"),
        (JSON + CHUNKED + b"xyz\r\n", "no HTTP"),
        (JSON + CHUNKED + b"-1\r\n\r\n", "no HTTP"),
        (JSON + CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", "no HTTP"),
        (JSON + CHUNKED + b"0_5\r\nhello\r\n0\r\n\r\n", "no HTTP"),
        (JSON + CHUNKED + b"3\r\nhello\r\n", "Expected LF after chunk data"),
        (JSON + CHUNKED + b"5\r\nhello\r\n", "connection lost"),
        (JSON + CHUNKED + b"0\r\nA: " + b"x" * (2 * MAX_CHUNK_BYTES), "its chunk has no end"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000, "no end"),
        (b"", "connection lost"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_answer_is_an_error_of_one_line(raw: bytes, message: str) -> None:
    async def play() -> None:
        async with scripted(raw) as server:
            with pytest.raises(UpstreamError, match=message) as found:
                await ask(Upstream(server.url, 1.0))
            assert "\n" not in str(found.value)

    asyncio.run(play())


def test_what_came_before_a_loss_is_still_given() -> None:
    async def play() -> None:
        async with scripted(*chunked(b"a", b"b", is_ended=False)) as server:
            upstream = Upstream(server.url, 1.0)
            async with upstream.post("/generate", b"{}", lambda: None) as answer:
                await asyncio.sleep(0.2)
                assert await answer.readany() == b"ab"
                with pytest.raises(UpstreamError):
                    await answer.readany()

    asyncio.run(play())


def test_connections_are_kept_until_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with scripted(WHOLE, is_kept=True) as server:
            upstream = Upstream(server.url, 1.0)
            for _ in range(3):
                await ask(upstream)
            assert (len(server.seen), server.num_connections) == (3, 1)
            await asyncio.gather(ask(upstream), ask(upstream))
            assert server.num_connections == 2
            monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.0)
            await asyncio.sleep(0.01)
            await ask(upstream)
            await asyncio.sleep(0.1)  # until the server has seen it
            assert (server.num_connections, server.num_lost) == (3, 2)
            upstream.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    "raw",
    [
        JSON + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        WHOLE + b"HTTP/1.1 200 OK\r\n",  # an answer that nobody has asked for
    ],
)
def test_a_connection_that_cannot_be_trusted_is_not_kept(raw: bytes) -> None:
    async def play() -> None:
        async with scripted(raw, is_kept=True) as server:
            upstream = Upstream(server.url, 1.0)
            for _ in range(2):
                assert (await ask(upstream))[2] == b"hello"
            assert server.num_connections == 2

    asyncio.run(play())


def test_an_answer_left_early_costs_its_connection() -> None:
    async def play() -> None:
        async with scripted(*chunked(b"a" * 10, b"b" * 10), is_kept=True) as server:
            upstream = Upstream(server.url, 1.0)
            async with upstream.post("/generate", b"{}", lambda: None) as answer:
                assert await answer.readany() == b"a" * 10
            assert (await ask(upstream))[2] == b"a" * 10 + b"b" * 10
            assert (server.num_connections, server.num_lost) == (2, 1)

    asyncio.run(play())


def test_a_server_waits_for_a_slow_reader() -> None:
    async def play() -> None:
        pieces = chunked(*[b"x" * 2**18] * 40)
        async with scripted(*pieces) as server:
            upstream = Upstream(server.url, 1.0)
            async with upstream.post("/generate", b"{}", lambda: None) as answer:
                await asyncio.sleep(0.5)
                first = await answer.readany()
                assert PAUSE_BYTES < len(first) <= 4 * PAUSE_BYTES
                assert len(first) + len(await answer.read()) == 40 * 2**18

    asyncio.run(play())


def test_nobody_there_is_told_from_nobody_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*args: object, **more: object) -> None:
        await asyncio.sleep(60)

    async def play() -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        with pytest.raises(RefusedError):
            await ask(Upstream(f"http://{HOST}:{port}", 1.0))
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
        with pytest.raises(ConnectTimeoutError, match=r"no connection within 0\.1 s"):
            await ask(Upstream(f"http://{HOST}:{port}", 0.1))

    asyncio.run(play())
