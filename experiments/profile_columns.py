"""What of a profile is measured, calibrated, modelled or emulated, a column a quantity."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table

from voltana.experiments.show import render, width
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.ecopred import fit_report

COLUMNS: Final = {
    "prefill_time": "prefill time",
    "decode_time": "decode time",
    "clock_dependence": "clock dep.",
    "prefill_power": "prefill power",
    "decode_power": "decode power",
    "idle_power": "idle power",
    "kv_capacity": "KV size",
    "iteration_spread": "spread",
}
"""Quantity of the provenance -> heading."""
_EMULATED_DRIVER: Final = "driver emulated"
"""What the profiler writes of the emulated cards' NVML."""
_SHORT: Final = {
    "measured": "meas.",
    "calibrated": "calib.",
    "modelled": "model",
    "emulated": "emul.",
}
_LEGEND: Final = (
    "meas.: measured on that hardware; calib.: calibrated from published measurements of its kind; "
    "model: modelled; emul.: measured on a card that another profile emulates. MAPE: largest mean "
    "error of the predictor at a clock, prefill / decode, in %. Sources and errors: the profile's "
    "profile.toml, or --json."
)


def status_of(profile: Profile, quantity: str) -> str:
    """Status of a column: an emulated card's measurements count as emulated.

    The clock dependence is that of decode's times and power, the weaker of both, where the profile
    states none of its own: such a profile has it from the same source as the numbers.
    """
    told = profile.meta.provenance
    if quantity == "clock_dependence" and quantity not in told:
        order = ("measured", "emulated", "calibrated", "modelled")
        return max(
            (status_of(profile, q) for q in ("decode_time", "decode_power")), key=order.index
        )
    if quantity not in told:
        return "–"
    entry = told[quantity]
    is_emulated = entry.status == "measured" and _EMULATED_DRIVER in entry.source
    return "emulated" if is_emulated else entry.status


def profiles_text(names: Sequence[str]) -> str:
    """A table within 100 columns and its legend."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("profile", no_wrap=True)
    table.add_column("TP, MHz", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, min_width=max(map(len, heading.split())))
    table.add_column("MAPE", no_wrap=True, justify="right")
    for name in names:
        profile = load_profile(name)
        clocks = profile.clocks_mhz
        family, _, model = name.partition("/")
        table.add_row(
            f"{family}/\n  {model}" if model else family,
            f"TP{profile.meta.model.tensor_parallel}\n{clocks[0]}-{clocks[-1]}",
            *(f"{_SHORT.get(s := status_of(profile, q), s)}" for q in COLUMNS),
            " / ".join(f"{m:.0f}" for m in _errors_pct(profile).values()),
        )
    return f"{render(table)}\n\n{textwrap.fill(_LEGEND, width())}"


def profiles_json(names: Sequence[str]) -> str:
    """Every profile with card, model, clocks, status and source of each column, stated errors."""
    found: list[dict[str, Any]] = []
    for name in names:
        profile = load_profile(name)
        meta = profile.meta
        found.append(
            {
                "name": name,
                "gpu": meta.gpu.name,
                "model": meta.model.name,
                "tensor_parallel": meta.model.tensor_parallel,
                "clocks_mhz": list(meta.clocks.supported_mhz),
                "status": {q: status_of(profile, q) for q in COLUMNS},
                "provenance": {q: dataclasses.asdict(p) for q, p in meta.provenance.items()},
                "errors": None if meta.errors is None else dataclasses.asdict(meta.errors),
                "ecopred_mape_pct": _errors_pct(profile),
            }
        )
    return json.dumps(found, indent=1)


def _errors_pct(profile: Profile) -> dict[str, float]:
    """Largest mean error of the predictor at a clock, by phase."""
    report = fit_report(profile.fitted)
    return {p: float(report.loc[report["phase"] == p, "mape_pct"].max())
            for p in ("prefill", "decode")}  # fmt: skip
