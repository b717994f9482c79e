"""How far a simulated run is from the real one: errors by metric, by iteration, and a verdict.

Both runs come from the one reader and are reduced by the one definition of every metric, so an
error is the model's and never that of two ways of counting. Sign: error = simulated / observed - 1,
positive where the simulation says more than was observed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.hwreplay.validate.pairing import cache_notes, compare_caches, find_faults
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.optional.mixed import MixedStep
from voltana.profiles.step_model import StepModel
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL
from voltana.sim.records import IterationTable, RunRecord

LimitKind = Literal["energy", "p50", "p90", "p99", "other"]
MAX_ITERATIONS: Final = 20_000
_ENERGY: Final = (
    ("energy_j", "J"),
    ("energy_busy_window_j", "J"),
    ("prefill_energy_j", "J"),
    ("decode_energy_j", "J"),
    ("colocated_energy_j", "J"),
    ("idle_energy_j", "J"),
    ("energy_per_output_token_j", "J/token"),
    ("cached_tokens", "tokens"),
    ("unsent_tokens", "tokens"),
)
"""And what was found in caches, which is energy that was not spent."""
CHUNK: Final = ("chunk_requests", "chunk_tokens")
_JUDGED_ENERGY: Final = frozenset({"energy_j", "energy_per_output_token_j", "cached_tokens"})
_LATENCIES: Final = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
_LEVELS: Final[Mapping[str, LimitKind]] = {"p50": "p50", "p90": "p90", "p99": "p99"}
POWER_EMULATED: Final = (
    "the observed run's cards were emulated from a profile: iteration times, power and energy are"
    " modelled, not measured"
)
CLIENTS: Final = (
    "energy, clocks and iterations, as the observed run is a load generator's and saw answers alone"
)
POWER_STATED: Final = "energy, as power was stated and not measured"
_UNJUDGED: Final[Mapping[str, LimitKind]] = dict.fromkeys(_LEVELS, "other")
_OTHERS: Final = (
    ("attainment", "fraction"),
    ("ttft_attainment", "fraction"),
    ("itl_attainment", "fraction"),
    ("throughput_tokens_per_s", "tokens/s"),
    ("goodput_rps", "requests/s"),
    ("makespan_s", "s"),
    ("requests_completed", "requests"),
    ("iterations", "iterations"),
)


class IterationModel(Protocol):
    """Predicts one iteration; the profile's step model does."""

    def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float: ...


OwnModels = Mapping[tuple[str, int], tuple[IterationModel, IterationModel]]
"""By phase and instance: the model of its profile's grid, and the one beyond."""


