"""Open-loop load: each request leaves at its arrival time, whatever the server does.

A request has token ids of the exact input length and asks for the exact output length
(`ignore_eos`). A turn that waits leaves its think time after the last token of the answer before
it; where that does not come, the session ends. Each end is one line of a JSONL file at once, so
that an interrupted run keeps what it has. Latencies count from the arrival the workload names, so
that lateness of this program is part of them and never hides a queue; it is reported beside them.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import aiohttp
import msgspec
import numpy as np

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.replay.token_ids import TokenIds
from voltana.hwreplay.router.body import GENERATE
from voltana.hwreplay.router.errors import engine_error
from voltana.hwreplay.router.sink import DECODE_HEADER, PREFILL_HEADER
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.records import CANCELLED, COMPLETED, FAILED, REJECTED, STATUS_NAMES
from voltana.sim.workload.workload import Workload

COUNT: Final = re.compile(rb'"completion_tokens":\s?(\d+)')
CACHED: Final = re.compile(rb'"cached_tokens":\s?(\d+)')
"""A client's own quotes are escaped in JSON, so that no text can look like these."""
EVENT_END: Final = b"\n\n"
KEEP_ALIVE_S: Final = 2.0
CLIENT_ERROR, SERVER_ERROR = 400, 500
REASON: Final = 1_000
"""Characters of a failure kept: what the router adds about lost servers stands at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Where to and how."""

    url: str
    seed: int = 13
    salt: int = 0
    """Other ids for another run: prompts that a server has seen before are in its prefix cache."""
    answer_id: int | None = None
    """What the servers always answer, so that answers in later prompts are as they were given; None
    where nobody knows: then prompts share nothing."""
    vocabulary: tuple[int, int] = (3, 512)
    """Token ids are drawn from the first to below the second; no special token, so from 3."""
    token: str | None = field(default=None, repr=False)
    drain_s: float = 60.0
    """After the last arrival requests may take so long; then they are cancelled."""

    def __post_init__(self) -> None:
        low, high = self.vocabulary
        if not 0 <= low < high:
            raise VoltanaError(f"vocabulary must be two rising token ids, got {low} and {high}")


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request ended; times on the run's clock."""

    request_id: int
    status: int
    sent_s: float
    first_token_s: float | None = None
    finish_s: float | None = None
    tokens: int = 0
    gaps_s: tuple[float, ...] = ()
    """Between consecutive tokens; 0 for tokens that came in one piece."""
    prefill_id: int = -1
    decode_id: int = -1
    reason: str = ""
    cached_tokens: int = 0
    """Of the prompt, found in a cache by the server's word."""
    arrival_s: float | None = None
    """When a turn that waits came: the last token before it and its think time."""


@dataclass(slots=True, kw_only=True)
class LoadReport:
    """What was sent and how it ended."""

    lateness_s: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False
    """False when it was interrupted."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values: counts by outcome, reasons, quantiles of lateness in s."""
        late = np.asarray(self.lateness_s)
        quantiles = {f"p{q}": float(np.quantile(late, q / 100)) for q in (50, 90, 99) if len(late)}
        return {
            "sent": len(late),
            "counts": dict(self.counts),
            "reasons": dict(self.reasons),
            "lateness_s": quantiles | ({"max": float(late.max())} if len(late) else {}),
            "is_complete": self.is_complete,
        }


class _Stream:
    """Reads one stream: when each token came, and how it ended."""

    __slots__ = ("_rest", "cached_tokens", "error", "is_done", "times_s")

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.cached_tokens = 0
        self.error: str | None = None
        self.is_done = False
        self._rest = b""

    def feed(self, chunk: bytes, now_s: float) -> None:
        *events, self._rest = (self._rest + chunk).split(EVENT_END)
        for event in events:
            if (found := COUNT.search(event)) is not None:
                if not self.times_s and (cached := CACHED.search(event)) is not None:
                    self.cached_tokens = int(cached[1])
                new = int(found[1]) - len(self.times_s)
                self.times_s.extend([now_s] * new)
            if (failure := engine_error(event)) is not None:
                self.error = failure[1]
            self.is_done = self.is_done or event.startswith(b"data: [DONE]")


_Send = Callable[[int, float, bytes], Awaitable[float | None]]


