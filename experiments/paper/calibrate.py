"""Fit the few unknowns of the published panel: two SLOs, one kernel time, one host time.

Unknown is what the publication does not state (TTFT and ITL promise) and what its engine did not
share with our sources of kernel times (attention backend, scheduling between prefill batches).
Everything else is the reference's documented setting or comes from other sources. The fit sees
one panel only, and of it only the rates below overload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize

from voltana.experiments.paper.panel import below_overload, panel_residuals, score
from voltana.profiles.build.a100 import Tuning, build_tuned
from voltana.profiles.catalog import FILES, Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import read_toml

MODEL: Final = "llama-3.1-8b"
PREFILL_PEAK_RATIO: Final = 1.23
"""Uncapped draw of prefill over the limit: an A100-80GB of 400 W was seen at 492 W."""
AWAKE_TOP_W: Final = 44.0
"""Awake power of a GPU at the top clock: `voltana.experiments.paper.mechanisms` derives it."""
STEP: Final = 0.15
"""Relative size of the first simplex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknowns:
    """The fitted parameters; the defaults are where the search begins.

    It begins at what is documented: the reference's demo asks for an ITL of 45 ms, its load
    balancer sets the TTFT promise to ten times that, kernel and host times are our sources'.
    """

    slo_ttft_s: float = 0.450
    slo_itl_s: float = 0.045
    attention_multiplier: float = 1.0
    prefill_host_s: float = 0.005

    @property
    def tuning(self) -> Tuning:
        """The part that changes iteration times."""
        return Tuning(
            attention_multiplier=self.attention_multiplier, prefill_host_s=self.prefill_host_s
        )

    @property
    def with_mechanisms(self) -> Tuning:
        """The same with what was not fitted: the profiles that the prediction runs on."""
        return replace(self.tuning, prefill_peak_ratio=PREFILL_PEAK_RATIO, awake_top_w=AWAKE_TOP_W)


_ROUNDING: Final = {
    "slo_ttft_s": 3, "slo_itl_s": 4, "attention_multiplier": 3, "prefill_host_s": 4,
}  # fmt: skip
"""Decimals that are kept: what is fitted is exactly what is written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Result of a search."""

    unknowns: Unknowns
    score: float
    evaluations: int


def fit(
    evaluate: Callable[[Unknowns], float],
    *,
    start: Unknowns | None = None,
    max_evaluations: int = 80,
) -> Fit:
    """Minimise a score by Nelder-Mead over the logarithms of the unknowns.

    Args:
        evaluate: Score of rounded unknowns, lower is better; asked once for each.
        start: Where the search begins.
        max_evaluations: Bound on the search.

    Returns:
        The best that was evaluated.
    """
    first = start or Unknowns()
    known: dict[Unknowns, float] = {}

    def cost(logs: npt.NDArray[np.float64]) -> float:
        at = _rounded(np.exp(logs))
        if at not in known:
            known[at] = evaluate(at)
        return known[at]

    origin = np.log([*asdict(first).values()])
    simplex = np.vstack([origin, origin + STEP * np.eye(len(origin))])
    minimize(
        cost,
        origin,
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "maxfev": max_evaluations, "xatol": 2e-3,
                 "fatol": 1e-3, "adaptive": True},
    )  # fmt: skip
    best = min(known, key=known.__getitem__)
    return Fit(unknowns=best, score=known[best], evaluations=len(known))


def _rounded(values: npt.NDArray[np.float64]) -> Unknowns:
    pairs = zip(_ROUNDING.items(), values, strict=True)
    return Unknowns(**{name: round(float(v), digits) for (name, digits), v in pairs})


def fit_panel(
    published: pd.DataFrame,
    data: Path,
    directory: Path,
    *,
    workload: str,
    max_evaluations: int = 80,
    jobs: int | None = None,
    report: Callable[[Unknowns, float], None] = lambda _unknowns, _score: None,
) -> Fit:
    """Fit the unknowns to a panel of Llama-3.1-8B; resumable, finished runs are kept.

    Args:
        published: See `voltana.experiments.paper.panel.read_panel`.
        data: Folder of the public measurements that profiles are built from.
        directory: Takes trial profiles and runs.
        workload: Length distribution, a choice made before the fit.
        max_evaluations: Bound on the search.
        jobs: Processes; all cores by default.
        report: Told of each evaluation.
    """
    below = published[published["rps"].isin(below_overload(published))]

    def evaluate(unknowns: Unknowns) -> float:
        profile = trial_profile(data, directory / "profiles", unknowns.tuning)
        changes: dict[str, str | float] = {
            "profile": str(profile),
            "workload": workload,
            "slo_ttft_s": unknowns.slo_ttft_s,
            "slo_itl_s": unknowns.slo_itl_s,
        }
        reached = score(panel_residuals(below, directory / "runs", jobs=jobs, changes=changes))
        report(unknowns, reached)
        return reached

    return fit(evaluate, max_evaluations=max_evaluations)


def trial_profile(data: Path, directory: Path, tuning: Tuning, model: str = MODEL) -> Path:
    """The profile of one tuning, built if it is not there.

    Args:
        data: Folder of the measured kernels.
        directory: Folder of the profiles that are tried.
        tuning: What to build it with.
        model: Name of the model.
    """
    name = "-".join(f"{value:g}" for value in asdict(tuning).values())
    made = directory / f"{model}-{name}"
    if not all((made / file).is_file() for file in FILES):
        build_tuned(data, made, model, tuning, "a trial of a fit")
    return made


def scaled_promises(unknowns: Unknowns, profile: Profile, of_fit: Profile) -> tuple[float, float]:
    """TTFT and ITL promise of another model, in seconds, rounded like the fitted ones.

    The publication gives each model promises of its own, which are not known. The rule is made
    before any other panel is looked at: the promise is the same multiple of the unloaded latency
    at the top clock. Unloaded ITL is a decode step of one request with 512 tokens of context,
    unloaded TTFT a prefill of 250 tokens and such a step.

    Args:
        unknowns: The fitted promises, in s.
        profile: Of the other model.
        of_fit: Of the model that was fitted.
    """
    itl_s, of_fit_itl_s = _unloaded_itl_s(profile), _unloaded_itl_s(of_fit)
    ttft_s, of_fit_ttft_s = _unloaded_ttft_s(profile), _unloaded_ttft_s(of_fit)
    return (
        round(unknowns.slo_ttft_s * ttft_s / of_fit_ttft_s, _ROUNDING["slo_ttft_s"]),
        round(unknowns.slo_itl_s * itl_s / of_fit_itl_s, _ROUNDING["slo_itl_s"]),
    )


def _unloaded_itl_s(profile: Profile) -> float:
    return profile.truth().predict_s("decode", profile.clocks_mhz[-1], 1, 512)


def _unloaded_ttft_s(profile: Profile) -> float:
    prefill_s = profile.truth().predict_s("prefill", profile.clocks_mhz[-1], 1, 250)
    return prefill_s + _unloaded_itl_s(profile)


def read_fitted(path: Path) -> Unknowns:
    """The unknowns of a `fitted.toml`.

    Raises:
        VoltanaError: It can't be read or lacks one of them.
    """
    data = read_toml(path)
    try:
        return Unknowns(**{name: float(data[name]) for name in _ROUNDING})
    except (KeyError, TypeError, ValueError) as error:
        raise VoltanaError(f"{path}: needs numbers {', '.join(_ROUNDING)} ({error})") from None
