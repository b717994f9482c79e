"""Small studies for the tests of the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from voltana.experiments.frontier.contenders import parse_contender
from voltana.experiments.frontier.search import Study
from voltana.experiments.frontier.study import make_study
from voltana.experiments.frontier.trial import Load


def make_small_study(
    *,
    base: Mapping[str, Any] | None = None,
    load: Mapping[str, Any] | None = None,
    policies: Sequence[str] = ("ecofreq + ecoroute",),
    tuning: Sequence[int] = (1, 2),
    judging: Sequence[int] = (11, 12, 13),
    **options: Any,  # noqa: ANN401 (those of make_study)
) -> Study:
    """8 s at 20 requests/s on two and two, unless said otherwise."""
    values: dict[str, Any] = {"target": 0.99, "attainment": "attainment", **options}
    return make_study(
        base or {"duration_s": 8, "slo_itl_s": 0.045},
        [Load(name="the load", settings=load or {"rate_rps": 20})],
        [parse_contender(policy) for policy in policies],
        tuning=[{"seed": s} for s in tuning],
        judging=[{"seed": s} for s in judging],
        **values,
    )
