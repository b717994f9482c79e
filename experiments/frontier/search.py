"""Energy at equal attainment, over the whole grid of controllers and routers.

What is compared is chosen on the tuning repeats and judged on others. The rule of choice is one for
all: the least mean energy among what, on each tuning repeat, misses no more than half of what the
target allows; where nothing does, what misses least on its worst repeat. Where no static fleet
could be chosen by that rule, or the chosen one falls below the target when it is judged, the best
one of the judging repeats stands beside it, chosen in hindsight. A policy's knob is searched by
`voltana.experiments.frontier.knob`, fixed clocks by the searches of
`voltana.experiments.frontier.static`, and that under every router that takes part, so that a
controller can be held against the best static fleet under its own router. Every policy is judged at
its default knob as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from voltana.experiments.frontier.contenders import Contender
from voltana.experiments.frontier.knob import search_knob
from voltana.experiments.frontier.static.fleets import F, Kinds, StaticFleets, static_fleets
from voltana.experiments.frontier.trial import ATTAINMENTS, Bench, Load, Trial, pooled
from voltana.experiments.progress import progress_bar
from voltana.experiments.sweep.executors import make_pool
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config

STATIC_MAX: Final = "static-max"
STATIC_CLOCK: Final = "static clock"
"""One for both phases, where they are apart."""
STATIC_PAIR: Final = "static pair"
STATIC_FLEET: Final = "static fleet"
DEFAULT: Final = "default"
"""Knob of a policy that is left as it is."""
HINDSIGHT: Final = "hindsight"
"""In the knob of a static fleet that was chosen on the very repeats that judge it."""
REFERENCES: Final = (STATIC_MAX, STATIC_CLOCK, STATIC_PAIR, STATIC_FLEET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is to be compared, on what, at which attainment."""

    base: Mapping[str, Any]
    loads: Sequence[Load]
    contenders: Sequence[Contender]
    tuning: Sequence[Mapping[str, Any]]
    """Configuration keys of each repeat on which is chosen: a seed, or a part of a trace."""
    judging: Sequence[Mapping[str, Any]]
    """Of each repeat whose numbers are reported."""
    kinds: Kinds
    """Cards of both phases, with the clocks that static fleets may use."""
    routers: tuple[str, ...]
    """Routers under which static pairs are searched."""
    static_caps: tuple[int, ...] = ()
    """Limits of the decode batch that static pairs are searched with, besides the base's own."""
    one_clock: bool = False
    """Whether static fleets whose phases are apart are searched with one clock for both, too."""
    target: float = 0.99
    attainment: str = "attainment"

    @property
    def choice_target(self) -> float:
        """What a choice has to attain on each tuning repeat: half the misses of the target.

        Of the settings that just reach the target on a few repeats half will miss it on others.
        """
        return 1.0 - 0.5 * (1.0 - self.target)

    def __post_init__(self) -> None:
        if self.attainment not in ATTAINMENTS:
            raise VoltanaError(
                f"attainment must be one of {', '.join(ATTAINMENTS)}, got {self.attainment!r}"
            )
        if not 0.0 < self.target <= 1.0:
            raise VoltanaError(f"target must be in (0, 1], got {self.target}")
        if not (self.loads and self.contenders and self.tuning and self.judging):
            raise VoltanaError("a frontier needs a load, a policy and a repeat at least")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One line of the result: what was chosen for a controller and router, and how it did."""

    load: str
    router: str
    controller: str
    knob: str
    """What was chosen, for the reader; `default` if nothing was."""
    tuned: Trial | None
    """On the tuning repeats; None at the default, which needs no tuning."""
    judged: Trial
    """On the judging repeats."""

    def is_reached(self, target: float) -> bool:
        """Whether the choice kept the target on each tuning repeat; always so of a default."""
        return self.tuned is None or self.tuned.keeps(target)

    @property
    def name(self) -> str:
        """For tables and figures."""
        is_default = self.knob == DEFAULT and self.controller not in REFERENCES
        return f"{self.controller} + {self.router}{' (default)' if is_default else ''}"


class _Desk:
    """A bench with a memory: asked for the same trial twice, it runs once."""

    def __init__(self, study: Study, load: Load, directory: Path) -> None:
        self.study = study
        self.load = load
        self.bench = Bench(study.base, load, study.attainment, directory)
        self._known: dict[tuple[str, bool], Trial] = {}

    def attempt(self, settings: Mapping[str, Any], label: str, *, on_all: bool) -> Trial:
        """One setting on the tuning repeats; one that was tried is known.

        Args:
            settings: Keys of the configuration, over the load's own.
            label: The setting in words; the same label is the same setting.
            on_all: On every tuning repeat, up to the first that misses; else on the first alone.
        """
        key = (label, on_all)
        if key not in self._known:
            repeats = self.study.tuning if on_all else self.study.tuning[:1]
            below = self.study.choice_target if on_all else 0.0
            self._known[key] = self.bench.run(settings, label, repeats, stop_below=below)
        return self._known[key]

    def whole(self, trial: Trial) -> Trial:
        """The trial on every tuning repeat: a search leaves one that misses at its first miss."""
        if trial.error or len(trial.attainments) == len(self.study.tuning):
            return trial
        return self.bench.run(trial.settings, trial.label, self.study.tuning)

    def attempt_judging(self, settings: Mapping[str, Any], label: str, *, on_all: bool) -> Trial:
        """As `attempt`, on the judging repeats, whose attainment counts together."""
        repeats = self.study.judging if on_all else self.study.judging[:1]
        # one repeat that misses more than all of them together may
        hopeless = 1.0 - len(repeats) * (1.0 - self.study.target)
        trial = self.bench.run(settings, label, repeats, stop_below=hopeless)
        if len(trial.attainments) == len(repeats):
            trial.attainments = (pooled(trial.rows, self.study.attainment),)
        return trial

    def judge(self, settings: Mapping[str, Any], label: str) -> Trial:
        return self.bench.run(settings, label, self.study.judging)


Task = tuple[Study, Load, "str | Contender", Path]
"""A router, whose static fleets are to be searched, or a contender."""


def search_frontier(
    study: Study, directory: Path, *, jobs: int | None = None
) -> Iterator[tuple[Load, list[Found]]]:
    """Search and judge every load; each is yielded when all of it is done.

    Args:
        study: What to compare.
        directory: Of the runs, each kept by the key of its configuration: an interrupted search
            goes on where it stopped.
        jobs: Processes; all cores by default.

    Raises:
        VoltanaError: Of a load not one run succeeded, or a process died.
    """
    tasks: list[Task] = [
        (study, load, who, directory) for load in study.loads for who in _parties(study)
    ]
    left = {load.name: len(study.routers) + len(study.contenders) for load in study.loads}
    results: dict[int, list[Found]] = {}
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    with (
        progress_bar("searching", len(tasks), kept=directory) as bar,
        make_pool(workers) as pool,
    ):
        futures = {pool.submit(run_task, task): i for i, task in enumerate(tasks)}
        for future in as_completed(futures):
            index = futures[future]
            load = tasks[index][1]
            results[index] = future.result()
            bar.advance()
            left[load.name] -= 1
            if left[load.name] == 0:
                found = [
                    f for i, t in enumerate(tasks) if t[1].name == load.name for f in results[i]
                ]
                _require_runs(found)
                yield load, found


def _parties(study: Study) -> list[str | Contender]:
    return [*study.routers, *study.contenders]


def run_task(task: Task) -> list[Found]:
    """Search and judge one contender, or the static fleets under one router."""
    study, load, who, directory = task
    desk = _Desk(study, load, directory)
    return _fixed(desk, who) if isinstance(who, str) else _contender(desk, who)


def _fixed(desk: _Desk, router: str) -> list[Found]:
    """The top clocks, the best pair with all instances and the best with any number."""
    study, target = desk.study, desk.study.choice_target
    config = make_config({**study.base, **desk.load.settings})
    fleets = static_fleets(config, router, study.kinds)
    attempt = partial(_attempt, desk.attempt, fleets)
    highest = desk.whole(attempt(None, fleets.top, True))
    pair, fleet = (desk.whole(t) for t in _search_fleets(study, fleets, attempt, target))
    chosen = [(STATIC_MAX, highest), (STATIC_PAIR, pair), (STATIC_FLEET, fleet)]
    if study.one_clock and not config.num_colocated:
        single = static_fleets(config, router, study.kinds, has_one_clock=True)
        of_one = partial(_attempt, desk.attempt, single)
        clock = _search_fleets(study, single, of_one, target)[1]
        chosen.insert(1, (STATIC_CLOCK, desk.whole(clock)))
    found = []
    for name, tuned in chosen:
        judged = desk.judge(tuned.settings, tuned.label)
        found.append(
            Found(load=desk.load.name, router=router, controller=name, knob=tuned.label,
                  tuned=tuned, judged=judged)
        )  # fmt: skip
    kept = pooled(found[-1].judged.rows, study.attainment) >= study.target
    if not (kept and fleet.keeps(target)):
        on_judging = partial(_attempt, desk.attempt_judging, fleets)
        _, known = _search_fleets(study, fleets, on_judging, study.target)
        judged = desk.judge(known.settings, known.label)
        is_better = not kept or judged.energy_j < found[-1].judged.energy_j
        if is_better and pooled(judged.rows, study.attainment) >= study.target:
            found.append(
                Found(load=desk.load.name, router=router, controller=STATIC_FLEET,
                      knob=f"{known.label}, {HINDSIGHT}", tuned=None, judged=judged)
            )  # fmt: skip
    return found


def _attempt(
    bench: Callable[..., Trial],
    fleets: StaticFleets[F],
    cap: int | None,
    fleet: F,
    on_all: bool,
) -> Trial:
    return bench(fleets.settings(fleet, cap), fleets.label(fleet, cap), on_all=on_all)


def _search_fleets(
    study: Study,
    fleets: StaticFleets[Any],
    attempt: Callable[[int | None, Any, bool], Trial],
    target: float,
) -> tuple[Trial, Trial]:
    """The best static pair, of all instances and without a cap, and the best static fleet of all.

    A fleet is of any number of instances, and all of them may have a cap.
    """
    pairs = [
        fleets.find(partial(attempt, cap), target, any_number=False)
        for cap in (None, *study.static_caps)
    ]
    any_number = fleets.find(partial(attempt, None), target, any_number=True)
    return pairs[0], _best([any_number, *pairs], target)


def _best(tried: Sequence[Trial], target: float) -> Trial:
    """The least energy that keeps the target; the nearest miss if nothing does."""
    kept = [t for t in tried if t.keeps(target)]
    if kept:
        return min(kept, key=lambda t: t.energy_j)
    return max(tried, key=lambda t: t.rank)


def _contender(desk: _Desk, contender: Contender) -> list[Found]:
    load, router, controller = desk.load.name, contender.router, contender.controller
    plain = desk.judge(contender.plain, DEFAULT)
    found = [
        Found(
            load=load, router=router, controller=controller, knob=DEFAULT, tuned=None, judged=plain
        )
    ]
    if not contender.knob:
        return found

    def attempt(position: float, on_all: bool) -> Trial:
        label = f"{contender.knob} {contender.value_text(position)}"
        return desk.attempt(contender.at(position), label, on_all=on_all)

    tuned = desk.whole(search_knob(attempt, desk.study.choice_target))
    is_at_end = tuned.label in {attempt(end, False).label for end in (0.0, 1.0)}
    label = f"{tuned.label} (end)" if is_at_end else tuned.label
    judged = desk.judge(tuned.settings, label)
    return [
        *found,
        Found(
            load=load, router=router, controller=controller, knob=label, tuned=tuned, judged=judged
        ),
    ]


def _require_runs(found: Sequence[Found]) -> None:
    if all(f.judged.rows.empty for f in found):
        raise VoltanaError(f"load {found[0].load!r}: not one run ended: {found[0].judged.error}")
