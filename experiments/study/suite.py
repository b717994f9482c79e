"""Experiments: a sweep file that also says what it asks and what to draw.

```toml
question = "Does X save energy at the same promises?"
[figure]
x = "rate_rps"                 # column on the horizontal axis
x_label = "request rate (requests/s)"
x_scale = 1.0                  # optional: what the column is multiplied by (1e3: s to ms)
series = "policy"              # column, or free axis, of the curves
rows = ["energy", "ttft", "itl"]  # keys of voltana.experiments.compare.measures.MEASURES
baseline = "static-1410"       # optional: the series that `saving` is counted against
match = "ecofreq + ecoroute"   # optional, with static pairs: keep the one of least energy whose
                               # attainments are those of this series or better
[quick]                        # optional: keys or axes that --quick replaces
duration_s = 15
[base] … [grid] … [static_pairs] …   # as in a sweep file
[[panel]]                      # optional: one column of axes each
name = "Llama-3.1-8B, ShareGPT"
profile = "a100-80g-sxm/llama-3.1-8b"
rate_rps = [50, 70]            # a list is an axis of this panel
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.compare.measures import find_measure
from voltana.experiments.compare.policies import SEED, add_saving, is_static_pair
from voltana.experiments.sweep.grid import CONFIGS, STATIC_PAIR, Point, expand
from voltana.profiles.common.binding import check_names, table, tables, value, values
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.sim.config import KEYS, read_toml

QUICK_DURATION_S: Final = 10.0
QUICK_POINTS: Final = 3
"""Points of the horizontal axis that a smoke run keeps: the first, the middle, the last."""
PANEL: Final = "panel"
MATCHED_PAIR: Final = "best static pair at equal attainment"
EQUAL_ATTAINMENT: Final = 0.005
"""Half a point less still counts as equal: about the spread between seeds."""
_SECTIONS: Final = ("question", "figure", "quick", "base", "grid", "static_pairs", "panel")
_TEXTS: Final = ("x", "x_label", "series", "baseline", "match")
_FIGURE: Final = (*_TEXTS, "x_scale", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureSpec:
    """What the figure of an experiment shows."""

    x: str
    x_label: str
    series: str
    rows: tuple[str, ...]
    x_scale: float = 1.0
    baseline: str | None = None
    match: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A question, the runs that answer it and the figure that shows the answer."""

    name: str
    question: str
    figure: FigureSpec
    points: list[Point]


def list_experiments() -> dict[str, str]:
    """Every shipped experiment with its question."""
    found = {p.stem: read_toml(p) for p in sorted(CONFIGS.glob("*.toml"))}
    return {name: data["question"] for name, data in found.items() if "question" in data}


def find_experiment(name: str) -> Path:
    """The file of a shipped experiment, or a file given by its path.

    Raises:
        VoltanaError: There is none of that name; the nearest is suggested.
    """
    known = list_experiments()
    if name in known:
        return CONFIGS / f"{name}.toml"
    if name.endswith(".toml"):
        return Path(name)
    if (CONFIGS / f"{name}.toml").is_file():
        raise VoltanaError(f"{name} is no experiment of this kind: run {_other_command(name)}")
    raise VoltanaError(f"no experiment {name!r}{nearest(name, known)}")


def _other_command(name: str) -> str:
    """The command that a shipped file of another kind is for."""
    path = CONFIGS / f"{name}.toml"
    if "frontier" in read_toml(path):
        is_contest = name.startswith("contest-")
        return "voltana frontier --contest" if is_contest else f"voltana frontier {path}"
    return "voltana demo" if name == "demo" else f"voltana {name} --help"


def read_experiment(path: Path, *, quick: bool = False) -> Experiment:
    """Read an experiment file.

    Args:
        path: TOML file, see the module's text.
        quick: Shrink it to a smoke size: runs of 10 s, one seed, three points of the horizontal
            axis, two static clocks, then whatever the file's `[quick]` says.

    Raises:
        VoltanaError: An unknown section or key, or a value that no run accepts.
    """
    data, where = read_toml(path), str(path)
    check_names(data, _SECTIONS, "section", where)
    question = value(data, "question", str, "", where).strip()
    if not question:
        raise VoltanaError(f"an experiment needs a question ({where})")
    figure = _figure(data, where)
    for name in ("quick", "base", "grid", "static_pairs"):
        table(data, name, where)
    tables(data, "panel", where)
    if quick:
        data = _shrink(data, figure.x)
    points = [p for panel in _panels(data) for p in _expand_panel(data, panel, where)]
    _check_figure(figure, points, where)
    return Experiment(name=path.stem, question=question, figure=figure, points=points)


def with_saving(frame: pd.DataFrame, figure: FigureSpec) -> pd.DataFrame:
    """Add `saving_pct`, and reduce static pairs to the best one where the figure asks for it.

    The saving is of energy, against the baseline series at the same x in the same panel, run for
    run: a seed is compared with the same seed, whose requests are the same.

    Raises:
        VoltanaError: The baseline, or the series to match, is named but was not run.
    """
    panel = frame[PANEL].fillna("") if PANEL in frame else ""  # an empty name is NaN in a CSV
    frame = frame.assign(**{PANEL: panel})
    loads = [PANEL, figure.x]
    if figure.match is not None:
        keys = [*loads, *([SEED] if SEED in frame else [])]
        frame = _with_matched_pair(frame, figure.series, figure.match, keys)
    if figure.baseline is None:
        return frame
    _of_series(frame, figure.series, figure.baseline, "to count savings against")
    return add_saving(frame, loads, figure.series, figure.baseline)


