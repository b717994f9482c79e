"""One request on its pair: ask both servers, stream from decode, try another pair if need be."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Final, Protocol

import aiohttp

from hwreplay.clock import RunClock
from hwreplay.router.body import Body
from hwreplay.router.config import RouterConfig
from hwreplay.router.errors import engine_error
from hwreplay.router.fleet import Attempt, NoWorkerError, RouterFleet, Worker
from hwreplay.router.prometheus import RouterMetrics
from profiles.errors import VoltanaError

EVENT: Final = b"data: "
LAST_EVENT: Final = b"data: [DONE]"
SERVER_ERROR: Final = 500
DRAIN_S: Final = 1.0
"""Longest wait for the prefill server's last word after the answer, to keep its connection."""
JSON_HEADERS: Final = {"Content-Type": "application/json"}

Pair = tuple[Worker, Worker]


class Sink(Protocol):
    """Where the answer goes."""

    async def begin(self, status: int, content_type: str, pair: Pair) -> None:
        """The decode server has begun to answer."""

    async def write(self, chunk: bytes) -> None:
        """A piece of the answer; waits while the client is slow."""


class RequestFailedError(VoltanaError):
    """The fleet has failed a request; the message goes to the client."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is a word for counting."""
        super().__init__(message)
        self.reason = reason


class PassedError(VoltanaError):
    """A server has refused the request itself: its answer goes to the client as it is."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"the server answers {status}")
        self.status = status
        self.content_type = content_type
        self.body = body


class _AttemptError(VoltanaError):
    """An attempt has come to nothing; another pair may do."""

    def __init__(
        self, reason: str, message: str, worker: Worker | None, *, was_there: bool = False
    ) -> None:
        """`was_there`: the server was lost with the request on it."""
        super().__init__(message)
        self.reason = reason
        self.worker = worker
        self.was_there = was_there


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way."""

    request_id: int
    body: Body
    arrival_s: float
    sink: Sink
    headers: dict[str, str] = field(default_factory=dict)
    attempt: Attempt | None = None
    last_piece_s: float = 0.0
    is_prefilled: bool = False
    is_begun: bool = False
    """Something of the answer has gone to the client."""


