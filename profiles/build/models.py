"""Shapes of the three models and what they cost on one instance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from voltana.profiles.build.kernels import AllReduce, Attention, Gemm, read_a100

GRAPH_BATCHES: Final = (
    1, 2, 4, *range(8, 129, 8), 160, 192, 224, 256, *range(320, 2049, 64),
)  # fmt: skip
"""Decode batches are padded to these CUDA-graph sizes (SGLang 0.4.7, as the reference ran it)."""
SMALL_OPS_S: Final = 27e-6
"""Norms, rotary, activation and launch gaps of one 8B decode layer (hidden size 4096)."""
SMALL_OPS_BYTES_PER_S: Final = 1.5e12
"""Rate at which the element-wise work of a long prefill moves memory (HBM2e peak is 2.0)."""
BYTES: Final = 2
"""bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder with grouped-query attention."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tensor_parallel: int
    kv_capacity_tokens: int
    max_context_tokens: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * 128 * BYTES

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(n, k) per layer and GPU: qkv, output, gate and up, down."""
        tp = self.tensor_parallel
        attention = self.heads * 128 // tp
        qkv = (self.heads + 2 * self.kv_heads) * 128 // tp
        return (
            (qkv, self.hidden),
            (self.hidden, attention),
            (2 * self.intermediate // tp, self.hidden),
            (self.hidden, self.intermediate // tp),
        )

    @property
    def weights_per_gpu(self) -> int:
        """Parameters one GPU reads in an iteration (embedding look-up left out)."""
        layer = sum(n * k for n, k in self.gemms)
        return self.layers * layer + self.vocabulary * self.hidden // self.tensor_parallel


SHAPES: Final = {
    "llama-3.1-8b": Shape(
        name="meta-llama/Llama-3.1-8B-Instruct", layers=32, hidden=4096, intermediate=14336,
        heads=32, kv_heads=8, vocabulary=128256, tensor_parallel=1, kv_capacity_tokens=457_600,
        max_context_tokens=131_072,
    ),
    "qwen3-32b-tp2": Shape(
        name="Qwen/Qwen3-32B", layers=64, hidden=5120, intermediate=25600, heads=64, kv_heads=8,
        vocabulary=151936, tensor_parallel=2, kv_capacity_tokens=325_037,
        max_context_tokens=40_960,
    ),
    "ministral-3b": Shape(
        name="ministral/Ministral-3b-instruct", layers=14, hidden=4096, intermediate=14336,
        heads=32, kv_heads=8, vocabulary=32000, tensor_parallel=1, kv_capacity_tokens=1_210_369,
        max_context_tokens=32_768,
    ),
}  # fmt: skip
"""Shapes: the models' config.json (Ministral-3b: that of a published fine-tune of it). KV
capacities: the reference's profiling script. Weights and KV cache together are 75-76 GB per GPU in
all three, so the 14 layers of Ministral-3b agree with its capacity."""


class Cost:
    """Time, bytes read and arithmetic of one iteration at the top clock.

    Args:
        data: Folder of the sources.
        shape: The model.
        attention_multiplier: Factor on both attention kernels; 1 is as measured.
    """

    def __init__(self, data: Path, shape: Shape, *, attention_multiplier: float) -> None:
        self._shape = shape
        self._gemm = Gemm(read_a100(data, "gemm_bf16"))
        heads, kv_heads = (
            shape.heads // shape.tensor_parallel,
            shape.kv_heads // shape.tensor_parallel,
        )
        self._decode_attention = Attention(
            read_a100(data, "decode_attention"), "decode", heads, kv_heads
        )
        self._prefill_attention = Attention(
            read_a100(data, "prefill_attention"), "prefill", heads, kv_heads
        )
        reduce = read_a100(data, "allreduce")
        self._graph_reduce = AllReduce(reduce, "graph")
        self._eager_reduce = AllReduce(reduce, "eager")
        self._multiplier = attention_multiplier

    def decode_s(self, batch: int, tokens: float) -> float:
        """One decode iteration with `tokens` of context in all."""
        shape = self._shape
        padded = next(b for b in GRAPH_BATCHES if b >= batch)
        attention = self._decode_attention.time_s(batch, max(tokens / batch, 1.0))
        layer = (
            self._gemms_s(padded)
            + self._multiplier * attention
            + SMALL_OPS_S * shape.hidden / 4096
            + self._reduce_s(self._graph_reduce, padded)
        )
        return shape.layers * layer + self._head_s(padded)

    def prefill_s(self, batch: int, tokens: float) -> float:
        """One prefill iteration of `batch` equal prompts with `tokens` in all."""
        shape = self._shape
        attention = self._prefill_attention.time_s(batch, max(tokens / batch, 1.0))
        moved = (10 * shape.hidden + 3 * shape.intermediate / shape.tensor_parallel) * BYTES
        layer = (
            self._gemms_s(tokens)
            + self._multiplier * attention
            + max(SMALL_OPS_S * shape.hidden / 4096, tokens * moved / SMALL_OPS_BYTES_PER_S)
            + self._reduce_s(self._eager_reduce, tokens)
        )
        return shape.layers * layer + self._head_s(min(batch, tokens))

    def decode_bytes(self, tokens: float) -> float:
        """HBM bytes that one GPU reads in a decode iteration."""
        shape = self._shape
        cache = tokens * shape.kv_bytes_per_token / shape.tensor_parallel
        return shape.weights_per_gpu * BYTES + cache

    def flops(self, tokens: float) -> float:
        """Arithmetic of one GPU's GEMMs for that many tokens."""
        return 2.0 * self._shape.weights_per_gpu * tokens

    def prefill_flops(self, batch: int, tokens: float) -> float:
        """Arithmetic of one GPU in a prefill of `batch` equal prompts: GEMMs, causal attention."""
        shape = self._shape
        pairs = 0.5 * tokens * max(tokens / batch, 1.0)
        attention = 4.0 * shape.layers * (shape.heads // shape.tensor_parallel) * 128 * pairs
        return self.flops(tokens) + attention

    def _gemms_s(self, m: float) -> float:
        return sum(self._gemm.time_s(m, n, k) for n, k in self._shape.gemms)

    def _head_s(self, m: float) -> float:
        shape = self._shape
        return self._gemm.time_s(m, shape.vocabulary // shape.tensor_parallel, shape.hidden)

    def _reduce_s(self, reduce: AllReduce, tokens: float) -> float:
        if self._shape.tensor_parallel == 1:
            return 0.0
        return 2 * reduce.time_s(tokens * self._shape.hidden * BYTES)
