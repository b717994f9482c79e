"""Does `voltana recommend` find what an exhaustive search finds, and does it keep its promise?

python -m voltana.experiments.study.advice --out results/advice

Of some small cases with few clocks every fleet, pair of clocks and router is run on the tuning and
the judging repeats. The best by the search's own rule of choice, and the best in hindsight (least
energy of what keeps the target on the judging repeats together), stand beside what was recommended.
Then the recommended fixed clocks and policy play ten more seeds, and requests of the same lengths
that come in bursts, which took part in nothing. Prints Markdown; what has been run is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from voltana.experiments.frontier.static.like import Fleet, Side
from voltana.experiments.frontier.trial import Trial, pooled
from voltana.experiments.recommend.advice import Advice
from voltana.experiments.recommend.choose.desk import Desk, Means
from voltana.experiments.recommend.choose.fixed import allows
from voltana.experiments.recommend.judge import advise
from voltana.experiments.recommend.question import Question, Repeats, make_question
from voltana.experiments.script import run_script
from voltana.profiles.common.markdown import markdown_table

DURATION_S: Final = 30.0
"""Of a repeat; shorter than the command's, so that there are many."""
_NEAR: Final = 1.1
UNSEEN_SEEDS: Final = range(501, 511)
BURSTY: Final = {"arrivals": "gamma:cv=2"}
CASES: Final[Mapping[str, tuple[dict[str, Any], int, tuple[int, ...]]]] = {
    "A100, Llama-3.1-8B, 20/s, 3 GPUs": (
        {"profile": "a100-80g-sxm/llama-3.1-8b", "rate_rps": 20, "slo_itl_s": 0.045}, 3,
        (705, 900, 1005, 1200, 1410),
    ),
    "A100, Llama-3.1-8B, 36/s, 4 GPUs": (
        {"profile": "a100-80g-sxm/llama-3.1-8b", "rate_rps": 36, "slo_itl_s": 0.045}, 4,
        (900, 1005, 1200, 1410),
    ),
    "H100, Llama-3.1-8B, 40/s, 4 GPUs": (
        {"profile": "h100-sxm/llama-3.1-8b", "rate_rps": 40, "slo_itl_s": 0.03}, 4,
        (990, 1200, 1395, 1590, 1980),
    ),
    "H100, Qwen3-32B TP2, 6/s, 8 GPUs": (
        {"profile": "h100-sxm/qwen3-32b-tp2", "rate_rps": 6, "slo_ttft_s": 1.0,
         "slo_itl_s": 0.06}, 8, (990, 1200, 1590, 1980),
    ),
}  # fmt: skip
"""Configuration keys, GPUs and clocks."""


@dataclass(frozen=True, slots=True)
class Option:
    """One fixed setting on the tuning repeats."""

    settings: Mapping[str, Any]
    label: str
    tuned: Trial


def every_setting(question: Question) -> Iterator[tuple[Fleet, str]]:
    """All fleets, pairs of clocks and routers that there is hardware for."""
    counts = range(1, question.instances)
    sides = [Side(n, c) for n, c in product(counts, question.clocks_mhz)]
    for a, b, router in product(sides, sides, question.routers):
        if allows(question, (a, b)):
            yield (a, b), router


def exhaustive(desk: Desk) -> list[Option]:
    """Every setting on all tuning repeats, but for those that are hopeless on the first."""
    question = desk.question
    settings = [
        (Means(router).settings(question, fleet), f"{fleet} {router}")
        for fleet, router in every_setting(question)
    ]
    first = question.tuning[:1]
    desk.ahead((s, first) for s, _ in settings)
    hopeful = [
        (s, label)
        for s, label in settings
        if desk.trial(s, label, first).worst_attainment >= question.target - 0.03
    ]
    desk.ahead((s, question.tuning) for s, _ in hopeful)
    return [Option(s, label, desk.whole(s, label, question.tuning)) for s, label in hopeful]


def best_by_rule(desk: Desk, options: list[Option]) -> Trial | None:
    """The best by the search's own rule, on the judging repeats; None if nothing keeps to it.

    The least energy on the tuning repeats of what reaches the choice's target on them together.
    """
    question = desk.question
    kept = [o for o in options if o.tuned.keeps(question.choice_target)]
    if not kept:
        return None
    best = min(kept, key=lambda o: o.tuned.energy_j)
    return desk.trial(best.settings, best.label, question.judging)


def best_in_hindsight(desk: Desk, options: list[Option]) -> Trial | None:
    """Least energy on the judging repeats of what keeps the target on them together.

    What spends far more than the best on the tuning repeats is not judged.
    """
    question = desk.question
    kept = [o.tuned.energy_j for o in options if o.tuned.keeps(question.target)]
    near = [o for o in options if o.tuned.energy_j <= _NEAR * min(kept, default=0.0)]
    desk.ahead((o.settings, question.judging) for o in near)
    judged = [desk.trial(o.settings, o.label, question.judging) for o in near]
    keeping = [t for t in judged if pooled(t.rows, "attainment") >= question.target]
    return min(keeping, key=lambda t: t.energy_j) if keeping else None


def unseen(question: Question) -> Mapping[str, Repeats]:
    """Repeats that took part in neither the choice nor the judging."""
    seeds: Repeats = [{**question.judging[0], "seed": s} for s in UNSEEN_SEEDS]
    return {"seeds": seeds, "trace": [{**r, **BURSTY} for r in seeds[:5]]}


def row_of(name: str, desk: Desk, advice: Advice) -> list[str]:
    """One line of the table."""
    question = desk.question
    options = exhaustive(desk)
    mine = advice.fixed.asked.energy_j
    cells = [name, advice.fixed.setting]
    for best in (best_by_rule(desk, options), best_in_hindsight(desk, options)):
        off = "–" if best is None else f"{100 * (mine / best.energy_j - 1):+.2f}"
        cells.append(off)
    for repeats in unseen(question).values():
        ways = [w for w in (advice.fixed, advice.dynamic) if w is not None]
        desk.ahead((w.settings, repeats) for w in ways)
        kept = [pooled(desk.trial(w.settings, w.setting, repeats).rows, "attainment") for w in ways]
        cells.append(" / ".join(f"{100 * k:.2f}" for k in kept))
    return [*cells, str(len(options))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=[*CASES])
    options = parser.parse_args()
    rows = []
    for name in options.case or CASES:
        settings, gpus, clocks = CASES[name]
        settings = {**settings, "duration_s": DURATION_S}
        question = make_question(settings, gpus=gpus, watts=None, clocks_mhz=clocks)
        desk = Desk(question, options.out)
        rows.append(row_of(name, desk, advise(desk)))
        print(rows[-1], flush=True)  # noqa: T201
    heads = (
        "case", "recommended fixed clocks", "energy over the exhaustive best, %",
        "over the best in hindsight, %", "kept on 10 unseen seeds, % (fixed / dynamic)",
        "kept at uneven arrivals, %", "settings tried",
    )  # fmt: skip
    print(markdown_table(heads, rows, numbers=range(2, 7)))  # noqa: T201


if __name__ == "__main__":
    run_script(main)
