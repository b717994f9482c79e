"""The advice as text and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from voltana.experiments.compare.draws import UNDECIDED
from voltana.experiments.compare.intervals import Interval
from voltana.experiments.recommend.advice import DYNAMIC, Advice, Judged, peak_w
from voltana.experiments.recommend.hand_over import (
    dynamo_yaml,
    gpu_lines,
    replay_toml,
    roles,
    sglang_lines,
)
from voltana.experiments.recommend.ranges import LOAD, PROFILE, SEEDS, Range, ranges
from voltana.experiments.show import render, width


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What energy costs here."""

    price_per_kwh: float | None = None
    currency: str = ""
    carbon_g_per_kwh: float | None = None

    def of_day(self, kwh: float) -> dict[str, float]:
        """Money and kg of CO2 of a day, as far as they are known."""
        found = {}
        if self.price_per_kwh is not None:
            found["money_a_day"] = self.price_per_kwh * kwh
        if self.carbon_g_per_kwh is not None:
            found["co2_kg_a_day"] = self.carbon_g_per_kwh * kwh / 1e3
        return found


def sentence(advice: Advice) -> str:
    """Whether dynamic control is worth it here, in one plain sentence."""
    dynamic, still = advice.dynamic, advice.still
    if dynamic is None:
        return "No: no dynamic policy takes part, as there are no clocks to choose among."
    if not advice.keeps(dynamic):
        if not advice.keeps(still):
            return (
                f"Neither {still.name} nor a dynamic policy keeps the promise here: take more "
                "GPUs, a lower load or a longer promise."
            )
        return (
            f"No: dynamic control is not worth it here, as no policy kept the promise "
            f"({_pct(dynamic.attainment())} of the requests), and {still.name} do."
        )
    saved = advice.saving(dynamic, still)
    kwh = advice.kwh_a_day(still) - advice.kwh_a_day(dynamic)
    amount = f"{_saving(saved)} beyond the best {still.name} ({kwh:+.1f} kWh a day)"
    if not advice.keeps(still):
        return (
            f"Yes: {dynamic.setting} keeps the promise, and {still.name} that were chosen the same "
            f"way do not ({_pct(still.attainment())})."
        )
    if advice.is_worth_it == "yes":
        return f"Yes: dynamic control is worth it here, it saves {amount}."
    if advice.is_worth_it == "no":
        return (
            f"No: dynamic control is not worth it here, {still.name} do as well; it would save "
            f"{amount}."
        )
    told = advice.drawn.get(DYNAMIC)
    if told is not None and told.verdict == UNDECIDED:
        return (
            f"Undecided: dynamic control saves {amount}, but it is better in only "
            f"{100 * told.chance:.0f} % of the cards that the profile's errors allow: measure the "
            "profile first."
        )
    return f"Undecided: dynamic control saves {amount}, which the repeats cannot tell from nothing."


def more_lines(advice: Advice) -> list[str]:
    """What else has to be known: overload, free GPUs, load, the profile's errors."""
    lines = [
        f"The promise is not kept by the {way.name}: only {_pct(way.attainment())} of the requests."
        for way in advice.ways
        if not advice.keeps(way)
    ]
    free = advice.question.gpus - sum(advice.best.counts) * advice.question.tensor_parallel
    if free:
        verb = "is not needed; its" if free == 1 else "are not needed; their"
        lines.append(f"{free} of {advice.question.gpus} GPUs {verb} energy is not counted.")
    at = [f"{w.name} {_pct(w.attainment(1.5))}" for w in advice.ways]
    lines.append(f"At 1.5 times the load the promise is kept by {', '.join(at)} of the requests.")
    for name, drawn in advice.drawn.items():
        other = advice.still.name if name == DYNAMIC else "the top clocks"
        lines.append(f"If the profile is off by its stated errors: {name} {drawn.text(other)}.")
    if advice.caps is not None:
        more = advice.saving(advice.fixed, advice.caps)
        lines.append(
            f"Fixed clocks save {_saving(more)} against power caps, if a card does at its cap what "
            "the model says."
        )
    elif advice.question.is_capped:
        lines.append("No power caps keep the promise on the instances of the fixed clocks.")
    if advice.rounds > 1:
        lines.append(f"Chosen {advice.rounds} times: the first choice fell when it was judged.")
    return lines


def text(advice: Advice, costs: Costs) -> str:
    """For the terminal."""
    question = advice.question
    base = question.base
    load = base.get("trace") or f"{base.get('workload', 'sharegpt')}"
    limits = f"{question.gpus} GPUs" + (f", {question.watts:g} W" if question.watts else "")
    title = f"{base['profile']}, {load}, {limits}, promise kept by {_pct(question.target)}"
    tables = [_table(advice, costs, title), _loads(advice), _ranges(advice)]
    said = [textwrap.fill(line, width()) for line in (sentence(advice), *more_lines(advice))]
    ready = [f"To use {advice.best.setting}:", *gpu_lines(advice, advice.best)]
    return "\n\n".join([*tables, "\n".join(said), "\n    ".join(ready)])


