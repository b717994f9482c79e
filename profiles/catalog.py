"""A profile: the tables of one GPU, model and engine, loaded and checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.profiles import ecopred
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.common.files import write_text
from voltana.profiles.optional.mixed import MIXED, MixedGrid, MixedStep
from voltana.profiles.optional.spread import IterationSpread, row_spreads
from voltana.profiles.places import DATA as DATA
from voltana.profiles.places import profile_directory
from voltana.profiles.schema import ProfileMeta, meta_toml, read_meta
from voltana.profiles.states import STATES_FILE, PowerStates, read_states
from voltana.profiles.step_model import StepModel
from voltana.profiles.tables import (
    AWAKE,
    grid_of,
    idle_power_of,
    raised,
    read_idle_table,
    read_phase_table,
)

FILES = ("profile.toml", "prefill.csv", "decode.csv", "idle.csv", "ecopred.csv")

ArrayLike = npt.ArrayLike
FloatOrArray = float | npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """Tables, metadata and the fitted predictor of one profile directory.

    Compared and hashed by identity: two loads are two profiles, `content_hash` tells if equal.
    """

    name: str
    meta: ProfileMeta
    prefill: pd.DataFrame
    decode: pd.DataFrame
    idle: pd.DataFrame
    fitted: pd.DataFrame
    content_hash: str
    """SHA-256 over the files, in hex."""
    directory: Path | None = None
    """Where it was read from."""
    believed: Profile | None = None
    """Of a drawn profile the nominal one, whose power policies go by; None: this one."""
    states: PowerStates | None = None
    """What an instance out of service draws; None if nobody has stated it."""
    mixed: pd.DataFrame | None = None
    """Measured iterations of a chunk of prompts beside decoding; None if nobody has."""

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported clocks, ascending."""
        return self.meta.clocks.supported_mhz

    def truth(self, *, extrapolate: bool = False) -> StepModel:
        """The tables as a function of a point: what happens in simulation."""
        return _step_model(self, extrapolate)

    def mixed_step(
        self, *, extrapolate: bool = False, overlap_frac: float | None = None
    ) -> MixedStep:
        """Iterations that compute prompts beside decoding: what happens in simulation.

        Args:
            extrapolate: As of `truth`, for both parts.
            overlap_frac: Of the shorter part, in place of what was measured; None takes that, and
                the plain sum where nothing was.
        """
        grid = None if overlap_frac is not None else _mixed_grid(self)
        model = self.truth(extrapolate=extrapolate)
        return MixedStep(model, grid=grid, overlap_frac=overlap_frac or 0.0)

    def spread(self) -> IterationSpread:
        """How much iteration times vary around the tables."""
        stated = self.meta.spread
        measured = {"prefill": row_spreads(self.prefill), "decode": row_spreads(self.decode)}
        return IterationSpread(
            {"prefill": stated.prefill, "decode": stated.decode} if stated else {},
            {phase: rows for phase, rows in measured.items() if rows is not None},
            self.clocks_mhz[-1],
        )

    def predictor(self) -> ecopred.EcoPred:
        """The fitted predictor: what policies believe."""
        return ecopred.EcoPred(self.fitted, self.clocks_mhz[-1])

    def iteration_time_s(
        self,
        phase: str,
        clock_mhz: ArrayLike,
        batch_size: ArrayLike,
        tokens: ArrayLike,
        *,
        extrapolate: bool = False,
    ) -> FloatOrArray:
        """Duration of an iteration in seconds; arguments broadcast, scalars give a float.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: Clock within the profiled range; 0 is unlocked (the top clock).
            batch_size: Requests of the batch (prefill: of equal length).
            tokens: New tokens (prefill) or context tokens (decode) of the whole batch.
            extrapolate: Allow points outside the profiled grid.

        Raises:
            VoltanaError: A point lies outside the grid and `extrapolate` is false.
        """
        model = self.truth(extrapolate=extrapolate)
        return _broadcast(lambda f, b, t: model.predict_s(phase, int(f), b, t),
                          clock_mhz, batch_size, tokens)  # fmt: skip

    def power_w(
        self,
        phase: str,
        clock_mhz: ArrayLike,
        batch_size: ArrayLike,
        tokens: ArrayLike,
        *,
        extrapolate: bool = False,
    ) -> FloatOrArray:
        """Power of the instance (all its GPUs) in watts.

        Args:
            phase: As of `iteration_time_s`, and so are the others.
            clock_mhz: Clock; 0 is unlocked.
            batch_size: Requests.
            tokens: Of the whole batch.
            extrapolate: Allow points outside the profiled grid.
        """
        model = self.truth(extrapolate=extrapolate)
        return _broadcast(lambda f, b, t: model.power_w(phase, int(f), b, t),
                          clock_mhz, batch_size, tokens)  # fmt: skip

    def idle_power_w(self, clock_mhz: ArrayLike) -> FloatOrArray:
        """Power between two iterations in watts at a locked clock, or unlocked (0)."""
        model = self.truth()
        return _broadcast(lambda f: model.idle_power_w(int(f)), clock_mhz)


