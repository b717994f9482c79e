"""Profiles drawn from the errors that a profile states: what the card may really be like.

A draw turns nine numbers, standard normal and cut at two deviations: for each phase one of its
time, of its clock dependence, of its power and of how that depends on the clock, and one of idle
power. All rows of a table share them, so that a draw is a table as smooth as the nominal one. With
z such a number, s its stated error, T and P the nominal time and power of a row, T₀ the time of the
same point at the top clock f₀, I(f) nominal idle power:

    time    e^(s z) · min(T₀ + e^(s' z')·(T - T₀), T₀·f₀/f)
    power   e^(s z) · (I(f) + (P - I(f))·(f/f₀)^(s' z'))     within drawn idle and the power limit
    idle    e^(s z) · I(f)

No time grows more than the clock falls, more tokens never take less time, and a higher clock never
draws less power, wherever the nominal table keeps to that. The power limit holds no iteration back
that it did not hold back before. What policies believe stays as the nominal profile says: nobody
has told them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.schema import ErrorsMeta, PerQuantity
from voltana.profiles.tables import POINT, idle_power_of

_CUT: Final = 2.0
"""Deviations at which the normal numbers are cut."""
_STREAM: Final = 0x564F4C54
"""Of the random numbers, so that they are no workload's."""
_NUMBERS: Final = tuple(f.name for f in dataclasses.fields(PerQuantity))


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors(PerQuantity):
    """What one draw multiplies by (times, powers) or raises to (`clock_power`)."""


def draw_factors(errors: ErrorsMeta, number: int) -> Factors:
    """The factors of one draw; the same number gives the same normal numbers for every profile."""
    normal = np.random.default_rng([_STREAM, number]).standard_normal(len(_NUMBERS))
    at = {
        name: getattr(errors, name) * float(z)
        for name, z in zip(_NUMBERS, np.clip(normal, -_CUT, _CUT), strict=True)
    }
    return Factors(
        **{k: v if k.endswith("clock_power") else float(np.exp(v)) for k, v in at.items()}
    )


def draw_profile(profile: Profile, number: int) -> Profile:
    """The profile with all its numbers moved within their stated errors.

    Args:
        profile: The nominal one.
        number: Of the draw, from 1.

    Raises:
        VoltanaError: The profile states no errors, or the number is below 1.
    """
    errors = profile.meta.errors
    if errors is None:
        raise VoltanaError(
            f"profile {profile.name!r} states no errors, so that none can be drawn: add [errors] "
            "to its profile.toml (docs/profiles.md), or leave the uncertainty out"
        )
    if number < 1:
        raise VoltanaError(f"a draw's number must be >= 1, got {number}")
    factors = draw_factors(errors, number)
    return dataclasses.replace(
        profile,
        prefill=_phase(profile, "prefill", factors),
        decode=_phase(profile, "decode", factors),
        idle=profile.idle.assign(
            **{
                name: profile.idle[name] * factors.idle_power
                for name in ("power_w", "awake_power_w")
                if name in profile.idle
            }
        ),
        content_hash=hashlib.sha256(f"{profile.content_hash} {factors}".encode()).hexdigest(),
        believed=profile,
    )


def _phase(profile: Profile, phase: str, factors: Factors) -> pd.DataFrame:
    """The rows of one phase, moved."""
    frame: pd.DataFrame = getattr(profile, phase)
    top_mhz = float(frame["frequency_mhz"].max())
    relative = frame["frequency_mhz"] / top_mhz
    point = [frame["batch_size"], frame["tokens"]]
    top_s = frame["time_s"].where(relative == 1.0).groupby(point).transform("median")
    top_s = top_s.fillna(frame["time_s"])  # a point that the top clock lacks: no clock to go by
    added = getattr(factors, f"{phase}_clock_time") * (frame["time_s"] - top_s)
    # bounded only where the nominal time is: noise may put a measured one beyond
    most = np.maximum(top_s / relative, frame["time_s"])
    time_s = getattr(factors, f"{phase}_time") * np.minimum(top_s + added, most)
    drawn = frame.assign(time_s=time_s.clip(lower=1e-9))
    if "spread_s" in frame:
        drawn["spread_s"] = frame["spread_s"] * drawn["time_s"] / frame["time_s"]
    drawn["time_s"] = _rising(frame, "time_s", drawn["time_s"], "tokens")
    drawn["power_w"] = _power_w(profile, phase, frame, relative, factors)
    return drawn


def _rising(
    frame: pd.DataFrame, name: str, drawn: pd.Series[float], along: str
) -> pd.Series[float]:
    """`drawn`, never falling along a column wherever the nominal numbers do not."""
    order = frame.sort_values(along, kind="stable").index
    ordered = frame.loc[order]
    by = [ordered[key] for key in (*POINT, "trial") if key != along]
    risen: pd.Series[float] = drawn.loc[order].groupby(by).cummax()
    falls = ordered[name].groupby(by).diff() < 0
    return risen.where(~falls, drawn.loc[order]).loc[frame.index]


def _power_w(
    profile: Profile, phase: str, frame: pd.DataFrame, relative: pd.Series[float], factors: Factors
) -> pd.Series[float]:
    known = {clock: w for clock, w in idle_power_of(profile.idle).items() if clock > 0}
    idle_w = pd.Series(
        np.interp(frame["frequency_mhz"], list(known), list(known.values())), index=frame.index
    )
    shape = relative ** getattr(factors, f"{phase}_clock_power")
    power_w = getattr(factors, f"{phase}_power") * (idle_w + (frame["power_w"] - idle_w) * shape)
    limit_w = profile.meta.gpu.power_limit_w * profile.meta.model.tensor_parallel
    most_w = np.maximum(limit_w, frame["power_w"])
    within_w = np.minimum(np.maximum(power_w, idle_w * factors.idle_power), most_w)
    return _rising(frame, "power_w", within_w, "frequency_mhz")
