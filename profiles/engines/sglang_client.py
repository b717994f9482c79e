"""What the profiler says to SGLang and hears from it: prompts over HTTP, records over ZMQ."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import urlsplit

import numpy as np
import zmq

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.base import EngineCrashError, NotHeldError, Window
from voltana.profiles.engines.sglang_metrics import (
    MAX_QUEUED_RECORDS,
    IterationMetrics,
    parse_metrics,
)

HEARTBEAT_LIMIT_S: Final = 30.0
REQUEST_LIMIT_S: Final = 600.0
POLL_MS: Final = 100
SETTLE_S: Final = 0.05
"""A record leaves the engine a little after the token that it is about."""
HANDSHAKE_S: Final = 0.03
ROOMS: Final = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server."""

    url: str
    metrics: str
    """ZMQ address of its forward-pass metrics."""
    bootstrap_port: int | None = None
    """Of a prefill server of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Who prefills and who decodes; the same server twice where it does both."""

    prefill: Endpoint
    decode: Endpoint

    @property
    def is_pair(self) -> bool:
        """Whether KV travels between two servers."""
        return self.prefill != self.decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """When the pieces of one streamed answer came."""

    sent_s: float
    chunks_s: tuple[float, ...]


class Records:
    """Hears a server's iterations in a thread, from `__enter__` to `__exit__`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._kept: list[IterationMetrics] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_heard = threading.Event()
        self._error: VoltanaError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._is_heard.wait(HEARTBEAT_LIMIT_S):
            self.close()
            raise VoltanaError(
                f"SGLang must publish forward-pass metrics, nothing came from {self._address} in "
                f"{HEARTBEAT_LIMIT_S:g} s: start it with --enable-forward-pass-metrics "
                "--forward-pass-metrics-ipc-name IPC and name IPC.0"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription."""
        self._stop.set()
        self._thread.join()

    def take(self) -> list[IterationMetrics]:
        """What came since the last call, heartbeats too; raises what the thread ran into."""
        if self._error is not None:
            raise self._error
        with self._lock:
            kept, self._kept = self._kept, []
        return kept

    def _run(self) -> None:
        context = zmq.Context()
        subscriber = context.socket(zmq.SUB)
        subscriber.set_hwm(MAX_QUEUED_RECORDS)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(self._address)
        try:
            while not self._stop.is_set():
                if subscriber.poll(POLL_MS):
                    frames = subscriber.recv_multipart()
                    record = parse_metrics(frames[-1], received_s=time.monotonic())
                    with self._lock:
                        self._kept.append(record)
                    self._is_heard.set()
        except VoltanaError as error:
            self._error = error
            self._is_heard.set()
        finally:
            subscriber.close(linger=0)
            context.term()


@dataclass(slots=True)
class Client:
    """Sends batches of random prompts. Random, so that no prefix cache answers for them."""

    servers: Endpoints
    vocabulary: int
    """Token ids below this one exist."""
    handshake_s: float = HANDSHAKE_S
    """Time that the requests of a burst have to be announced between the servers of a pair."""
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def start(
        self, prompt_tokens: Sequence[int], output_tokens: int, *, is_burst: bool = False
    ) -> Future[Answer]:
        """Send one batch; the future ends with its last token.

        Args:
            prompt_tokens: Length of each prompt.
            output_tokens: Tokens that each answer gets.
            is_burst: Have the prompts prefill in one pass, as far as the engine's limits allow.
        """
        body: dict[str, Any] = {
            "input_ids": [
                self._rng.integers(3, self.vocabulary, size=n).tolist() for n in prompt_tokens
            ],
            "sampling_params": {
                "temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True
            },
            "stream": True,
        }  # fmt: skip
        prefill, decode = self.servers.prefill, self.servers.decode
        if not self.servers.is_pair:
            return self._pool.submit(_post, decode.url, body)
        number = len(prompt_tokens)
        body |= {
            "bootstrap_host": [urlsplit(prefill.url).hostname] * number,
            "bootstrap_port": [prefill.bootstrap_port] * number,
            "bootstrap_room": self._rng.integers(ROOMS, size=number).tolist(),
        }
        first = self._pool.submit(_post, prefill.url, body)
        if not is_burst or number == 1:
            return self._pool.submit(_both, first, decode.url, body)
        # The pair's handshakes come one by one; a paused scheduler then finds all of them done.
        time.sleep(self.handshake_s)
        _control(prefill.url, "pause_generation", {"mode": "in_place"})
        try:
            both = self._pool.submit(_both, first, decode.url, body)
            time.sleep(self.handshake_s)
        finally:
            _control(prefill.url, "continue_generation", {})
        return both

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()


def window_of(
    iteration_s: Sequence[float], tokens: float, spans_s: Sequence[tuple[float, float]]
) -> Window:
    """A window of passes.

    Args:
        iteration_s: Duration of each.
        tokens: Mean of what the point calls tokens.
        spans_s: Start and end of each stretch that held the point.
    """
    return Window(
        iteration_s=tuple(iteration_s),
        elapsed_s=spans_s[-1][1] - spans_s[0][0],
        tokens=float(tokens),
        spans_ns=tuple((round(a * 1e9), round(b * 1e9)) for a, b in spans_s),
    )


def get_json(url: str) -> Mapping[str, Any]:
    """GET a JSON document.

    Raises:
        EngineCrashError: No server, or no JSON.
    """
    target = urlsplit(url)
    assert target.hostname is not None
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
    try:
        connection.request("GET", target.path)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EngineCrashError(f"SGLang must answer at {url}, it did not: {error}") from None
    finally:
        connection.close()
    return found


def _control(url: str, verb: str, body: Mapping[str, Any]) -> None:
    target = urlsplit(url)
    assert target.hostname is not None
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/{verb}", json.dumps(body), headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        raise EngineCrashError(f"SGLang at {url} must take {verb}, it did not: {error!r}") from None
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise EngineCrashError(f"SGLang at {url} must know {verb}, it said {response.status}")


def _both(first: Future[Answer], url: str, body: Mapping[str, Any]) -> Answer:
    answer = _post(url, body)
    first.result()
    return answer


def _post(url: str, body: Mapping[str, Any]) -> Answer:
    """POST and drain the stream; its end is checked, its tokens are not read."""
    target = urlsplit(url)
    assert target.hostname is not None
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=REQUEST_LIMIT_S)
    sent_s, chunks_s, tail = time.monotonic(), [], b""
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate", json.dumps(body), headers)
        response = connection.getresponse()
        while chunk := response.read1(65536):
            chunks_s.append(time.monotonic())
            tail = (tail + chunk)[-2000:]
    except (OSError, http.client.HTTPException) as error:
        raise EngineCrashError(f"SGLang at {url} must answer, it broke off: {error!r}") from None
    finally:
        connection.close()
    said = " ".join(tail[-300:].decode(errors="replace").split())
    if http.client.BAD_REQUEST <= response.status < http.client.INTERNAL_SERVER_ERROR:
        raise NotHeldError(
            f"SGLang at {url} must take a batch, it refused ({response.status}): {said}"
        )
    if response.status != http.client.OK or b"[DONE]" not in tail:
        raise EngineCrashError(
            f"SGLang at {url} must answer, it broke off ({response.status}): {said}"
        )
    if b'"error"' in tail:
        raise NotHeldError(f"SGLang at {url} must finish a batch, it gave up: {said}")
    return Answer(sent_s=sent_s, chunks_s=tuple(chunks_s))
