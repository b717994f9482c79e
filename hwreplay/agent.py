"""The agent of one instance: a process that listens, asks the controller and sets the clock.

    engine  ── forward-pass metrics (ZMQ) ──┐
    engine  ── batch notices (datagrams) ───┤ poll ── tracker ── controller ── actuator
    router  ── arrivals and ends (ZMQ) ─────┘

One thread, no waiting: what comes first is served first, the router's events before the engine's
records. Run by `start_agent`, or by hand with `python -m hwreplay.agent FILE.json`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

import msgspec
import zmq

from hwreplay.actuator.client import (
    Actuator,
    ActuatorLostError,
    DryRunActuator,
    HelperActuator,
)
from hwreplay.batch_feed import BatchFeed
from hwreplay.clock import RunClock
from hwreplay.context import PolicySource
from hwreplay.control import ControlLoop, StaleLimits
from hwreplay.events import Event, apply_event, topic_of
from hwreplay.metrics_feed import MAX_QUEUED_RECORDS, MetricsError, parse_metrics
from hwreplay.tracker import InstanceTracker
from profiles.catalog import load_profile
from profiles.errors import VoltanaError
from sim.config import make_config
from sim.policies.base import Phase
from sim.results import read_json, write_json

TICK_S: Final = 0.05
RECONNECT_S: Final = 1.0
SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One agent. A JSON file of the same keys is its command line."""

    phase: Phase
    instance_id: int
    start_ns: int
    """CLOCK_MONOTONIC at the start of the run: the instant that every process calls 0."""
    settings: Mapping[str, Any]
    """The simulated configuration that is replayed, as `SimConfig.as_dict` writes it."""
    metrics_address: str
    """ZMQ address of the engine's forward-pass metrics."""
    event_address: str | None = None
    """ZMQ address of the router's events; None: the engine's word alone."""
    batch_socket: str | None = None
    """Where the engine's plug-in announces batches. Without it a prefill decision lags by one
    iteration, as `prefill_metrics = "after"` simulates."""
    actuator_socket: str | None = None
    """The helper's socket; None records decisions and touches nothing."""
    gpus: tuple[int, ...] = ()
    caps_w: Mapping[int, float] | None = None
    """Power limit of one GPU by clock, where clocks cannot be locked."""
    stale: StaleLimits = dataclasses.field(default_factory=StaleLimits)

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"agent-{self.phase}-{self.instance_id}"


