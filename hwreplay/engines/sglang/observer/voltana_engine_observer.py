"""SGLang plug-in (entry point group `sglang.srt.plugins`): announces each batch before it runs.

Upstream's forward-pass metrics leave after the pass; a clock for a prefill batch must be decided
before it. This hook sends one datagram a batch to the Unix socket named by VOLTANA_BATCH_SOCKET
and never waits: a full or missing socket loses the message, and no error leaves the hook, for it
would end the scheduler. Without the variable it does nothing.

Under tensor parallelism every rank runs every batch; the one that publishes the metrics (rank 0 of
attention's, last pipeline stage) announces it, and no other.

A datagram has 30 bytes: magic, version, kind, requests, tokens (new ones in prefill, context in
decode), queued requests, CLOCK_MONOTONIC in ns; of a mixed batch requests and tokens are decode's,
and its prompts and their new tokens follow.
"""

from __future__ import annotations

import os
import socket
import struct
import time

ENVIRONMENT = "VOLTANA_BATCH_SOCKET"
TARGET = "sglang.srt.managers.scheduler.Scheduler.run_batch"
LAYOUT = struct.Struct("<4sBBHIIQHI")
MAGIC = b"VBAT"
VERSION = 2
HELLO, PREFILL, DECODE, MIXED = 0, 1, 2, 3
MAX_COUNT, MAX_REQUESTS = 2**32 - 1, 2**16 - 1


class Announcer:
    """Writes datagrams to one socket path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._has_greeted = False
        self._is_first: bool | None = None

    def announce(self, scheduler: object, batch: object) -> None:
        """Send one batch, on the rank that speaks for all. Whatever goes wrong stays here."""
        try:
            if self._is_first is None:  # known once the ranks have met, before the first batch
                self._is_first = speaks_for_all()
            if not self._is_first:
                return
            if not self._has_greeted:
                self._send(HELLO, 0, 0, 0)
                self._has_greeted = True
            self._announce(scheduler, batch)
        except Exception:  # any error would end the scheduler
            return

    def fileno(self) -> int:
        """Of its socket."""
        return self._socket.fileno()

    def close(self) -> None:
        """Announce nothing from now on."""
        self._socket.close()

    def _announce(self, scheduler: object, batch: object) -> None:
        mode = batch.forward_mode
        if mode.is_prebuilt() or mode.is_idle():
            return
        waiting = len(scheduler.waiting_queue)
        if mode.is_mixed():
            number = len(batch.decoding_reqs)
            tokens = int(batch.seq_lens_cpu[-number:].sum())
            chunk = batch.batch_size() - number, batch.extend_num_tokens - number
            self._send(MIXED, number, tokens, waiting, chunk)
        elif mode.is_extend():
            self._send(PREFILL, batch.batch_size(), batch.extend_num_tokens, waiting)
        else:
            tokens = int(batch.seq_lens_cpu.sum())
            self._send(DECODE, batch.batch_size(), tokens, waiting)

    def _send(
        self, kind: int, requests: int, tokens: int, waiting: int, chunk: tuple[int, int] = (0, 0)
    ) -> None:
        counts = min(requests, MAX_REQUESTS), min(tokens, MAX_COUNT), min(waiting, MAX_COUNT)
        prompts = min(chunk[0], MAX_REQUESTS), min(chunk[1], MAX_COUNT)
        message = LAYOUT.pack(MAGIC, VERSION, kind, *counts, time.monotonic_ns(), *prompts)
        self._socket.sendto(message, self._path)


def speaks_for_all() -> bool:
    """Whether this process is the rank whose forward-pass metrics SGLang publishes."""
    from sglang.srt.runtime_context import get_parallel

    ranks = get_parallel()
    return ranks.attn_tp_rank == 0 and ranks.pp_rank == ranks.pp_size - 1


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
