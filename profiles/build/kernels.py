"""Kernel times at the top clock, interpolated from a public kernel data base.

Of the A100: ai-dynamo/aiconfigurator @ 095f58a (Apache-2.0), A100-SXM4-80GB, bf16, SGLang 0.5.10:
GEMM by (m, n, k), decode and prefill attention by batch and length, all-reduce by message size.
All tables in ms; everything here returns seconds. The tables scatter by up to 10 % between runs:
times are made non-decreasing in the size of the work, steps are kept.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import isotonic_regression

from voltana.profiles.common.errors import VoltanaError

FloatArray = npt.NDArray[np.float64]

_FOLDER = "aiconfigurator_a100_sxm"


def read_a100(data: Path, table: str) -> pd.DataFrame:
    """One table of the A100 extract, such as `gemm_bf16`."""
    return read_csv(data / _FOLDER / f"{table}_sglang0.5.10.csv")


def read_csv(path: Path) -> pd.DataFrame:
    """Read one of the sources' tables.

    Raises:
        VoltanaError: It is not there.
    """
    if not path.is_file():
        raise VoltanaError(f"no source table {path}: --data must name the folder of the sources")
    return pd.read_csv(path)


class Gemm:
    """Time of a bf16 GEMM (m×k by k×n), linear between the measured m, n and k.

    Beyond the largest measured n or k the time grows in proportion to it: such a GEMM is bound by
    reading its weights or by arithmetic, and both are proportional.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self._curves: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}
        for key, part in table.groupby(["n", "k"]):
            n, k = (int(str(side)) for side in key)
            median = part.groupby("m")["latency"].median()
            times = _rising(median.to_numpy(dtype=float) * 1e-3)
            self._curves[n, k] = median.index.to_numpy(dtype=float), times
        self._n = sorted({n for n, _ in self._curves})
        self._k = sorted({k for _, k in self._curves})

    def time_s(self, m: float, n: int, k: int) -> float:
        """Seconds for one GEMM of m×k by k×n.

        Args:
            m: Tokens.
            n: Columns of the weights.
            k: Rows of the weights.
        """
        total = 0.0
        for n_at, n_weight in _weights(self._n, n):
            for k_at, k_weight in _weights(self._k, k):
                if n_weight * k_weight > 0:
                    curve_m, curve_s = self._curves[n_at, k_at]
                    total += n_weight * k_weight * float(np.interp(m, curve_m, curve_s))
        return total


def _rising(times: FloatArray) -> FloatArray:
    """The nearest non-decreasing curve: isotonic regression with relative weights."""
    return np.asarray(isotonic_regression(times, weights=times**-2.0).x)


def _weights(known: list[int], value: int) -> list[tuple[int, float]]:
    at = bisect_left(known, value)
    if at == len(known):
        return [(known[-1], value / known[-1])]
    if known[at] == value or at == 0:
        return [(known[at], value / known[at])]
    low, high = known[at - 1], known[at]
    weight = (value - low) / (high - low)
    return [(low, 1 - weight), (high, weight)]


class Attention:
    """Time of one attention layer by batch and length; linear between measured points.

    Beyond the longest measured length it continues its last piece, beyond the largest batch it
    grows in proportion to the batch.

    Args:
        data: Folder of the sources.
        phase: "prefill" or "decode".
        heads: Query heads of one GPU.
        kv_heads: Key and value heads of one GPU.
    """

    def __init__(
        self, table: pd.DataFrame, phase: str, heads: int, kv_heads: int, head_dim: int = 128
    ) -> None:
        length = "step" if phase == "decode" else "isl"
        chosen = table[
            (table["num_heads"] == heads)
            & (table["num_key_value_heads"] == kv_heads)
            & (table["head_dim"] == head_dim)
        ]
        self._rows: dict[int, tuple[FloatArray, FloatArray]] = {}
        for batch, part in chosen.groupby("batch_size"):
            median = part.groupby(length)["latency"].median()
            times = np.maximum.accumulate(median.to_numpy(dtype=float)) * 1e-3
            self._rows[int(str(batch))] = (median.index.to_numpy(dtype=float), times)
        self._batches = [b for b in sorted(self._rows) if len(self._rows[b][0]) > 1]

    def time_s(self, batch: float, length: float) -> float:
        """Seconds for one layer with `batch` requests of `length` tokens each."""
        known = self._batches
        if batch >= known[-1]:
            return self._row_s(known[-1], length) * batch / known[-1]
        at = max(bisect_left(known, batch), 1)
        low, high = known[at - 1], known[at]
        weight = (batch - low) / (high - low)
        return (1 - weight) * self._row_s(low, length) + weight * self._row_s(high, length)

    def _row_s(self, batch: int, length: float) -> float:
        lengths, times = self._rows[batch]
        if length <= lengths[-1]:
            return float(np.interp(length, lengths, times))
        slope = (times[-1] - times[-2]) / (lengths[-1] - lengths[-2])
        return float(times[-1] + slope * (length - lengths[-1]))


class AllReduce:
    """Time of one all-reduce by message size in bytes; `mode` is "graph" or "eager"."""

    def __init__(self, table: pd.DataFrame, mode: str, num_gpus: int = 2) -> None:
        chosen = table[
            (table["num_gpus"] == num_gpus) & table["backend"].str.endswith(f"_{mode}")
        ].sort_values("message_size")
        # the table counts elements of two bytes
        self._bytes = 2.0 * chosen["message_size"].to_numpy(dtype=float)
        self._times = _rising(chosen["latency"].to_numpy(dtype=float) * 1e-3)

    def time_s(self, message_bytes: float) -> float:
        """Seconds for one all-reduce."""
        return float(np.interp(message_bytes, self._bytes, self._times))