def _with_matched_pair(
    frame: pd.DataFrame, series: str, match: str, keys: list[str]
) -> pd.DataFrame:
    """Of the static pairs keep, at each x, that of least energy which attains what `match` does.

    Where no pair does, none is kept: the figure shows a gap.
    """
    is_pair = is_static_pair(frame, series)
    attainments = ["ttft_attainment", "itl_attainment"]
    matched = _of_series(frame, series, match, "to match")
    wanted = matched.groupby(keys)[attainments].mean() - EQUAL_ATTAINMENT
    pairs = frame[is_pair].join(wanted.add_suffix("_wanted"), on=keys)
    reaches = pd.Series(True, index=pairs.index)
    for name in attainments:
        reaches &= pairs[name] >= pairs[f"{name}_wanted"]
    kept = pairs[reaches].sort_values("energy_j").drop_duplicates(keys)
    clocks = kept[series].astype(str).str.removeprefix(f"{STATIC_PAIR} ")
    best = kept[frame.columns].assign(clocks=clocks)
    best[series] = MATCHED_PAIR
    return pd.concat([frame[~is_pair], best.sort_values(keys)], ignore_index=True)


def _of_series(frame: pd.DataFrame, series: str, name: str, why: str) -> pd.DataFrame:
    found = frame[frame[series].astype(str) == name]
    if found.empty:
        raise VoltanaError(f"no {series} called {name!r} {why}")
    return found


def _figure(data: Mapping[str, Any], where: str) -> FigureSpec:
    section = table(data, "figure", where)
    check_names(section, _FIGURE, "key", f"[figure], {where}")
    if not {"x", "x_label", "series", "rows"} <= set(section):
        raise VoltanaError(f"[figure] needs x, x_label, series and rows ({where})")
    texts = {key: value(section, key, str, "", where) for key in _TEXTS if key in section}
    rows = values(section, "rows", str, (), where)
    for name in rows:
        find_measure(name, where)
    return FigureSpec(rows=rows, x_scale=value(section, "x_scale", float, 1.0, where), **texts)


def _check_figure(figure: FigureSpec, points: Sequence[Point], where: str) -> None:
    """Whether the runs will have what the figure is to show; asked before they are run."""
    labels = list(dict.fromkeys(name for p in points for name in p.labels))
    for key in ("x", "series"):
        name = getattr(figure, key)
        if name not in labels and name not in KEYS:
            raise VoltanaError(
                f"{key} of [figure] must be a free axis or a configuration key, got {name!r} "
                f"({where}){nearest(name, [*labels, *KEYS])}"
            )
    known = {str({**p.config.as_dict(), **p.labels}.get(figure.series)) for p in points}
    for key in ("baseline", "match"):
        name = getattr(figure, key)
        if name is not None and name not in known:
            shown = [n for n in known if not n.startswith(STATIC_PAIR)]
            raise VoltanaError(
                f"{key} of [figure] is no {figure.series}: {name!r} ({where}){nearest(name, shown)}"
            )


def _panels(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return data.get("panel") or [{"name": ""}]


def _expand_panel(data: Mapping[str, Any], panel: Mapping[str, Any], where: str) -> list[Point]:
    """The points of one panel: its lists are axes that come before those of all panels."""
    if not isinstance(panel.get("name"), str):
        raise VoltanaError(f"a [[panel]] needs a name ({where})")
    own = {key: value for key, value in panel.items() if key != "name"}
    for key in own:
        if key not in KEYS:
            raise VoltanaError(f"unknown key {key!r} in [[panel]] ({where}){nearest(key, KEYS)}")
    axes = {key: value for key, value in own.items() if isinstance(value, list)}
    fixed = {key: value for key, value in own.items() if not isinstance(value, list)}
    sweep = {
        "base": {**data.get("base", {}), **fixed},
        "grid": {**axes, **data.get("grid", {})},
    }
    if "static_pairs" in data:
        sweep["static_pairs"] = data["static_pairs"]
    return [
        Point(labels={PANEL: panel["name"], **point.labels}, config=point.config)
        for point in expand(sweep, where)
    ]


def _shrink(data: Mapping[str, Any], x: str) -> dict[str, Any]:
    """A smoke size: short runs, few points of the horizontal axis, then the file's own wishes."""
    wishes = data.get("quick", {})
    base = {**data.get("base", {}), "duration_s": QUICK_DURATION_S}
    axes = {k: _without_length(v) for k, v in data.get("grid", {}).items()}
    grid = {k: _thin(v) if k == x else v for k, v in axes.items()}
    if "seed" in grid:
        grid["seed"] = grid["seed"][:1]
    for key, wish in wishes.items():
        (grid if isinstance(wish, list) else base)[key] = wish
    own = _without_length(_panels(data))
    panels = [{k: _thin(v) if k == x else v for k, v in panel.items()} for panel in own]
    small = {**data, "base": base, "grid": grid, "panel": panels}
    if "static_pairs" in data:
        clocks = data["static_pairs"]["clocks_mhz"]
        small["static_pairs"] = {**data["static_pairs"], "clocks_mhz": [clocks[0], clocks[-1]]}
    return small


def _without_length(entry: Any) -> Any:  # noqa: ANN401 (what stands in a file)
    """Panels, or the entries of an axis, without a length of run of their own."""
    if isinstance(entry, list):
        return [_without_length(item) for item in entry]
    if not isinstance(entry, Mapping):
        return entry
    return {k: v for k, v in entry.items() if k != "duration_s" or isinstance(v, list)}


def _thin(values: list[Any]) -> list[Any]:
    if len(values) <= QUICK_POINTS:
        return values
    return [values[0], values[len(values) // 2], values[-1]]