@lru_cache(maxsize=16)
def _step_model(profile: Profile, extrapolate: bool) -> StepModel:
    """Built once: its rows are costly to make and never change."""
    prefill, decode = grid_of(profile.prefill), grid_of(profile.decode)
    rest_w = idle_power_of(profile.idle)
    limit_w = profile.meta.gpu.power_limit_w * profile.meta.model.tensor_parallel
    if AWAKE not in profile.idle:
        return StepModel(
            prefill, decode, rest_w, profile.clocks_mhz,
            extrapolate=extrapolate, power_limit_w=limit_w,
        )  # fmt: skip
    awake_w = idle_power_of(profile.idle, AWAKE)
    return StepModel(
        raised(prefill, awake_w),
        raised(decode, awake_w),
        {clock: power_w + awake_w[clock] for clock, power_w in rest_w.items()},
        profile.clocks_mhz,
        rest_w=rest_w,
        extrapolate=extrapolate,
        power_limit_w=limit_w + max(awake_w.values()),
    )


@lru_cache(maxsize=16)
def _mixed_grid(profile: Profile) -> MixedGrid | None:
    """Of a drawn profile the nominal one's: a draw moves the parts, not what they share."""
    profile = profile.believed or profile
    table = profile.mixed
    if table is None:
        return None
    if AWAKE in profile.idle:
        awake_w = idle_power_of(profile.idle, AWAKE)
        known = [clock for clock in awake_w if clock > 0]
        above_w = np.interp(table["frequency_mhz"], known, [awake_w[clock] for clock in known])
        table = table.assign(power_w=table["power_w"] + above_w)
    return MixedGrid.of_table(table, profile.truth(extrapolate=True))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a shipped profile by name, or any profile directory by path.

    Raises:
        VoltanaError: No such profile (the nearest name is suggested), or a file breaks a rule.
    """
    directory = profile_directory(name_or_path)
    if not directory.is_dir():
        raise VoltanaError(
            f"unknown profile {str(name_or_path)!r}{nearest(str(name_or_path), list_profiles())}"
        )
    meta = read_meta(directory / "profile.toml")
    clocks = meta.clocks.supported_mhz
    prefill = read_phase_table(directory / "prefill.csv", clocks)
    decode = read_phase_table(directory / "decode.csv", clocks)
    idle = read_idle_table(directory / "idle.csv", clocks)
    _require_idle_range(idle, clocks, directory)
    if AWAKE in idle and "awake_power" not in meta.provenance:
        raise VoltanaError(
            f"provenance must be stated for awake_power, as {directory / 'idle.csv'} has {AWAKE}"
        )
    mixed = _read_mixed(directory, meta)
    fitted, _ = ecopred.read_ecopred(directory / "ecopred.csv", clocks)
    name = str(name_or_path) if directory == DATA / name_or_path else directory.name
    return Profile(name=name, meta=meta, prefill=prefill, decode=decode, idle=idle, fitted=fitted,
                   content_hash=_hash(directory), directory=directory,
                   states=read_states(directory / STATES_FILE), mixed=mixed)  # fmt: skip


def list_profiles() -> list[str]:
    """Names of the shipped profiles."""
    found = DATA.glob("*/*/profile.toml")
    return sorted(path.parent.relative_to(DATA).as_posix() for path in found)


def write_profile(
    directory: Path,
    meta: ProfileMeta,
    prefill: pd.DataFrame,
    decode: pd.DataFrame,
    idle: pd.DataFrame,
    mixed: pd.DataFrame | None = None,
) -> Profile:
    """Fit EcoPred, write a complete profile directory and load it back.

    The same tables give the same bytes.

    Args:
        directory: Where to; made if it is not there.
        meta: What `profile.toml` says.
        prefill: Rows of prefill.csv.
        decode: Rows of decode.csv.
        idle: Rows of idle.csv.
        mixed: Rows of mixed.csv; None: an older one is removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fitted = ecopred.fit(prefill, decode)
    frames = {"prefill": prefill, "decode": decode, "idle": idle, "ecopred": fitted}
    if mixed is None:
        (directory / MIXED).unlink(missing_ok=True)
    else:
        frames["mixed"] = mixed
    texts = {
        f"{name}.csv": f.to_csv(index=False, float_format="%.6g") for name, f in frames.items()
    }
    texts["profile.toml"] = meta_toml(meta)
    for name, text in texts.items():
        write_text(text, directory / name)
    return load_profile(directory)


def _read_mixed(directory: Path, meta: ProfileMeta) -> pd.DataFrame | None:
    if not (directory / MIXED).is_file():
        return None
    missing = [q for q in ("mixed_time", "mixed_power") if q not in meta.provenance]
    if missing:
        raise VoltanaError(
            f"provenance must be stated for {' and '.join(missing)}: {directory} has {MIXED}"
        )
    return read_phase_table(directory / MIXED, meta.clocks.supported_mhz, chunks=True)


def _require_idle_range(idle: pd.DataFrame, clocks: tuple[int, ...], directory: Path) -> None:
    known = idle.loc[idle["frequency_mhz"] > 0, "frequency_mhz"]
    if known.empty or known.min() > clocks[0] or known.max() < clocks[-1]:
        raise VoltanaError(
            f"{directory / 'idle.csv'}: needs rows at {clocks[0]} and {clocks[-1]} MHz, "
            "the lowest and the highest supported clock"
        )


def _hash(directory: Path) -> str:
    digest = hashlib.sha256()
    optional = [name for name in (STATES_FILE, MIXED) if (directory / name).is_file()]
    for name in (*FILES, *optional):
        digest.update(name.encode() + b"\0" + (directory / name).read_bytes() + b"\0")
    return digest.hexdigest()


def _broadcast(function: object, *arguments: ArrayLike) -> FloatOrArray:
    applied = np.frompyfunc(function, len(arguments), 1)(*arguments)  # type: ignore[call-overload]
    return (
        np.asarray(applied, dtype=np.float64) if isinstance(applied, np.ndarray) else float(applied)
    )
