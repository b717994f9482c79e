"""Verdicts of the loop: simulated against replayed, and savings against static-max."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from voltana.experiments.runs import cached_profile
from voltana.hwreplay.validate.validate import Comparison, Thresholds, Validation, validate
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.records import RunRecord

CHANCE_SDS: Final = 2.0
"""Which of decode's boundaries a request catches is chance, for both sides. The prediction is a
mean over starts; the replay is one, and may be off by so many standard deviations of these."""
LIMITS: Final = Thresholds(energy_frac=0.05, p50_frac=0.05, p90_frac=None, p99_frac=0.10)
ITERATION_FRAC: Final = 0.03
"""Of the sum of all iterations of a phase, and of the median one."""
ATTAINMENT: Final = 0.01
SAVING: Final = 0.02
SAME: Final = 0.02
"""Savings closer than this have no order: it is what either side may be off by."""
BASELINE: Final = "static-max"
SHOWN: Final = {
    "energy_j": "energy",
    "ttft_s.p50": "TTFT p50",
    "ttft_s.p99": "p99",
    "itl_s.p50": "ITL p50",
    "itl_s.p99": "p99",
    "tpot_s.p50": "TPOT p50",
    "tpot_s.p99": "p99",
}


def slug(name: str) -> str:
    """A folder's name.

    Example:
        >>> slug("1P1D, ShareGPT ecofreq + ecoroute")
        '1p1d-sharegpt-ecofreq-ecoroute'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def compare(
    field: str, policy: str, simulated: Sequence[RunRecord], observed: RunRecord, folder: Path
) -> dict[str, Any]:
    """One cell: every error, every limit that is broken, and what the run says of itself.

    Args:
        field: Name of fleet and workload.
        policy: Name of the policy.
        simulated: The prediction, played with several starts against decode's iterations.
        observed: The replay.
        folder: The replay's, with its `replay.json`.
    """
    profile = cached_profile(str(simulated[0].settings["profile"]))
    first = validate(
        simulated[0],
        observed,
        thresholds=LIMITS,
        model=profile.truth(),
        beyond=profile.truth(extrapolate=True),
    )
    # what the tables say of each observed iteration is the same beside every start
    found = [first, *(validate(one, observed, thresholds=LIMITS) for one in simulated[1:])]
    metrics = {
        c.metric: _Metric.of([_named(v, c.metric) for v in found]) for c in first.comparisons
    }
    attained = metrics["attainment"]
    failed = [*first.faults, *(name for name, m in metrics.items() if not m.passes)]
    for phase, errors in first.iteration_errors.items():
        worst = max(abs(errors["total_error_frac"]), abs(errors["median_error_frac"]))
        if worst > ITERATION_FRAC:
            failed.append(f"{phase} iterations")
    state = json.loads((folder / "replay.json").read_text())
    return {
        "field": field,
        "policy": policy,
        "failed": failed,
        "errors": {name: metrics[name].error for name in SHOWN},
        "chance": {name: metrics[name].chance for name in SHOWN},
        "within": {name: metrics[name].is_within for name in SHOWN},
        "energy_j": [metrics["energy_j"].simulated, metrics["energy_j"].observed],
        "attainment": [attained.simulated, attained.observed],
        "iterations": first.iteration_errors,
        "residency": first.residency,
        "overruns": state["overruns"],
        "agents": {name: agent["counts"] for name, agent in state["agents"].items()},
        "learnt": {name: agent["learnt"] for name, agent in state["agents"].items()},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metric:
    """One metric of a cell: the mean prediction beside what was observed."""

    simulated: float
    observed: float
    error: float
    """Relative to the observed one; of attainment the difference."""
    chance: float
    """Standard deviation of the error over the starts of the prediction."""
    limit: float | None

    @classmethod
    def of(cls, pairs: Sequence[Comparison]) -> _Metric:
        """From the comparisons of all starts."""
        values = np.array([c.simulated for c in pairs])
        observed, is_share = pairs[0].observed, pairs[0].metric == "attainment"
        scale = 1.0 if is_share else observed
        return cls(
            simulated=float(values.mean()),
            observed=observed,
            error=float((values.mean() - observed) / scale),
            chance=float(values.std(ddof=1) / scale),
            limit=ATTAINMENT if is_share else pairs[0].limit_frac if pairs[0].is_judged else None,
        )

    @property
    def is_within(self) -> bool:
        return self.limit is None or abs(self.error) <= self.limit

    @property
    def passes(self) -> bool:
        return self.limit is None or abs(self.error) <= self.limit + CHANCE_SDS * self.chance


def _named(found: Validation, metric: str) -> Comparison:
    return next(c for c in found.comparisons if c.metric == metric)


def line(cell: Mapping[str, Any]) -> str:
    """One cell in one line."""
    errors = ", ".join(f"{label} {_error(cell, name)}" for name, label in SHOWN.items())
    verdict = "passes" if not cell["failed"] else f"FAILS ({', '.join(cell['failed'])})"
    return f"{cell['field']}, {cell['policy']}: {errors}: {verdict}"


def savings(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Savings of each policy against static-max of its field, [simulated, replayed]."""
    found = []
    for cell in cells:
        base = next(
            (c for c in cells if c["field"] == cell["field"] and c["policy"] == BASELINE), None
        )
        if base is None or cell is base:
            continue
        pair = [1 - cell["energy_j"][side] / base["energy_j"][side] for side in (0, 1)]
        found.append({"field": cell["field"], "policy": cell["policy"], "saving": pair})
    return found


def wrong_order(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pairs of policies whose savings differ clearly in simulation and the other way in replay."""
    return [
        f"{a['policy']} and {b['policy']} on {a['field']}"
        for a in rows
        for b in rows
        if a["field"] == b["field"]
        and a["saving"][0] > b["saving"][0] + SAME
        and a["saving"][1] < b["saving"][1]
    ]


def report(found: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether all circles close, and the Markdown that says how.

    Args:
        found: What `cells.json` holds.
        tables: Of the profile circle, one row a table and clock; none: it was left out.
    """
    cells, saved = found["cells"], savings(found["cells"])
    order = wrong_order(saved)
    bad = [row for row in saved if abs(row["saving"][0] - row["saving"][1]) > SAVING]
    passes = (
        all(not c["failed"] for c in cells)
        and not bad
        and not order
        and all(t["passes"] for t in tables)
    )
    host = "; ".join(
        f"{name}: "
        + ", ".join(f"{k.removesuffix('_s')} {v * 1e3:.1f} ms" for k, v in times.items())
        for name, times in found["host_times"].items()
    )
    inside = [is_within for cell in cells for is_within in cell["within"].values()]
    lines = [
        "# The loop on emulated cards",
        "",
        f"**Verdict: {'closes' if passes else 'does not close'}.**",
        "",
        (
            "Emulated, not measured: real SGLang, router, agents, helper and meters on cards that"
            f" run from a profile, in time {found['dilation']:g} times slower, without noise."
            f" The host adds to a first token ({host})."
        ),
        "",
        (
            "Errors are of the mean of several simulations, whose loads start at another moment of"
            " decode's iterations, ± their standard deviation over these: chance, which the one"
            f" replay has too. (!) is beyond its limit ({sum(inside)} of {len(inside)} errors are"
            f" within); beyond by more than {CHANCE_SDS:g} standard deviations, a cell fails."
        ),
        "",
        *_profile_lines(tables),
        "## Simulated against replayed (error of the simulation)",
        "",
        markdown_table(
            ["", "", *SHOWN.values(), "attainment", "iterations", "overran", "verdict"],
            [_cell_row(cell) for cell in cells],
        ),
        "",
        "## Savings against static-max",
        "",
        markdown_table(
            ["", "", "simulated", "replayed", "verdict"], [_saving_row(row) for row in saved]
        ),
        "",
        *([f"Out of order: {'; '.join(order)}."] if order else []),
    ]
    return passes, "\n".join(lines) + "\n"


def _profile_lines(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tables:
        return []
    rows = [
        [t["table"], f"{t['clock_mhz']} MHz", str(t["points"]), _percent(t["median"]),
         _percent(t["worst"]), f"{t['limit']:.0%}", "pass" if t["passes"] else "FAIL"]
        for t in tables
    ]  # fmt: skip
    head = ["table", "clock", "points", "median error", "worst", "limit of the median", "verdict"]
    return [
        "## The profiler on the card against the card's own tables",
        "",
        markdown_table(head, rows),
        "",
    ]


def _cell_row(cell: Mapping[str, Any]) -> list[str]:
    attained = " / ".join(f"{100 * value:.1f} %" for value in cell["attainment"])
    iterations = ", ".join(
        f"{phase} {_percent(e['total_error_frac'])}" for phase, e in cell["iterations"].items()
    )
    overran = cell["overruns"]
    return [
        cell["field"],
        cell["policy"],
        *(_error(cell, name) for name in SHOWN),
        attained,
        iterations,
        f"{overran['num_overran']} of {overran['num_passes']}, {overran['late_frac']:.2%}",
        "pass" if not cell["failed"] else f"FAIL: {', '.join(cell['failed'])}",
    ]


def _saving_row(row: Mapping[str, Any]) -> list[str]:
    simulated, replayed = row["saving"]
    verdict = "pass" if abs(simulated - replayed) <= SAVING else "FAIL"
    values = (f"{100 * value:.1f} %" for value in (simulated, replayed))
    return [row["field"], row["policy"], *values, verdict]


def _error(cell: Mapping[str, Any], name: str) -> str:
    chance = f"±{100 * cell['chance'][name]:.1f}"
    return f"{_percent(cell['errors'][name])} {chance}{'' if cell['within'][name] else ' (!)'}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"
