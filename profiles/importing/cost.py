"""Time, bytes and arithmetic of one iteration at the clock that the kernels were measured at.

The model of `voltana.profiles.build.models`, for any system and decoder: the kernels of a layer,
times the layers, the output head, two all-reduces a layer, and what the tables leave out (see
`Host`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.build.kernels import AllReduce, Attention, Gemm
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.importing.decoder import BYTES, Decoder
from voltana.profiles.importing.systems import Host, load_host
from voltana.profiles.importing.tables import KernelTables

MOE_ROUTING: Final = "power_law_1.01"
"""How the wheel spread tokens over experts; its other two lie within 4 % beyond 32 tokens."""
BANDWIDTH_SHARE: Final = 0.75
"""Of the peak, at which element-wise kernels of a long prefill move memory, as on the A100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one GPU does in an iteration."""

    time_s: float
    weight_bytes: float
    cache_bytes: float
    flops: float


class Cost:
    """What iterations of one decoder cost on one system."""

    def __init__(self, tables: KernelTables, decoder: Decoder) -> None:
        self.decoder = decoder
        self.host: Host = load_host(tables.system)
        self._move_bytes_per_s = BANDWIDTH_SHARE * tables.system.bandwidth_bytes_per_s
        self._gemm = Gemm(tables.read("gemm"))
        self._attention = {
            phase: _attention(tables.read(f"{phase}_attention"), phase, decoder)
            for phase in ("decode", "prefill")
        }
        self._experts = _Experts(tables.read("moe"), decoder) if decoder.experts else None
        self._reduce = {}
        if decoder.tensor_parallel > 1:
            table = tables.read("allreduce")
            self._reduce = {m: _reduce(table, m, decoder) for m in ("graph", "eager")}

    def decode(self, batch: int, tokens: float) -> Work:
        """One decode iteration of `batch` requests with `tokens` of context in all."""
        model = self.decoder
        layer_s = (
            self._products_s(batch)
            + self._attention["decode"].time_s(batch, max(tokens / batch, 1.0))
            + self._reduces_s("graph", batch)
            + self.host.per_layer_s
        )
        time_s = model.layers * layer_s + self._head_s(batch) + batch * self.host.per_request_s
        cache = tokens * model.kv_bytes_per_token / model.tensor_parallel
        return Work(
            time_s=time_s, weight_bytes=BYTES * model.weights_read(batch), cache_bytes=cache,
            flops=model.flops(batch),
        )  # fmt: skip

    def prefill(self, batch: int, tokens: float) -> Work:
        """One prefill iteration of `batch` equal prompts with `tokens` in all, host apart."""
        model = self.decoder
        width = model.experts_per_token or 1
        inner = 3 * width * model.intermediate / model.tensor_parallel
        moved = tokens * (10 * model.hidden + inner) * BYTES
        layer_s = (
            self._products_s(tokens)
            + self._attention["prefill"].time_s(batch, max(tokens / batch, 1.0))
            + self._reduces_s("eager", tokens)
            + max(self.host.per_layer_s, moved / self._move_bytes_per_s)
        )
        time_s = model.layers * layer_s + self._head_s(min(batch, tokens))
        pairs = 0.5 * tokens * max(tokens / batch, 1.0)
        attention = 4.0 * model.layers * model.gpu_heads * model.head_dim * pairs
        written = tokens * model.kv_bytes_per_token / model.tensor_parallel
        return Work(
            time_s=time_s, weight_bytes=BYTES * model.weights_read(tokens), cache_bytes=written,
            flops=model.flops(tokens) + attention,
        )  # fmt: skip

    def _products_s(self, rows: float) -> float:
        dense = sum(self._gemm.time_s(rows, n, k) for n, k in self.decoder.gemms)
        return dense + (self._experts.time_s(rows) if self._experts else 0.0)

    def _head_s(self, rows: float) -> float:
        model = self.decoder
        return self._gemm.time_s(rows, model.vocabulary // model.tensor_parallel, model.hidden)

    def _reduces_s(self, mode: str, tokens: float) -> float:
        if not self._reduce:
            return 0.0
        return 2 * self._reduce[mode].time_s(tokens * self.decoder.hidden * BYTES)


class _Experts:
    """Time of the experts of one layer by tokens, linear between measured ones."""

    def __init__(self, table: pd.DataFrame, model: Decoder) -> None:
        wanted = {
            "hidden_size": model.hidden, "inter_size": model.intermediate,
            "topk": model.experts_per_token, "num_experts": model.experts,
            "moe_tp_size": model.tensor_parallel, "distribution": MOE_ROUTING,
        }  # fmt: skip
        for column, value in wanted.items():
            table = table[table[column] == value]
        if table.empty:
            raise VoltanaError(
                f"the tables have no experts of {model.name} with TP{model.tensor_parallel}: "
                "choose another --engine, --version or --tp"
            )
        median = table.groupby("num_tokens")["latency"].median()
        self._tokens = median.index.to_numpy(dtype=float)
        self._times = np.maximum.accumulate(median.to_numpy(dtype=float)) * 1e-3

    def time_s(self, tokens: float) -> float:
        beyond = max(tokens / self._tokens[-1], 1.0)
        return float(np.interp(tokens, self._tokens, self._times) * beyond)


def _attention(table: pd.DataFrame, phase: str, model: Decoder) -> Attention:
    wanted = (model.gpu_heads, model.gpu_kv_heads, model.head_dim)
    columns = ("num_heads", "num_key_value_heads", "head_dim")
    rows = pd.concat([table[c] == v for c, v in zip(columns, wanted, strict=True)], axis=1)
    if not rows.all(axis=1).any():
        raise VoltanaError(
            f"the tables have no {phase} attention of {wanted[0]} heads over {wanted[1]} of "
            f"{wanted[2]} numbers ({model.name}, TP{model.tensor_parallel}): choose another --tp"
        )
    return Attention(table, phase, *wanted)


def _reduce(table: pd.DataFrame, mode: str, model: Decoder) -> AllReduce:
    table = table[table["backend"].str.endswith(f"_{mode}")]
    degrees = sorted({int(n) for n in table["num_gpus"]})
    if model.tensor_parallel not in degrees:
        raise VoltanaError(f"--tp must be 1 or one of {degrees}, got {model.tensor_parallel}")
    return AllReduce(table, mode, model.tensor_parallel)