class LoadGenerator:
    """Sends one workload once."""

    def __init__(self, workload: Workload, config: LoadConfig, clock: RunClock, path: Path) -> None:
        """Nothing is sent before `run`.

        Args:
            workload: What to send, and when on `clock`.
            config: Where to.
            clock: The run's; its 0 is the workload's.
            path: JSONL file that takes one row a request.
        """
        self.report = LoadReport()
        self._workload = workload
        self._config = config
        self._clock = clock
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()
        self._encode = msgspec.json.Encoder(decimal_format="number").encode
        self._ids = TokenIds(
            workload,
            config.vocabulary,
            seed=config.seed,
            salt=config.salt,
            answer_id=config.answer_id,
        )
        self._previous = [-1] * len(workload)
        self._next: dict[int, int] = {}
        """Which turn waits for a request's answer."""
        if workload.turns is not None:
            self._previous = workload.turns.previous.tolist()
            self._next = {p: row for row, p in enumerate(self._previous) if p >= 0}
        self._last_s = workload.duration_s
        """When the last request that is known of comes."""

    async def run(self, on_end: Callable[[], None] | None = None) -> LoadReport:
        """Send everything and wait for the answers; `on_end` is called as each request ends."""
        headers = {"Content-Type": "application/json"}
        if self._config.token is not None:
            headers["Authorization"] = f"Bearer {self._config.token}"
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        with self._path.open("ab", buffering=0) as out:
            async with aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
            ) as session:
                send = partial(self._one, session, out)
                try:
                    await self._send_all(send, on_end)
                    await self._drain()
                finally:
                    for task in self._tasks:
                        task.cancel()
                    await asyncio.gather(*self._tasks, return_exceptions=True)
        self.report.is_complete = True
        return self.report

    async def _send_all(self, send: _Send, on_end: Callable[[], None] | None) -> None:
        """Begin each request that waits for none, at its arrival."""
        arrivals_s = self._workload.arrival_s.tolist()
        for request_id, arrival_s in enumerate(arrivals_s):
            if self._previous[request_id] >= 0:
                continue
            data = self._body(request_id)
            await asyncio.sleep(max(arrival_s - self._clock.now_s(), 0.0))
            task = asyncio.create_task(self._session(send, request_id, arrival_s, data, on_end))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _session(
        self,
        send: _Send,
        request_id: int,
        arrival_s: float,
        data: bytes,
        on_end: Callable[[], None] | None,
    ) -> None:
        """One request, then the turns that wait for one another's answers."""
        while True:
            ended_s = await send(request_id, arrival_s, data)
            if on_end is not None:
                on_end()
            following = self._next.get(request_id)
            if following is None or ended_s is None:
                return
            assert self._workload.turns is not None
            request_id = following
            arrival_s = ended_s + float(self._workload.turns.think_s[following])
            self._last_s = max(self._last_s, arrival_s)
            data = self._body(request_id)
            await asyncio.sleep(max(arrival_s - self._clock.now_s(), 0.0))

    async def _drain(self) -> None:
        while self._tasks:
            left_s = self._last_s + self._config.drain_s - self._clock.now_s()
            if left_s <= 0:
                break
            await asyncio.wait(self._tasks, timeout=left_s)
        for task in self._tasks:
            task.cancel("it took longer than the run waits")

    def _body(self, request_id: int) -> bytes:
        output_tokens = int(self._workload.output_tokens[request_id])
        params = {"max_new_tokens": output_tokens, "ignore_eos": True, "temperature": 0.0}
        ids = self._ids.of(request_id)
        return self._encode({"input_ids": ids, "sampling_params": params, "stream": True})

    async def _one(
        self,
        session: aiohttp.ClientSession,
        out: BinaryIO,
        request_id: int,
        arrival_s: float,
        data: bytes,
    ) -> float | None:
        """Send one request; returns when its last token came, None where it did not."""
        sent_s = self._clock.now_s()
        self.report.lateness_s.append(sent_s - arrival_s)
        stream = _Stream()
        ids = (-1, -1)
        try:
            async with session.post(self._config.url + GENERATE, data=data) as answer:
                ids = _pair_of(answer)
                if answer.status >= CLIENT_ERROR:
                    status = REJECTED if answer.status < SERVER_ERROR else FAILED
                    reason = _reason(answer.status, await answer.read())
                else:
                    while chunk := await answer.content.readany():
                        stream.feed(chunk, self._clock.now_s())
                    status, reason = _judge(stream, int(self._workload.output_tokens[request_id]))
        except (aiohttp.ClientError, OSError) as error:
            status, reason = FAILED, f"the connection broke: {type(error).__name__}"
        except asyncio.CancelledError:
            status, reason = CANCELLED, "cancelled by the load generator"
        came_s = arrival_s if self._previous[request_id] >= 0 else None
        self._keep(out, _row(request_id, status, reason, sent_s, stream, ids, came_s))
        return stream.times_s[-1] if status == COMPLETED else None

    def _keep(self, out: BinaryIO, row: Row) -> None:
        out.write(self._encode(row) + b"\n")
        self.report.counts[STATUS_NAMES[row.status]] += 1
        if row.reason:
            self.report.reasons[row.reason] += 1


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is left out.

    Raises:
        VoltanaError: Another line is no row.
    """
    lines = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(_row_decoder.decode(line))
        except msgspec.DecodeError as error:
            raise VoltanaError(f"line {number} must be a request's row: {error} ({path})") from None
    return rows


_row_decoder: Final = msgspec.json.Decoder(Row)


def _row(
    request_id: int,
    status: int,
    reason: str,
    sent_s: float,
    stream: _Stream,
    ids: tuple[int, int],
    came_s: float | None,
) -> Row:
    is_done, times_s = status == COMPLETED, stream.times_s
    return Row(
        request_id=request_id,
        status=status,
        sent_s=round(sent_s, 6),
        first_token_s=round(times_s[0], 6) if times_s else None,
        finish_s=round(times_s[-1], 6) if times_s and is_done else None,
        tokens=len(times_s),
        gaps_s=tuple(np.diff(times_s).round(6).tolist()),
        prefill_id=ids[0],
        decode_id=ids[1],
        reason=reason,
        cached_tokens=stream.cached_tokens,
        arrival_s=None if came_s is None else round(came_s, 6),
    )


def _judge(stream: _Stream, output_tokens: int) -> tuple[int, str]:
    if stream.error is not None:
        return FAILED, stream.error
    if not stream.is_done:
        return FAILED, "the stream ended without [DONE]"
    if len(stream.times_s) != output_tokens:
        return FAILED, f"{len(stream.times_s)} tokens came, {output_tokens} were asked for"
    return COMPLETED, ""


def _pair_of(answer: aiohttp.ClientResponse) -> tuple[int, int]:
    prefill, decode = (answer.headers.get(h, "-1") for h in (PREFILL_HEADER, DECODE_HEADER))
    return int(prefill), int(decode)


def _reason(status: int, body: bytes) -> str:
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        message = body[:100].decode(errors="replace")
    return f"{status}: {' '.join(str(message).split())[:REASON]}"
