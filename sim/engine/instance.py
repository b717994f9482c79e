"""What prefill and decode instances have in common: the loop of runs and idleness."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from voltana.sim.config import SimConfig
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState
from voltana.sim.records import InstanceRecord, IterationTable

IterationRow = tuple[str, int, float, float, int, int, int, float]
"""phase, instance_id, start_s, duration_s, batch_size, tokens, clock_mhz, energy_j"""


class Instance(ABC):
    """One engine server: it runs iterations while it has work.

    Iterations follow one another without a gap. Requests join and leave at their boundaries. The
    controller is asked at the start of an iteration; its decision takes effect after the
    actuation latency, inside that iteration if it lasts long enough.

    The state is true at the boundaries where the instance itself is at work. In between, `look`
    works out what it shows; whoever reads a state calls it first.
    """

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: GpuTrack,
    ) -> None:
        """See the class.

        Args:
            config: The run's configuration.
            log: Takes what becomes of requests.
            state: What policies see of this instance; it is kept here.
            answers: The controller, its answers checked.
            track: The GPUs.
        """
        self.state = state
        self.log = log
        self.answers = answers
        self._has_holding = answers.has_holding
        self.controller = answers.controller
        self.step_at: Callable[[Instance, float], None] = _not_in_a_fleet
        """The agenda's: `step` this instance at that time, and not when it was asked for before."""
        self.call_at: Callable[[float, Callable[[float], None]], None] = _without_agenda
        """The agenda's: call this with the time when it is that time."""
        self.step_number = 0
        """The agenda's: which of its entries for this instance counts."""
        self.step_rank = 0
        """The agenda's: of steps that are due at one instant, those of a lower rank come first."""
        self.track = track
        self.run = track.run
        """The iterations that are running, while `state.is_busy`."""
        self.num_retractions = 0
        self.iteration_rows: list[IterationRow] | None = [] if config.record_iterations else None
        self.idle_change_s = math.inf
        """At rest: when the clock changes next, of which nobody is told. Infinity if busy."""
        self._batch_size = 0
        self._batch_tokens = 0
        """Of the run's first iteration."""
        self._decision_mhz = self.track.clock_mhz
        self._is_parked = True
        self.on_rest: Callable[[float], None] | None = None
        """Called with the time whenever it has gone idle; a scaler may send it away then."""
        self._num_expected = 0
        """Of those that wait, how many have yet to be let in: no work for now."""
        state.clock_mhz = self.track.clock_mhz

    def park(self, now_s: float) -> None:
        """Go idle until a request comes."""
        state = self.state
        state.is_busy = False
        state.now_s = now_s
        self.idle_change_s = self.track.enter_idle(now_s, self.answers.on_idle(state))
        self._is_parked = True
        if self.on_rest is not None:
            self.on_rest(now_s)

    @property
    def is_parked(self) -> bool:
        """Whether it is idle and no step of it is due."""
        return self._is_parked

    def step(self, now_s: float) -> float | None:
        """Close the run that ends now, or idleness, and go on.

        Returns:
            When the next run ends; None if there is none and the instance is idle.
        """
        state, track = self.state, self.track
        if state.is_busy:
            if self.iteration_rows is not None:
                self._keep_rows(self.run.count)
            track.book()
            state.energy_j = track.energy_j
            state.clock_mhz = track.clock_mhz
            self._end(now_s)
            if not (state.num_running or state.num_waiting > self._num_expected) or (
                self._has_holding and self._holds(now_s)
            ):
                self.park(now_s)
                return None
        else:
            self._settle_idle(now_s)
            self.idle_change_s = math.inf
            state.is_busy = True
            self._forget_last_iteration()
        self._begin(now_s)
        return now_s + self.run.duration_s

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Its memory is lost: nobody is here, so what it may have kept of them goes."""

    def look(self, now_s: float) -> None:
        """Let the state show what has happened by `now_s`."""
        if not self.state.is_busy:
            self._settle_idle(now_s)

    def report(self, now_s: float) -> None:
        """As `look`, and tell the log too, which else hears of a run at its end."""
        self.look(now_s)

    def close(self, end_s: float) -> None:
        """The simulation ends: report and book what has happened by then."""
        self.report(end_s)
        if self.state.is_busy:
            self._keep_rows(self.run.ended_before(end_s))
            self.track.book(end_s)
        self.state.energy_j = self.track.energy_j

    def record(self) -> InstanceRecord:
        """Totals of this instance."""
        return self.track.record(self.state.phase, self.state.instance_id, self.num_retractions)

    def _holds(self, now_s: float) -> bool:
        """Whether the instance rests although requests wait: prefill may."""
        return False

    def _wake(self, now_s: float) -> None:
        self._is_parked = False
        self.step_at(self, now_s)

    def _settle_idle(self, now_s: float) -> None:
        state, track = self.state, self.track
        self.idle_change_s = track.settle_idle(now_s)
        state.clock_mhz = track.clock_mhz
        state.energy_j = track.energy_j

    def _ask_controller(self, now_s: float) -> None:
        state = self.state
        state.now_s = now_s
        decide: Callable[[InstanceState], object] = self.controller.decide
        try:
            answer = decide(state)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.answers.fail("decide", error)
        if type(answer) is not int or answer != self._decision_mhz:  # else it was checked before
            self._decision_mhz = self.answers.clock_mhz(answer)
        self.track.request_clock(now_s, self._decision_mhz)

    def _keep_rows(self, ended: int) -> None:
        """Append a row for each of the run's first iterations, if they are kept."""
        rows, state, run, batch_size = self.iteration_rows, self.state, self.run, self._batch_size
        if rows is None:
            return
        clock_mhz = state.clock_mhz  # a change shows when its first iteration has ended
        for k in range(ended):
            time_s = run.iteration_s(k)
            rows.append(
                (state.phase, state.instance_id, run.start_s + run.elapsed_s(k), time_s, batch_size,
                 self._batch_tokens + k * batch_size, clock_mhz, run.power_w(k) * time_s)
            )  # fmt: skip
            clock_mhz = self.track.clock_mhz

    @abstractmethod
    def _forget_last_iteration(self) -> None:
        """Work resumes after idleness: there is no iteration whose metrics could still come."""

    @abstractmethod
    def _begin(self, now_s: float) -> None:
        """Form the batch, ask the controller, begin the next run."""

    @abstractmethod
    def _end(self, now_s: float) -> None:
        """The run has ended and is booked: hand tokens and finished requests on."""


def iteration_table(instances: list[Instance]) -> IterationTable | None:
    """The kept rows of all instances in order of time; None if there are none."""
    rows = [row for i in instances for row in i.iteration_rows or ()]
    if not rows:
        return None
    rows.sort(key=lambda row: row[2])
    columns = list(zip(*rows, strict=True))
    ids, batch, tokens, clocks = (np.array(columns[k], dtype=np.int64) for k in (1, 4, 5, 6))
    return IterationTable(
        phase=np.array(columns[0]),
        instance_id=ids,
        start_s=np.array(columns[2]),
        duration_s=np.array(columns[3]),
        batch_size=batch,
        tokens=tokens,
        clock_mhz=clocks,
        energy_j=np.array(columns[7]),
    )


def _not_in_a_fleet(instance: Instance, at_s: float) -> None:
    raise AssertionError(f"{instance.state.phase} {instance.state.instance_id} has no agenda")


def _without_agenda(at_s: float, action: Callable[[float], None]) -> None:
    raise AssertionError("an instance without an agenda has no timer")
