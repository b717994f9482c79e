"""What the agents tell the router: clock, energy and decisions of their instance.

A ZMQ PUSH socket an agent, one PULL socket in the router; one msgpack array a report.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec
import zmq

from voltana.hwreplay.messages.inbox import Inbox
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import Phase

MAX_QUEUED_REPORTS: Final = 1000


class AgentReport(msgspec.Struct, frozen=True, array_like=True):
    """One instance's clock and counters at one instant."""

    phase: Phase
    instance_id: int
    at_s: float
    """On the run's clock."""
    clock_mhz: int
    """Lock in force; 0 is unlocked."""
    energy_j: float | None = None
    """Energy of its GPUs since the start of the run, where the agent reads it."""
    decisions: int = 0
    """Decisions taken so far."""
    energy_at_s: float | None = None
    """When that energy was read, on the run's clock."""
    wish_mhz: int = 0
    """What the controller wants; not the lock in force where nothing is set."""
    acts: bool = False
    """Whether wishes reach a card: False in a dry run."""
    iterations: int = 0
    observed_s: float = 0.0
    """Their durations in all."""
    predicted_s: float = 0.0
    """What the controller's predictor said of them."""
    output_tokens: int = 0
    """Made in decode iterations."""
    saved_j: float = 0.0
    """Estimated against the top clock; the wishes' saving in a dry run."""
    safe: str = ""
    """Why the clock is unlocked for safety; empty while it is not."""
    attainment: float | None = None
    """The guard's share of kept promises over the last minute, where it knows enough."""
    is_released: bool = False
    """The guard has given the clock back."""
    headroom: float = 1.0
    """What the promise would leave of an iteration of the present batch at the top clock: 1 at
    rest, below 0 where even that clock is too slow."""


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(AgentReport)


class Reports(Protocol):
    """Where an agent's reports go."""

    def send(self, report: AgentReport) -> None:
        """Take one; never waits."""

    def close(self) -> None:
        """No more come."""


class ReportSender:
    """An agent's side; sending never waits: without a router reports are dropped."""

    def __init__(self, address: str) -> None:
        """Connect; the router need not be there yet."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set_hwm(MAX_QUEUED_REPORTS)
        self._socket.connect(address)

    def send(self, report: AgentReport) -> None:
        """Send, or drop it if the router does not take any."""
        try:
            self._socket.send(_encoder.encode(report), flags=zmq.NOBLOCK)
        except zmq.Again:
            return

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)
        self._context.term()


class ReportFeed:
    """The router's side."""

    def __init__(self, address: str) -> None:
        """Bind.

        Raises:
            VoltanaError: The address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._inbox = Inbox(self._socket)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise VoltanaError(f"the report feed cannot bind {address}: {error}") from None

    async def receive(self) -> AgentReport:
        """The next report.

        Raises:
            VoltanaError: The message is no report.
        """
        data = await self._inbox.receive()
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise VoltanaError(f"the report feed must carry reports, got {error}") from None

    def close(self) -> None:
        """Unbind."""
        self._inbox.close()
        self._socket.close(linger=0)
        self._context.term()
