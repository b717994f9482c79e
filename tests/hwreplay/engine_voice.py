"""Speaks as SGLang's publisher of forward-pass metrics does: the same frames on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

QUEUED_TOKENS = 100
"""Of each prompt in the engine's queue."""


class EngineVoice:
    """A bound PUB socket; counts its records as upstream does."""

    def __init__(self, path: Path) -> None:
        self.address = f"ipc://{path}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.bind(self.address)
        self.sequence = 0

    def raw(self, payload: bytes) -> None:
        self._socket.send_multipart((b"", self.sequence.to_bytes(8, "big"), payload))

    def say(self, *, wall_time_s: float = 0.01, queued: int = 0, **scheduled: int) -> None:
        """One record; without `scheduled` an idle heartbeat."""
        message: dict[str, Any] = {
            "version": 1,
            "worker_id": "test",
            "dp_rank": 0,
            "counter_id": self.sequence,
            "wall_time": wall_time_s if scheduled else 0.0,
            "scheduled_requests": scheduled,
            "queued_requests": {
                "num_prefill_requests": queued,
                "sum_prefill_tokens": QUEUED_TOKENS * queued,
            },
        }
        self.raw(msgspec.msgpack.encode(message))
        self.sequence += 1

    def decode(self, batch_size: int, tokens: int) -> None:
        self.say(num_decode_requests=batch_size, sum_decode_kv_tokens=tokens)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@contextmanager
def repeating(action: Callable[[], None], period_s: float = 0.01) -> Iterator[None]:
    """Do something again and again in a thread, as an engine under steady load does."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(period_s):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
