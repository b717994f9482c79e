"""The journal of a profiling run: every finished point, appended at once; a re-run resumes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.engines.base import Point
from voltana.profiles.measure.trial import Trial

MAX_TRIES: Final = 3
Key = tuple[int, Point]
"""Clock in MHz, point."""


@dataclass(slots=True)
class Journal:
    """One JSON object a line, one of them the run's description."""

    path: Path
    run: dict[str, Any] | None = None
    points: dict[Key, list[Trial]] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)
    idle_w: dict[tuple[int, bool], list[float]] = field(default_factory=dict)
    """(clock in MHz, 0 unlocked; model loaded?) -> power of each trial."""
    _num_failed: dict[Key, int] = field(default_factory=dict)
    """In earlier runs."""
    dropped: list[str] = field(default_factory=list)
    """Reasons for which this run gave up trials and clocks."""

    @staticmethod
    def open(path: Path) -> Journal:
        """Open or resume; `describe` the run before anything but idle power is added.

        Raises:
            VoltanaError: The file is damaged before its last line.
        """
        journal = Journal(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            journal._read()
        return journal

    def describe(self, run: Mapping[str, Any]) -> None:
        """State what the run measures (GPU, engine, model, protocol).

        Raises:
            VoltanaError: The file belongs to another run.
        """
        plain = json.loads(json.dumps(run))
        if self.run is None:
            self.run = plain
            self._append({"kind": "run", **plain})
            return
        self._refuse_changes(plain, self.run.keys() | plain.keys())

    def check(self, part: Mapping[str, Any]) -> None:
        """Refuse already by what is known before the engine runs; nothing is recorded.

        Raises:
            VoltanaError: The file belongs to another run.
        """
        if self.run is not None:
            self._refuse_changes(json.loads(json.dumps(part)), part.keys())

    def _refuse_changes(self, plain: Mapping[str, Any], keys: Iterable[str]) -> None:
        before = self.run or {}
        changed = sorted(key for key in keys if before.get(key) != plain.get(key))
        if changed:
            raise VoltanaError(
                f"a resumed run must repeat its settings, got another {', '.join(changed)} "
                f"({self.path}): use the same, or a new --out"
            )

    def add_point(self, clock_mhz: int, point: Point, trials: list[Trial]) -> None:
        """Record a finished point.

        Args:
            clock_mhz: Lock in force; 0 for none.
            point: What was held.
            trials: What was measured, one a trial.
        """
        self.points[clock_mhz, point] = trials
        rows = [dataclasses.asdict(trial) for trial in trials]
        self._append({"kind": "point", **_key_json(clock_mhz, point), "trials": rows})

    def add_failure(
        self, clock_mhz: int, point: Point, reason: str, *, is_final: bool = True
    ) -> None:
        """Record a point that failed; this run does not try it again.

        Unless it is final, a later one does, until it has failed `MAX_TRIES` times: a point that
        kills the engine every time must not keep all runs from what comes after it.

        Args:
            clock_mhz: Lock in force; 0 for none.
            point: What was held.
            reason: In one line.
            is_final: Whether it is not to be tried again.
        """
        self.failures[clock_mhz, point] = reason
        entry = {**_key_json(clock_mhz, point), "reason": reason, "is_final": is_final}
        self._append({"kind": "failure", **entry})

    def add_dropped(self, clock_mhz: int, reason: str, point: Point | None = None) -> None:
        """Record a trial of a point, or a whole clock, that was given up; it may be tried again.

        Args:
            clock_mhz: That was left out.
            reason: In one line.
            point: Where; None for the whole clock.
        """
        where = {"clock_mhz": clock_mhz} if point is None else _key_json(clock_mhz, point)
        self.dropped.append(reason)
        self._append({"kind": "dropped", **where, "reason": reason})

    def add_idle(self, clock_mhz: int, *, is_loaded: bool, power_w: list[float]) -> None:
        """Record idle power.

        Args:
            clock_mhz: Lock in force; 0 for none.
            is_loaded: Whether the model was in memory.
            power_w: Of all cards, in W.
        """
        self.idle_w[clock_mhz, is_loaded] = power_w
        entry = {"clock_mhz": clock_mhz, "is_loaded": is_loaded, "power_w": power_w}
        self._append({"kind": "idle", **entry})

    def is_done(self, clock_mhz: int, point: Point) -> bool:
        """Whether the point is measured or known to fail."""
        return (clock_mhz, point) in self.points or (clock_mhz, point) in self.failures

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # the last line was being written when the run died
            write_text(complete, self.path)
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                raise VoltanaError(
                    f"every line must be JSON, got {line[:40]!r} ({self.path}:{number}): "
                    "remove that line, or start with a new --out"
                ) from None
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        kind = entry.pop("kind")
        if kind == "run":
            self.run = entry
        elif kind == "idle":
            self.idle_w[entry["clock_mhz"], entry["is_loaded"]] = entry["power_w"]
        elif kind == "failure":
            key = _key(entry)
            self._num_failed[key] = self._num_failed.get(key, 0) + 1
            if entry["is_final"] or self._num_failed[key] >= MAX_TRIES:
                self.failures[key] = entry["reason"]
        elif kind == "point":
            rows = [Trial(**row | {"flags": tuple(row["flags"])}) for row in entry["trials"]]
            self.points[_key(entry)] = rows


def _key_json(clock_mhz: int, point: Point) -> dict[str, Any]:
    return {"clock_mhz": clock_mhz, **dataclasses.asdict(point)}


def _key(entry: Mapping[str, Any]) -> Key:
    names = [item.name for item in dataclasses.fields(Point) if item.name in entry]
    return entry["clock_mhz"], Point(**{name: entry[name] for name in names})
