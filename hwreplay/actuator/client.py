"""The agent's side: one interface for an actuator that acts and for a file that only records.

Writing never waits for the device: `set_clock` hands the message to the kernel and returns, the
answer is collected by a later `beat`. `clock_mhz` is what has been confirmed.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TextIO

from voltana.hwreplay.messages.actuation import (
    MAX_SEQUENCE,
    SIZE,
    Answer,
    Operation,
    Request,
    Status,
    card_code,
    parse_answer,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import UNLOCKED_MHZ

CONNECT_S: Final = 5.0
_REFUSALS: Final = {
    Status.VALUE_NOT_ALLOWED: "the actuator may not set it: add it to its --clocks, or name only "
    "those in the controller's frequencies",
    Status.TAKEN: "another agent holds that GPU: end one of them",
    Status.RATE_LIMITED: "more changes than the actuator's --max-rate",
}
"""What to do about those that an operator can mend."""


class ActuatorLostError(VoltanaError):
    """The actuator is gone or has dropped us; it restores the clocks by itself."""


class ClockSetter(Protocol):
    """Sets the clock of one instance."""

    @property
    def clock_mhz(self) -> int:
        """Clock last confirmed; 0 is unlocked."""

    @property
    def num_refused(self) -> int:
        """Wishes that were not granted so far."""

    @property
    def last_refusal(self) -> str:
        """Why the last of them was not."""

    def set_clock(self, clock_mhz: int) -> None:
        """Ask for a clock (0 unlocks). Does not wait. Repeating the last wish costs nothing."""

    def beat(self) -> None:
        """Say "alive" and collect answers. Call it several times within the actuator's silence."""

    def collect(self) -> None:
        """Take the answers that wait."""

    def fileno(self) -> int | None:
        """For a poll: readable when an answer waits. None if none ever does."""

    def close(self) -> None:
        """Unlock and end."""


class DryRun:
    """Writes one JSON line a wish, `{"time_s": …, "clock_mhz": …}`, and touches nothing.

    What it would have set is no clock: `clock_mhz` stays what it is, unlocked.
    """

    clock_mhz = UNLOCKED_MHZ
    num_refused = 0
    last_refusal = ""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._start_ns = time.monotonic_ns()
        self._wish_mhz = UNLOCKED_MHZ

    def set_clock(self, clock_mhz: int) -> None:
        if clock_mhz != self._wish_mhz:
            self._wish_mhz = clock_mhz
            time_s = (time.monotonic_ns() - self._start_ns) * 1e-9
            line = {"time_s": round(time_s, 6), "clock_mhz": clock_mhz}
            self._file.write(json.dumps(line) + "\n")

    def beat(self) -> None:
        self._file.flush()

    def collect(self) -> None:
        return

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self.set_clock(UNLOCKED_MHZ)
        self._file.close()