@dataclass(frozen=True, slots=True)
class ProfileModel:
    """A profile's iterations, of one phase or of both."""

    parts: StepModel
    both: MixedStep

    def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
        """Duration in s of an iteration of one phase; arguments as of the step model."""
        return self.parts.predict_s(phase, clock_mhz, batch_size, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Largest error that passes, as a fraction; None reports without judging."""

    energy_frac: float | None = 0.05
    p50_frac: float | None = 0.10
    p90_frac: float | None = None
    p99_frac: float | None = 0.20

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not (limit >= 0 and math.isfinite(limit)):
                raise VoltanaError(f"{name} must be >= 0 and finite, got {limit}")

    def limit_frac(self, kind: LimitKind) -> float | None:
        """The limit of one kind of metric."""
        return None if kind == "other" else getattr(self, f"{kind}_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of both runs."""

    metric: str
    unit: str
    simulated: float
    observed: float
    error_frac: float
    """simulated / observed - 1; NaN where either is missing or the observed one is 0."""
    limit_frac: float | None
    """None: reported, not judged."""

    @property
    def is_judged(self) -> bool:
        """Judged unless it has no limit, or exists in neither run (no gaps, say)."""
        return self.limit_frac is not None and not (
            math.isnan(self.simulated) and math.isnan(self.observed)
        )

    @property
    def passes(self) -> bool:
        """A judged metric that one side lacks fails: what was not seen is not validated."""
        limit_frac = self.limit_frac if self.is_judged else None
        return limit_frac is None or abs(self.error_frac) <= limit_frac


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All that is known about one pair of runs."""

    comparisons: Sequence[Comparison]
    points: pd.DataFrame | None
    """One row an iteration; see `predict_iterations`. None where the real run kept none."""
    iteration_errors: Mapping[str, Mapping[str, float]]
    residency: Mapping[str, Mapping[str, Mapping[str, float]]]
    """{"simulated" | "observed": {phase: {clock: share of busy time}}}"""
    notes: Sequence[str]
    faults: Sequence[str] = ()
    """Why the runs are no pair to compare (another workload, one that did not end): each fails the
    verdict, whatever the errors are."""
    cached: Mapping[str, float] = field(default_factory=dict)
    """See `compare_caches`."""
    left_out: Sequence[str] = ()
    """What the verdict does not cover, and why."""

    @property
    def passes(self) -> bool:
        return not self.faults and all(c.passes for c in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """What `validation.json` holds."""
        return {
            "schema_version": 1,
            "passes": self.passes,
            "faults": list(self.faults),
            "left_out": list(self.left_out),
            "metrics": [asdict(c) | {"passes": c.passes} for c in self.comparisons],
            "iterations": self.iteration_errors,
            "clock_residency": self.residency,
            "cached": dict(self.cached),
            "notes": list(self.notes),
        }


def validate(
    simulated: RunRecord,
    observed: RunRecord,
    *,
    thresholds: Thresholds,
    model: IterationModel | None = None,
    beyond: IterationModel | None = None,
    own: OwnModels = MappingProxyType({}),
) -> Validation:
    """Compare two runs.

    Args:
        simulated: The prediction.
        observed: The real run (or any other).
        thresholds: What passes.
        model: The simulated profile, to predict each observed iteration; None leaves that out.
        beyond: The same outside its grid.
        own: Both of instances that are unlike the others.
    """
    ours, theirs = summarise(simulated), summarise(observed)
    cached = compare_caches(simulated.requests, observed.requests)
    notes = [*_notes(simulated, observed), *cache_notes(cached)]
    is_emulated = observed.settings.get("power") == "emulated"
    is_power_stated = observed.settings.get("is_power_measured") is False and not is_emulated
    if is_emulated:
        notes.append(POWER_EMULATED)
    is_clients = "benchmark" in observed.settings
    if observed.settings.get("token_gaps") == "mean of each request":
        notes.append(
            "the observed token gaps are means of each request: its p99 is no single gap's"
        )
    points = None
    if observed.iterations is None or not len(observed.iterations.duration_s):
        if not is_clients:
            notes.append("the observed run kept no iterations: no error per iteration")
    elif model is not None:
        points = predict_iterations(observed.iterations, model, beyond, own)
        outside = int((~points["is_inside"]).sum())
        if outside:
            notes.append(
                f"{outside} of {len(points)} iterations lie outside the profiled grid and are "
                "extrapolated"
            )
    return Validation(
        comparisons=_compare(
            ours, theirs, thresholds, judges_energy=not (is_power_stated or is_clients)
        ),
        points=points,
        iteration_errors={} if points is None else summarise_iterations(points),
        residency={
            "simulated": ours["clock_residency"],
            "observed": theirs["clock_residency"],
        },
        notes=notes,
        faults=find_faults(simulated, observed),
        cached=cached,
        left_out=[CLIENTS] if is_clients else [POWER_STATED] if is_power_stated else [],
    )


def error_frac(simulated: float, observed: float) -> float:
    """Relative error of a prediction.

    Example:
        >>> error_frac(110.0, 100.0), error_frac(0.0, 0.0)
        (0.10000000000000009, nan)
    """
    return simulated / observed - 1.0 if observed else float("nan")


def predict_iterations(
    table: IterationTable,
    model: IterationModel,
    beyond: IterationModel | None = None,
    own: OwnModels = MappingProxyType({}),
) -> pd.DataFrame:
    """Predict each iteration of a run from its own batch, tokens and clock.

    Args:
        table: The observed iterations; at most `MAX_ITERATIONS` of them, evenly spaced, are used.
        model: Raises VoltanaError outside its grid.
        beyond: Answers there; without it such a point is NaN.
        own: Both of instances that are unlike the others.

    Returns:
        Columns phase, instance_id, start_s, clock_mhz, batch_size, tokens, observed_s,
        predicted_s, is_inside, chunk_requests, chunk_tokens. Where the run says what prompts had in
        front of them, requests are equal prompts with the same attention, if all had as much.
    """
    count = len(table.duration_s)
    keep = np.unique(np.linspace(0, count - 1, min(count, MAX_ITERATIONS)).astype(np.int64))
    frame = pd.DataFrame(
        {
            "phase": table.phase[keep].astype(str),
            "instance_id": table.instance_id[keep],
            "start_s": table.start_s[keep],
            "clock_mhz": table.clock_mhz[keep],
            "batch_size": table.batch_size[keep],
            "tokens": table.tokens[keep],
            "observed_s": table.duration_s[keep],
        }
    )
    for name in CHUNK:
        column = getattr(table, name)
        frame[name] = 0 if column is None else column[keep]
    if table.prefix_tokens is not None:
        _count_attention(frame, table.prefix_tokens[keep])
    is_chunk = (frame["chunk_requests"] > 0) & (frame["chunk_tokens"] > 0)
    is_batch = (frame["batch_size"] > 0) & (frame["tokens"] > 0)
    frame = frame[is_batch | is_chunk].reset_index(drop=True)
    names = ("phase", "instance_id", "clock_mhz", "batch_size", "tokens", *CHUNK)
    found = [
        _predict(*own.get((phase, instance_id), (model, beyond)), phase, (int(clock), *point))
        for phase, instance_id, clock, *point in zip(*(frame[n] for n in names), strict=True)
    ]
    predicted, inside = [f[0] for f in found], [f[1] for f in found]
    return frame.assign(predicted_s=predicted, is_inside=inside)


def summarise_iterations(points: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Errors of the iteration model by phase.

    Returns:
        By phase: `num`, `total_error_frac` (of the summed time: what energy inherits),
        `median_error_frac`, `mape_frac` (mean absolute) and `p90_abs_error_frac`.
    """
    found: dict[str, dict[str, float]] = {}
    for phase in (PREFILL, DECODE, COLOCATED):
        rows = points[(points["phase"] == phase) & (points["observed_s"] > 0)].dropna()
        if rows.empty:
            continue
        ratio = (rows["predicted_s"] / rows["observed_s"] - 1.0).to_numpy()
        found[phase] = {
            "num": len(rows),
            "total_error_frac": rows["predicted_s"].sum() / rows["observed_s"].sum() - 1.0,
            "median_error_frac": float(np.median(ratio)),
            "mape_frac": float(np.mean(np.abs(ratio))),
            "p90_abs_error_frac": float(np.quantile(np.abs(ratio), 0.9)),
        }
    return found


def cdf(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Steps of the empirical distribution of a (weighted) sample: values and fractions."""
    weights = np.ones(len(values), dtype=np.int64) if counts is None else counts
    order = np.argsort(values, kind="stable")
    total = max(int(weights.sum()), 1)
    return values[order], np.cumsum(weights[order]) / total


def _count_attention(frame: pd.DataFrame, prefix_tokens: npt.NDArray[np.int64]) -> None:
    """Make prompts with tokens in front of them fewer: T² / Σ c·(c + 2p) = n·T / (T + 2·P)."""
    for phase, count, tokens in ((PREFILL, "batch_size", "tokens"), (COLOCATED, *CHUNK)):
        rows = ((frame["phase"] == phase) & (frame[tokens] > 0)).to_numpy()
        done = frame[tokens].to_numpy()[rows]
        share = np.ones(len(frame))
        share[rows] = done / (done + 2 * prefix_tokens[rows])
        frame[count] = frame[count] * share


def _predict(
    model: IterationModel, beyond: IterationModel | None, phase: str, point: tuple[Any, ...]
) -> tuple[float, bool]:
    try:
        return _duration_s(model, phase, point), True
    except VoltanaError:
        return float("nan") if beyond is None else _duration_s(beyond, phase, point), False


def _duration_s(model: IterationModel, phase: str, point: tuple[Any, ...]) -> float:
    clock_mhz, batch_size, tokens, *chunk = point
    if phase != COLOCATED:
        return model.predict_s(phase, clock_mhz, batch_size, tokens)
    if not isinstance(model, ProfileModel):
        return float("nan")
    return model.both.time_and_power(clock_mhz, (chunk[0], chunk[1]), (batch_size, tokens))[0]


def _compare(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    thresholds: Thresholds,
    *,
    judges_energy: bool,
) -> list[Comparison]:
    rows: list[tuple[str, str, LimitKind, float, float]] = []
    for name, unit in (e for e in _ENERGY if e[0] in ours and e[0] in theirs):
        kind: LimitKind = "energy" if judges_energy and name in _JUDGED_ENERGY else "other"
        rows.append((name, unit, kind, ours[name], theirs[name]))
    rows += [
        (f"{name}.{level}", "s", kind_of_level, ours[name][level], theirs[name][level])
        for name in _LATENCIES
        for level, kind_of_level in (_LEVELS if name != "e2e_s" else _UNJUDGED).items()
    ]
    rows += [(name, unit, "other", ours[name], theirs[name]) for name, unit in _OTHERS]
    return [
        Comparison(
            metric=name,
            unit=unit,
            simulated=float(a),
            observed=float(b),
            error_frac=error_frac(a, b),
            limit_frac=thresholds.limit_frac(kind),
        )
        for name, unit, kind, a, b in rows
    ]


def _notes(simulated: RunRecord, observed: RunRecord) -> list[str]:
    keys = simulated.settings.keys() & observed.settings.keys()
    pairs = ((key, simulated.settings[key], observed.settings[key]) for key in sorted(keys))
    return [f"setting {k} differs: {a} simulated, {b} observed" for k, a, b in pairs if a != b]
