"""What prefill and decode instances have in common: the loop of iterations and idleness."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from sim.config import SimConfig
from sim.engine.log import RunLog
from sim.engine.track import GpuTrack
from sim.policies.answers import ControllerAnswers
from sim.policies.base import InstanceState
from sim.records import InstanceRecord

IterationRow = tuple[str, int, float, float, int, int, int, float]
"""phase, instance_id, start_s, duration_s, batch_size, tokens, clock_mhz, energy_j"""


class Instance(ABC):
    """One engine server: it runs iterations while it has work.

    Iterations follow one another without a gap. Requests join and leave at their boundaries. The
    controller is asked at the start of an iteration; its decision takes effect after the
    actuation latency, inside that iteration if it lasts long enough.

    The driver calls `park` once at the start, `step` whenever an iteration ends or `on_work` has
    asked for it, and `sync` before anybody looks at the state.
    """

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: GpuTrack,
    ) -> None:
        self.state = state
        self.log = log
        self.answers = answers
        self._has_holding = answers.has_holding
        self.controller = answers.controller
        self.on_work: Callable[[Instance], None] = _no_driver
        """The driver's: step this instance now, after all else that happens at this instant."""
        self.later: Callable[[float, Callable[[float], None]], None] = _never
        """The driver's: call this with the time when it is that time."""
        self.due = 0
        """The driver's: which of its entries for this instance is the valid one."""
        self.track = track
        self.num_retractions = 0
        self.iteration_rows: list[IterationRow] | None = [] if config.record_iterations else None
        self._start_s = 0.0
        """When the running iteration began."""
        self._decision_mhz = self.track.clock_mhz
        self._is_parked = True
        self._num_expected = 0
        """Of those that wait, how many have yet to be let in: no work for now."""
        self.idle_change_s = math.inf
        """Idle: when its clock changes next; nobody has been told of that. Infinity if busy."""
        self.tie_rank = 0
        """The driver's: of steps that are due at one instant those of a lower rank come first."""
        state.clock_mhz = self.track.clock_mhz

    def park(self, now_s: float) -> None:
        """There is no work: be idle until `on_work` has been answered by `step`."""
        state = self.state
        state.is_busy = False
        state.now_s = now_s
        self.idle_change_s = self.track.enter_idle(now_s, self.answers.on_idle(state))
        self._is_parked = True

    def step(self, now_s: float) -> float | None:
        """Close the iteration that ends now, or idleness, and go on.

        Returns:
            When the next iteration ends; None if there is none and the instance is idle.
        """
        state = self.state
        if state.is_busy:
            self._finish_iteration(now_s)
            if not (state.num_running or state.num_waiting > self._num_expected) or (
                self._has_holding and self._holds(now_s)
            ):
                self.park(now_s)
                return None
        else:
            self.settle(now_s)
            self.idle_change_s = math.inf
            state.is_busy = True
            self._forget_last_iteration()
        self._start_s = now_s
        return self._begin(now_s)

    def _holds(self, now_s: float) -> bool:
        """Whether the instance rests although requests wait: prefill may."""
        return False

    def sync(self, now_s: float) -> None:
        """Bring an idle instance's clock up to date before somebody looks at it."""
        if self.idle_change_s <= now_s:
            self.settle(now_s)

    def refresh(self, now_s: float) -> None:
        """As `sync`, and book the energy of an idle instance up to `now_s`."""
        if not self.state.is_busy:
            self.settle(now_s)

    def catch_up(self, now_s: float) -> None:
        """As `refresh`, and report to the log whatever has happened by `now_s`."""
        self.refresh(now_s)

    def settle(self, now_s: float) -> None:
        """Book time and energy up to `now_s`, at the end of idleness or of the run."""
        if self.state.is_busy:
            self.track.settle_iteration(now_s)
        else:
            self.idle_change_s = self.track.settle_idle(now_s)
        self.state.clock_mhz = self.track.clock_mhz
        self.state.energy_j = self.track.energy_j

    def record(self) -> InstanceRecord:
        """Totals of this instance."""
        return self.track.record(self.state.phase, self.state.instance_id, self.num_retractions)

    def _wake(self) -> None:
        self._is_parked = False
        self.on_work(self)

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

    def _finish_iteration(self, now_s: float) -> None:
        self._settle_iteration(self._start_s, now_s)
        self._complete(self._start_s, now_s)

    def _settle_iteration(self, start_s: float, end_s: float) -> None:
        state, track = self.state, self.track
        before_j = track.energy_j
        track.settle_iteration(end_s)
        state.energy_j = track.energy_j
        if self.iteration_rows is not None:
            batch_size, tokens = self._current_batch()
            self.iteration_rows.append(
                (state.phase, state.instance_id, start_s, end_s - start_s, batch_size, tokens,
                 state.clock_mhz, track.energy_j - before_j)
            )  # fmt: skip
        state.clock_mhz = track.clock_mhz

    @abstractmethod
    def _forget_last_iteration(self) -> None:
        """Work resumes after idleness: there is no iteration whose metrics could still come."""

    @abstractmethod
    def _begin(self, now_s: float) -> float:
        """Form the batch, ask the controller, lay out the iteration; returns when it ends."""

    @abstractmethod
    def _complete(self, start_s: float, now_s: float) -> None:
        """The iteration has ended: hand tokens and finished requests on."""

    @abstractmethod
    def _current_batch(self) -> tuple[int, int]:
        """Batch size and tokens of the iteration that is running."""


def _never(at_s: float, action: Callable[[float], None]) -> None:
    raise AssertionError("an instance without a driver has no timer")


def _no_driver(instance: Instance) -> None:
    raise AssertionError(f"{instance.state.phase} {instance.state.instance_id} has no driver")
