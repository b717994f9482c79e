"""Where settings are run: on frontier's bench, side by side, every run kept by its key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from voltana.experiments.frontier.static.like import Fleet, FleetSearch, Side, counts_name
from voltana.experiments.frontier.trial import POINTS, Bench, Load, Trial, pooled
from voltana.experiments.recommend.question import Question, Repeats
from voltana.experiments.sweep.executors import make_pool
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_missing
from voltana.experiments.sweep.store import FolderStore
from voltana.sim.config import make_config

LOAD = Load(name="the load", settings={})
PHASES: Final = ("prefill", "decode")
_LOCK: Final = "static:f="
_CAP: Final = "powercap:cap="


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
        """Both sides of a search of fixed clocks, in a process each; the runs are kept.

        Not beside a connection to a cluster, which does not bear a fork.
        """
        if self.jobs == 1 or self.executor != "processes":
            return
        with make_pool(2) as pool:
            list(pool.map(search.explore, (0, 1)))


def fleet_at(counts: tuple[int, int], clock_mhz: int) -> Fleet:
    """Prefill and decode instances, all at one clock."""
    return Side(counts[0], clock_mhz), Side(counts[1], clock_mhz)


def fixed_clock_mhz(settings: Mapping[str, Any], phase: str) -> int | None:
    """The clock that a fleet of `Means` was locked at in a phase; None if it is not locked."""
    return _set_once(settings, phase, _LOCK)


def fixed_cap_w(settings: Mapping[str, Any], phase: str) -> int | None:
    """The power cap of an instance that `Means` gave a phase; None if it has none."""
    return _set_once(settings, phase, _CAP)


def _set_once(settings: Mapping[str, Any], phase: str, by: str) -> int | None:
    text = str(settings.get(f"{phase}_controller", ""))
    return int(text[len(by) :].partition(",")[0]) if text.startswith(by) else None


@dataclass(frozen=True, slots=True)
class Means:
    """How a fleet that is set once is held: by locked clocks or by power caps, and its router.

    A cap leaves the clock to the card, which slows down only what would draw more: a light batch
    runs at the top clock, a heavy one at the fastest that fits. It is played as `powercap` whose
    cap nothing releases. A fleet in caps is named by clocks, too: its cap is what the tables draw
    at most there, so that no batch runs slower than under that lock.
    """

    router: str
    is_cap: bool = False

    def settings(self, question: Question, fleet: Fleet) -> dict[str, Any]:
        """Configuration keys, of as many instances as are named and no more."""
        found: dict[str, Any] = {"router": self.router}
        for phase, side in zip(PHASES, fleet, strict=True):
            found[f"num_{phase}"] = side.active
            found[f"{phase}_controller"] = (
                f"{_CAP}{question.cap_w(phase, side.clock_mhz)},release=0"
                if self.is_cap
                else f"{_LOCK}{side.clock_mhz}"
            )
        return found

    def label(self, question: Question, fleet: Fleet) -> str:
        """Such as `2P1D at 1005/1200 MHz` or, of caps, `2P1D within 310/280 W`."""
        prefill, decode = fleet
        counts = counts_name(prefill.active, decode.active)
        if not self.is_cap:
            return f"{counts} at {prefill.clock_mhz}/{decode.clock_mhz} MHz"
        caps = (question.cap_w(p, s.clock_mhz) for p, s in zip(PHASES, fleet, strict=True))
        return f"{counts} within {'/'.join(map(str, caps))} W"
