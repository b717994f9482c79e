"""Every figure is legible at half a text's width, in colours that all can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from voltana.experiments.compare.policies import compare
from voltana.experiments.contest.page import shares_figure
from voltana.experiments.draw.plots import energy_vs_slo, save, stretch_attainment
from voltana.experiments.draw.profiles import profile_figure
from voltana.experiments.draw.runs import energy_against_itl_slo, run_figure
from voltana.experiments.frontier.contenders import parse_contender
from voltana.experiments.frontier.search import DEFAULT, STATIC_FLEET, STATIC_MAX, Found
from voltana.experiments.frontier.search_page import pareto_figure
from voltana.experiments.frontier.study import make_study
from voltana.experiments.frontier.table import COLUMNS
from voltana.experiments.frontier.trial import Load, Trial
from voltana.experiments.paper.figure import draw_panel
from voltana.experiments.runs import run
from voltana.experiments.study.curves import draw_experiment
from voltana.experiments.study.suite import PANEL, Experiment, FigureSpec
from voltana.experiments.sweep.grid import expand
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.catalog import load_profile
from voltana.profiles.draw.style import COLOURS, HALF_WIDTH_IN, LEAST_PT
from voltana.sim.config import SimConfig

EDGE_PX = 1
"""Letters end on whole pixels."""
NAMES = ("static-max", "ecofreq + ecoroute", "static pair 1005/1005")


def frame(panels: int, x: list[object]) -> pd.DataFrame:
    """Attainments from 30 to 100 %, two seeds."""
    rows = [
        {"policy": name, PANEL: f"panel {panel}, long", "rate_rps": v, "seed": seed,
         "energy_j": 1e5 * (i + 2 + seed), "energy_per_output_token_j": 0.1, "saving_pct": 9.0 * i,
         "ttft_attainment": 1 - 0.2 * i, "itl_attainment": 1 - 0.35 * i}
        for (i, name), panel, v, seed in product(enumerate(NAMES), range(panels), x, (0, 1))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def seven() -> pd.DataFrame:
    """As many policies as README's figure has: the legend takes its room from the axes."""
    rows = frame(1, [10, 20]).drop(columns=PANEL)
    middle = rows[rows["policy"] == NAMES[1]]
    more = [middle.assign(policy=f"ecofreq + ecoroute-tile {i}") for i in range(4)]
    return pd.concat([rows, *more], ignore_index=True)


def experiment(panels: int, x: list[object]) -> Figure:
    spec = FigureSpec(
        x="rate_rps", x_label="request rate (requests/s)", series="policy",
        rows=("energy", "saving", "itl"),
    )  # fmt: skip
    chosen = Experiment(name="e", question="?", figure=spec, points=[])
    return draw_experiment(chosen, frame(panels, x))


def panel() -> Figure:
    columns = ("saving_pct", "energy_kj", "ttft_attainment_pct", "itl_attainment_pct")
    rows = [{"series": s, "rps": r} for s in ("static-1410", "voltanallm") for r in (50, 60)]
    values = {f"{c}_{who}": 50.0 for c in columns for who in ("ours", "published")}
    return draw_panel(pd.DataFrame([row | values for row in rows]))


def promises(tmp_path: Path) -> Figure:
    grid = {
        "base": {"rate_rps": 10, "duration_s": 2},
        "grid": {"slo_itl_s": [0.01, 0.06], "policy": [{"name": "static-max"}]},
        "static_pairs": {"clocks_mhz": [1410]},
    }
    return energy_against_itl_slo(run_sweep(expand(grid, "test"), tmp_path, jobs=1))


def pareto() -> Figure:
    loads = [Load(name=f"{r} requests/s", settings={"rate_rps": r}) for r in (1, 2, 3)]
    study = make_study(
        {}, loads, [parse_contender("ecofreq + ecoroute")], target=0.99, attainment="attainment",
        tuning=[{"seed": 1}], judging=[{"seed": 2}],
    )  # fmt: skip
    rows = pd.DataFrame({"attainment": [0.995], "requests_total": [100], "gaps_total": [1]})
    judged = Trial(settings={}, label="", attainments=(0.995,), energies_j=(5e4,), rows=rows)
    found = {
        load.name: [
            Found(load=load.name, router="ecoroute", controller=name, knob=DEFAULT, tuned=None,
                  judged=judged)
            for name in (STATIC_MAX, STATIC_FLEET, "ecofreq")
        ]
        for load in loads
    }  # fmt: skip
    return pareto_figure(study, found)


