"""An agent's ears: its sockets, and its turn."""

from __future__ import annotations

import functools
import json
import time
from functools import partial
from pathlib import Path
from typing import Final, TextIO

import msgspec
import zmq

from voltana.hwreplay.actuator.client import ActuatorLostError
from voltana.hwreplay.agent.account import Account
from voltana.hwreplay.agent.agent import AgentConfig
from voltana.hwreplay.agent.guard import Guard, GuardedClock, GuardLimits, token_gap_s
from voltana.hwreplay.agent.make import (
    caps_w,
    connect,
    make_controller,
    make_loop,
    make_meter,
    record_file,
)
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.agent_reports import AgentReport, Reports, ReportSender
from voltana.hwreplay.messages.batch_feed import BatchFeed, BatchNotice
from voltana.hwreplay.messages.events import Event, read_event, topic_of
from voltana.hwreplay.view.colocated import ColocatedTracker
from voltana.hwreplay.view.context import PolicySource
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import (
    MAX_QUEUED_RECORDS,
    IterationMetrics,
    MetricsError,
    parse_metrics,
)
from voltana.sim.policies.base import COLOCATED, PREFILL, InstanceState
from voltana.sim.results import write_json

TICK_S: Final = 0.05
RECONNECT_S: Final = 1.0
BOTH_PHASES: Final = (
    "the server computes prompts and tokens alike, and was listed as one of a phase: its clock "
    "stays the driver's; list it as colocated in [fleet]"
)


