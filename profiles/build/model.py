"""The direct model behind the tables: one iteration's time and power at any clock.

Time at the top clock is the sum of kernels. Each part has a share that goes with 1/f (the rest
waits for memory), so T(f) = A·(1 + sag·x²) + B·(1 + x) with x = f_top/f - 1: T = A + B·f_top/f,
and a small loss of achievable memory bandwidth at low clocks (caches and network on chip are
clocked with the SMs). GEMM share = base + (1 - base)·min(1, utilisation/saturation), so it rises
with the batch as the tensor cores become the limit.

Power, per GPU: idle(f) + active·φ(f), with active = base + W per TB/s of memory reading + W at
full tensor utilisation, at the top clock. Where that exceeds the power limit, power is the limit
and the clock sags to where the two meet; time follows the sagged clock.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from profiles.build.assumptions import BYTES_PER_ELEMENT, Assumptions, ModelShape
from profiles.build.kernels import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What `profiles.build.fit` derives from the sources; see `coefficients.toml`."""

    base_share: float
    """Frequency-bound share of memory-bound kernels."""
    saturation: float
    """Tensor utilisation at which a GEMM is wholly frequency bound."""
    bandwidth_sag: float
    compute_w: float
    """Active power at full tensor utilisation, W per GPU."""
    small_ops_s_per_token: float
    """Small operations of a large Llama-8B layer."""
    small_ops_constant_s: float
    clocks_mhz: list[int]
    phi: list[float]
    """Active power relative to the top clock, at `clocks_mhz`."""
    idle_below_top_w: list[float]
    """Idle power lost against the top clock, at `clocks_mhz`, W per GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration on one GPU at the top clock, power limit aside."""

    free_s: float
    """Time that does not scale with 1/f, without host time."""
    bound_s: float
    """Time that scales with 1/f."""
    host_s: float
    flops: float
    read_bytes: float

    @property
    def top_s(self) -> float:
        """Duration at the top clock."""
        return self.free_s + self.bound_s + self.host_s


