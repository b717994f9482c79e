"""What the router tells the agents: when requests come to an instance and when they leave.

A ZMQ PUB socket, one frame an event: its topic, one an instance (`prefill/0/`), and a msgpack
array. Sending is among the dearest parts of routing, so that there are not two frames. Once a
second each instance's open requests are repeated whole: a subscriber that lost events recovers.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
import zmq

from voltana.hwreplay.messages.inbox import Inbox
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import MAX_QUEUED_RECORDS
from voltana.sim.policies.base import Phase

EventKind = Literal["assigned", "prefilled", "first_token", "finished", "open"]
SNAPSHOT_S: Final = 1.0


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One thing that happened to one request at one instance."""

    kind: EventKind
    phase: Phase
    instance_id: int
    at_s: float
    """On the run's clock; of "assigned" it is the request's arrival."""
    request_id: int = -1
    input_tokens: int = 0
    output_tokens: int | None = None
    """Length it will reach, where the run has a length oracle."""
    open_ids: tuple[int, ...] = ()
    """Of "open": all requests that the router counts here."""


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Event)


def topic_of(phase: Phase, instance_id: int) -> bytes:
    """Topic of one instance. It ends in a slash, so that instance 1 does not match instance 10."""
    return f"{phase}/{instance_id}/".encode()


def read_event(frame: bytes) -> Event:
    """The event behind its topic.

    Raises:
        msgspec.DecodeError: The message is none.
    """
    return _decoder.decode(frame[frame.find(b"/", frame.find(b"/") + 1) + 1 :])


class EventPublisher:
    """The router's side; sending never waits."""

    def __init__(self, address: str) -> None:
        """Bind.

        Raises:
            VoltanaError: The address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(MAX_QUEUED_RECORDS)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise VoltanaError(f"the event feed cannot bind {address}: {error}") from None

    def publish(self, event: Event) -> None:
        """Send one event."""
        topic = topic_of(event.phase, event.instance_id)
        self._socket.send(topic + _encoder.encode(event), zmq.NOBLOCK)

    def close(self) -> None:
        """Unbind."""
        self._socket.close(linger=0)
        self._context.term()


class EventFeed:
    """An agent's side: the events of one instance, or of all."""

    def __init__(self, address: str, instance: tuple[Phase, int] | None = None) -> None:
        """Connect; the router need not be there yet."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(MAX_QUEUED_RECORDS)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic_of(*instance) if instance else b"")
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(address)
        self._inbox = Inbox(self._socket)

    async def receive(self) -> Event:
        """The next event.

        Raises:
            VoltanaError: The message is no event.
        """
        data = await self._inbox.receive()
        try:
            return read_event(data)
        except msgspec.DecodeError as error:
            raise VoltanaError(f"the event feed must carry events, got {error}") from None

    def close(self) -> None:
        """End the subscription."""
        self._inbox.close()
        self._socket.close(linger=0)
        self._context.term()