class Agent:
    """Sockets around a `ControlLoop`. Whoever runs it polls, and gives it its turns."""

    def __init__(
        self,
        config: AgentConfig,
        directory: Path,
        source: PolicySource,
        poller: zmq.Poller,
        reports: Reports | None = None,
    ) -> None:
        """Make the controller, connect, bind and set the initial clock.

        Args:
            config: What to watch and what to set.
            directory: Takes the agent's files.
            source: Makes the controller; agents of one process share it.
            poller: Wakes the process up; this agent's sockets are put there.
            reports: Takes what it has to say; None: the router at the configured address, if any.

        Raises:
            VoltanaError: A wrong setting, or the actuator does not answer.
        """
        self._config = config
        self._clock = RunClock(start_ns=config.start_ns)
        # once: on a later connection the limit in force may be a cap of ours that is left over
        self._make_caps_w = functools.cache(partial(caps_w, config, source.profile))
        self._guard = Guard(config.guard or GuardLimits(floor=0.0, resume=1.0))
        self._tracker, self._loop = make_loop(
            config, directory, self._clock, source, self._make_caps_w, self._guard
        )
        self._account = Account(source.profile, source.predictor())
        self._promise_s = source.promise_s(config.phase)
        self._meter = make_meter(config)
        self._reconnect_s = 0.0
        self._has_both_phases = False
        self._previous: IterationMetrics | None = None
        self._token_s: float | None = None
        """End of the latest iteration that decoded; None since a rest."""
        self._clocks: TextIO = record_file(config, directory, "clocks").open("w")
        self._report = directory / f"{config.name}.report.json"
        self._batches = (
            None if config.batch_socket is None else BatchFeed(Path(config.batch_socket))
        )
        self._reports = reports
        if reports is None and config.report_address is not None:
            self._reports = ReportSender(config.report_address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._metrics = self._subscribe(config.metrics_address, b"")
        self._events = (
            None
            if config.event_address is None
            else self._subscribe(config.event_address, topic_of(config.phase, config.instance_id))
        )
        self._poller = poller
        for feed in (self._events, self._batches, self._metrics):
            if feed is not None:
                self._poller.register(feed, zmq.POLLIN)
        self._polled_fd: int | None = None
        self._ticked_s = self._clock.now_s()

    @property
    def state(self) -> InstanceState:
        """What the controller sees of the instance."""
        return self._tracker.state

    def adopt(self, source: PolicySource) -> None:
        """Take over another policy and other promises; clock, meter and what is known stay.

        Raises:
            VoltanaError: No such policy: the old one stays.
        """
        self._loop.adopt(make_controller(self._config, source), self._clock.now_s())
        self._promise_s = source.promise_s(self._config.phase)

    def turn(self) -> None:
        """Take what waits, the router's word before the engine's, and let time pass."""
        self._take_events()
        self._take_notices()
        self._take_records()
        now_s = self._clock.now_s()
        self._loop.collect(now_s)
        if now_s - self._ticked_s >= TICK_S:
            self._ticked_s = now_s
            self._tick(now_s)
        elif self._loop.clock_changes:
            self._tell_clock(now_s)

    def poll_actuator(self) -> None:
        """Wake up for the actuator's answers; its connection comes and goes."""
        fd = self._loop.actuator_fd
        if fd == self._polled_fd:
            return
        if self._polled_fd is not None:
            self._poller.unregister(self._polled_fd)
        if fd is not None:
            self._poller.register(fd, zmq.POLLIN)
        self._polled_fd = fd

    def _take_events(self) -> None:
        if self._events is None:
            return
        while (frames := _receive(self._events)) is not None:
            try:
                event = read_event(frames[-1])
                self._judge_prompt(event)
                self._tracker.on_event(event)
                self._loop.hear_router(self._clock.now_s())
            except msgspec.DecodeError as error:
                self._loop.report.counts["wrong_messages"] += 1
                self._loop.go_safe(self._clock.now_s(), f"a wrong event: {error}")
        self._loop.settle(self._clock.now_s())

    def _take_notices(self) -> None:
        if self._batches is None:
            return
        report = self._loop.report
        notice = self._next_notice()
        while notice is not None:
            start_ns, writes = time.monotonic_ns(), self._loop.num_wishes
            following = self._next_notice()
            is_newest = following is None
            if self._loop.on_notice(notice, self._clock.now_s(), is_newest=is_newest):
                self._count_latency(start_ns, writes)
                report.notice.add((time.monotonic_ns() - notice.sent_ns) * 1e-9)
            notice = following

    def _next_notice(self) -> BatchNotice | None:
        """The next one that is right; wrong ones are counted and unlock the clock."""
        assert self._batches is not None
        while True:
            try:
                return self._batches.receive()
            except VoltanaError as error:
                self._loop.report.counts["wrong_messages"] += 1
                self._loop.go_safe(self._clock.now_s(), str(error))

    def _take_records(self) -> None:
        frames = _receive(self._metrics)
        while frames is not None:
            start_ns, writes = time.monotonic_ns(), self._loop.num_wishes
            following = _receive(self._metrics)
            try:
                record = parse_metrics(frames[-1], received_s=self._clock.now_s())
            except MetricsError as error:
                self._loop.report.counts["wrong_messages"] += 1
                self._loop.go_safe(self._clock.now_s(), str(error))
            else:
                if self._is_of_both_phases(record):
                    self._loop.go_safe(self._clock.now_s(), BOTH_PHASES)
                elif self._loop.on_record(record, is_newest=following is None):
                    self._count_latency(start_ns, writes)
                self._book(record)
            frames = following

    def _is_of_both_phases(self, record: IterationMetrics) -> bool:
        """Whether this engine has ever computed both; asked where no router speaks."""
        if self._events is None and self._config.phase != COLOCATED:
            other = (
                record.num_decode_requests
                if self._config.phase == PREFILL
                else record.num_prefill_requests
            )
            self._has_both_phases |= other > 0
        return self._has_both_phases

    def _judge_prompt(self, event: Event) -> None:
        """Prefill under a router: a prompt keeps its budget, from arrival to end, or misses it."""
        if event.kind != "prefilled" or event.phase != PREFILL:
            return
        arrival_s = self._tracker.arrival_s(event.request_id)
        if arrival_s is not None:
            is_kept = event.at_s - arrival_s <= self._promise_s
            self._guard.attainment.add(self._clock.now_s(), kept=int(is_kept), total=1)

    def _book(self, record: IterationMetrics) -> None:
        """Count an iteration that has ended, and whether its tokens came in time."""
        previous, self._previous = self._previous, record
        state, loop = self._tracker.state, self._loop
        if record.is_heartbeat or self._has_both_phases:
            self._token_s = None
            return
        if isinstance(self._tracker, ColocatedTracker):
            self._account.add_both(state, self._tracker.ended_chunk)
            self._judge_tokens(record)
            return
        self._account.add(state, loop.wish_mhz, acts=self._acts)
        if state.phase == PREFILL and self._events is not None:
            return
        waited_s, batch = state.last_duration_s, state.ended_batch_size
        if state.phase != PREFILL:
            waited_s = token_gap_s(record, previous, waited_s)
        is_kept = waited_s <= self._promise_s
        self._guard.attainment.add(self._clock.now_s(), kept=is_kept * batch, total=batch)

    def _judge_tokens(self, record: IterationMetrics) -> None:
        """Of a server that does both: a token comes where decoding stood too, so late."""
        batch = record.num_decode_requests
        if not batch:
            return
        since_s = record.start_s if self._token_s is None else self._token_s
        self._token_s = record.received_s
        is_kept = record.received_s - since_s <= self._promise_s
        self._guard.attainment.add(self._clock.now_s(), kept=is_kept * batch, total=batch)

    @property
    def _acts(self) -> bool:
        return self._config.actuator_socket is not None

    def _count_latency(self, start_ns: int, wishes_before: int) -> None:
        latency_s = (time.monotonic_ns() - start_ns) * 1e-9
        self._loop.report.latency.add(latency_s)
        if self._loop.num_wishes > wishes_before:
            self._loop.report.written.add(latency_s)

    def _tick(self, now_s: float) -> None:
        if self._meter is not None and (energy_j := self._meter.energy_j) is not None:
            self._tracker.on_energy(energy_j)
        self._loop.tick(now_s)
        if self._guard.look(now_s):
            self._loop.report.counts["guard_changes"] += 1
            self._loop.repeat_wish(now_s)
        if not self._loop.has_actuator and now_s >= self._reconnect_s:
            self._reconnect_s = now_s + RECONNECT_S
            self._reconnect()
        self._tell_clock(now_s)
        self._clocks.flush()

    def _tell_clock(self, now_s: float) -> None:
        """To the file and to the router."""
        changes = self._loop.clock_changes
        while changes:
            at_s, clock_mhz = changes.popleft()
            self._clocks.write(json.dumps({"at_s": at_s, "clock_mhz": clock_mhz}) + "\n")
        if self._reports is not None:
            self._reports.send(self._report_of(now_s))

    def _report_of(self, now_s: float) -> AgentReport:
        state, loop, account, meter = self._tracker.state, self._loop, self._account, self._meter
        return AgentReport(
            state.phase,
            state.instance_id,
            now_s,
            state.clock_mhz,
            None if meter is None else meter.energy_j,
            loop.report.counts["decisions"],
            energy_at_s=None if meter is None else self._clock.at_s(meter.read_ns),
            wish_mhz=loop.wish_mhz,
            acts=self._acts,
            iterations=account.iterations,
            observed_s=account.observed_s,
            predicted_s=account.predicted_s,
            output_tokens=account.output_tokens,
            saved_j=account.saved_j,
            safe=loop.safe_reason,
            attainment=self._guard.share,
            is_released=self._guard.is_released,
            headroom=account.headroom(state, self._promise_s),
        )

    def _reconnect(self) -> None:
        try:
            actuator = connect(self._config, self._make_caps_w)
            self._loop.attach(GuardedClock(actuator, self._guard))
        except ActuatorLostError:
            self._loop.report.counts["reconnects_failed"] += 1

    def _subscribe(self, address: str, topic: bytes) -> zmq.Socket[bytes]:
        subscriber: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        subscriber.set_hwm(MAX_QUEUED_RECORDS)
        subscriber.setsockopt(zmq.SUBSCRIBE, topic)
        subscriber.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        subscriber.connect(address)
        return subscriber

    def close(self) -> None:
        """Give the clock back, leave the report."""
        now_s = self._clock.now_s()
        self._loop.close(now_s)
        self._tell_clock(now_s)
        self._clocks.close()
        write_json(self._loop.report.as_dict(), self._report)
        for part in (self._batches, self._reports, self._meter):
            if part is not None:
                part.close()
        for subscriber in (self._metrics, self._events):
            if subscriber is not None:
                subscriber.close(linger=0)
        self._context.term()


def _receive(subscriber: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return subscriber.recv_multipart(flags=zmq.NOBLOCK)
    except zmq.Again:
        return None
