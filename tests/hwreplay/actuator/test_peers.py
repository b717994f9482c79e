"""Peers in any order against a model of who holds what, and one that means harm."""

from __future__ import annotations

import array
import os
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.hwreplay.actuator.conftest import ALLOWED_MHZ, Recorder, eventually, serving
from voltana.hwreplay.actuator.client import ActuatorClient
from voltana.hwreplay.messages.actuation import Operation, Request, Status, parse_answer

GPUS = st.integers(0, 3)
CLOCKS = st.sampled_from((*ALLOWED_MHZ, 0, 706, 2**32 - 1))


class Peers(RuleBasedStateMachine):
    """The model: a GPU belongs to the peer that locked it first, until that one lets go."""

    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._recorder = Recorder()
        self._path = Path(self._folder.name) / "s"
        self._serving = serving(self._path, self._recorder, max_rate_per_s=1e6, silence_s=60.0)
        self._serving.__enter__()
        self._sockets: list[socket.socket] = []
        self._owner: dict[int, socket.socket] = {}
        self._clock: dict[int, int] = {}

    def _ask(self, peer: socket.socket, request: Request) -> Status:
        peer.send(request.pack())
        answer = parse_answer(peer.recv(64))
        assert answer.sequence == request.sequence
        return answer.status

    def _let_go(self, peer: socket.socket) -> None:
        for gpu in [gpu for gpu, owner in self._owner.items() if owner is peer]:
            del self._owner[gpu], self._clock[gpu]

    @rule(target=peers)
    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets.append(peer)
        peer.settimeout(20)
        peer.connect(str(self._path))
        assert self._ask(peer, Request(operation=Operation.HELLO)) == Status.OK
        return peer

    @rule(peer=peers, gpu=GPUS, clock_mhz=CLOCKS, sequence=st.integers(0, 2**32 - 1))
    def lock(self, peer: socket.socket, gpu: int, clock_mhz: int, sequence: int) -> None:
        if gpu not in self._recorder.gpus:
            expected = Status.GPU_NOT_ALLOWED
        elif self._owner.get(gpu, peer) is not peer:
            expected = Status.TAKEN
        elif clock_mhz not in (0, *ALLOWED_MHZ):
            expected = Status.VALUE_NOT_ALLOWED
        else:
            expected = Status.OK
            self._owner[gpu], self._clock[gpu] = peer, clock_mhz
            if clock_mhz == 0:
                del self._owner[gpu], self._clock[gpu]
        request = Request(operation=Operation.LOCK, gpu=gpu, value=clock_mhz, sequence=sequence)
        assert self._ask(peer, request) == expected

    @rule(peer=peers, gpu=GPUS, value=st.integers(0, 2**32 - 1))
    def cap(self, peer: socket.socket, gpu: int, value: int) -> None:
        request = Request(operation=Operation.CAP, gpu=gpu, value=value)
        assert self._ask(peer, request) == Status.UNSUPPORTED

    @rule(peer=peers)
    def release(self, peer: socket.socket) -> None:
        self._let_go(peer)
        assert self._ask(peer, Request(operation=Operation.RELEASE)) == Status.OK

    @rule(peer=consumes(peers))
    def leave(self, peer: socket.socket) -> None:
        self._let_go(peer)
        peer.close()

    @rule(peer=consumes(peers), nonsense=st.binary(min_size=1, max_size=15))
    def talk_nonsense(self, peer: socket.socket, nonsense: bytes) -> None:
        self._let_go(peer)
        peer.send(nonsense)
        assert parse_answer(peer.recv(64)).status == Status.MALFORMED
        assert peer.recv(64) == b""
        peer.close()

    @invariant()
    def the_cards_are_as_the_model_says(self) -> None:
        assert eventually(lambda: self._recorder.held == self._clock)

    def teardown(self) -> None:
        for peer in self._sockets:
            peer.close()
        self._serving.__exit__(None, None, None)
        assert self._recorder.held == {}
        self._folder.cleanup()


Peers.TestCase.settings = settings(max_examples=20, stateful_step_count=25)
TestPeers = pytest.mark.slow(Peers.TestCase)


def test_descriptors_in_a_message_are_closed_and_a_flood_starves_nobody(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        serving(tmp_path / "s", recorder),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as harmful,
    ):
        harmful.settimeout(20)
        harmful.connect(str(tmp_path / "s"))
        read, write = os.pipe()
        rights = array.array("i", [write])
        beat = Request(operation=Operation.BEAT).pack()
        harmful.sendmsg([beat], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert parse_answer(harmful.recv(64)).status == Status.OK
        os.close(write)
        assert os.read(read, 1) == b""  # the actuator holds no other end
        os.close(read)
        harmful.setblocking(False)
        good = ActuatorClient(tmp_path / "s", [0])
        good.set_clock(1005)
        is_dropped = False

        def flood() -> bool:
            """Send without ever reading an answer, as fast as the kernel takes it."""
            nonlocal is_dropped
            for _ in range(2000):
                try:
                    harmful.send(beat)
                except BlockingIOError:
                    break
                except OSError:
                    is_dropped = True
                    break
            good.beat()
            return is_dropped and good.clock_mhz == 1005

        assert eventually(flood)
        good.close()