class ActuatorClient:
    """Asks the actuator to set the clocks, or the power limits, of an instance's GPUs."""

    def __init__(
        self,
        path: Path,
        gpus: Sequence[int],
        *,
        uuids: Sequence[str] | None = None,
        make_caps_w: Callable[[], Mapping[int, float]] | None = None,
    ) -> None:
        """Connect and shake hands.

        Args:
            path: The actuator's socket.
            gpus: The instance's GPUs; they move together.
            uuids: Of these GPUs, as this process's NVML has them: the actuator is asked for its own
                number of each. None: both count alike.
            make_caps_w: Gives the power limit of one GPU that stands for each clock, in W; called
                if the actuator limits power because clocks cannot be locked there.

        Raises:
            ActuatorLostError: No actuator there, or it does not answer this user.
            VoltanaError: It limits power and no limits are known, or it does not have a card.
        """
        self._gpus = tuple(gpus)
        self._sequence = 0
        self._wanted_mhz: int | None = UNLOCKED_MHZ
        """None after a refusal, so that the next decision is sent whatever it is."""
        self._clock_mhz = UNLOCKED_MHZ
        self._open: dict[int, tuple[int, int]] = {}
        """Sequence of a message under way, with its clock and when it was sent in ns."""
        self._under_way: dict[int, int] = {}
        """Clock that each GPU has been asked for and has not answered: one message a card."""
        self._next: dict[int, int] = {}
        """Newest wish of a GPU whose answer is awaited; it replaces the one before it."""
        self._held: dict[int, int] = {}
        """Clock that each GPU has confirmed, by the actuator's number."""
        self.refused: Counter[Status] = Counter()
        self.num_refused = 0
        self.last_refusal = ""
        self.answer_s: deque[float] = deque(maxlen=100_000)
        """From a message to its answer, the device call included."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._operation, self.silence_s = self._shake_hands(path, uuids)
        self._held.update(dict.fromkeys(self._gpus, UNLOCKED_MHZ))
        self._caps_w: Mapping[int, float] = {}
        if self._operation == Operation.CAP:
            if make_caps_w is None:
                self._socket.close()
                raise VoltanaError(f"the actuator at {path} limits power: say which limits")
            self._caps_w = make_caps_w()

    @property
    def clock_mhz(self) -> int:
        return self._clock_mhz

    @property
    def operation(self) -> Operation:
        """What the actuator does: LOCK or CAP."""
        return self._operation

    @property
    def unanswered(self) -> int:
        """Messages under way."""
        return len(self._open)

    def fileno(self) -> int:
        """For a poll: readable when an answer waits."""
        return self._socket.fileno()

    def set_clock(self, clock_mhz: int) -> None:
        if clock_mhz == self._wanted_mhz:
            return
        if self._operation == Operation.CAP and clock_mhz and clock_mhz not in self._caps_w:
            self._refuse(clock_mhz, self._gpus[0], Status.VALUE_NOT_ALLOWED)
            return
        self._wanted_mhz = clock_mhz
        for gpu in self._gpus:
            if gpu in self._under_way:
                self._next[gpu] = clock_mhz
            else:
                self._ask(gpu, clock_mhz)

    def beat(self) -> None:
        self._send(Request(operation=Operation.BEAT))
        self.collect()

    def collect(self) -> None:
        """Read the answers that wait.

        Raises:
            ActuatorLostError: The connection is gone.
        """
        while True:
            try:
                data = self._socket.recv(SIZE + 1)
            except BlockingIOError:
                return
            except OSError as error:
                raise _lost(error.strerror or str(error)) from None
            if not data:
                raise _lost("it has closed the connection")
            self._take(parse_answer(data))

    def close(self) -> None:
        try:
            self._send(Request(operation=Operation.RELEASE))
        except ActuatorLostError:
            return  # an actuator that is gone has restored already
        finally:
            self._socket.close()

    def _take(self, answer: Answer) -> None:
        clock_mhz, sent_ns = self._open.pop(answer.sequence, (None, 0))
        if clock_mhz is None:
            return  # the answer to a beat
        self.answer_s.append((time.monotonic_ns() - sent_ns) * 1e-9)
        self._under_way.pop(answer.gpu, None)
        newest_mhz = self._next.pop(answer.gpu, None)
        if answer.status == Status.OK:
            self._held[answer.gpu] = clock_mhz
            if set(self._held.values()) == {clock_mhz}:
                self._clock_mhz = clock_mhz
        elif answer.status != Status.RECORDED:
            self._refuse(clock_mhz, answer.gpu, answer.status, has_newer=newest_mhz is not None)
        if newest_mhz is not None and (newest_mhz != clock_mhz or answer.status != Status.OK):
            self._ask(answer.gpu, newest_mhz)

    def _ask(self, gpu: int, clock_mhz: int) -> None:
        self._sequence = self._sequence % MAX_SEQUENCE + 1
        self._open[self._sequence] = (clock_mhz, time.monotonic_ns())
        self._under_way[gpu] = clock_mhz
        self._send(self._request(gpu, clock_mhz))

    def _refuse(self, clock_mhz: int, gpu: int, status: Status, *, has_newer: bool = False) -> None:
        self.refused[status] += 1
        self.num_refused += 1
        said = _REFUSALS.get(status, status.name)
        self.last_refusal = f"{clock_mhz} MHz on GPU {gpu}: {said}"
        if not has_newer:
            self._wanted_mhz = None

    def _request(self, gpu: int, clock_mhz: int) -> Request:
        value = clock_mhz
        if self._operation == Operation.CAP and clock_mhz:
            value = round(self._caps_w[clock_mhz] * 1e3)
        return Request(operation=self._operation, gpu=gpu, value=value, sequence=self._sequence)

    def _send(self, request: Request) -> None:
        try:
            self._socket.send(request.pack())
        except OSError as error:
            raise _lost(error.strerror or str(error)) from None

    def _shake_hands(self, path: Path, uuids: Sequence[str] | None) -> tuple[Operation, float]:
        try:
            self._socket.settimeout(CONNECT_S)
            self._socket.connect(str(path))
            self._socket.send(Request(operation=Operation.HELLO).pack())
            answer = parse_answer(self._socket.recv(SIZE + 1))
            operation = Operation(answer.gpu)
        except (OSError, ValueError, VoltanaError) as error:
            self._socket.close()
            raise ActuatorLostError(
                f"the actuator must answer at {path}, it does not ({error}): start it there as "
                "root with `voltana actuator`, naming this user, or use a dry run"
            ) from None
        if uuids is not None:
            cards = zip(self._gpus, uuids, strict=True)
            self._gpus = tuple(self._find(gpu, uuid, path) for gpu, uuid in cards)
        self._socket.setblocking(False)
        return operation, answer.value * 1e-3

    def _find(self, gpu: int, uuid: str, path: Path) -> int:
        """The actuator's number of a card."""
        try:
            request = Request(operation=Operation.FIND, gpu=gpu, value=card_code(uuid))
            self._socket.send(request.pack())
            answer = parse_answer(self._socket.recv(SIZE + 1))
        except (OSError, VoltanaError) as error:
            self._socket.close()
            raise _lost(str(error)) from None
        if answer.status != Status.OK:
            self._socket.close()
            raise VoltanaError(
                f"the actuator at {path} must have GPU {gpu} ({uuid}), it has not: name it with "
                "--gpu there, by that machine's numbers, or start an actuator of this version"
            )
        return answer.gpu


def caps_from_power(
    power_w: Mapping[int, float], *, range_w: tuple[float, float]
) -> dict[int, float]:
    """Power limit that stands for each clock: what the board draws there at most.

    Args:
        power_w: By clock in MHz, the highest power of one GPU at that clock.
        range_w: Lowest and highest limit the card takes.

    Example:
        >>> caps_from_power({705: 180.2, 1410: 410.0}, range_w=(200.0, 400.0))
        {705: 200.0, 1410: 400.0}
    """
    low_w, high_w = range_w
    return {clock: min(max(float(math.ceil(w)), low_w), high_w) for clock, w in power_w.items()}


def _lost(why: str) -> ActuatorLostError:
    return ActuatorLostError(
        f"the actuator must stay reachable, it does not ({why}): start it again"
    )