def _table(advice: Advice, costs: Costs, title: str) -> str:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    table.add_column("way")
    table.add_column("setting")
    names = ["kept %", "J/request", "saves %", "kWh/day"]
    names += [f"{costs.currency or 'money'}/day"] if costs.price_per_kwh is not None else []
    names += ["kg CO2/day"] if costs.carbon_g_per_kwh is not None else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for way in advice.ways:
        kwh = advice.kwh_a_day(way)
        saved = advice.saving(way, advice.now)
        table.add_row(
            way.name, way.setting, f"{100 * way.attainment():.2f}",
            half_text(way.joules_per_request), "" if way is advice.now else half_text(saved),
            f"{kwh:.1f}", *(f"{v:.2f}" for v in costs.of_day(kwh).values()),
        )  # fmt: skip
    return render(table)


def _loads(advice: Advice) -> str:
    """What is kept, and saved against the top clocks, at other loads."""
    table = Table(title="at other loads: kept %, saved %", box=SIMPLE_HEAD, padding=(0, 1),
                  title_justify="left")  # fmt: skip
    table.add_column("way")
    for factor in advice.now.at_load:
        table.add_column(f"x {factor:g}", justify="right", no_wrap=True)
    for way in advice.ways:
        cells = []
        for factor in way.at_load:
            kept = f"{100 * way.attainment(factor):.2f}"
            saved = advice.saving(way, advice.now, factor).mean
            cells.append(kept if way is advice.now else f"{kept}, {saved:.1f}")
        table.add_row(way.name, *cells)
    return render(table)


RANGES: Final[Mapping[str, str]] = {
    SEEDS: "seeds (95 % of the mean)",
    LOAD: "load x 0.8 to 1.2 (all runs)",
    PROFILE: "profile's errors (95 % of draws)",
}
"""What is uncertain, for the reader."""


def range_text(found: Mapping[str, Range]) -> str:
    """Saving and kept, of one way and one thing that is uncertain."""
    low, high = found["saving_vs_top_clocks_pct"]
    least, most = (100.0 * share for share in found["attainment"])
    return f"{low:.1f} to {high:.1f}; {least:.1f} to {most:.1f}"


def _ranges(advice: Advice) -> str:
    """Where savings against the top clocks and what is kept may lie."""
    table = Table(title="where they lie: saved %; kept %", box=SIMPLE_HEAD, padding=(0, 1),
                  title_justify="left")  # fmt: skip
    found = {way.name: ranges(advice, way) for way in advice.ways if way is not advice.now}
    by = [key for key in RANGES if all(key in each for each in found.values())]
    table.add_column("way")
    for key in by:
        table.add_column(RANGES[key], justify="right", no_wrap=True)
    for name, each in found.items():
        table.add_row(name, *(range_text(each[key]) for key in by))
    return render(table)


def as_dict(advice: Advice, costs: Costs) -> dict[str, Any]:
    """For JSON: everything that the text and the page say."""
    question = advice.question
    best = advice.best
    return {
        "question": {
            **question.base, "gpus": question.gpus, "watts": question.watts,
            "target": question.target, "draws": question.draws,
        },
        "worth_it": advice.is_worth_it,
        "sentence": sentence(advice),
        "notes": more_lines(advice),
        "advised": best.name,
        "ways": [_way(advice, way, costs) for way in advice.ways],
        "uncertainty": {name: drawn.as_dict() for name, drawn in advice.drawn.items()},
        "knee": {
            "attainment_energy_j": [list(point) for point in advice.knee.attainments],
            "gpus_energy_j": [list(point) for point in advice.knee.by_gpus],
        },
        "ready": {
            "gpus": gpu_lines(advice, best), "sglang": sglang_lines(advice, best),
            "dynamo": dynamo_yaml(advice, best), "replay": replay_toml(advice, best),
        },
    }  # fmt: skip


def _way(advice: Advice, way: Judged, costs: Costs) -> dict[str, Any]:
    kwh = advice.kwh_a_day(way)
    return {
        "name": way.name,
        "setting": way.setting,
        "settings": dict(way.settings),
        "roles": [asdict(role) for role in roles(advice, way)],
        "router": way.router,
        "keeps": advice.keeps(way),
        "attainment": way.attainment(),
        "energy_per_request_j": asdict(way.joules_per_request),
        "mean_w": way.mean_w,
        "peak_w": peak_w(advice, way),
        "kwh_a_day": kwh,
        **costs.of_day(kwh),
        "saving_vs_top_clocks_pct": asdict(advice.saving(way, advice.now)),
        "saving_vs_fixed_clocks_pct": asdict(advice.saving(way, advice.fixed)),
        "ranges": {
            source: {
                **each,
                **_costs_between(costs, each["kwh_a_day"]),
            }
            for source, each in ranges(advice, way).items()
        },
        "at_load": {
            f"{factor:g}": {
                "attainment": way.attainment(factor),
                "saving_vs_top_clocks_pct": asdict(advice.saving(way, advice.now, factor)),
            }
            for factor in way.at_load
        },
    }


def _costs_between(costs: Costs, kwh: Range) -> dict[str, Range]:
    low, high = costs.of_day(kwh[0]), costs.of_day(kwh[1])
    return {name: (low[name], high[name]) for name in low}


def _pct(share: float) -> str:
    return f"{100 * share:.4g} %"


def half_text(found: Interval) -> str:
    """Mean and half width of the interval."""
    return f"{found.mean:.1f}" + ("" if math.isnan(found.half) else f" ± {found.half:.1f}")


def _saving(found: Interval) -> str:
    return f"{half_text(found)} %"