class Proxy:
    """Sends requests to the fleet."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: RouterFleet,
        metrics: RouterMetrics,
        clock: RunClock,
        session: aiohttp.ClientSession,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_s)

    async def serve(self, call: Call) -> None:
        """Serve one request to its end.

        Raises:
            NoWorkerError: No healthy pair.
            RequestFailedError: It has started and its server was lost, or every attempt failed.
            PassedError: A server has refused the request itself.
        """
        excluded: set[Worker] = set()
        failed: _AttemptError | None = None
        lost = 0
        for attempt in range(self._config.max_attempts):
            try:
                pair = self._fleet.choose(call.request_id, call.arrival_s, call.body, excluded)
            except NoWorkerError as error:
                if failed is None:
                    raise
                raise RequestFailedError(failed.reason, f"{failed}; then {error}") from None
            if attempt:
                self._metrics.retries.inc()
            try:
                await self._attempt(call, pair)
            except _AttemptError as error:
                if call.is_begun:
                    raise RequestFailedError(error.reason, str(error)) from None
                failed = error
                lost += error.was_there
                if lost >= self._config.max_lost:
                    raise RequestFailedError(
                        error.reason, f"{error}; it is not tried again, {lost} servers died with it"
                    ) from None
                excluded |= set(pair) if error.worker is None else {error.worker}
            else:
                return
        assert failed is not None
        tries = self._config.max_attempts
        raise RequestFailedError(failed.reason, f"{failed}; {tries} pairs were tried")

    async def _attempt(self, call: Call, pair: Pair) -> None:
        """One pair, in a task of its own that the loss of a server can end."""
        task = asyncio.create_task(self._run(call, pair))
        call.attempt = attempt = Attempt(task)
        for worker in pair:
            worker.attempts.add(attempt)
        try:
            await asyncio.wait({task})
        finally:
            await _end(task)
            for worker in pair:
                worker.attempts.discard(attempt)
            self._fleet.release(pair, call.request_id)
        if task.cancelled():
            lost = next((w for w in pair if not w.is_healthy), None)
            why = attempt.loss or "it was cancelled"
            raise _AttemptError("server_lost", why, lost, was_there=True)
        task.result()

    async def _run(self, call: Call, pair: Pair) -> None:
        """Ask both. Decode's end is the request's; prefill's failure counts until decode begins."""
        call.is_prefilled = False
        host, port = pair[0].config.reachable_host, pair[0].config.bootstrap_port
        data = call.body.encode(host, port, secrets.randbits(63))
        prefill = asyncio.create_task(self._prefill(call, pair, data))
        decode = asyncio.create_task(self._decode(call, pair, data))
        self._metrics.routing_s.observe(self._clock.now_s() - call.arrival_s)
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
            if not decode.done() and (call.is_begun or prefill.exception() is None):
                await asyncio.wait({decode})
            if decode.done() and decode.exception() is None:
                await asyncio.wait({prefill}, timeout=DRAIN_S)
        finally:
            await _end(prefill)
            await _end(decode)
        if not call.is_begun and not prefill.cancelled():
            prefill.result()
        decode.result()

    async def _prefill(self, call: Call, pair: Pair, data: bytes) -> None:
        worker = pair[0]
        try:
            async with self._post(worker, call, data) as answer:
                if answer.status >= 400:
                    raise await self._refusal(answer, worker)
                async for chunk in answer.content.iter_any():
                    worker.heard_s = self._clock.now_s()
                    self._look_for_error(chunk, worker)
                    self._mark_prefilled(call, pair)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._broken(worker, error) from None

    def _mark_prefilled(self, call: Call, pair: Pair) -> None:
        if not call.is_prefilled:
            call.is_prefilled = True
            self._fleet.prefilled(pair, call.request_id)

    async def _decode(self, call: Call, pair: Pair, data: bytes) -> None:
        worker = pair[1]
        try:
            async with self._post(worker, call, data) as answer:
                if answer.status >= 400:
                    raise await self._refusal(answer, worker)
                if call.body.is_stream:
                    await self._stream(call, pair, answer)
                else:
                    await self._whole(call, pair, answer)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._broken(worker, error) from None

    async def _whole(self, call: Call, pair: Pair, answer: aiohttp.ClientResponse) -> None:
        """Nothing goes to the client before all is there: a lost server can still be replaced."""
        data = await answer.read()
        self._first(call, pair)
        await call.sink.begin(answer.status, answer.content_type, pair)
        await call.sink.write(data)

    async def _stream(self, call: Call, pair: Pair, answer: aiohttp.ClientResponse) -> None:
        content, worker = answer.content, pair[1]
        async with asyncio.timeout(self._config.first_token_s):
            chunk = await content.readany()
        if not chunk:
            raise _AttemptError("engine_error", f"{worker.name} ends an empty stream", worker)
        self._look_for_error(chunk, None)
        self._first(call, pair)
        self._metrics.ttft_s.observe(call.last_piece_s - call.arrival_s)
        await call.sink.begin(answer.status, answer.content_type, pair)
        while chunk:
            worker.tracker.on_tokens(call.request_id, chunk.count(EVENT) or 1)
            await call.sink.write(chunk)
            self._look_for_error(chunk, None)
            chunk = await content.readany()
            now_s = worker.heard_s = self._clock.now_s()
            if chunk and not chunk.startswith(LAST_EVENT):
                self._metrics.itl_s.observe(now_s - call.last_piece_s)
            call.last_piece_s = now_s

    def _first(self, call: Call, pair: Pair) -> None:
        """The decode server has something: prefill is over and its loss no longer matters."""
        self._mark_prefilled(call, pair)
        call.is_begun = True
        call.last_piece_s = self._clock.now_s()
        self._fleet.first_token(pair[1], call.request_id, call.last_piece_s)
        if call.attempt is not None:
            pair[0].attempts.discard(call.attempt)

    def _look_for_error(self, chunk: bytes, worker: Worker | None) -> None:
        """SGLang reports a failure of its own as an event of a stream that is 200 OK."""
        found = engine_error(chunk)
        if found is None:
            return
        status, message = found
        if status < SERVER_ERROR:
            raise PassedError(status, "application/json", message.encode())
        raise _AttemptError("engine_error", f"the engine reports {message}", worker)

    def _post(
        self, worker: Worker, call: Call, data: bytes
    ) -> aiohttp.client._RequestContextManager:
        return self._session.post(
            worker.config.url.rstrip("/") + call.body.path,
            data=data,
            headers=JSON_HEADERS | call.headers,
            timeout=self._timeout,
        )

    def _broken(self, worker: Worker, error: Exception) -> _AttemptError:
        """A server that refuses connections is out at once, one that breaks them is checked."""
        message = f"{worker.name} does not answer ({type(error).__name__}: {error})"
        if isinstance(error, aiohttp.ClientConnectorError):
            asyncio.get_running_loop().call_soon(self._fleet.take_out, worker, message)
        else:
            worker.check_now.set()
        reason = "timeout" if isinstance(error, TimeoutError) else "server_lost"
        was_there = not isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
        return _AttemptError(reason, message, worker, was_there=was_there)

    @staticmethod
    async def _refusal(answer: aiohttp.ClientResponse, worker: Worker) -> VoltanaError:
        body = await answer.read()
        if answer.status < SERVER_ERROR:
            return PassedError(answer.status, answer.content_type, body)
        return _AttemptError(
            "engine_error", f"{worker.name} answers {answer.status}: {body[:200]!r}", worker
        )


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task that still runs, wait for it, and look at its error so that none is lost."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
