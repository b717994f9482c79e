"""A profile that is wrong on purpose: stands in for hardware that behaves unlike its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from voltana.profiles.catalog import Profile, load_profile, write_profile
from voltana.profiles.common.files import write_csv


def perturbed_profile(
    profile: Profile,
    directory: Path,
    *,
    time_ratio: float = 1.0,
    power_ratio: float = 1.0,
    noise_frac: float = 0.0,
    seed: int = 13,
) -> Profile:
    """Write a copy of a profile whose every point is off.

    Args:
        profile: What the simulator believes.
        directory: Of the copy.
        time_ratio: Factor on iteration times.
        power_ratio: Factor on power, idle included.
        noise_frac: Relative standard deviation of a further factor on each point's time, which
            stands for what a table cannot know; the sign and size differ from point to point.
        seed: Of the noise.

    Returns:
        The copy. Its predictor is the original's: policies believe what was profiled.
    """
    rng = np.random.default_rng(seed)
    write_profile(
        directory,
        profile.meta,
        _scaled(profile.prefill, time_ratio, power_ratio, noise_frac, rng),
        _scaled(profile.decode, time_ratio, power_ratio, noise_frac, rng),
        profile.idle.assign(power_w=profile.idle["power_w"] * power_ratio),
    )
    write_csv(profile.fitted, directory / "ecopred.csv", float_format="%.6g")
    return load_profile(directory)


def _scaled(
    table: pd.DataFrame,
    time_ratio: float,
    power_ratio: float,
    noise_frac: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    noise = np.exp(rng.normal(0.0, noise_frac, len(table)))
    return table.assign(
        time_s=table["time_s"] * time_ratio * noise, power_w=table["power_w"] * power_ratio
    )
