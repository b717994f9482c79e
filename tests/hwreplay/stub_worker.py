"""Small servers that speak SGLang's prefill/decode HTTP and its forward-pass metrics.

They have a real scheduler loop whose iteration times are stated, so that what a client sees can be
worked out by hand. A pair hands the "KV" over by its room, as SGLang does: decode answers nothing
before prefill has done that room's prompt. By hand: `python -m tests.hwreplay.stub_worker`; servers
in processes of their own meet in a folder (`--rooms`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvloop
import zmq
from aiohttp import web

from tests.conftest import ROOT
from tests.hwreplay.stub_rooms import FileRooms, Room
from voltana.hwreplay.router.body import CHAT, COMPLETIONS, GENERATE, parse_body
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

HOST = "127.0.0.1"
MODEL = str(ROOT / "hwreplay/engines/sglang/llama-3.1-8b")
VOCAB_SIZE = 128256
"""Of that model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StubTimes:
    """Iteration times: prefill `base + tokens · each`, decode `base + batch · each`."""

    prefill_base_s: float = 0.002
    prefill_token_s: float = 0.0
    decode_base_s: float = 0.002
    decode_request_s: float = 0.0
    max_running: int = 1000

    def prefill_s(self, tokens: int) -> float:
        return self.prefill_base_s + self.prefill_token_s * tokens

    def decode_s(self, batch_size: int) -> float:
        return self.decode_base_s + self.decode_request_s * batch_size


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request inside a server."""

    room: Room
    input_tokens: int
    output_tokens: int
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    made: int = 0
    is_gone: bool = False
    has_logprobs: bool = False


class StubWorker:
    """One server. `rooms` is shared by a fleet."""

    def __init__(
        self,
        phase: Phase,
        rooms: dict[int, Room],
        times: StubTimes,
        metrics: str | None = None,
    ) -> None:
        self.phase = phase
        self.url = ""
        self.seen: list[dict[str, Any]] = []
        """Every request body, in order of arrival."""
        self.cancelled = 0
        self.is_frozen = False
        self.is_hung = False
        """The scheduler stands still while the HTTP side answers its health check."""
        self.fail_next: list[int] = []
        """HTTP statuses to answer the next requests with."""
        self.abort_after: int | None = None
        """Decode reports a failure inside the stream after so many tokens."""
        self.model: str | None = MODEL
        """What /model_info names, as SGLang does: a folder, or a name on a hub."""
        self._rooms = rooms
        self._times = times
        self._jobs: deque[Job] = deque()
        self._work = asyncio.Event()
        self._sequence = 0
        self._feed: zmq.Socket[bytes] | None = None
        self._zmq: zmq.Context[zmq.Socket[bytes]] | None = None
        if metrics is not None:
            self._zmq = zmq.Context()
            self._feed = self._zmq.socket(zmq.PUB)
            self._feed.bind(metrics)

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=2**26)
        for path in (GENERATE, COMPLETIONS, CHAT):
            app.router.add_post(path, self._serve)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/health", self._loads)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, port, backlog=1024)
        await site.start()
        self.port = int(self._runner.addresses[0][1])
        self.url = f"http://{HOST}:{self.port}"
        loops = {PREFILL: self._prefill_loop, DECODE: self._decode_loop, COLOCATED: self._both_loop}
        loop = loops[self.phase]()
        self._task = asyncio.create_task(loop)

    async def die(self) -> None:
        """Like kill -9: the listener and every connection go at once."""
        if self._task.done():
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()
        if self._feed is not None and self._zmq is not None:
            self._feed.close(linger=0)
            self._zmq.term()
            self._feed = None

    async def _loads(self, request: web.Request) -> web.Response:
        await self._thaw()
        return web.json_response({"loads": []})

    async def _models(self, request: web.Request) -> web.Response:
        entries = [{"id": self.model, "object": "model"}]
        return web.json_response({"object": "list", "data": entries})

    async def _model_info(self, request: web.Request) -> web.Response:
        await self._thaw()
        if self.model is None:
            raise web.HTTPNotFound
        return web.json_response({"model_path": self.model, "model_type": "llama"})

    async def _thaw(self) -> None:
        while self.is_frozen:
            await asyncio.sleep(0.01)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        asked_ns = time.monotonic_ns()
        data = await request.read()
        if self.fail_next:
            return web.json_response({"error": "planned"}, status=self.fail_next.pop(0))
        body = parse_body(request.path, data, VOCAB_SIZE)
        fields = json.loads(data)
        self.seen.append(fields)
        is_both = self.phase == COLOCATED
        room = Room() if is_both else self._rooms.setdefault(fields["bootstrap_room"], Room())
        room.asked_ns = asked_ns
        tokens = 1 if self.phase == PREFILL else body.max_new_tokens
        job = Job(
            room=room, input_tokens=body.input_tokens, output_tokens=tokens,
            has_logprobs=bool(fields.get("logprobs")),
        )  # fmt: skip
        self._jobs.append(job)
        self._work.set()
        try:
            return await self._answer(request, job, is_stream=body.is_stream)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            job.is_gone = True

    async def _answer(
        self, request: web.Request, job: Job, *, is_stream: bool
    ) -> web.StreamResponse:
        if not is_stream:
            while await job.tokens.get() is not None:
                pass
            return web.json_response(_whole(request.path, job))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        count = 0
        while await job.tokens.get() is not None:
            count += 1
            if count == 1:
                await response.prepare(request)
            if self.abort_after is not None and count > self.abort_after:
                error = {"error": {"message": "KV transfer failed", "code": 500}}
                await response.write(b"data: " + msgspec.json.encode(error) + b"\n\n")
                return response
            event = msgspec.json.encode(_event(request.path, job, count))
            await response.write(b"data: " + event + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _prefill_loop(self) -> None:
        while True:
            await self._wait_for_work()
            batch = [job for job in self._jobs if not job.is_gone]
            self._jobs.clear()
            if not batch:
                continue
            tokens = sum(job.input_tokens for job in batch)
            duration_s = self._times.prefill_s(tokens)
            await self._iterate(
                duration_s, num_prefill_requests=len(batch), sum_prefill_tokens=tokens
            )
            for job in batch:
                job.room.set()
                self._give(job)

    async def _decode_loop(self) -> None:
        running: list[Job] = []
        due_s = 0.0
        while True:
            if not running:
                await self._wait_for_arrived()
            waiting = [job for job in self._jobs if not job.is_gone]
            self._jobs = deque(waiting)
            for job in waiting:
                if len(running) < self._times.max_running and job.room.is_set():
                    running.append(job)
                    self._jobs.remove(job)
            if not running:
                continue
            context = sum(job.input_tokens + job.made for job in running)
            loop = asyncio.get_running_loop()
            due_s = max(due_s, loop.time()) + self._times.decode_s(len(running))
            await self._iterate(
                due_s - loop.time(), num_decode_requests=len(running), sum_decode_kv_tokens=context
            )
            for job in running:
                self._give(job)
            running = [j for j in running if j.made < j.output_tokens and not j.is_gone]

    async def _both_loop(self) -> None:
        """Prompts first, decoding stands meanwhile: a prompt's iteration makes its first token."""
        running: list[Job] = []
        while True:
            if not running:
                await self._wait_for_work()
            batch = [job for job in self._jobs if not job.is_gone]
            self._jobs.clear()
            if batch:
                tokens = sum(job.input_tokens for job in batch)
                await self._iterate(
                    self._times.prefill_s(tokens),
                    num_prefill_requests=len(batch), sum_prefill_tokens=tokens,
                )  # fmt: skip
                running += batch
            elif running:
                batch = running
                context = sum(job.input_tokens + job.made for job in running)
                await self._iterate(
                    self._times.decode_s(len(running)),
                    num_decode_requests=len(running), sum_decode_kv_tokens=context,
                )  # fmt: skip
            for job in batch:
                self._give(job)
            running = [j for j in running if j.made < j.output_tokens and not j.is_gone]

    async def _wait_for_work(self) -> None:
        if not self._jobs:
            self._work.clear()
            await self._work.wait()

    async def _wait_for_arrived(self) -> None:
        while True:
            await self._wait_for_work()
            if any(j.is_gone or j.room.is_set() for j in self._jobs):
                return
            await asyncio.sleep(0.0005)

    @staticmethod
    def _give(job: Job) -> None:
        job.made += 1
        job.tokens.put_nowait(job.made)
        if job.made == job.output_tokens:
            job.tokens.put_nowait(None)

    async def _iterate(self, duration_s: float, **scheduled: int) -> None:
        await asyncio.sleep(duration_s)
        await self._thaw()
        while self.is_hung:
            await asyncio.sleep(0.01)
        if self._feed is not None:
            record = {
                "version": 1, "worker_id": "stub", "dp_rank": 0, "counter_id": self._sequence,
                "wall_time": duration_s, "scheduled_requests": scheduled, "queued_requests": {},
            }  # fmt: skip
            self._sequence += 1
            number = self._sequence.to_bytes(8, "big")
            self._feed.send_multipart((b"", number, msgspec.msgpack.encode(record)), zmq.NOBLOCK)


