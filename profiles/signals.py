"""Signals that ask a program to end: made one kind, or put off while it cleans up."""

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
    """Treat SIGTERM and SIGHUP as Ctrl-C within; one that its owner ignores or handles stays so.

    That goes for Ctrl-C as well: a script's background job is deaf to it, not to the other two.
    For the main thread, which alone hears signals; elsewhere nothing changes.
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
    """Hear no request to end within; one that came is heard after."""
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
    """Handle signals so within, as before after it. For the main thread; elsewhere nothing."""
    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
