"""A workload: when requests arrive and how long they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_csv, write_parquet
from voltana.sim.workload.prompts import ANSWER, PREVIOUS, SEGMENTS, THINK_S, Prompts, Turns

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Requests in order of arrival; all arrays of shape (n,), checked when made."""

    arrival_s: FloatArray
    """Not negative, never falling; time 0 is the start of the run."""
    input_tokens: IntArray
    output_tokens: IntArray
    name: str = "workload"
    prompts: Prompts | None = None
    """What prompts share; None where nobody says."""
    turns: Turns | None = None
    """Who waits for whose answer; None: nobody does, and all arrive when `arrival_s` says."""

    def __post_init__(self) -> None:
        shapes = {len(self.arrival_s), len(self.input_tokens), len(self.output_tokens)}
        if len(shapes) != 1:
            raise VoltanaError(f"arrays of {self.name} must have one length, got {sorted(shapes)}")
        _require(self, "arrival_s", np.isfinite(self.arrival_s), "must be finite")
        _require(self, "arrival_s", self.arrival_s >= 0, "must be >= 0")
        rising = np.diff(self.arrival_s, prepend=0.0) >= 0
        _require(self, "arrival_s", rising, "must not fall from one request to the next")
        _require(self, "input_tokens", self.input_tokens >= 1, "must be >= 1")
        _require(self, "output_tokens", self.output_tokens >= 1, "must be >= 1")
        if self.prompts is not None:
            self.prompts.check(self.input_tokens, self.output_tokens, self.name)
        if self.turns is not None:
            self.turns.check(len(self), self.name)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Time of the last arrival; 0 when empty."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def content_hash(self) -> str:
        """SHA-256 over all arrays, in hex; the name does not count."""
        arrays = [self.arrival_s, self.input_tokens, self.output_tokens]
        if self.prompts is not None:
            arrays += [self.prompts.names, self.prompts.tokens, self.prompts.starts]
            if self.prompts.answers is not None:
                arrays.append(self.prompts.answers)
        if self.turns is not None:
            arrays += [self.turns.previous, self.turns.think_s]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def scaled(self, factor: float) -> Workload:
        """Play `factor` times as fast: arrival and think times are divided by it, lengths stay."""
        if not (factor > 0 and np.isfinite(factor)):
            raise VoltanaError(f"time scale must be > 0 and finite, got {factor}")
        turns = self.turns and replace(self.turns, think_s=self.turns.think_s / factor)
        name = f"{self.name}, {factor:g} times as fast"
        return replace(self, arrival_s=self.arrival_s / factor, turns=turns, name=name)

    def sliced(self, start_s: float, end_s: float) -> Workload:
        """Requests that arrive in [start_s, end_s), with start_s as the new time 0."""
        if not end_s > start_s >= 0:
            raise VoltanaError(f"a slice needs 0 <= start < end, got {start_s} and {end_s}")
        inside = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        rows = np.flatnonzero(inside)
        return Workload(
            arrival_s=self.arrival_s[rows] - start_s,
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            name=self.name,
            prompts=self.prompts and self.prompts.taken(rows),
            turns=self.turns and self.turns.taken(rows),
        )

    def superposed(self, *others: Workload) -> Workload:
        """All requests of all workloads on one time axis; equal times keep the argument order.

        Raises:
            VoltanaError: One has prompts or turns: their names and rows would mean two things.
        """
        parts = (self, *others)
        if any(p.prompts is not None or p.turns is not None for p in parts):
            raise VoltanaError("workloads with prompts or turns cannot be laid over one another")
        order = np.argsort(np.concatenate([p.arrival_s for p in parts]), kind="stable")
        return Workload(
            arrival_s=np.concatenate([p.arrival_s for p in parts])[order],
            input_tokens=np.concatenate([p.input_tokens for p in parts])[order],
            output_tokens=np.concatenate([p.output_tokens for p in parts])[order],
            name=" + ".join(p.name for p in parts),
        )

    def write(self, path: Path) -> None:
        """Write as plain CSV (gzip if the name ends in .gz) or parquet, to be read as a trace.

        What prompts share and who waits for whom are columns of their own, where there are any.
        """
        frame = pd.DataFrame(
            {
                "arrival_s": self.arrival_s,
                "input_tokens": self.input_tokens,
                "output_tokens": self.output_tokens,
            }
        )
        if self.prompts is not None:
            frame[SEGMENTS] = self.prompts.texts()
            if self.prompts.answers is not None:
                frame[ANSWER] = self.prompts.answers
        if self.turns is not None:
            frame[PREVIOUS], frame[THINK_S] = self.turns.previous, self.turns.think_s
        if path.suffix == ".parquet":
            write_parquet(frame, path)
        elif path.suffix == ".gz":
            write_csv(frame, path, compression={"method": "gzip", "mtime": 0})
        else:
            write_csv(frame, path)


def _require(workload: Workload, column: str, holds: npt.NDArray[np.bool_], rule: str) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        value = getattr(workload, column)[row]
        raise VoltanaError(f"{column} {rule}, got {value} (request {row} of {workload.name})")
