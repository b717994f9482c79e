"""Where settings are run: on frontier's bench, side by side, every run kept by its key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voltana.experiments.frontier.fixed import Fleet, FleetSearch, Side
from voltana.experiments.frontier.trial import POINTS, Bench, Load, Trial, pooled
from voltana.experiments.recommend.question import Question, Repeats
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_missing
from voltana.experiments.sweep.store import FolderStore
from voltana.sim.config import make_config

LOAD = Load(name="the load", settings={})


@dataclass(slots=True)
class Desk:
    """Runs settings of one question; asked for the same twice, it runs once."""

    question: Question
    directory: Path
    jobs: int | None = None
    executor: str = "processes"
    screened: list[Trial] = field(default_factory=list)
    """What has been tried on the first tuning repeat alone, in any order."""
    _known: dict[str, Trial] = field(default_factory=dict)

    @property
    def bench(self) -> Bench:
        """Of the asked load."""
        return Bench(self.question.base, LOAD, "attainment", self.directory)

    def ahead(self, wanted: Iterable[tuple[Mapping[str, Any], Repeats]]) -> None:
        """Run what the store lacks of these side by side; a failure shows when it is asked for."""
        points = [
            Point(labels={}, config=make_config({**self.question.base, **repeat, **settings}))
            for settings, repeats in wanted
            for repeat in repeats
        ]
        if self.jobs != 1 or self.executor != "processes":
            run_missing(
                points, FolderStore(self.directory / POINTS), jobs=self.jobs, executor=self.executor
            )

    def trial(
        self,
        settings: Mapping[str, Any],
        label: str,
        repeats: Repeats,
        *,
        stop_below: float = 0.0,
    ) -> Trial:
        """One setting on some repeats; one that was run before is known.

        Args:
            settings: Keys of the configuration, over the question's own.
            label: The setting in words.
            repeats: Settings of each, a seed or a piece of the trace.
            stop_below: Attainment, 0 to 1: the first repeat that falls below it is the last.
        """
        key = f"{sorted(settings.items())} {[*repeats]} {stop_below}"
        if key not in self._known:
            trial = self.bench.run(settings, label, repeats, stop_below=stop_below)
            self._known[key] = trial
            if list(repeats) == list(self.question.tuning[:1]) and not trial.error:
                self.screened.append(trial)
        return self._known[key]

    def first(self, settings: Mapping[str, Any], label: str, repeats: Repeats) -> Trial:
        """On the first repeat alone, with the benefit of the doubt: half the target's misses more.

        One repeat is short, and what it does not rule out is tried on all of them.
        """
        trial = self.trial(settings, label, repeats[:1])
        doubt = 0.5 * (1.0 - self.question.target)
        return replace(trial, attainments=tuple(min(a + doubt, 1.0) for a in trial.attainments))

    def whole(self, settings: Mapping[str, Any], label: str, repeats: Repeats) -> Trial:
        """On all repeats, whose requests count together; left at a repeat that decides it alone."""
        misses = len(repeats) * (1.0 - self.question.choice_target)
        trial = self.trial(settings, label, repeats, stop_below=1.0 - misses)
        if trial.error:
            return trial
        return replace(trial, attainments=(pooled(trial.rows, "attainment"),))

    def explore(self, search: FleetSearch) -> None:
        """Both sides of a search of fixed clocks, in a process each; the runs are kept."""
        if self.jobs == 1:
            return
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(search.explore, (0, 1)))


def fleet_at(counts: tuple[int, int], clock_mhz: int) -> Fleet:
    """Prefill and decode instances, all at one clock."""
    return Side(counts[0], clock_mhz), Side(counts[1], clock_mhz)


def fixed_clock_mhz(settings: Mapping[str, Any], phase: str) -> int | None:
    """The clock that `fleet_settings` gave a phase; None if a policy chooses it."""
    name, _, clock = str(settings.get(f"{phase}_controller", "")).partition(":f=")
    return int(clock) if name == "static" else None


def fleet_settings(fleet: Fleet, router: str) -> dict[str, Any]:
    """Configuration keys of fixed clocks on as many instances as are named, and no more."""
    prefill, decode = fleet
    return {
        "num_prefill": prefill.active,
        "num_decode": decode.active,
        "prefill_controller": f"static:f={prefill.clock_mhz}",
        "decode_controller": f"static:f={decode.clock_mhz}",
        "router": router,
    }
