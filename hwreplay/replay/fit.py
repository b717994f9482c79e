"""A quick profile of running servers: iteration times fitted to a minute of their own records.

`voltana profile` holds one point at a time and is the better measurement. This is for a machine
that has no such time, or too much noise: a few terms, fitted to the median of thousands of
iterations of all sizes, hold where single points do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

from voltana.hwreplay.replay.recording import IterationRow
from voltana.profiles.catalog import Profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import BACK_TO_BACK_S
from voltana.profiles.schema import ClocksMeta, ProfileMeta, Provenance
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import DECODE, PREFILL, Phase

GRID_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
GRID_TOKENS: Final = (1, 64, 256, 1024, 2048, 4096, 8192, 16384)
ROUNDS: Final = 60
MIN_STEPS: Final = 10
SOURCE: Final = "fitted to the median of SGLang's own records of its iterations"


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration."""

    batch_size: int
    tokens: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Iteration time as a sum of terms, every coefficient >= 0."""

    phase: Phase
    coefficients_s: tuple[float, ...]
    """Of 1; tokens; in prefill tokens²/batch size, the work of attention; each ramp of batch."""
    knots: tuple[int, ...]
    """Batch sizes where the slope against batch may change: an engine's time has steps there."""
    num_steps: int
    median_abs_error_frac: float
    """How far a single iteration is from it: the machine's noise more than the fit's."""

    def time_s(self, batch_size: float, tokens: float) -> float:
        """Duration of one iteration."""
        terms = _terms(self.phase, np.array([batch_size]), np.array([tokens]), self.knots)
        return float(terms[0] @ np.array(self.coefficients_s))


def steps_of(rows: Sequence[IterationRow], phase: Phase) -> list[Step]:
    """Iteration times of one phase.

    Prefill: the forward pass, as batches seldom follow one another. Decode: from end to end of
    iterations that follow at once, so that scheduling counts; the first after a pause is left out,
    as nothing tells when the scheduler began with it.
    """
    mine = sorted(
        (r for r in rows if r.phase == phase and r.batch_size > 0 and r.tokens > 0),
        key=lambda r: r.start_s + r.duration_s,
    )
    if phase == PREFILL:
        return [Step(r.batch_size, r.tokens, r.wall_time_s) for r in mine]
    found = []
    for before, row in pairwise(mine):
        time_s = row.start_s + row.duration_s - before.start_s - before.duration_s
        if row.wall_time_s / 2 < time_s < row.wall_time_s + BACK_TO_BACK_S:
            found.append(Step(row.batch_size, row.tokens, time_s))
    return found


def fit_surface(steps: Sequence[Step], phase: Phase) -> Surface:
    """The conditional median of the time, by reweighted non-negative least squares.

    Errors count relative to the fitted time, so that short iterations weigh as much as long ones,
    and a batch size has the voice of the root of how often it was seen: a long stream does not
    drown the others, and the few iterations between two bursts do not bend them.

    Raises:
        VoltanaError: Fewer than 10 iterations.
    """
    if len(steps) < MIN_STEPS:
        raise VoltanaError(f"a fit needs {MIN_STEPS} {phase} iterations, got {len(steps)}")
    time_s = np.array([step.time_s for step in steps])
    sizes = np.array([step.batch_size for step in steps])
    knots = _knots(phase, sizes)
    terms = _terms(phase, sizes, np.array([step.tokens for step in steps]), knots)
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    share = 1.0 / np.sqrt(counts[place])
    fitted_s, weights = np.full(len(steps), float(np.median(time_s))), share
    found = np.zeros(terms.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights) / fitted_s
        found, _ = nnls(terms * root[:, None], time_s * root)
        fitted_s = np.maximum(terms @ found, 1e-6)
        weights = share / np.maximum(np.abs(time_s / fitted_s - 1.0), 1e-3)
    return Surface(
        phase=phase,
        coefficients_s=tuple(float(c) for c in found),
        knots=knots,
        num_steps=len(steps),
        median_abs_error_frac=float(np.median(np.abs(fitted_s / time_s - 1.0))),
    )


def write_fitted_profile(
    directory: Path,
    surfaces: Sequence[Surface],
    base: ProfileMeta,
    config: SimConfig,
    power_w: float,
) -> Profile:
    """Write the fit as a profile of one clock and constant power.

    Args:
        directory: Where to.
        surfaces: Of prefill and decode.
        base: What is not measured here: the model, and the engine's limits where `config` names
            none.
        config: Its limits are the servers'.
        power_w: Stated, never measured.
    """
    clock_mhz = base.clocks.supported_mhz[-1]
    columns = ["frequency_mhz", "batch_size", "tokens", "trial", "time_s", "power_w"]
    tables = {
        surface.phase: pd.DataFrame(
            [
                (clock_mhz, b, t, 0, surface.time_s(b, t), power_w)
                for b in GRID_BATCHES
                for t in GRID_TOKENS
            ],
            columns=columns,
        )
        for surface in surfaces
    }
    idle = pd.DataFrame(
        [(f, 0, power_w) for f in (0, clock_mhz)], columns=["frequency_mhz", "trial", "power_w"]
    )
    meta = _meta(base, config, surfaces, clock_mhz)
    return write_profile(directory, meta, tables[PREFILL], tables[DECODE], idle)


def _meta(
    base: ProfileMeta, config: SimConfig, surfaces: Sequence[Surface], clock_mhz: int
) -> ProfileMeta:
    engine = base.engine
    errors = ", ".join(
        f"{s.phase}: {s.num_steps} iterations, median error {s.median_abs_error_frac:.0%}"
        for s in surfaces
    )
    stated = Provenance(status="modelled", source="stated by the user, constant")
    timed = Provenance(status="measured", source=SOURCE, uncertainty=errors)
    return dataclasses.replace(
        base,
        gpu=dataclasses.replace(base.gpu, name="none: stated power"),
        engine=dataclasses.replace(
            engine,
            name="sglang",
            max_prefill_tokens=config.max_prefill_tokens or engine.max_prefill_tokens,
            max_running_requests=config.max_running_requests or engine.max_running_requests,
            kv_capacity_tokens=config.kv_capacity_tokens or engine.kv_capacity_tokens,
        ),
        clocks=ClocksMeta(supported_mhz=(clock_mhz,), default_levels_mhz=(clock_mhz,)),
        provenance={name: timed if "time" in name else stated for name in base.provenance},
    )


def _knots(phase: Phase, sizes: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Where the slope may change: decode's batch sizes of the grid, as far as any was seen.

    Prefill batches of a probe hold one prompt mostly: one slope. The last ramp has no end, so that
    larger batches than were seen follow its slope.
    """
    if phase == PREFILL:
        return (1,)
    return tuple(knot for knot in GRID_BATCHES if knot < sizes.max()) or (1,)


def _terms(
    phase: Phase,
    batch_size: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
    knots: Sequence[int],
) -> npt.NDArray[np.float64]:
    columns = [np.ones(len(batch_size)), tokens]
    if phase == PREFILL:
        columns.append(tokens.astype(np.float64) ** 2 / batch_size)
    ends = (*knots[1:], np.inf)
    columns += [
        np.clip(batch_size - begin, 0, end - begin) for begin, end in zip(knots, ends, strict=True)
    ]
    return np.stack([np.asarray(c, dtype=np.float64) for c in columns], axis=1)
