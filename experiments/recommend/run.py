"""The whole of `voltana recommend`: one advice a profile, and what is written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltana.experiments.draw.plots import save
from voltana.experiments.progress import progress_bar
from voltana.experiments.recommend.advice import Advice
from voltana.experiments.recommend.choose.desk import Desk
from voltana.experiments.recommend.figure import knee_figure
from voltana.experiments.recommend.hand_over import write_ready
from voltana.experiments.recommend.judge import advise
from voltana.experiments.recommend.question import make_question
from voltana.experiments.recommend.show import Costs, as_dict
from voltana.experiments.sweep.executors import check_executor, staying_connected
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.folders import claim
from voltana.sim.config import DEFAULT_PROFILE
from voltana.sim.results import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommended:
    """What was found and written."""

    advices: Sequence[Advice]
    told: Mapping[str, Any]
    """As JSON has it."""
    lines: Sequence[str]
    """For the terminal: the comparison of profiles, and what was written."""


def recommend_all(
    profiles: Sequence[str],
    settings: Mapping[str, Any],
    out: Path,
    costs: Costs,
    *,
    jobs: int | None = None,
    executor: str = "processes",
    **options: Any,  # noqa: ANN401 (those of make_question)
) -> Recommended:
    """Advise for each profile and write page, figure and files.

    Args:
        profiles: Names or directories; empty: that of the settings, or the default.
        settings: Configuration keys of the load and its promises.
        out: Where to; runs are kept there.
        costs: Price and carbon.
        jobs: Processes; all cores by default.
        executor: `processes` or `ray`.
        options: Hardware, target, policies: see `make_question`.

    Raises:
        VoltanaError: See `make_question` and `advise`.
    """
    check_executor(executor)
    if profiles and "profile" in settings:
        raise VoltanaError("the profile is named twice: leave --set profile out")
    names = profiles or [str(settings.get("profile", DEFAULT_PROFILE))]
    if len(set(names)) < len(names):
        raise VoltanaError("a profile is named twice: leave one out")
    questions = [make_question({**settings, "profile": name}, **options) for name in names]
    claim(out, "advice")
    advices = []
    with progress_bar("searching", len(questions), kept=out) as bar, staying_connected(executor):
        for name, question in zip(names, questions, strict=True):
            bar.advance(0, f"searching {name}")
            advices.append(advise(Desk(question, out, jobs, executor)))
            bar.advance()
    return _written(advices, names, out, costs)


def _written(
    advices: Sequence[Advice], names: Sequence[str], out: Path, costs: Costs
) -> Recommended:
    figures, files = [], []
    for i, advice in enumerate(advices):
        suffix = "" if len(advices) == 1 else f"-{i + 1}"
        figures.append(save(knee_figure(advice), out, f"knee{suffix}")[0])
        files.append(write_ready(advice, out / f"ready{suffix}"))
    told: dict[str, Any] = {"advices": [as_dict(advice, costs) for advice in advices]}
    lines = []
    if len(advices) > 1:
        best = _best(advices)
        told["best_profile"] = None if best is None else names[best]
        lines.append(
            "No profile keeps the promise." if best is None
            else f"Least energy: {names[best]}, {advices[best].best.setting}."
        )  # fmt: skip
    write_json(told, out / "recommend.json")
    try:
        from voltana.experiments.recommend.page import write_page
    except ImportError:  # the advice itself needs no template
        lines.append("No page was written: it needs pip install 'voltana[report]'")
    else:
        write_page(told["advices"], figures, out / "recommend.html", costs.currency)
        lines.append(str(out / "recommend.html"))
    lines.append(f"{out / 'recommend.json'} {figures[0]} {files[0][0]}")
    return Recommended(advices=advices, told=told, lines=lines)


def _best(advices: Sequence[Advice]) -> int | None:
    kept = [i for i, a in enumerate(advices) if a.keeps(a.best)]
    return min(kept, key=lambda i: advices[i].kwh_a_day(advices[i].best)) if kept else None
