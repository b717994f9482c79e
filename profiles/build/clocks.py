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
import pandas as pd
from scipy.optimize import minimize_scalar, nnls

from voltana.profiles.build.kernels import read_csv

TOP_MHZ: Final = 1410
IDLE_TOP_W: Final = 63.0
"""A100-80G, model loaded, clock locked at 1410 MHz: 62-65 W (three public readings)."""
_FOLDER = "energyllm_a100_llama31_8b"
_BATCH_GROUPS: Final = {8: (1, 24), 40: (25, 48), 64: (49, 64)}
"""Representative batch size -> range of batch sizes whose share is pooled."""
SHARE_ABOVE: Final = {256: 0.40, 1024: 0.50}
"""Modelled, not in the data (it ends at batch 64): the GEMMs turn from reading weights to
arithmetic, which scales with 1/f; attention over the cache stays with the memory. By the kernel
table, Llama-8B GEMMs reach 67 % of the tensor peak at batch 256 but are 40 % of a step there."""
LARGEST_SAG: Final = 0.5
"""Bound of the search: half the memory-bound time more at half the top clock."""
PREFILL_SHARE: Final = {1: 0.20, 256: 0.70, 512: 0.95, 16384: 0.95}
"""Tokens -> frequency-bound share of prefill. Modelled: GEMMs of more than 512 tokens are bound
by arithmetic and scale close to 1/f, a prompt of a few tokens reads weights as decode does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockModel:
    """Coefficients of time and power against the clock.

    T = A·(1 + sag·x²) + B·(1 + x) with x = 1410/f - 1: the split T = A + B·1410/f, with the
    memory-bound part A losing some bandwidth at low clocks (caches and the network on chip run at
    the SM clock). Without sag the sweep is overestimated by 3 % at 1005 MHz and underestimated at
    705 MHz. P = idle(f) + active·phi(f).
    """

    sag: float
    decode_share: dict[int, float]
    """Batch size -> B / (A + B)."""
    phi: dict[int, float]
    """Clock -> active power relative to 1410 MHz."""
    idle_w: dict[int, float]
    """Clock -> idle power of one GPU."""

    def time_factor(self, share: float, clock_mhz: float) -> float:
        """Time at a clock relative to 1410 MHz."""
        x = TOP_MHZ / clock_mhz - 1.0
        return (1.0 - share) * (1.0 + self.sag * x * x) + share * (1.0 + x)

    def decode_share_at(self, batch: float) -> float:
        """Frequency-bound share of a decode iteration."""
        return _interpolate(self.decode_share, batch)

    def prefill_share_at(self, tokens: float) -> float:
        """Frequency-bound share of a prefill iteration; linear in log tokens."""
        log = {np.log(t): s for t, s in PREFILL_SHARE.items()}
        return _interpolate(log, float(np.log(tokens)))

    def power_w(self, active_top_w: float, clock_mhz: float) -> float:
        """Power of one GPU whose active part is `active_top_w` at 1410 MHz; no cap applied."""
        return _interpolate(self.idle_w, clock_mhz) + active_top_w * self.phi_at(clock_mhz)

    def phi_at(self, clock_mhz: float) -> float:
        """Active power relative to the top clock."""
        return _interpolate(self.phi, clock_mhz)

    def clock_under_cap(self, active_top_w: float, clock_mhz: float, cap_w: float) -> float:
        """The clock that the card sags to: the highest one <= `clock_mhz` within the cap.

        Args:
            active_top_w: Power above idle at the top clock, in W.
            clock_mhz: Clock that was locked.
            cap_w: Power limit of the card, in W.
        """
        if self.power_w(active_top_w, clock_mhz) <= cap_w:
            return clock_mhz
        low, high = float(min(self.phi)), clock_mhz
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (
                (middle, high) if self.power_w(active_top_w, middle) <= cap_w else (low, middle)
            )
        return low


def fit_clock_model(data: Path, loaded_top_w: float) -> ClockModel:
    """Derive the coefficients from the sweep.

    Args:
        data: Folder of the sources.
        loaded_top_w: Power of one GPU of this card at moderate decode load at the top clock. The
            sweep's ratio of whole-card power is made to hold there.
    """
    relative = read_csv(data / _FOLDER / "relative_to_1410.csv").set_index("gpu_frequency_mhz")
    idle = read_csv(data / _FOLDER / "idle_power_vs_locked_clock.csv")
    then = pd.Series(idle.iloc[:, 1].to_numpy(dtype=float), index=idle.iloc[:, 0].astype(int))
    idle_w = IDLE_TOP_W - (then.loc[TOP_MHZ] - then)
    active = relative["P_rel_median"] * loaded_top_w - idle_w
    phi = np.maximum.accumulate((active / active.loc[TOP_MHZ]).to_numpy(dtype=float))
    sag, share = _fit_sag(data)
    return ClockModel(
        sag=sag,
        decode_share=share | SHARE_ABOVE,
        phi={int(str(c)): float(p) for c, p in zip(relative.index, phi, strict=True)},
        idle_w={int(str(c)): float(w) for c, w in idle_w.items()},
    )


def read_sweep(data: Path) -> pd.DataFrame:
    """Durations of whole batches, without the runs that stopped early."""
    grid = read_csv(data / _FOLDER / "llama31_8b_grid_recovered.csv")
    return grid[grid["early_stop_outlier"] == 0]


def _fit_sag(data: Path) -> tuple[float, dict[int, float]]:
    """The sag that explains all batch sizes best, and the frequency-bound share by group."""
    parts = {int(str(b)): p for b, p in read_sweep(data).groupby("batch_size")}

    def total_error(sag: float) -> float:
        return sum(_split(part, sag)[1] for part in parts.values())

    found = minimize_scalar(total_error, bounds=(0.0, LARGEST_SAG), method="bounded")
    sag = round(float(found.x), 3)
    shares: dict[int, float] = {}
    for name, (low, high) in _BATCH_GROUPS.items():
        pooled = [_split(part, sag)[0] for b, part in parts.items() if low <= b <= high]
        shares[name] = max([float(np.median(pooled)), *shares.values()])  # never falling
    return sag, shares


def _split(part: pd.DataFrame, sag: float) -> tuple[float, float]:
    """Share B / (A + B) of one batch size and the squared relative error of its fit."""
    x = TOP_MHZ / part["gpu_frequency_mhz"].to_numpy(dtype=float) - 1.0
    weight = 1.0 / part["total_latency_sec"].to_numpy(dtype=float)
    basis = np.column_stack([1.0 + sag * x * x, 1.0 + x]) * weight[:, None]
    (free, bound), error = nnls(basis, np.ones_like(x))
    return float(bound / (free + bound)), float(error**2)


def _interpolate(points: dict[int, float] | dict[float, float], at: float) -> float:
    xs = sorted(points)
    return float(np.interp(at, xs, [points[x] for x in xs]))  # type: ignore[index]
