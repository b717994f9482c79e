"""Rates that were recorded: windows of a fleet's request rate, shipped or of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.lengths import DATA
from voltana.sim.workload.workload import FloatArray

COLUMNS: Final = ("window_start_s", "rate_rps")
SHIPPED: Final = {"alibaba-m-large": "alibaba-m-large-rates.csv.gz"}
"""14 days in windows of 600 s: a pool of large models at Alibaba Cloud Model Studio, the sum over
its clients (ServeGen, arXiv 2505.09999, Apache-2.0, f891d118; language/m-large)."""


class RateCurve:
    """A rate that is constant in each window, and nothing before the first and after the last.

    Args:
        start_s: Where each window begins, rising, the first at 0, shape [n], n >= 2.
        rate_rps: Rate in it, >= 0, shape [n]. The last window is as long as the one before it.
    """

    def __init__(self, start_s: FloatArray, rate_rps: FloatArray) -> None:
        ends_s = np.append(start_s, 2 * start_s[-1] - start_s[-2])
        self._edges_s = ends_s
        self._reached = np.concatenate(([0.0], np.cumsum(rate_rps * np.diff(ends_s))))

    @property
    def end_s(self) -> float:
        """End of the last window."""
        return float(self._edges_s[-1])

    def __call__(self, time_s: FloatArray) -> FloatArray:
        """Expected arrivals up to each time."""
        return np.interp(time_s, self._edges_s, self._reached)


def read_curve(name_or_path: str) -> RateCurve:
    """A shipped curve by name, or a CSV of one's own (also .gz) with `COLUMNS`.

    Raises:
        VoltanaError: It is not there, or a row breaks a rule; the message names file and rule.
    """
    path = DATA / SHIPPED[name_or_path] if name_or_path in SHIPPED else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(SHIPPED)
        raise VoltanaError(f"no such rate curve: {name_or_path}; shipped: {known}; or a CSV file")
    try:
        frame = pd.read_csv(path)
        start_s, rate_rps = (frame[column].to_numpy(dtype=np.float64) for column in COLUMNS)
    except (KeyError, ValueError) as error:
        needed = " and ".join(COLUMNS)
        raise VoltanaError(f"{path}: must be a CSV with numbers in {needed}: {error}") from None
    if len(start_s) < 2 or start_s[0] != 0 or not np.all(np.diff(start_s) > 0):
        raise VoltanaError(f"{path}: window_start_s must rise from 0, in two rows or more")
    if not (np.all(np.isfinite(rate_rps)) and np.all(rate_rps >= 0) and np.any(rate_rps > 0)):
        raise VoltanaError(f"{path}: rate_rps must be finite and >= 0, and not 0 throughout")
    return RateCurve(start_s, rate_rps)
