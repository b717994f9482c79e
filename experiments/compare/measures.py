"""The quantities that figures and tables of experiments show, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from voltana.profiles.common.errors import VoltanaError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One quantity of the vertical axis."""

    label: str
    of: Callable[[pd.DataFrame], pd.Series[Any]]
    is_percentage: bool = False
    """An attainment: at most 100, with a target."""
    from_zero: bool = False
    """Only meaningful from zero on, and comparable from panel to panel."""


MEASURES: Final = {
    "energy": Measure(
        label="energy of the run (kJ)", of=lambda f: f["energy_j"] / 1e3, from_zero=True
    ),
    "saving": Measure(label="energy saved (%)", of=lambda f: f["saving_pct"]),
    "token_energy": Measure(
        label="energy per output token (J)", of=lambda f: f["energy_per_output_token_j"],
        from_zero=True,
    ),
    "request_energy": Measure(
        label="energy per request (J)", of=lambda f: f["energy_per_request_j"], from_zero=True
    ),
    "ttft": Measure(
        label="TTFT attainment (%)", of=lambda f: 100 * f["ttft_attainment"], is_percentage=True
    ),
    "itl": Measure(
        label="ITL attainment (%)", of=lambda f: 100 * f["itl_attainment"], is_percentage=True
    ),
    "attainment": Measure(
        label="both kept (% of requests)", of=lambda f: 100 * f["attainment"], is_percentage=True
    ),
    "power": Measure(
        label="mean power (W)", of=lambda f: f["energy_j"] / f["makespan_s"], from_zero=True
    ),
    "clock_changes": Measure(
        label="clock changes per second", of=lambda f: f["clock_changes"] / f["makespan_s"],
        from_zero=True,
    ),
}  # fmt: skip


def find_measure(name: str, where: str = "") -> Measure:
    """A measure by its name.

    Raises:
        VoltanaError: There is none; the nearest is suggested.
    """
    if name not in MEASURES:
        raise VoltanaError(
            f"no measure {name!r} to draw{f' ({where})' * bool(where)}{nearest(name, MEASURES)}"
        )
    return MEASURES[name]
