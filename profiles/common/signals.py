"""Signals that ask a program to end: treated alike, or delayed while it cleans up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stops_as_interrupts() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP act as Ctrl-C, unless they are ignored or handled.

    A script's background job, which ignores Ctrl-C, still ends on the other two. Signals reach the
    main thread only; in any other thread nothing changes.
    """
    numbers = [n for n in STOPPING[1:] if signal.getsignal(n) == signal.SIG_DFL]
    with handled(numbers, _interrupt):
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:  # Ctrl-C is ignored, or was never Python's
        raise KeyboardInterrupt


@contextmanager
def stops_put_off() -> Iterator[None]:
    """Delay requests to end until the block has been left."""
    came: list[int] = []
    numbers = [n for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN]
    with handled(numbers, lambda number, frame: came.append(number)):
        yield
    if came:
        os.kill(os.getpid(), came[0])


@contextmanager
def handled(
    numbers: Iterable[signal.Signals],
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    """Set a handler for signals within the block. In another than the main thread: do nothing."""
    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
