"""The state of one decode instance in the routing MDP: batch bucket × KV bucket × clock level."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import InstanceState

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateGrid:
    """Buckets of batch size and of KV tokens a request, and clock levels.

    Batch bucket i holds edges[i] <= requests < edges[i + 1], and its node is the mean of these
    integers; a batch beyond the last edge counts to the last bucket. The first holds the empty
    batch alone, since an idle instance is another machine than a busy one.
    KV is counted by the request (the mean context of the batch): the total follows the batch size
    so closely that buckets of the total would be mostly empty. The KV bucket is the nearest node.
    A state's number is (batch bucket · num_kv + KV bucket) · num_levels + level.
    """

    batch_edges_requests: tuple[int, ...]
    kv_nodes_tokens: tuple[float, ...]
    """KV tokens a request, ascending."""
    levels_mhz: tuple[int, ...]
    _nodes: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        edges = self.batch_edges_requests
        if len(edges) < 3 or edges[:2] != (0, 1) or not _ascends(edges):
            raise VoltanaError(f"batch bucket edges must ascend as 0, 1, …, got {edges}")
        for name in ("kv_nodes_tokens", "levels_mhz"):
            values = getattr(self, name)
            if not values or values[0] <= 0 or not _ascends(values):
                raise VoltanaError(f"{name} must be positive and ascending, got {values}")
        object.__setattr__(self, "_nodes", tuple(self.batch_nodes_requests.tolist()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Buckets of batch, of KV, and levels."""
        return self.num_batch, len(self.kv_nodes_tokens), len(self.levels_mhz)

    @property
    def num_batch(self) -> int:
        """Batch buckets."""
        return len(self.batch_edges_requests) - 1

    @property
    def num_states(self) -> int:
        """States of one instance."""
        batch, kv, levels = self.shape
        return batch * kv * levels

    @property
    def batch_nodes_requests(self) -> FloatArray:
        """Mean batch size of each bucket. Shape (num_batch,)."""
        ends = np.asarray(self.batch_edges_requests, dtype=np.float64)
        return np.asarray((ends[:-1] + ends[1:] - 1.0) / 2.0)

    def level_of(self, clock_mhz: int) -> int:
        """Position of the level nearest to a clock; unlocked (0) counts as the top one."""
        return _nearest(self.levels_mhz, clock_mhz or self.levels_mhz[-1])

    def blend(self, requests: int, kv_tokens: int, clock_mhz: int) -> tuple[int, int, float]:
        """Linear interpolation in the batch size between bucket nodes.

        Args:
            requests: Batch size.
            kv_tokens: KV tokens of all its requests.
            clock_mhz: Clock lock in force; unlocked (0) counts as the top level.

        Returns:
            State numbers below and above, and the weight of the one above. The empty batch is a
            state of its own; beyond the outer nodes of the others their state stands alone.
        """
        nodes = self._nodes
        stride = self.num_states // len(nodes)
        kv = _nearest(self.kv_nodes_tokens, kv_tokens / requests) if requests else 0
        other = kv * len(self.levels_mhz)
        other += self.level_of(clock_mhz)
        low = bisect_right(nodes, requests) - 1
        if low == 0 and requests > 0:
            return stride + other, stride + other, 0.0
        below = low * stride + other
        if low == 0 or low + 1 >= len(nodes):
            return below, below, 0.0
        return below, below + stride, (requests - nodes[low]) / (nodes[low + 1] - nodes[low])

    def blend_instance(self, state: InstanceState) -> tuple[int, int, float]:
        """`blend` of a live decode instance: its open requests, and KV in use or queued."""
        return self.blend(state.open_requests, state.kv_load_tokens, state.clock_mhz)


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


def kv_nodes(input_tokens: float, context_tokens: float, buckets: int) -> tuple[float, ...]:
    """Nodes of KV tokens a request, around their mean and never down to the prompt.

    Args:
        input_tokens: Mean prompt.
        context_tokens: Mean context of a running request.
        buckets: How many nodes.

    Example:
        >>> kv_nodes(200, 500, 1), kv_nodes(200, 500, 3)
        ((500.0,), (350.0, 500.0, 650.0))
    """
    half = 0.75 * (1.0 - 1.0 / buckets) * (context_tokens - input_tokens)
    step = 2.0 * half / max(buckets - 1, 1)
    return tuple(float(context_tokens - half + step * i) for i in range(buckets))


def _nearest(nodes: tuple[float, ...], value: float) -> int:
    """Position of the nearest node, the lower one of a tie."""
    return min(range(len(nodes)), key=lambda i: abs(nodes[i] - value))


def _ascends(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in pairwise(values))
