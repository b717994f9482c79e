"""One request on its pair: ask both servers, stream from decode, try another pair if need be."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.router.body import Body
from voltana.hwreplay.router.config import RouterConfig
from voltana.hwreplay.router.errors import (
    EVENT,
    LAST_EVENT,
    SERVER_ERROR,
    EventWatch,
    PassedError,
    RequestFailedError,
    error_body,
)
from voltana.hwreplay.router.prometheus import RouterMetrics
from voltana.hwreplay.router.servers.attempt import Attempt, AttemptError, NoWorkerError, Worker
from voltana.hwreplay.router.servers.fleet import Pair, RouterFleet
from voltana.hwreplay.router.servers.upstream import (
    Connection,
    ConnectTimeoutError,
    RefusedError,
    UpstreamError,
)
from voltana.hwreplay.router.sink import NONE

DRAIN_S: Final = 1.0
"""Time for a prefill server to end its answer after decode's; then its request is cancelled."""
CLIENT_ERROR: Final = 400
ENERGY_HEADER: Final = "X-Voltana-Energy-J"


class Sink(Protocol):
    """Where the answer goes."""

    async def begin(
        self, status: int, content_type: str, pair: Pair, more: Mapping[str, str] = NONE
    ) -> None:
        """The decode server has begun to answer.

        Args:
            status: HTTP status.
            content_type: HTTP header.
            pair: The servers that serve it.
            more: Further headers.
        """

    async def write(self, piece: bytes) -> None:
        """A piece of the answer; waits while the client is slow."""

    async def end(self, piece: bytes) -> None:
        """The last piece."""


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way."""

    request_id: int
    body: Body
    arrival_s: float
    sink: Sink
    attempt: Attempt | None = None
    pair: Pair | None = None
    """The servers that it was last sent to."""
    first_s: float | None = None
    """When the first piece of the answer came, on the run's clock."""
    pieces: int = 0
    """Of the answer's stream: a token each, unless the server puts several in one."""
    last_piece_s: float = 0.0
    is_prefilled: bool = False
    is_begun: bool = False
    """Something of the answer has gone to the client."""

    def as_dict(self) -> dict[str, object]:
        """Keys of its line in the access log."""
        found: dict[str, object] = {
            "request_id": self.request_id, "input_tokens": self.body.input_tokens,
            "max_new_tokens": self.body.max_new_tokens, "pieces": self.pieces,
        }  # fmt: skip
        if self.first_s is not None:
            found["ttft_s"] = round(self.first_s - self.arrival_s, 6)
        if self.pair is not None:
            found["prefill"], found["decode"] = (w.config.instance_id for w in self.pair)
        return found


