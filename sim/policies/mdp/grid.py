"""The state of one decode instance in the routing MDP: batch bucket × KV bucket × clock level."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from profiles.errors import VoltanaError
from sim.policies.base import InstanceState

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateGrid:
    """Buckets of batch size and of KV tokens a request, and clock levels.

    KV is counted by the request (the mean context of the batch): the total follows the batch size
    closely, and buckets of the total would be either empty or too coarse.
    Bucket i holds edges[i] <= value < edges[i + 1]; what lies at or beyond the last edge counts to
    the last bucket. Its node is the mean of the integers in it. The first batch bucket holds the
    empty batch alone, since an idle instance is another machine than a busy one.
    A state's number is (batch bucket · num_kv + KV bucket) · num_levels + level.
    """

    batch_edges_requests: tuple[int, ...]
    kv_edges_tokens: tuple[int, ...]
    """Of KV tokens a request."""
    levels_mhz: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_edges("batch bucket edges", self.batch_edges_requests)
        _check_edges("KV bucket edges", self.kv_edges_tokens)
        if self.batch_edges_requests[1] != 1 or len(self.batch_edges_requests) < 3:
            raise VoltanaError(
                "batch bucket edges must begin 0, 1 and have a third,"
                f" got {self.batch_edges_requests}: the empty batch is a bucket of its own"
            )
        levels = self.levels_mhz
        if not levels or any(b <= a for a, b in pairwise(levels)):
            raise VoltanaError(f"clock levels must be ascending and at least one, got {levels}")

    @property
    def num_batch(self) -> int:
        """Batch buckets."""
        return len(self.batch_edges_requests) - 1

    @property
    def num_kv(self) -> int:
        """KV buckets."""
        return len(self.kv_edges_tokens) - 1

    @property
    def num_levels(self) -> int:
        """Clock levels."""
        return len(self.levels_mhz)

    @property
    def num_states(self) -> int:
        """States of one instance."""
        return self.num_batch * self.num_kv * self.num_levels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Buckets of batch, of KV, and levels."""
        return self.num_batch, self.num_kv, self.num_levels

    @property
    def batch_nodes_requests(self) -> FloatArray:
        """Mean batch size of each bucket. Shape (num_batch,)."""
        return _nodes(self.batch_edges_requests)

    @property
    def kv_nodes_tokens(self) -> FloatArray:
        """Mean KV tokens a request of each bucket. Shape (num_kv,)."""
        return _nodes(self.kv_edges_tokens)

    def locate(self, requests: int, kv_tokens: int, clock_mhz: int) -> int:
        """State number of an instance; an unlocked clock (0) counts as the top level.

        Args:
            requests: Batch size.
            kv_tokens: KV tokens of all its requests.
            clock_mhz: Clock lock in force.
        """
        batch = min(bisect_right(self.batch_edges_requests, requests), self.num_batch) - 1
        each = kv_tokens // max(requests, 1)
        kv = min(bisect_right(self.kv_edges_tokens, each), self.num_kv) - 1
        return (batch * self.num_kv + kv) * self.num_levels + self.level_of(clock_mhz)

    def locate_instance(self, state: InstanceState) -> int:
        """State number of a live decode instance: its open requests, and KV in use or queued."""
        return self.locate(state.open_requests, state.kv_load_tokens, state.clock_mhz)

    def level_of(self, clock_mhz: int) -> int:
        """Nearest level, the lower one of a tie; unlocked (0) is the top."""
        levels = self.levels_mhz
        if clock_mhz == 0:
            return len(levels) - 1
        return min(range(len(levels)), key=lambda i: abs(levels[i] - clock_mhz))


def batch_edges(max_requests: int, width: int = 8) -> tuple[int, ...]:
    """Edges that are narrow near empty and then `width` wide, each bucket ending at a multiple.

    Buckets end where decode time may jump (8k, 128k requests), so that no step lies inside one.

    Example:
        >>> batch_edges(24, 8)
        (0, 1, 2, 3, 5, 9, 17, 25)
    """
    small = [0, 1, 2, 3, *(1 + 2**k for k in range(2, 12))]
    edges = [e for e in small if e <= width]
    top = -(-max_requests // width) * width
    return (*edges, *range(width + 1, top + 2, width))


def kv_edges(input_tokens: float, output_tokens: float, buckets: int) -> tuple[int, ...]:
    """Edges of KV tokens a request around its mean, a prompt and (without memory) a mean output.

    One bucket has its node at the mean. More of them have their nodes half a mean output apart,
    but never reach below the prompt.

    Example:
        >>> kv_edges(200, 300, 1), kv_edges(200, 300, 3)
        ((0, 1001), (0, 425, 575, 726))
    """
    mean = input_tokens + output_tokens
    if buckets == 1:
        return (0, round(2 * mean) + 1)
    step = output_tokens / 2.0
    low = mean - step * (buckets / 2.0 - 1.0)
    if low <= input_tokens:
        low, step = input_tokens + step / 2.0, output_tokens / (buckets - 1)
    inner = [round(low + step * i) for i in range(buckets - 1)]
    return (0, *inner, round(inner[-1] + step) + 1)


def _nodes(edges: Sequence[int]) -> FloatArray:
    ends = np.asarray(edges, dtype=np.float64)
    return np.asarray((ends[:-1] + ends[1:] - 1.0) / 2.0)


def _check_edges(name: str, edges: tuple[int, ...]) -> None:
    if len(edges) < 2 or edges[0] != 0 or any(b <= a for a, b in pairwise(edges)):
        raise VoltanaError(f"{name} must ascend from 0, got {edges}")