def _event(path: str, job: Job, count: int) -> dict[str, Any]:
    reason = {"type": "length", "length": count} if count == job.output_tokens else None
    if path == GENERATE:
        meta = {
            "prompt_tokens": job.input_tokens, "completion_tokens": count, "finish_reason": reason,
            "asked_ns": job.room.asked_ns, "written_ns": time.monotonic_ns(),
        }  # fmt: skip
        return {"text": "", "output_ids": [count], "meta_info": meta}
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason and "length"}
    choice |= {"delta": {"content": "x"}} if path == CHAT else {"text": "x"}
    kind = "chat.completion.chunk" if path == CHAT else "text_completion"
    event: dict[str, Any] = {"id": "stub", "object": kind, "model": "stub", "choices": [choice]}
    if reason is not None:
        event["usage"] = _usage(job)
    return event


def _usage(job: Job) -> dict[str, int]:
    return {
        "prompt_tokens": job.input_tokens, "completion_tokens": job.output_tokens,
        "total_tokens": job.input_tokens + job.output_tokens,
    }  # fmt: skip


def _whole(path: str, job: Job) -> dict[str, Any]:
    """An answer that is no stream: a token is an x, as likely as not."""
    if path == GENERATE:
        return _event(path, job, job.output_tokens)
    tokens, text = ["x"] * job.output_tokens, "x" * job.output_tokens
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    if path == CHAT:
        choice["message"] = {"role": "assistant", "content": text}
        told: Any = {"content": [{"token": t, "logprob": -0.5, "top_logprobs": []} for t in tokens]}
    else:
        choice["text"] = text
        told = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)}
    if job.has_logprobs:
        choice["logprobs"] = told
    return {
        "id": "stub", "object": "chat.completion" if path == CHAT else "text_completion",
        "model": "stub", "choices": [choice], "usage": _usage(job),
    }  # fmt: skip