class Proxy:
    """Sends requests to the fleet."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: RouterFleet,
        metrics: RouterMetrics,
        clock: RunClock,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._draining: set[asyncio.Task[None]] = set()

    async def serve(self, call: Call) -> None:
        """Serve one request to its end.

        Raises:
            NoWorkerError: No healthy pair.
            RequestFailedError: It has started and its server was lost, or every attempt failed.
            PassedError: A server has refused the request itself before it has started.
        """
        excluded: set[Worker] = set()
        failed: AttemptError | None = None
        lost: list[str] = []
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
            except PassedError as error:
                if not call.is_begun:
                    raise
                raise RequestFailedError("refused", str(error)) from None
            except AttemptError as error:
                if call.is_begun:
                    raise RequestFailedError(error.reason, str(error)) from None
                if error.is_final:
                    raise RequestFailedError(error.reason, str(error)) from None
                failed = error
                lost += await self._fleet.lost(_asked(call))
                if len(lost) >= self._config.max_lost:
                    names = " and ".join(lost) + (" was" if len(lost) == 1 else " were")
                    raise RequestFailedError(
                        error.reason, f"{error}; it is not tried again, {names} lost with it"
                    ) from None
                excluded |= set(pair) if error.worker is None else {error.worker}
            else:
                return
        assert failed is not None
        tries = self._config.max_attempts
        raise RequestFailedError(failed.reason, f"{failed}; {tries} pairs were tried")

    async def _attempt(self, call: Call, pair: Pair) -> None:
        """One pair; the loss of a server ends it."""
        call.attempt, call.pair = (attempt := Attempt()), pair
        for worker in pair:
            worker.attempts.add(attempt)
        try:
            with attempt:
                await self._run(call, pair)
        finally:
            for worker in pair:
                worker.attempts.discard(attempt)
            self._fleet.release(pair, call.request_id)

    async def _run(self, call: Call, pair: Pair) -> None:
        """Ask both. Decode's end is the request's; prefill's failure counts until decode begins."""
        call.is_prefilled = False
        if pair[0] is pair[1]:
            await self._decode(call, pair, call.body.as_it_came())
            return
        host, port = pair[0].config.reachable_host, pair[0].config.bootstrap_port
        data = call.body.encode(host, port, secrets.randbits(63))
        prefill = asyncio.create_task(self._prefill(call, pair, data))
        prefill.add_done_callback(partial(_on_prefill_end, call))
        try:
            await self._decode(call, pair, data)
        except BaseException:
            prefill.cancel()
            await asyncio.wait({prefill})
            raise
        if not prefill.done():
            self._drain(prefill)

    def _drain(self, prefill: asyncio.Task[None]) -> None:
        """Let it end by itself: the client has its answer, and may be gone by then."""
        self._draining.add(prefill)
        prefill.add_done_callback(self._draining.discard)
        asyncio.get_running_loop().call_later(DRAIN_S, prefill.cancel)

    async def _prefill(self, call: Call, pair: Pair, data: bytes) -> None:
        worker, watch = pair[0], EventWatch()
        try:
            async with self._post(worker, call, data) as answer:
                await self._check_status(answer, worker)
                while piece := await answer.readany():
                    worker.heard_s = self._clock.now_s()
                    _check_engine(watch.look(piece), worker, blamed=worker)
                    self._mark_prefilled(call, pair)
                _check_engine(watch.end(), worker, blamed=worker)
        except UpstreamError as error:
            raise self._broken(worker, call, error) from None

    def _mark_prefilled(self, call: Call, pair: Pair) -> None:
        if not call.is_prefilled:
            call.is_prefilled = True
            self._fleet.prefilled(pair, call.request_id)

    async def _decode(self, call: Call, pair: Pair, data: bytes) -> None:
        worker = pair[1]
        limit = asyncio.timeout(self._config.first_token_s)
        try:
            async with limit, self._post(worker, call, data) as answer:
                await self._check_status(answer, worker)
                if call.body.is_stream:
                    await self._stream(call, pair, answer, limit)
                else:
                    await self._whole(call, pair, answer, limit)
        except UpstreamError as error:
            raise self._broken(worker, call, error) from None
        except TimeoutError:
            late = worker if call.is_prefilled else pair[0]
            late.check_now.set()
            raise AttemptError(
                "timeout",
                f"{late.name} makes no token in {self._config.first_token_s:g} s",
                late,
                is_final=True,  # another pair would compute it again, with no better prospects
            ) from None

    async def _whole(
        self, call: Call, pair: Pair, answer: Connection, limit: asyncio.Timeout
    ) -> None:
        """Nothing goes to the client before all is there: a lost server can still be replaced."""
        data = await answer.read()
        self._first(call, pair, limit)
        headers = await self._energy_header(call)
        await call.sink.begin(answer.status, answer.content_type, pair, headers)
        await call.sink.end(data)

    async def _energy_header(self, call: Call) -> dict[str, str]:
        """The request's energy, where it is asked for and a meter counts."""
        bills = self._fleet.bills
        if bills is None or not self._config.energy_header:
            return {}
        known: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        bills.close(call.request_id, lambda j: None if known.done() else known.set_result(j))
        energy_j = await known
        return {} if energy_j is None else {ENERGY_HEADER: f"{energy_j:.3f}"}

    async def _stream(
        self, call: Call, pair: Pair, answer: Connection, limit: asyncio.Timeout
    ) -> None:
        """Pass every piece on at once, but [DONE] only when the server has ended the stream."""
        worker, watch, held = pair[1], EventWatch(), b""
        assert call.attempt is not None
        while piece := await answer.readany():
            call.attempt.silent_since_s = None
            _check_engine(watch.look(piece), worker, blamed=None)
            if watch.is_done:
                cut = max(piece.rfind(LAST_EVENT), 0)
                piece, held = piece[:cut], piece[cut:]
            if not piece:
                call.attempt.silent_since_s = self._clock.now_s()
                continue
            now_s = worker.heard_s = self._clock.now_s()
            if call.is_begun:
                self._metrics.on_gap(now_s - call.last_piece_s)
                call.last_piece_s = now_s
            else:
                self._first(call, pair, limit)
                self._metrics.on_first_token(call.last_piece_s - call.arrival_s)
                await call.sink.begin(answer.status, answer.content_type, pair)
            pieces = piece.count(EVENT) or 1
            call.pieces += pieces
            worker.tracker.on_tokens(call.request_id, pieces)
            await call.sink.write(piece)
            call.attempt.silent_since_s = self._clock.now_s()
        _check_engine(watch.end(), worker, blamed=None)
        if not watch.is_done or not call.is_begun:
            raise AttemptError("engine_error", f"{worker.name} ends its stream early", worker)
        await call.sink.end(held)

    def _first(self, call: Call, pair: Pair, limit: asyncio.Timeout) -> None:
        """The decode server has something: prefill is over and its loss no longer matters."""
        limit.reschedule(None)
        self._mark_prefilled(call, pair)
        call.is_begun = True
        call.last_piece_s = call.first_s = self._clock.now_s()
        self._fleet.first_token(pair[1], call.request_id, call.last_piece_s)
        if call.attempt is not None and pair[0] is not pair[1]:
            pair[0].attempts.discard(call.attempt)

    def _post(
        self, worker: Worker, call: Call, data: bytes
    ) -> AbstractAsyncContextManager[Connection]:
        return worker.upstream.post(call.body.path, data, partial(self._sent, call, worker))

    def _sent(self, call: Call, worker: Worker) -> None:
        assert call.attempt is not None
        call.attempt.asked.add(worker)
        assert call.pair is not None
        if call.attempt.asked == set(call.pair):
            self._metrics.routing_s.observe(self._clock.now_s() - call.arrival_s)

    def _broken(self, worker: Worker, call: Call, error: UpstreamError) -> AttemptError:
        """A server that refuses connections is out at once, one that breaks them is checked."""
        message = f"{worker.name} does not answer ({error})"
        if isinstance(error, RefusedError):
            assert call.attempt is not None
            worker.attempts.discard(call.attempt)  # it is not lost with the server: it never came
            self._fleet.take_out(worker, message)
        else:
            worker.check_now.set()
        is_late = isinstance(error, ConnectTimeoutError)
        return AttemptError("unreachable" if is_late else "server_lost", message, worker)

    @staticmethod
    async def _check_status(answer: Connection, worker: Worker) -> None:
        if answer.status < CLIENT_ERROR:
            return
        body = await answer.read()
        if answer.status < SERVER_ERROR:
            raise PassedError(answer.status, answer.content_type, body)
        raise AttemptError(
            "engine_error", f"{worker.name} answers {answer.status}: {body[:200]!r}", worker
        )


def _asked(call: Call) -> set[Worker]:
    """Servers that the last attempt's request reached."""
    return set() if call.attempt is None else call.attempt.asked


def _on_prefill_end(call: Call, prefill: asyncio.Task[None]) -> None:
    """Without its prefill an answer never begins; once it has begun, prefill is over."""
    error = None if prefill.cancelled() else prefill.exception()
    if error is not None and not call.is_begun and call.attempt is not None:
        call.attempt.fail(error)


def _check_engine(found: tuple[int, str] | None, worker: Worker, *, blamed: Worker | None) -> None:
    """SGLang reports a failure of its own as an event of a stream that is 200 OK."""
    if found is None:
        return
    status, message = found
    if status < SERVER_ERROR:
        raise PassedError(status, "application/json", error_body(status, message))
    raise AttemptError("engine_error", f"{worker.name} reports {message}", blamed)