def start_agent(config: AgentConfig, directory: Path) -> subprocess.Popen[bytes]:
    """Start an agent in a process of its own; it ends with its parent or by SIGTERM.

    It leaves in `directory`: NAME.json (this configuration), NAME.clocks.jsonl (each confirmed
    change of the clock), NAME.report.json (latencies, safe states) at its end, and NAME.log.
    """
    path = directory / f"{config.name}.json"
    write_json(msgspec.to_builtins(config, str_keys=True), path)
    with (directory / f"{config.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hwreplay.agent", str(path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
        )


def read_agent_config(path: Path) -> AgentConfig:
    """Read the JSON file of an agent.

    Raises:
        VoltanaError: A key is missing, unknown or of the wrong type.
    """
    try:
        return msgspec.convert(read_json(path), AgentConfig, strict=False)
    except msgspec.ValidationError as error:
        raise VoltanaError(
            f"an agent's file must hold its configuration: {error} ({path})"
        ) from None


class Agent:
    """Sockets around a `ControlLoop`."""

    def __init__(self, config: AgentConfig, directory: Path) -> None:
        """Make the controller, connect, bind and set the initial clock.

        Raises:
            VoltanaError: A wrong setting, or the helper does not answer.
        """
        self._config = config
        self._clock = RunClock(start_ns=config.start_ns)
        self._tracker, self._loop = _make_loop(config, directory)
        self._reconnect_s = 0.0
        self._clocks: TextIO = (directory / f"{config.name}.clocks.jsonl").open("w")
        self._report = directory / f"{config.name}.report.json"
        self._batches = (
            None if config.batch_socket is None else BatchFeed(Path(config.batch_socket))
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._metrics = self._subscribe(config.metrics_address, b"")
        self._events = (
            None
            if config.event_address is None
            else self._subscribe(config.event_address, topic_of(config.phase, config.instance_id))
        )
        self._poller = zmq.Poller()
        for source in (self._events, self._batches, self._metrics):
            if source is not None:
                self._poller.register(source, zmq.POLLIN)
        self._decode_event = msgspec.msgpack.Decoder(Event).decode

    def run(self) -> None:
        """Serve until a signal, the parent's end or an error; the clock is given back always."""
        parent = os.getppid()
        gc.collect()
        gc.freeze()
        ticked_s = self._clock.now_s()
        try:
            while os.getppid() == parent:
                self._poller.poll(int(TICK_S * 1e3))
                self._take_events()
                self._take_notices()
                self._take_records()
                now_s = self._clock.now_s()
                if now_s - ticked_s >= TICK_S:
                    ticked_s = now_s
                    self._tick(now_s)
        finally:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
            self._close()

    def _take_events(self) -> None:
        if self._events is None:
            return
        while (frames := _receive(self._events)) is not None:
            try:
                apply_event(self._tracker, self._decode_event(frames[-1]))
            except msgspec.DecodeError as error:
                self._loop.go_safe(self._clock.now_s(), f"a wrong event: {error}")
        self._loop.settle(self._clock.now_s())

    def _take_notices(self) -> None:
        if self._batches is None:
            return
        try:
            while (notice := self._batches.receive()) is not None:
                start_ns = time.monotonic_ns()
                if self._loop.on_notice(notice, self._clock.now_s()):
                    end_ns = time.monotonic_ns()
                    self._loop.report.latency.add((end_ns - start_ns) * 1e-9)
                    self._loop.report.notice.add((end_ns - notice.sent_ns) * 1e-9)
        except VoltanaError as error:
            self._loop.go_safe(self._clock.now_s(), str(error))

    def _take_records(self) -> None:
        while (frames := _receive(self._metrics)) is not None:
            start_ns = time.monotonic_ns()
            try:
                record = parse_metrics(frames[-1], received_s=self._clock.now_s())
            except MetricsError as error:
                self._loop.go_safe(self._clock.now_s(), str(error))
                continue
            if self._loop.on_record(record):
                self._loop.report.latency.add((time.monotonic_ns() - start_ns) * 1e-9)

    def _tick(self, now_s: float) -> None:
        self._loop.tick(now_s)
        if not self._loop.has_actuator and now_s >= self._reconnect_s:
            self._reconnect_s = now_s + RECONNECT_S
            self._reconnect()
        changes = self._loop.clock_changes
        while changes:
            at_s, clock_mhz = changes.popleft()
            self._clocks.write(json.dumps({"at_s": at_s, "clock_mhz": clock_mhz}) + "\n")
        self._clocks.flush()

    def _reconnect(self) -> None:
        try:
            self._loop.attach(_helper(self._config))
        except ActuatorLostError:
            self._loop.report.counts["reconnects_failed"] += 1

    def _subscribe(self, address: str, topic: bytes) -> zmq.Socket[bytes]:
        subscriber: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        subscriber.set_hwm(MAX_QUEUED_RECORDS)
        subscriber.setsockopt(zmq.SUBSCRIBE, topic)
        subscriber.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        subscriber.connect(address)
        return subscriber

    def _close(self) -> None:
        self._loop.close()
        self._tick(self._clock.now_s())
        self._clocks.close()
        write_json(self._loop.report.as_dict(), self._report)
        if self._batches is not None:
            self._batches.close()
        for subscriber in (self._metrics, self._events):
            if subscriber is not None:
                subscriber.close(linger=0)
        self._context.term()


def _make_loop(config: AgentConfig, directory: Path) -> tuple[InstanceTracker, ControlLoop]:
    settings = make_config(config.settings, where=config.name)
    source = PolicySource(config=settings, profile=load_profile(settings.profile))
    controller = source.make_controller(config.phase, config.instance_id)
    if source.cluster.is_observed:
        raise VoltanaError(
            f"an agent shows its controller one instance, the {config.phase} controller of "
            f"{config.name} sees the whole fleet: replay another policy"
        )
    tracker = source.make_tracker(config.phase, config.instance_id)
    actuator: Actuator = (
        DryRunActuator(directory / f"{config.name}.decisions.jsonl")
        if config.actuator_socket is None
        else _helper(config)
    )
    loop = ControlLoop(
        controller,
        tracker,
        actuator,
        predictor=source.profile.predictor(),
        limits=config.stale,
        decides_before_decode=settings.decode_metrics == "before",
    )
    return tracker, loop


def _helper(config: AgentConfig) -> HelperActuator:
    if config.actuator_socket is None:
        raise ActuatorLostError("a dry run has no helper")
    return HelperActuator(Path(config.actuator_socket), config.gpus, caps_w=config.caps_w)


def _receive(subscriber: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return subscriber.recv_multipart(flags=zmq.NOBLOCK)
    except zmq.Again:
        return None


def _on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str]) -> None:
    """Run one agent: the only argument is its JSON file."""
    path = Path(arguments[0])
    for signum in SIGNALS:
        signal.signal(signum, _on_signal)
    Agent(read_agent_config(path), path.parent).run()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VoltanaError as failure:
        sys.stderr.write(f"voltana agent: {failure}\n")
        sys.exit(2)
