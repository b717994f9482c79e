"""KV caches on their way from prefill to decode: side by side, in turn, or sharing a link.

On a shared link the bandwidth is divided equally among the transfers under way. What one of them
has got since a mark is the same for all, so that the link counts the bytes that a transfer present
all along would have got; each ends when that count reaches its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Final

from voltana.sim.config import SimConfig
from voltana.sim.engine.request import SimRequest

Deliver = Callable[[SimRequest, float], None]
CallAt = Callable[[float, Callable[[float], None]], None]

_SAME_BYTES: Final = 1e-12
"""Relative; counts of bytes are rounded, so that equal ends may differ by this."""


class SharedLink:
    """A link whose bandwidth the transfers under way divide equally."""

    def __init__(self, bytes_per_s: float, call_at: CallAt, deliver: Deliver) -> None:
        """See the class.

        Args:
            bytes_per_s: Bandwidth of the link.
            call_at: The agenda's.
            deliver: Takes each request whose bytes are over, and the time.
        """
        self._bytes_per_s = bytes_per_s
        self._call_at = call_at
        self._deliver = deliver
        self._got_bytes = 0.0
        """What each transfer that has been under way since the link was last free has got."""
        self._since_s = 0.0
        self._under_way: list[tuple[float, int, SimRequest]] = []
        """Heap of ends, in bytes got, with a number that keeps the order of beginnings."""
        self._number = 0
        self._plan_number = 0
        """Of the end that was asked for last; others are out of date."""

    def begin(self, request: SimRequest, num_bytes: float, now_s: float) -> None:
        """These bytes of a request's KV cache join those under way."""
        count = len(self._under_way)
        if count:
            self._got_bytes += (now_s - self._since_s) * self._bytes_per_s / count
        else:
            self._got_bytes = 0.0
        self._since_s = now_s
        self._number += 1
        heappush(self._under_way, (self._got_bytes + num_bytes, self._number, request))
        self._plan(now_s)

    def _plan(self, now_s: float) -> None:
        if not self._under_way:
            return
        left_bytes = self._under_way[0][0] - self._got_bytes
        self._plan_number += 1
        end_s = now_s + max(left_bytes, 0.0) * len(self._under_way) / self._bytes_per_s
        self._call_at(end_s, partial(self._end, self._plan_number))

    def _end(self, number: int, now_s: float) -> None:
        if number != self._plan_number:
            return
        under_way = self._under_way
        self._got_bytes, self._since_s = under_way[0][0], now_s
        reached = self._got_bytes * (1.0 + _SAME_BYTES)
        ended = []
        while under_way and under_way[0][0] <= reached:
            ended.append(heappop(under_way)[2])
        self._plan(now_s)
        for request in ended:
            self._deliver(request, now_s)


class Transfers:
    """Moves KV caches as the configuration says."""

    def __init__(
        self, config: SimConfig, kv_bytes_per_token: int, call_at: CallAt, deliver: Deliver
    ) -> None:
        """See the class.

        Args:
            config: Latency, bandwidth, and who shares it.
            kv_bytes_per_token: Of the model.
            call_at: The agenda's.
            deliver: Takes each request whose cache has come, and the time.
        """
        self._latency_s = config.kv_transfer_latency_s
        self._bytes_per_s = config.kv_transfer_bytes_per_s
        self._bytes_per_token = kv_bytes_per_token
        self._call_at = call_at
        self._deliver = deliver
        self._is_in_turn = config.kv_transfers == "in_turn"
        self._free_s = [0.0] * config.num_prefill
        self._shared_by = config.kv_transfers.removeprefix("shared_by_")
        self._links: list[SharedLink] = []
        if self._bytes_per_s is not None and config.kv_transfers.startswith("shared_by_"):
            counts = {"prefill": config.num_prefill, "decode": config.num_decode, "fleet": 1}
            self._links = [
                SharedLink(self._bytes_per_s, call_at, deliver)
                for _ in range(counts[self._shared_by])
            ]

    @property
    def is_instant(self) -> bool:
        """Whether they take no time at all."""
        return self._latency_s == 0 and self._bytes_per_s is None

    def send(self, request: SimRequest, now_s: float) -> None:
        """A request's KV cache begins to move: first the latency passes, then its bytes."""
        delay_s = self._latency_s
        sent_tokens = request.input_tokens - request.unsent_tokens
        num_bytes = float(sent_tokens * self._bytes_per_token)
        if self._links:
            begin = partial(self._link_of(request).begin, request, num_bytes)
            self._do(begin, now_s + delay_s, now_s)
            return
        if self._bytes_per_s is not None:
            delay_s += num_bytes / self._bytes_per_s
        at_s = now_s + delay_s
        if self._is_in_turn:
            at_s = max(now_s, self._free_s[request.prefill_id]) + delay_s
            self._free_s[request.prefill_id] = at_s
        self._do(partial(self._deliver, request), at_s, now_s)

    def _do(self, action: Callable[[float], None], at_s: float, now_s: float) -> None:
        """Then, or here and now if that is not later."""
        if at_s > now_s:
            self._call_at(at_s, action)
        else:
            action(now_s)

    def _link_of(self, request: SimRequest) -> SharedLink:
        if self._shared_by == "prefill":
            return self._links[request.prefill_id]
        return self._links[request.decode_id if self._shared_by == "decode" else 0]
