"""SGLang plug-in (entry point group `sglang.srt.plugins`): announces each batch before it runs.

Upstream's forward-pass metrics leave after the pass; a clock for a prefill batch must be decided
before it. This hook sends one datagram a batch to the Unix socket named by VOLTANA_BATCH_SOCKET
and never waits: a full or missing socket loses the message, and no error leaves the hook, for it
would end the scheduler. Without the variable it does nothing.

A datagram has 24 bytes: magic, version, kind, requests, tokens (new ones in prefill, context in
decode), queued requests, CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import os
import socket
import struct
import time

ENVIRONMENT = "VOLTANA_BATCH_SOCKET"
TARGET = "sglang.srt.managers.scheduler.Scheduler.run_batch"
LAYOUT = struct.Struct("<4sBBHIIQ")
MAGIC = b"VBAT"
VERSION = 1
HELLO, PREFILL, DECODE = 0, 1, 2
MAX_COUNT, MAX_REQUESTS = 2**32 - 1, 2**16 - 1


class Announcer:
    """Writes datagrams to one socket path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._has_greeted = False

    def announce(self, scheduler: object, batch: object) -> None:
        """Send one batch. Whatever goes wrong stays here."""
        try:
            if not self._has_greeted:
                self._send(HELLO, 0, 0, 0)
                self._has_greeted = True
            self._announce(scheduler, batch)
        except Exception:  # any error would end the scheduler
            return

    def _announce(self, scheduler: object, batch: object) -> None:
        mode = batch.forward_mode
        if mode.is_prebuilt() or mode.is_idle():
            return
        waiting = len(scheduler.waiting_queue)
        if mode.is_extend():
            self._send(PREFILL, batch.batch_size(), batch.extend_num_tokens, waiting)
        else:
            tokens = int(batch.seq_lens_cpu.sum())
            self._send(DECODE, batch.batch_size(), tokens, waiting)

    def _send(self, kind: int, requests: int, tokens: int, waiting: int) -> None:
        counts = min(requests, MAX_REQUESTS), min(tokens, MAX_COUNT), min(waiting, MAX_COUNT)
        message = LAYOUT.pack(MAGIC, VERSION, kind, *counts, time.monotonic_ns())
        self._socket.sendto(message, self._path)


def register() -> None:
    """Called by SGLang in each of its processes."""
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    announcer = Announcer(path)

    def around(original, scheduler, batch, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        announcer.announce(scheduler, batch)
        return original(scheduler, batch, *args, **kwargs)

    HookRegistry.register(TARGET, around, HookType.AROUND)