class DirectModel:
    """Evaluates one model on one instance; slow, exact, used to fill and to check the tables."""

    def __init__(
        self, kernels: Kernels, given: Assumptions, fitted: Coefficients, shape: ModelShape
    ) -> None:
        self._kernels, self._given, self._fitted, self._shape = kernels, given, fitted, shape
        self._graphs = given.engine.graph_batches()

    def padded(self, batch: int) -> int:
        """Batch of the CUDA graph that runs `batch` requests."""
        at = bisect_left(self._graphs, batch)
        return self._graphs[at] if at < len(self._graphs) else batch

    def decode(self, batch: int, tokens: float) -> Step:
        """A decode step over `tokens` context tokens in all, at the graph's batch size."""
        rows = self.padded(batch)
        heads, kv_heads = self._heads()
        attention = self._given.time.attention_multiplier * self._kernels.decode_attention_s(
            heads, kv_heads, rows, tokens
        )
        kv_bytes = self._shape.kv_bytes_per_token() / self._shape.tensor_parallel * tokens
        return self._step(
            rows, rows, attention, self._fitted.base_share, self._given.time.decode_host_s,
            attention_flops=0.0, kv_bytes=kv_bytes,
        )  # fmt: skip

    def prefill(self, batch: int, tokens: float) -> Step:
        """A prefill step over `tokens` new tokens in `batch` equal prompts."""
        heads, kv_heads = self._heads()
        attention = self._given.time.attention_multiplier * self._kernels.prefill_attention_s(
            heads, kv_heads, batch, tokens
        )
        pairs = tokens * max(tokens / batch, 1.0) / 2
        flops = 4 * self._shape.layers * heads * self._shape.head_dim * pairs
        return self._step(
            tokens, min(batch, tokens), attention, self._given.time.prefill_attention_share,
            self._given.time.prefill_host_s, attention_flops=flops, kv_bytes=0.0,
        )  # fmt: skip

    def time_and_power(self, step: Step, frequency_mhz: float) -> tuple[float, float]:
        """Duration in s and power of the whole instance in W at a locked clock."""
        limit = self._given.card.power_limit_w
        clock = frequency_mhz
        power = self._uncapped_w(step, clock)
        if power > limit:
            lowest = float(self._fitted.clocks_mhz[0])
            clock = float(brentq(lambda f: self._uncapped_w(step, f) - limit, lowest, clock))
            power = limit
        return self.time_s(step, clock), power * self._shape.tensor_parallel

    def time_s(self, step: Step, clock_mhz: float) -> float:
        """Duration in s at a clock that the card really holds."""
        x = self._given.card.top_mhz / clock_mhz - 1
        sagged = step.free_s * (1 + self._fitted.bandwidth_sag * x * x)
        return sagged + step.bound_s * (1 + x) + step.host_s

    def idle_w(self, clock_mhz: float) -> float:
        """Idle power of one GPU at a locked clock, in W."""
        below = np.interp(clock_mhz, self._fitted.clocks_mhz, self._fitted.idle_below_top_w)
        return self._given.power.idle_top_w - float(below)

    def active_top_w(self, step: Step) -> float:
        """Power above idle of one GPU at the top clock, power limit aside, in W."""
        power = self._given.power
        tb_per_s = step.read_bytes / step.top_s / 1e12
        used = step.flops / step.top_s / (self._given.card.peak_tflops * 1e12)
        base = power.decode_base_w - power.idle_top_w
        return base + power.decode_w_per_tb_s * tb_per_s + self._fitted.compute_w * used

    def gemm_s(self, rows: float) -> float:
        """The GEMMs of one layer at the top clock, for `rows` tokens."""
        return sum(self._kernels.gemm_s(n, k, rows) for n, k in self._shape.layer_gemms())

    def _uncapped_w(self, step: Step, clock_mhz: float) -> float:
        phi = float(np.interp(clock_mhz, self._fitted.clocks_mhz, self._fitted.phi))
        return self.idle_w(clock_mhz) + self.active_top_w(step) * phi

    def _heads(self) -> tuple[int, int]:
        tp = self._shape.tensor_parallel
        return self._shape.heads // tp, self._shape.kv_heads // tp

    def _step(
        self, rows: float, head_rows: float, attention_s: float, attention_share: float,
        host_s: float, *, attention_flops: float, kv_bytes: float,
    ) -> Step:  # fmt: skip
        shape = self._shape
        n, k = shape.head_gemm()
        gemm = shape.layers * self.gemm_s(rows) + self._kernels.gemm_s(n, k, head_rows)
        weights = shape.layer_weights() + shape.head_weights()
        flops = 2.0 * (rows * shape.layer_weights() + head_rows * shape.head_weights())
        share = self._gemm_share(flops / gemm / (self._given.card.peak_tflops * 1e12))
        attention = shape.layers * attention_s
        small = shape.layers * self._small_ops_s(rows)
        base = self._fitted.base_share
        bound = share * gemm + attention_share * attention + base * small
        reduce = 0.0
        if shape.tensor_parallel > 1:  # after attention and after the MLP of every layer
            message = rows * shape.hidden * BYTES_PER_ELEMENT
            reduce = 2 * shape.layers * self._kernels.all_reduce_s(message)
        return Step(
            free_s=gemm + attention + small + reduce - bound,
            bound_s=bound,
            host_s=host_s,
            flops=flops + attention_flops,
            read_bytes=BYTES_PER_ELEMENT * weights + kv_bytes,
        )

    def _gemm_share(self, utilisation: float) -> float:
        base = self._fitted.base_share
        return base + (1 - base) * min(1.0, utilisation / self._fitted.saturation)

    def _small_ops_s(self, rows: float) -> float:
        """Launch bound at first, then bound by the activations it reads and writes."""
        shape, reference = self._shape, self._given.models["llama-3.1-8b"]
        width = shape.hidden + shape.intermediate / shape.tensor_parallel
        per_token = self._fitted.small_ops_s_per_token * width / (
            reference.hidden + reference.intermediate
        )  # fmt: skip
        floor = self._given.time.small_ops_s_per_layer
        norm = self._given.time.qk_norm_s_per_layer if shape.has_qk_norm else 0.0
        return norm + max(floor, self._fitted.small_ops_constant_s + per_token * rows)
