"""Stub servers for timing what stands in front of them: `python -m benchmarks.lean_servers`.

They cost as little as Python can: no web framework, no JSON, one timer an iteration, one write a
piece. Prefill hands a request over to decode by its room; every piece says when the later of both
servers was asked and when the piece was written. All requests are alike, as told on the command
line. What a client sees of `tests.hwreplay.stub_worker` is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import msgspec
import uvloop
import zmq
from httptools import HttpRequestParser

HOST: Final = "127.0.0.1"
ROOM: Final = re.compile(rb'"bootstrap_room":\s*(\d+)')
STREAM: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
PIECE: Final = (
    b'data: {"text":"","output_ids":[%d],"meta_info":{"prompt_tokens":%d,"completion_tokens":%d,'
    b'"finish_reason":%s,"asked_ns":%d,"written_ns":%d}}\n\n'
)
LENGTH: Final = b'{"type":"length","length":%d}'
DONE: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
HEALTHY: Final = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"loads":[]}'
)


@dataclass(slots=True)
class Room:
    """Where the halves of a request meet."""

    asked_ns: int = 0
    """When the later of both servers was asked."""
    is_prefilled: bool = False
    enter: Callable[[], None] | None = None
    """What decode does once it is."""


class Exchange(asyncio.Protocol):
    """A connection and the request that is open on it. The parser calls `on_...`."""

    def __init__(self, server: LeanServer) -> None:
        self._server = server
        self._parser = HttpRequestParser(self)
        self._body: list[bytes] = []
        self.transport: asyncio.Transport
        self.asked_ns = self.made = 0
        self.room = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """A piece of the request."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        if self._parser.get_method() == b"GET":
            self.transport.write(HEALTHY)
            return
        found = ROOM.search(b"".join(self._body))
        self._body.clear()
        assert found is not None
        self.room, self.asked_ns, self.made = int(found[1]), time.monotonic_ns(), 0
        self._server.ask(self)

    def give(self, asked_ns: int, input_tokens: int, most: int) -> bool:
        """Write a token; returns whether it was the last one of `most`."""
        self.made += 1
        is_last = self.made == most
        reason = LENGTH % most if is_last else b"null"
        stamps = asked_ns, time.monotonic_ns()
        event = PIECE % (self.made, input_tokens, self.made, reason, *stamps)
        head = STREAM if self.made == 1 else b""
        self.transport.write(
            b"%s%x\r\n%s\r\n%s" % (head, len(event), event, DONE if is_last else b"")
        )
        return is_last


class LeanServer:
    """One server: a batch an iteration, all that is there at its start."""

    def __init__(self, rooms: dict[int, Room], arguments: argparse.Namespace, feed: str) -> None:
        self._rooms = rooms
        self._arguments = arguments
        self._is_prefill = "prefill" in feed
        self._batch: list[Exchange] = []
        self._waiting: list[Exchange] = []
        self._due_s = 0.0
        self._is_running = False
        self._loop = asyncio.get_running_loop()
        self._sequence = 0
        self._feed = zmq.Context.instance().socket(zmq.PUB)
        self._feed.bind(feed)

    def ask(self, request: Exchange) -> None:
        """Take a request; decode's waits for its prompt."""
        room = self._rooms.setdefault(request.room, Room())
        room.asked_ns = request.asked_ns
        if self._is_prefill or room.is_prefilled:
            self.enter(request)
        else:
            room.enter = partial(self.enter, request)

    def enter(self, request: Exchange) -> None:
        """It runs from the next iteration on."""
        self._waiting.append(request)
        if not self._is_running:
            self._is_running = True
            self._due_s = self._loop.time()
            self._begin()

    def _begin(self) -> None:
        self._batch += self._waiting
        self._waiting = []
        if not self._batch:
            self._is_running = False
            return
        self._due_s = max(self._due_s + self._arguments.iteration_s, self._loop.time())
        self._loop.call_at(self._due_s, self._end)

    def _end(self) -> None:
        self._publish(len(self._batch))
        self._batch = [r for r in self._batch if not self._give(r)]
        self._begin()

    def _give(self, request: Exchange) -> bool:
        """Another token of a request; returns whether it is done."""
        if request.transport.is_closing():
            return True
        room, tokens = self._rooms[request.room], self._arguments.input_tokens
        if not self._is_prefill:
            is_done = request.give(room.asked_ns, tokens, self._arguments.output_tokens)
            if is_done:
                del self._rooms[request.room]
            return is_done
        room.is_prefilled = True
        if room.enter is not None:
            room.enter()
        return request.give(room.asked_ns, tokens, 1)

    def _publish(self, size: int) -> None:
        tokens = size * self._arguments.input_tokens
        scheduled = (
            {"num_prefill_requests": size, "sum_prefill_tokens": tokens}
            if self._is_prefill
            else {"num_decode_requests": size, "sum_decode_kv_tokens": tokens}
        )
        record = {
            "version": 1, "worker_id": "stub", "dp_rank": 0, "counter_id": self._sequence,
            "wall_time": self._arguments.iteration_s, "scheduled_requests": scheduled,
            "queued_requests": {},
        }  # fmt: skip
        self._sequence += 1
        number = self._sequence.to_bytes(8, "big")
        self._feed.send_multipart((b"", number, msgspec.msgpack.encode(record)), zmq.NOBLOCK)


async def serve(arguments: argparse.Namespace) -> None:
    """Print the `[fleet]` table, then serve for ever."""
    rooms: dict[int, Room] = {}
    table: dict[str, list[dict[str, str]]] = {}
    loop = asyncio.get_running_loop()
    for phase in ("prefill", "decode"):
        table[phase] = []
        for index in range(getattr(arguments, phase)):
            feed = arguments.metrics.format(phase=phase, index=index)
            server = LeanServer(rooms, arguments, feed)
            listener = await loop.create_server(
                lambda server=server: Exchange(server),  # type: ignore[misc]
                HOST,
                0,
                backlog=1024,
            )
            port = listener.sockets[0].getsockname()[1]
            table[phase].append({"url": f"http://{HOST}:{port}", "metrics": feed})
    sys.stdout.write(json.dumps(table) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    """Run until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--iteration-s", type=float, default=0.005)
    parser.add_argument("--input-tokens", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    parser.add_argument("--metrics", required=True, help="ZMQ address with {phase} and {index}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
