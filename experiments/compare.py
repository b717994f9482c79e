"""Fair comparison of policies within one load point."""

from __future__ import annotations

from typing import Final

import pandas as pd

from experiments.grid import STATIC_PAIR
from profiles.errors import VoltanaError

STATIC_MAX: Final = "static-max"
BEST_PAIR: Final = "best static pair"
TARGET: Final = 0.99
"""Default attainment that TTFT and ITL must both reach to count as keeping the SLO."""


def keeps_slo(frame: pd.DataFrame, target: float = TARGET) -> pd.Series[bool]:
    """Rows whose TTFT and ITL attainments both reach the target."""
    return (frame["ttft_attainment"] >= target) & (frame["itl_attainment"] >= target)


def compare(frame: pd.DataFrame, *, target: float = TARGET) -> pd.DataFrame:
    """Add savings, and reduce the static pairs of each load point to the best one.

    The best static pair is the one with the least energy among those that keep the SLO; where
    none does, the one with the highest worse attainment. A saving of a policy that does not keep
    the SLO is no saving at equal attainment: `keeps_slo` says so in every table and figure.

    Args:
        frame: Tidy results of one sweep with a `policy` column, one row per rate and policy.
        target: Attainment that both TTFT and ITL must reach.

    Returns:
        Rows by rate and policy with `saving_pct` (whole-run energy against static-max).

    Raises:
        VoltanaError: A load point has no `static-max` to compare with.
    """
    frame = frame.assign(keeps_slo=keeps_slo(frame, target))
    parts = []
    for rate, at_rate in frame.groupby("rate_rps", sort=True):
        is_pair = at_rate["policy"].str.startswith(STATIC_PAIR)
        kept = at_rate[~is_pair]
        baseline = kept[kept["policy"] == STATIC_MAX]
        if baseline.empty:
            raise VoltanaError(f"no {STATIC_MAX} at rate {rate}: nothing to compare with")
        if is_pair.any():
            kept = pd.concat([kept, best_pair(at_rate[is_pair])])
        reference_j = float(baseline["energy_j"].iloc[0])
        parts.append(kept.assign(saving_pct=100 * (1 - kept["energy_j"] / reference_j)))
    return pd.concat(parts, ignore_index=True)


def best_pair(pairs: pd.DataFrame) -> pd.DataFrame:
    """The one row of `pairs` (one load point, with `keeps_slo`) that `compare` keeps."""
    feasible = pairs[pairs["keeps_slo"]]
    if feasible.empty:
        worse = pairs[["ttft_attainment", "itl_attainment"]].min(axis=1)
        best = pairs.loc[[worse.idxmax()]]
    else:
        best = feasible.loc[[feasible["energy_j"].idxmin()]]
    clocks = best["policy"].iloc[0].removeprefix(f"{STATIC_PAIR} ")
    return best.assign(policy=BEST_PAIR, clocks=clocks)
