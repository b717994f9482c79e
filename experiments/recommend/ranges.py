"""Where the numbers of a way may lie: over seeds, over the load, and over the profile's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd

from voltana.experiments.compare.intervals import t_interval
from voltana.experiments.frontier.trial import Trial
from voltana.experiments.recommend.advice import HOURS, Advice, Judged

NEAR_LOAD: Final = 0.2
"""Part of the load by which it may be off."""
SEEDS, LOAD, PROFILE = "seeds", "load", "profile"
Range = tuple[float, float]


def ranges(advice: Advice, way: Judged) -> Mapping[str, Mapping[str, Range]]:
    """Low and high of each quantity, by what is uncertain.

    - `seeds`: the 95 % interval of the mean over the judging repeats;
    - `load`: the least and the largest of all runs at 0.8 to 1.2 times the load;
    - `profile`: the 2.5 and 97.5 % quantiles over the draws from the profile's stated errors, if
      there are any.

    Quantities are attainment, J a request, kWh a day, and % saved against the top clocks, each run
    paired with that of the top clocks on the same requests, load and draw.
    """
    now = advice.now
    near = [f for f in way.at_load if abs(f - 1.0) <= NEAR_LOAD + 1e-9]
    found = {
        SEEDS: _spread([(way.asked, now.asked)], _interval),
        LOAD: _spread([(way.at_load[f], now.at_load[f]) for f in near], _extremes),
    }
    if way.drawn:
        found[PROFILE] = _spread([*zip(way.drawn, now.drawn, strict=True)], _quantiles)
    return found


def _spread(
    pairs: Sequence[tuple[Trial, Trial]], of: Callable[[Sequence[float]], Range]
) -> Mapping[str, Range]:
    mine = pd.concat([a.rows for a, _ in pairs], ignore_index=True)
    top = pd.concat([b.rows for _, b in pairs], ignore_index=True)
    low, high = of([*mine["attainment"]])
    return {
        "attainment": (max(low, 0.0), min(high, 1.0)),
        "energy_per_request_j": of([*mine["energy_per_request_j"]]),
        "kwh_a_day": of([*(mine["energy_j"] / top["makespan_s"] * HOURS / 1e3)]),
        "saving_vs_top_clocks_pct": of([*(100.0 * (1.0 - mine["energy_j"] / top["energy_j"]))]),
    }


def _interval(values: Sequence[float]) -> Range:
    found = t_interval(values)
    return found.mean - found.half, found.mean + found.half


def _extremes(values: Sequence[float]) -> Range:
    return min(values), max(values)


def _quantiles(values: Sequence[float]) -> Range:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
