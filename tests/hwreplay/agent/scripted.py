"""A clock, a controller and records by script: what a control loop is tested with."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from voltana.hwreplay.actuator.client import ActuatorLostError
from voltana.hwreplay.agent.control import ControlLoop
from voltana.hwreplay.agent.loop_record import StaleLimits
from voltana.hwreplay.messages.batch_feed import BatchNotice, NoticeKind
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import Controller, IdlePlan, InstanceState, Phase


class Clock:
    """An actuator that does at once what it is told."""

    def __init__(self) -> None:
        self.clock_mhz = 0
        self.wishes: list[int] = []
        self.is_lost = False
        self.is_closed = False
        self.num_refused = 0
        self.last_refusal = ""
        self.refuses: set[int] = set()

    def set_clock(self, clock_mhz: int) -> None:
        if self.is_lost:
            raise ActuatorLostError("gone")
        if clock_mhz in self.refuses:
            self.num_refused += 1
            self.last_refusal = f"{clock_mhz} MHz: no"
            return
        self.clock_mhz = clock_mhz
        self.wishes.append(clock_mhz)

    def collect(self) -> None:
        self.beat()

    def fileno(self) -> int | None:
        return None

    def beat(self) -> None:
        if self.is_lost:
            raise ActuatorLostError("gone")

    def close(self) -> None:
        self.is_closed = True


CLOCKS = (210, 705, 800, *range(1000, 1020), 1200, 1410)
FAILED = "the controller failed: "
is_safe = attrgetter("is_safe")  # a property that mypy would take for a constant
OWN: Any = object()  # answer by the rule of `Script`


class Script(Controller):
    """1000 MHz + batch size; remembers what it saw."""

    def __init__(self, plan: IdlePlan | None = None) -> None:
        self.seen: list[tuple[float, int, int, float, int]] = []
        self.plan = plan
        self.fails: Exception | None = None
        self.answer: Any = OWN

    def decide(self, state: InstanceState) -> int:
        if self.answer is not OWN:
            return self.answer  # type: ignore[no-any-return]  # deliberately anything
        if self.fails is not None:
            raise self.fails
        self.seen.append(
            (state.now_s, state.last_batch_size, state.last_tokens, state.last_queue_delay_s,
             state.clock_mhz)
        )  # fmt: skip
        return 1000 + state.last_batch_size

    def initial_clock_mhz(self) -> int:
        return 705

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self.plan


class TenMilliseconds:
    def predict_s(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 0.01


def make(
    phase: Phase, plan: IdlePlan | None = None, *, decides_before: bool = False
) -> tuple[ControlLoop, Script, Clock, InstanceTracker]:
    tracker = InstanceTracker(
        phase, 0, kv_capacity_tokens=10_000, max_prefill_tokens=4096, max_running_requests=16
    )
    controller, clock = Script(plan), Clock()
    limits = StaleLimits(least_s=0.05)
    loop = ControlLoop(
        controller,
        tracker,
        clock,
        predictor=TenMilliseconds(),
        clocks_mhz=CLOCKS,
        limits=limits,
        decides_before=decides_before,
    )
    return loop, controller, clock, tracker


def record(sequence: int, at_s: float, **values: Any) -> IterationMetrics:  # noqa: ANN401
    return IterationMetrics(sequence=sequence, received_s=at_s, wall_time_s=0.01, **values)


def decode(sequence: int, at_s: float, batch_size: int = 2) -> IterationMetrics:
    return record(sequence, at_s, num_decode_requests=batch_size, sum_decode_kv_tokens=100)


def prefill(sequence: int, at_s: float) -> IterationMetrics:
    return record(sequence, at_s, num_prefill_requests=1, sum_prefill_tokens=50)


def notice(at_s: float, tokens: int = 50) -> BatchNotice:
    return BatchNotice(
        kind=NoticeKind.PREFILL, num_requests=1, tokens=tokens, num_waiting=0, sent_ns=0
    )


def with_requests(tracker: InstanceTracker, count: int) -> None:
    for request_id in range(count):
        tracker.on_assigned(request_id, 0.0, 50)
        if tracker.state.phase == "decode":
            tracker.on_prefilled(request_id)
            tracker.on_first_token(request_id, 0.1)