@dataclass(slots=True, kw_only=True)
class StubFleet:
    """Several servers in this process."""

    prefill: list[StubWorker]
    decode: list[StubWorker]
    colocated: list[StubWorker] = field(default_factory=list)

    @property
    def workers(self) -> list[StubWorker]:
        return [*self.prefill, *self.decode, *self.colocated]

    def table(self, metrics: str | None = None) -> dict[str, list[dict[str, str]]]:
        """As a `[fleet]` table lists it; `metrics` as in `stub_fleet`."""
        return {
            phase: [
                {"url": w.url}
                | ({} if metrics is None else {"metrics": metrics.format(phase=phase, index=i)})
                for i, w in enumerate(workers)
            ]
            for phase, workers in (
                ((COLOCATED, self.colocated),)
                if self.colocated
                else ((PREFILL, self.prefill), (DECODE, self.decode))
            )
        }


@contextlib.asynccontextmanager
async def stub_fleet(
    num_prefill: int = 1,
    num_decode: int = 1,
    times: StubTimes | None = None,
    metrics: str | None = None,
    *,
    rooms: dict[int, Room] | None = None,
    port: int = 0,
    num_colocated: int = 0,
) -> AsyncIterator[StubFleet]:
    """Run a fleet; `metrics` is a template such as ipc:///tmp/x-{phase}-{index}.

    `rooms` are shared with other processes; `port` is for a fleet of one server.
    """
    rooms = {} if rooms is None else rooms

    def make(phase: Phase, index: int) -> StubWorker:
        address = None if metrics is None else metrics.format(phase=phase, index=index)
        return StubWorker(phase, rooms, times or StubTimes(), address)

    fleet = StubFleet(
        prefill=[make(PREFILL, i) for i in range(num_prefill)],
        decode=[make(DECODE, i) for i in range(num_decode)],
        colocated=[make(COLOCATED, i) for i in range(num_colocated)],
    )
    for worker in fleet.workers:
        await worker.start(port)
    try:
        yield fleet
    finally:
        for worker in fleet.workers:
            await worker.die()


async def _serve(arguments: argparse.Namespace) -> None:
    times = StubTimes(
        prefill_base_s=arguments.prefill_s,
        prefill_token_s=arguments.prefill_token_s,
        decode_base_s=arguments.decode_s,
        decode_request_s=arguments.decode_request_s,
    )
    rooms = None if arguments.rooms is None else FileRooms(arguments.rooms)
    async with stub_fleet(
        arguments.prefill,
        arguments.decode,
        times,
        arguments.metrics,
        rooms=rooms,
        port=arguments.port,
    ) as fleet:
        for worker in fleet.prefill:
            worker.fail_next = [500] * arguments.prefill_failures
        sys.stdout.write(json.dumps(fleet.table(arguments.metrics)) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--prefill-s", type=float, default=0.002)
    parser.add_argument("--prefill-token-s", type=float, default=0.0)
    parser.add_argument("--decode-s", type=float, default=0.002)
    parser.add_argument("--decode-request-s", type=float, default=0.0)
    parser.add_argument("--metrics")
    parser.add_argument("--rooms", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefill-failures", type=int, default=0)
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
