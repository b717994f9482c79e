"""How time and power move with the clock, from a public frequency sweep.

Source: qweewqq/EnergyLLM @ 3fffed3: Llama-3.1-8B, vLLM 0.11, A100-40GB, whole batches at 15 locked
clocks, 1 Hz NVML power; rows recovered from published regression forests. Only coefficients
derived from it are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]

TOP_MHZ: Final = 1410
IDLE_TOP_W: Final = 63.0
"""A100-80G, model loaded, clock locked at 1410 MHz: 62-65 W (three public readings)."""
_FOLDER = "energyllm_a100_llama31_8b"
_BATCH_GROUPS: Final = {8: (1, 24), 40: (25, 48), 64: (49, 64)}
"""Representative batch size -> range of batch sizes whose share is pooled."""
SHARE_ABOVE: Final = {256: 0.45, 1024: 0.50}
"""Modelled, not in the data (it ends at batch 64): the GEMMs turn from reading weights to
arithmetic, which scales with 1/f; attention over the cache stays with the memory."""
PREFILL_SHARE: Final = {1: 0.20, 256: 0.70, 512: 0.95, 16384: 0.95}
"""Tokens -> frequency-bound share of prefill. Modelled: GEMMs of more than 512 tokens are bound
by arithmetic and scale close to 1/f, a prompt of a few tokens reads weights as decode does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockModel:
    """Coefficients of T = A + B·1410/f and P = idle(f) + active·phi(f)."""

    decode_share: dict[int, float]
    """Batch size -> B / (A + B)."""
    phi: dict[int, float]
    """Clock -> active power relative to 1410 MHz."""
    idle_w: dict[int, float]
    """Clock -> idle power of one GPU."""

    def time_factor(self, share: float, clock_mhz: float) -> float:
        """Time at a clock relative to 1410 MHz."""
        return 1.0 - share + share * TOP_MHZ / clock_mhz

    def decode_share_at(self, batch: float) -> float:
        """Frequency-bound share of a decode iteration."""
        return _interpolate(self.decode_share, batch)

    def prefill_share_at(self, tokens: float) -> float:
        """Frequency-bound share of a prefill iteration; linear in log tokens."""
        log = {np.log(t): s for t, s in PREFILL_SHARE.items()}
        return _interpolate(log, float(np.log(tokens)))

    def power_w(self, active_top_w: float, clock_mhz: float) -> float:
        """Power of one GPU whose active part is `active_top_w` at 1410 MHz; no cap applied."""
        idle = _interpolate(self.idle_w, clock_mhz)
        return idle + active_top_w * _interpolate(self.phi, clock_mhz)

    def clock_under_cap(self, active_top_w: float, clock_mhz: float, cap_w: float) -> float:
        """The clock that the card sags to: the highest one <= `clock_mhz` within the cap."""
        if self.power_w(active_top_w, clock_mhz) <= cap_w:
            return clock_mhz
        low, high = float(min(self.phi)), clock_mhz
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (
                (middle, high) if self.power_w(active_top_w, middle) <= cap_w else (low, middle)
            )
        return low


def fit_clock_model(data: Path) -> ClockModel:
    """Derive the coefficients from the sweep."""
    grid = pd.read_csv(data / _FOLDER / "llama31_8b_grid_recovered.csv")
    relative = pd.read_csv(data / _FOLDER / "relative_to_1410.csv").set_index("gpu_frequency_mhz")
    idle = pd.read_csv(data / _FOLDER / "idle_power_vs_locked_clock.csv")
    idle_then = dict(zip(idle.iloc[:, 0].astype(int), idle.iloc[:, 1], strict=True))
    top = grid[grid["gpu_frequency_mhz"] == TOP_MHZ]
    loaded_w = float(top["avg_gpu_power_watts"].median())
    clocks = relative.index.to_numpy(dtype=float)
    active = relative["P_rel_median"] * loaded_w - pd.Series(idle_then)
    phi = np.maximum.accumulate((active / active[TOP_MHZ]).to_numpy(dtype=float))
    fall = {c: idle_then[TOP_MHZ] - w for c, w in idle_then.items()}
    return ClockModel(
        decode_share=_shares(grid) | SHARE_ABOVE,
        phi=dict(zip((int(c) for c in clocks), (float(p) for p in phi), strict=True)),
        idle_w={c: IDLE_TOP_W - float(f) for c, f in fall.items()},
    )


def _shares(grid: pd.DataFrame) -> dict[int, float]:
    """Least squares of T against 1410/f per batch size; medians over groups, never falling."""
    shares: dict[int, float] = {}
    kept = grid[grid["early_stop_outlier"] == 0]
    for name, (low, high) in _BATCH_GROUPS.items():
        found = []
        for _, part in kept[kept["batch_size"].between(low, high)].groupby("batch_size"):
            x = TOP_MHZ / part["gpu_frequency_mhz"].to_numpy(dtype=float)
            slope, constant = np.polyfit(x, part["total_latency_sec"].to_numpy(dtype=float), 1)
            found.append(slope / (slope + constant))
        shares[name] = float(np.median(found))
    values = np.maximum.accumulate(list(shares.values()))
    return dict(zip(shares, (float(v) for v in values), strict=True))


def _interpolate(points: dict[int, float] | dict[float, float], at: float) -> float:
    xs = sorted(points)
    return float(np.interp(at, xs, [points[x] for x in xs]))  # type: ignore[index]
