"""Predictions under every plausible rule for the promises that are not known.

The publication gives each model promises of its own and we know none. The rules below turn those
fitted for Llama-3.1-8B into the other models'. `CENTRAL` was the rule of the first prediction,
made before any of it was scored, and stays; the others make the band.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voltana.experiments.draw.plots import add_legend, display_name
from voltana.experiments.paper.calibrate import Unknowns, read_fitted, scaled_promises
from voltana.experiments.paper.panel import (
    FITTED,
    PANEL_KEYS,
    VALUES,
    as_panel,
    main_figure_points,
    with_saving_pct,
)
from voltana.experiments.runs import cached_profile
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.catalog import Profile
from voltana.profiles.draw.style import STYLE, WIDTH_IN, line_style
from voltana.sim.config import make_config

Promises = tuple[float, float]
"""TTFT and ITL promise in s."""
Rule = Callable[[Unknowns, Profile, Profile], Promises]
"""From the fitted unknowns, a model's profile and that of the fit."""


def _times_itl(factor: float) -> Rule:
    def rule(unknowns: Unknowns, profile: Profile, of_fit: Profile) -> Promises:
        itl_s = scaled_promises(unknowns, profile, of_fit)[1]
        return round(factor * itl_s, 3), itl_s

    return rule


CENTRAL: Final = "multiples of the unloaded latency"
RULES: Final[dict[str, Rule]] = {
    CENTRAL: scaled_promises,
    "TTFT = 9 ITL": _times_itl(9.0),
    "TTFT = 10 ITL": _times_itl(10.0),
    "the same for all": lambda unknowns, _profile, _of_fit: (
        unknowns.slo_ttft_s,
        unknowns.slo_itl_s,
    ),
}
"""ITL is the multiple of the unloaded one but in the last; 10 is the reference balancer's factor,
9 that of the fit."""
_RULE: Final = "promises"
_ROWS: Final = {
    "saving_pct": "saved (%)",
    "ttft_attainment_pct": "TTFT (%)",
    "itl_attainment_pct": "ITL (%)",
}


def band_points() -> list[Point]:
    """The main figure's runs under every rule; those of the fitted model under one, its own."""
    points = main_figure_points()
    of_fit = cached_profile(points[0].config.profile)
    fitted = read_fitted(FITTED)
    made = []
    for point in points:
        profile = cached_profile(point.config.profile)
        known = profile.meta.model.name == of_fit.meta.model.name
        for name, rule in RULES.items():
            slo_ttft_s, slo_itl_s = rule(fitted, of_fit if known else profile, of_fit)
            if known:
                slo_ttft_s, slo_itl_s = fitted.slo_ttft_s, fitted.slo_itl_s
            changes = {"slo_ttft_s": slo_ttft_s, "slo_itl_s": slo_itl_s}
            config = make_config({**point.config.as_dict(), **changes})
            made.append(Point(labels={**point.labels, _RULE: name}, config=config))
    return made


def predict_by_rule(directory: Path, *, jobs: int | None = None) -> pd.DataFrame:
    """All panels under all rules: the panel's columns, the rule, both promises, the saving."""
    frame = run_sweep(band_points(), directory, jobs=jobs)
    made = as_panel(frame).round(dict.fromkeys(VALUES, 1))
    made = made.assign(
        promises=frame[_RULE], slo_ttft_s=frame["slo_ttft_s"], slo_itl_s=frame["slo_itl_s"]
    )
    parts = [with_saving_pct(part) for _, part in made.groupby(_RULE, sort=False)]
    return pd.concat(parts, ignore_index=True).round({"saving_pct": 1})


def central(by_rule: pd.DataFrame) -> pd.DataFrame:
    """The central prediction, in the panel's columns."""
    return by_rule.loc[by_rule[_RULE] == CENTRAL, [*PANEL_KEYS, *VALUES]]


def bands(by_rule: pd.DataFrame) -> pd.DataFrame:
    """Least, central and largest value over the rules, a row a cell."""
    values = ["saving_pct", *VALUES]
    of_cell = by_rule.groupby(list(PANEL_KEYS), sort=False)[values]
    middle = by_rule[by_rule[_RULE] == CENTRAL].set_index(list(PANEL_KEYS))[values]
    parts = {"_low": of_cell.min(), "": middle, "_high": of_cell.max()}
    joined = pd.concat([p.add_suffix(suffix) for suffix, p in parts.items()], axis=1)
    order = [f"{value}{suffix}" for value in values for suffix in parts]
    return joined[order].reset_index()


def draw_bands(found: pd.DataFrame) -> Figure:
    """Draw saving and attainments of every panel, with the band over the rules.

    Args:
        found: Result of `bands`.
    """
    panels = list(dict.fromkeys(zip(found["model"], found["dataset"], strict=True)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * WIDTH_IN, 4.6), layout="constrained")
        axes = figure.subplots(len(_ROWS), len(panels), sharex="col", sharey="row", squeeze=False)
        handles: dict[str, Line2D] = {}
        for column, (model, dataset) in enumerate(panels):
            of_panel = found[(found["model"] == model) & (found["dataset"] == dataset)]
            axes[0, column].set_title(f"{model}\n{dataset}")
            for i, (series, rows) in enumerate(of_panel.groupby("series", sort=False)):
                style = line_style(i)
                handles[display_name(str(series))] = Line2D([], [], **style)
                for place, value in zip(axes[:, column], _ROWS, strict=True):
                    place.plot(rows["rps"], rows[value], **style)
                    low, high = rows[f"{value}_low"], rows[f"{value}_high"]
                    place.fill_between(rows["rps"], low, high, color=style["color"], alpha=0.2)
        for place, label in zip(axes[:, 0], _ROWS.values(), strict=True):
            place.set_ylabel(label)
        figure.supxlabel("rate (requests/s)")
        for name, handle in handles.items():
            handle.set_label(name)
        add_legend(figure, list(handles.values()), "outside upper center")
    return figure
