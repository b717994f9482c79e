"""Hands an engine's metrics on to a second socket, or drops them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

import zmq

POLL_MS = 50


class MetricsRelay:
    """A thread between a PUB socket and its subscribers."""

    def __init__(self, source: str, path: Path) -> None:
        self.address = f"ipc://{path}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._in = self._context.socket(zmq.SUB)
        self._in.setsockopt(zmq.SUBSCRIBE, b"")
        self._in.connect(source)
        self._out = self._context.socket(zmq.PUB)
        self._out.bind(self.address)
        self._left: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def drop_after(self, count: int) -> None:
        """Let so many more messages pass, then none."""
        self._left = count

    def let_pass(self) -> None:
        self._left = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._in.close(linger=0)
        self._out.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        while not self._ended.is_set():
            if not self._in.poll(POLL_MS):
                continue
            frames = self._in.recv_multipart()
            if self._left is not None:
                if self._left <= 0:
                    continue
                self._left -= 1
            self._out.send_multipart(frames)