def contest_shares() -> Figure:
    rows = [
        ["sharegpt", "2P2D", f"{r} requests/s", "round-robin", c, k, 1.0, 1.0, 50.0, 1.0, s, 1.0,
         1.0, 1.2]
        for r in (20, 36)
        for c, k, s in ((STATIC_MAX, "1410/1410 MHz", 0.0), (STATIC_FLEET, "1005/705 MHz", 30.0),
                        ("ecofreq", "margin 0.1", 35.0), ("ecofreq", DEFAULT, 20.0))
    ]  # fmt: skip
    return shares_figure(pd.DataFrame(rows, columns=[*COLUMNS]))


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "energy against SLO": lambda _: energy_vs_slo(compare(frame(1, [10, 20]).drop(columns=PANEL))),
    "energy against SLO, seven policies": lambda _: energy_vs_slo(compare(seven())),
    "one panel": lambda _: experiment(1, [50, 100, 150]),
    "three panels": lambda _: experiment(3, [50, 100, 150]),
    "six panels": lambda _: experiment(6, [50, 100, 150]),
    "categories": lambda _: experiment(1, ["steady", "swing 0.6", "swing 0.9"]),
    "published panel": lambda _: panel(),
    "promises": promises,
    "pareto": lambda _: pareto(),
    "contest": lambda _: contest_shares(),
    "profile": lambda _: profile_figure(load_profile("a100-80g-sxm/llama-3.1-8b")),
    "run": lambda _: run_figure(run(SimConfig(rate_rps=9, duration_s=2, timeline_interval_s=0.1))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_letters_and_colours(name: str, tmp_path: Path) -> None:
    figure = FIGURES[name](tmp_path)
    save(figure, tmp_path, "figure")  # a warning of the layout is an error
    shrunk = HALF_WIDTH_IN / figure.get_size_inches()[0]
    texts = [t for t in figure.findobj(Text) if t.get_text().strip()]
    assert texts
    assert min(t.get_fontsize() for t in texts) * shrunk >= LEAST_PT - 1e-9
    figure.draw_without_rendering()  # letters lie where this resolution puts them
    beyond = [
        (text, box)
        for text, box in ((t, t.get_window_extent()) for t in texts if t not in _ticks(figure))
        if min(box.x0, box.y0) < -EDGE_PX
        or box.x1 > figure.bbox.x1 + EDGE_PX
        or box.y1 > figure.bbox.y1 + EDGE_PX
    ]
    assert beyond == [], "cut off at an edge"
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    assert {to_hex(line.get_color()).upper() for line in drawn} <= {*COLOURS}


def _ticks(figure: Figure) -> set[Text]:
    """Labels of ticks: those beyond the ends of an axis are not drawn."""
    axes = [axis for a in figure.axes for axis in (a.xaxis, a.yaxis)]
    return {label for axis in axes for label in axis.get_ticklabels(which="both")}


def test_nothing_joins_categories_and_panels_share_their_energy_from_zero() -> None:
    dots = experiment(1, ["steady", "swing"]).axes[0].get_lines()
    assert {line.get_linestyle() for line in dots} == {"None"}
    energy = experiment(3, [1, 2]).axes[:3]
    assert len({axes.get_ylim() for axes in energy}) == 1
    assert energy[0].get_ylim()[0] == 0


@pytest.mark.parametrize("lowest", [0.0, 30.0, 60.0, 85.0, 93.0, 98.0, 100.0])
def test_an_attainment_axis_shows_what_there_is(lowest: float) -> None:
    axes = Figure().subplots()
    stretch_attainment(axes, "y", lowest)
    low, high = axes.get_ylim()
    assert low <= lowest
    assert high > 100
    # to the eye 99 and 100 are further apart than 99 and 98
    place = axes.transData.transform(np.array([[0, 98], [0, 99], [0, 100]]))[:, 1]
    assert place[2] - place[1] > place[1] - place[0] > 0
