"""A validation as Markdown: what a reader needs to believe it, or not to."""

from __future__ import annotations

import math

from voltana.hwreplay.validate.validate import Comparison, Validation
from voltana.profiles.common.markdown import markdown_table

_MS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")


def markdown(validation: Validation, *, simulated: str, observed: str, figure: str) -> str:
    """The report.

    Args:
        validation: What was found.
        simulated: Name of the simulated run.
        observed: Name of the real run.
        figure: Path of the figure, relative to the report.
    """
    verdict = "passes" if validation.passes else "fails"
    failed = [*validation.faults, *(c.metric for c in validation.comparisons if not c.passes)]
    lines = [
        "# Simulation against observation",
        "",
        f"Simulated: `{simulated}`. Observed: `{observed}`. Error = simulated / observed - 1.",
        "",
        f"**Verdict: {verdict}**" + (f" ({', '.join(failed)})" if failed else ""),
        *(["", f"Not judged: {'; '.join(validation.left_out)}."] if validation.left_out else []),
        "",
        markdown_table(
            ("metric", "simulated", "observed", "error", "limit", "verdict"),
            map(_row, validation.comparisons),
        ),
        "",
        f"![Distributions, iterations and clocks]({figure})",
        "",
    ]
    if validation.iteration_errors:
        lines += ["## Time of an iteration", "", _iterations(validation), ""]
    lines += ["## Share of busy time by clock", "", _residency(validation), ""]
    if validation.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in validation.notes), ""]
    return "\n".join(lines)


def _row(item: Comparison) -> tuple[str, ...]:
    limit = "" if item.limit_frac is None else f"{100 * item.limit_frac:g} %"
    verdict = ("pass" if item.passes else "FAIL") if item.is_judged else ""
    simulated, observed = (_number(item, v) for v in (item.simulated, item.observed))
    return (item.metric, simulated, observed, _percent(item.error_frac), limit, verdict)


def _number(item: Comparison, value: float) -> str:
    if not math.isfinite(value):
        return "none"
    if item.metric.partition(".")[0] in _MS:
        return f"{1e3 * value:.2f} ms"
    if item.unit == "fraction":
        return f"{100 * value:.2f} %"
    return f"{value:,.4g} {item.unit}" if value < 1e4 else f"{value:,.0f} {item.unit}"


def _percent(frac: float) -> str:
    return "none" if not math.isfinite(frac) else f"{100 * frac:+.1f} %"


def _iterations(validation: Validation) -> str:
    return markdown_table(
        (
            "phase",
            "iterations",
            "error of the sum",
            "median error",
            "mean absolute error",
            "p90 absolute error",
        ),
        (
            (
                phase,
                f"{e['num']:.0f}",
                *(
                    _percent(e[key])
                    for key in (
                        "total_error_frac",
                        "median_error_frac",
                        "mape_frac",
                        "p90_abs_error_frac",
                    )
                ),
            )
            for phase, e in validation.iteration_errors.items()
        ),
    )


def _residency(validation: Validation) -> str:
    rows = []
    ours, theirs = validation.residency["simulated"], validation.residency["observed"]
    for phase in ours:
        clocks = sorted({*ours[phase], *theirs.get(phase, {})}, key=int)
        for clock in clocks:
            shares = (side.get(phase, {}).get(clock, 0.0) for side in (ours, theirs))
            name = "unlocked" if clock == "0" else f"{clock} MHz"
            rows.append((phase, name, *(f"{100 * share:.1f} %" for share in shares)))
    return markdown_table(("phase", "clock", "simulated", "observed"), rows)
