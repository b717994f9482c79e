"""Measured mixed iterations, as the rows of `mixed.csv` and what `profile.toml` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from voltana.profiles.measure.trial import NOT_MEASURED
from voltana.profiles.optional.mixed import MixedStep, error_text
from voltana.profiles.schema import Provenance
from voltana.profiles.step_model import StepModel
from voltana.profiles.tables import MIXED_POINT


def mixed_frame(rows: Sequence[dict[str, Any]], parts: StepModel) -> pd.DataFrame:
    """The table. Where the power of a trial could not be metered it is the mean of both parts.

    Args:
        rows: One a trial.
        parts: The tables of both phases.
    """
    step = MixedStep(parts)
    frame = pd.DataFrame(rows)
    key = list(MIXED_POINT)
    points = frame[key].itertuples(index=False)
    mean_w = [step.time_and_power(f, (1.0, chunk), (b, t))[1] for f, chunk, b, t in points]
    is_known = ~frame["flags"].str.contains(NOT_MEASURED)
    frame = frame.assign(power_w=frame["power_w"].where(is_known, mean_w))
    frame = frame.sort_values([*key, "trial"], ignore_index=True)
    # points asked for at two contexts may have been held at one
    return frame.assign(trial=frame.groupby(key).cumcount())


def mixed_provenance(
    frame: pd.DataFrame, parts: StepModel, timed: Provenance, power: Provenance
) -> dict[str, Provenance]:
    """What `profile.toml` says of the table.

    Args:
        frame: As of `mixed_frame`.
        parts: As there.
        timed: Of iteration times.
        power: Of the trials' power.
    """
    of_time, of_power = error_text(frame, parts)
    number = int(frame["flags"].str.contains(NOT_MEASURED).sum())
    source = power.source + ("; there the mean of both parts stands" if number else "")
    return {
        "mixed_time": replace(timed, uncertainty=f"{timed.uncertainty}; {of_time}"),
        "mixed_power": replace(
            power, source=source, uncertainty=f"{power.uncertainty}; {of_power}"
        ),
    }
