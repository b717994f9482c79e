"""From a journal to a profile directory that `load_profile` accepts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.profiles.catalog import Profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_csv
from voltana.profiles.device.gpu import GpuIdentity
from voltana.profiles.engines.base import MIXED, PHASES, EngineFacts, Phase
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.mixed_rows import mixed_frame, mixed_provenance
from voltana.profiles.measure.trial import CLOCK_OFF, CLOCK_TOLERANCE_MHZ, GAPS, NOT_MEASURED, Trial
from voltana.profiles.schema import (
    ClocksMeta,
    EngineMeta,
    GpuMeta,
    ModelMeta,
    ProfileMeta,
    Provenance,
)
from voltana.profiles.step_model import StepModel
from voltana.profiles.tables import CHUNK, POINT, grid_of, idle_power_of

BARE_IDLE: Final = "idle_bare.csv"
MIN_POINTS: Final = 2
MAX_HELD: Final = 4
"""Multiple of the shortest context that can be held, up to which a row is extended."""
HELD: Final = "not-measured-held-from-next-tokens"


def assemble(
    directory: Path, log: Journal, identities: Sequence[GpuIdentity], facts: EngineFacts
) -> Profile:
    """Write and load back the profile of a journal.

    Points measured with the clock left alone (clock 0 in the journal) go under the one clock that
    was read most often while they ran.

    Args:
        directory: Of the profile.
        log: What was measured.
        identities: Of the cards.
        facts: Of engine and model.
    """
    alone_mhz = _observed_clock_mhz(log)
    frames = {phase: _phase_frame(log, phase, alone_mhz, facts) for phase in ("prefill", "decode")}
    clocks_mhz = tuple(sorted({c or alone_mhz for c, p in log.points if p.phase != MIXED}))
    idle = _idle_frame(log, alone_mhz, clocks_mhz)
    provenance = _provenance(log, identities, facts, has_control=alone_mhz == 0)
    rows = [row for row in _rows(log, MIXED, alone_mhz) if row["frequency_mhz"] in clocks_mhz]
    mixed = None
    if rows:
        prefill, decode = (grid_of(frames[phase]) for phase in PHASES)
        parts = StepModel(prefill, decode, idle_power_of(idle), clocks_mhz, extrapolate=True)
        mixed = mixed_frame(rows, parts)
        power = power_provenance(_trials(log, MIXED), identities, facts)
        provenance |= mixed_provenance(mixed, parts, provenance["prefill_time"], power)
    meta = ProfileMeta(
        gpu=_gpu_meta(identities[0]),
        model=ModelMeta(
            name=facts.model_name,
            tensor_parallel=facts.tensor_parallel,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            max_context_tokens=facts.max_context_tokens,
        ),
        engine=EngineMeta(
            name=facts.engine_name,
            version=facts.engine_version,
            max_prefill_tokens=facts.max_prefill_tokens,
            max_running_requests=facts.max_running_requests,
            kv_capacity_tokens=facts.kv_capacity_tokens,
        ),
        clocks=ClocksMeta(supported_mhz=clocks_mhz, default_levels_mhz=clocks_mhz),
        provenance=provenance,
    )
    write_bare_idle(directory, log, alone_mhz)
    return write_profile(directory, meta, frames["prefill"], frames["decode"], idle, mixed)


def _observed_clock_mhz(log: Journal) -> int:
    """The clock of a run that left it alone; 0 if the run locked its clocks."""
    seen = [t.clock_mhz for (clock, _), trials in log.points.items() if clock == 0 for t in trials]
    return statistics.mode(seen) if seen else 0


def _rows(log: Journal, phase: Phase, alone_mhz: int) -> list[dict[str, Any]]:
    """A row a trial."""
    return [
        {
            "frequency_mhz": clock or alone_mhz,
            **({CHUNK: point.chunk_tokens} if phase == MIXED else {}),
            "batch_size": point.batch_size,
            "tokens": round(statistics.median(trial.tokens for trial in trials)),
            "trial": number,
            "time_s": trial.time_s,
            "power_w": trial.power_w,
            "spread_s": trial.spread_s,
            "flags": ";".join(trial.flags),
        }
        for (clock, point), trials in log.points.items()
        if point.phase == phase
        for number, trial in enumerate(trials)
    ]


def _phase_frame(log: Journal, phase: Phase, alone_mhz: int, facts: EngineFacts) -> pd.DataFrame:
    rows = _rows(log, phase, alone_mhz)
    if len(rows) < MIN_POINTS:
        raise VoltanaError(
            f"a profile needs >= {MIN_POINTS} {phase} points, got {len(rows)} ({log.path}): "
            "raise --budget, add the phase to --phases, or re-run with the same --out to go on"
        )
    frame = pd.DataFrame(rows)
    if phase == "decode" and facts.min_context_tokens > 1:
        frame = pd.concat([frame, _held_rows(frame, facts.min_context_tokens)])
    distinct = frame.groupby(["frequency_mhz", "batch_size"])["tokens"].transform("nunique")
    if (distinct > 1).any():  # a row that the budget cut short shares no range with its neighbours
        frame = frame[distinct > 1]
    frame = frame.sort_values([*POINT, "trial"], ignore_index=True)
    # Two points asked for may have been held at the same tokens: their trials become one point's.
    return frame.assign(trial=frame.groupby(list(POINT)).cumcount())


def _held_rows(frame: pd.DataFrame, min_context_tokens: int) -> pd.DataFrame:
    """The shortest measured context of each batch size, stated for a context of 1 too.

    An engine that serves real prompts cannot be held there; over so few tokens time hardly changes.
    """
    key = ["frequency_mhz", "batch_size"]
    shortest = frame[frame["tokens"] == frame.groupby(key)["tokens"].transform("min")]
    context = shortest["tokens"] / shortest["batch_size"]
    shortest = shortest[(context > 1) & (context <= MAX_HELD * min_context_tokens)]
    held: pd.DataFrame = shortest.assign(tokens=shortest["batch_size"], flags=HELD)
    return held


def _idle_frame(log: Journal, alone_mhz: int, clocks_mhz: Sequence[int]) -> pd.DataFrame:
    """Idle power of a loaded engine, unlocked and at the clocks that have points.

    It is measured at every clock before the first point: a run that ended early has more of it.
    """
    rows = [
        {"frequency_mhz": clock, "trial": trial, "power_w": power_w}
        for (clock, is_loaded), powers_w in log.idle_w.items()
        if is_loaded and clock in (0, *clocks_mhz)
        for trial, power_w in enumerate(powers_w)
    ]
    if alone_mhz:  # the one clock left alone idles as the driver has it
        rows += [row | {"frequency_mhz": alone_mhz} for row in rows if row["frequency_mhz"] == 0]
    return pd.DataFrame(rows).sort_values(["frequency_mhz", "trial"], ignore_index=True)


def write_bare_idle(directory: Path, log: Journal, alone_mhz: int) -> None:
    """Write `idle_bare.csv`: idle power before the model was loaded, columns as in `idle.csv`.

    Nothing is written where the model was there first (attached servers).

    Args:
        directory: Of the profile.
        log: What was measured.
        alone_mhz: Clock of idle power without a model.
    """
    rows = [
        {"frequency_mhz": clock, "trial": trial, "power_w": power_w}
        for (clock, is_loaded), powers_w in sorted(log.idle_w.items())
        if not is_loaded
        for trial, power_w in enumerate(powers_w)
    ]
    if alone_mhz:
        rows += [row | {"frequency_mhz": alone_mhz} for row in rows if row["frequency_mhz"] == 0]
    if rows:
        frame = pd.DataFrame(rows)
        write_csv(frame, directory / BARE_IDLE, float_format="%.6g")


def _gpu_meta(identity: GpuIdentity) -> GpuMeta:
    memory_gib = identity.memory_bytes / 2**30
    return GpuMeta(
        name=identity.name, power_limit_w=identity.power_limit_w, memory_gib=memory_gib or 1.0
    )


def _provenance(
    log: Journal, identities: Sequence[GpuIdentity], facts: EngineFacts, *, has_control: bool
) -> dict[str, Provenance]:
    identity = identities[0]
    notes = ", ".join(f"{key} {value}" for key, value in facts.notes.items())
    engine = f"{facts.engine_name} {facts.engine_version} ({notes})"
    timed = Provenance(
        status="measured",
        source=f"voltana profile on {identity.name}, driver {identity.driver_version}; {engine}",
        uncertainty=f"iteration times spread by {_time_spread(log):.1%} (median half "
        "interquartile range); trials kept in the tables",
    )
    power = {phase: power_provenance(_trials(log, phase), identities, facts) for phase in PHASES}
    clocks = (
        f"locked and read back{_off_text(log)}"
        if has_control
        else "left alone: one clock, the most frequent reading; no clock was ever touched"
    )
    return {
        "prefill_time": timed,
        "decode_time": timed,
        "prefill_power": power["prefill"],
        "decode_power": power["decode"],
        "idle_power": power_provenance([], identities, facts),
        "kv_capacity": Provenance(
            status="modelled", source=f"memory left by the weights, as {facts.engine_name} has it"
        ),
        "clocks": Provenance(
            status="measured" if identity.is_power_measured else "modelled", source=clocks
        ),
    }


def power_provenance(
    trials: Sequence[Trial], identities: Sequence[GpuIdentity], facts: EngineFacts
) -> Provenance:
    """Where the power of a phase comes from: measured, unless a card or a trial forbids it.

    Args:
        trials: All of the phase.
        identities: Of the cards.
        facts: Of engine and model.
    """
    identity = identities[0]
    if not identity.is_power_measured:
        return Provenance(
            status="modelled",
            source=f"a stated constant of {identity.power_limit_w:g} W; not a measurement",
            uncertainty="unknown",
        )
    if not facts.is_on_gpu:
        return Provenance(
            status="modelled",
            source=f"board power of {identity.name} while the engine computed elsewhere: not the "
            "power of this work",
            uncertainty="unknown",
        )
    by = " and ".join(sorted({trial.energy_source for trial in trials}) or ["counter or samples"])
    cards = "the GPU" if len(identities) == 1 else f"all {len(identities)} GPUs"
    source = f"NVML energy by {by}, board power of {cards}"
    unknown = sum(NOT_MEASURED in trial.flags for trial in trials)
    if unknown:
        return Provenance(
            status="modelled",
            source=f"{source}; but in {unknown} of {len(trials)} trials the engine paused too long "
            f"for that: their power is an estimate ({NOT_MEASURED})",
            uncertainty="unknown in those trials",
        )
    return Provenance(
        status="measured",
        source=source,
        uncertainty=f"trials kept in the tables; NVML itself about 5 %{_pauses_text(trials)}",
    )


def _trials(log: Journal, phase: Phase | None = None) -> list[Trial]:
    return [
        trial
        for (_, point), trials in log.points.items()
        if phase in (None, point.phase)
        for trial in trials
    ]


def _pauses_text(trials: Sequence[Trial]) -> str:
    number = sum(GAPS in trial.flags for trial in trials)
    return (
        f"; in {number} of {len(trials)} trials pauses were taken out at the idle power ({GAPS})"
        if number
        else ""
    )


def _off_text(log: Journal) -> str:
    """How many trials stand under a clock that was locked but not held."""
    number = sum(CLOCK_OFF in trial.flags for trial in _trials(log))
    if not number:
        return ""
    return (
        f"; {number} of {len(_trials(log))} trials ran more than {CLOCK_TOLERANCE_MHZ} MHz off it "
        f"under load and stand under the locked clock ({CLOCK_OFF})"
    )


def _time_spread(log: Journal) -> float:
    spreads = [trial.spread_s / trial.time_s for trial in _trials(log)]
    return statistics.median(spreads) if spreads else 0.0
