"""Who may ask, for what, how often; and that every way of leaving gives the GPUs back."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hwreplay.actuator.conftest import ALLOWED_MHZ, Recorder, beating, eventually, serving
from voltana.hwreplay.actuator.actuator import Actuator, ActuatorConfig
from voltana.hwreplay.actuator.client import ActuatorClient, ActuatorLostError, DryRun
from voltana.hwreplay.messages.actuation import Operation, Request, Status, parse_answer
from voltana.profiles.common.errors import VoltanaError


def confirmed(client: ActuatorClient, clock_mhz: int) -> bool:
    return beating(client, lambda: client.clock_mhz == clock_mhz)


def ask(path: Path, *requests: Request) -> list[Status]:
    """Raw answers on one connection."""
    found = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(20)
        raw.connect(str(path))
        for request in requests:
            raw.send(request.pack())
            found.append(parse_answer(raw.recv(64)).status)
    return found


def lock(gpu: int, value: int) -> Request:
    return Request(operation=Operation.LOCK, gpu=gpu, value=value)


def test_an_instance_of_two_gpus_moves_together(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder):
        client = ActuatorClient(tmp_path / "s", [0, 1])
        assert client.silence_s == 2.0
        client.set_clock(1005)
        assert confirmed(client, 1005)
        assert recorder.held == {0: 1005, 1: 1005}
        client.set_clock(1005)  # the same wish is no message
        client.set_clock(0)
        assert confirmed(client, 0)
        client.close()
    assert recorder.calls == [(0, 1005), (1, 1005), (0, 0), (1, 0)]
    assert len(client.answer_s) == 4


def test_the_socket_is_its_owners_alone(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder):
        mode = (tmp_path / "s").stat()
        assert stat.S_ISSOCK(mode.st_mode)
        assert stat.S_IMODE(mode.st_mode) == 0o600
        assert mode.st_uid == os.getuid()
    assert not (tmp_path / "s").exists()


def test_a_peer_of_another_user_is_not_heard(tmp_path: Path, recorder: Recorder) -> None:
    with (
        serving(tmp_path / "s", recorder, allowed_uids=frozenset({os.getuid() + 1})),
        pytest.raises(ActuatorLostError, match="naming this user"),
    ):
        ActuatorClient(tmp_path / "s", [0])
    assert recorder.calls == []


def test_refusals_by_kind(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder):
        holder = ActuatorClient(tmp_path / "s", [1])
        holder.set_clock(705)
        assert confirmed(holder, 705)
        assert ask(
            tmp_path / "s",
            lock(7, 705),
            lock(0, 706),
            lock(1, 1410),
            lock(1, 0),
            Request(operation=Operation.CAP, gpu=0, value=300_000),
            lock(0, 705),
            lock(0, 0),
        ) == [
            Status.GPU_NOT_ALLOWED,
            Status.VALUE_NOT_ALLOWED,
            Status.TAKEN,
            Status.TAKEN,
            Status.UNSUPPORTED,
            Status.OK,
            Status.OK,
        ]
        assert recorder.calls == [(1, 705), (0, 705), (0, 0)]
        holder.close()


def test_rate_limit_and_the_way_back_is_free(tmp_path: Path, recorder: Recorder) -> None:
    """A bucket of 2 x 0.01 changes holds none; at 2 a second 4 pass at once and giving back too."""
    with serving(tmp_path / "s", recorder, max_rate_per_s=0.01):
        assert ask(tmp_path / "s", lock(0, 705)) == [Status.RATE_LIMITED]
    requests = [lock(0, ALLOWED_MHZ[i % 3]) for i in range(6)]
    with serving(tmp_path / "s", recorder, max_rate_per_s=2.0):
        answers = ask(tmp_path / "s", *requests, lock(0, 0))
    assert answers[:4] == [Status.OK] * 4
    assert Status.RATE_LIMITED in answers[4:6]
    assert answers[-1] == Status.OK
    assert recorder.held == {}


def test_a_new_connection_brings_no_new_changes(tmp_path: Path, recorder: Recorder) -> None:
    """Eight at once at 4 per s, on GPU 0, however often the peer comes back; GPU 1 has its own."""
    with serving(tmp_path / "s", recorder, max_rate_per_s=4.0):
        found = [ask(tmp_path / "s", lock(0, ALLOWED_MHZ[i % 3]))[0] for i in range(10)]
        assert found[:8] == [Status.OK] * 8
        assert Status.RATE_LIMITED in found[8:]
        assert ask(tmp_path / "s", lock(1, 705)) == [Status.OK]


@pytest.mark.parametrize(
    "limits", [{"silence_s": 61.0}, {"silence_s": 0.0}, {"silence_s": float("nan")},
               {"max_rate_per_s": float("inf")}],
)  # fmt: skip
def test_limits_that_are_none_are_refused(tmp_path: Path, limits: dict[str, float]) -> None:
    with pytest.raises(VoltanaError, match=f"{next(iter(limits))} must be > 0 and <="):
        ActuatorConfig(socket_path=tmp_path, allowed_uids=frozenset(), owner_uid=0, **limits)


def test_a_socket_for_another_user_needs_a_folder_that_nobody_else_renames_in(
    tmp_path: Path, recorder: Recorder
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives sockets away")
    for mode, owner, is_good in (
        (0o755, 0, True), (0o1777, 0, True), (0o777, 0, False), (0o775, 0, False),
        (0o755, 4242, False),
    ):  # fmt: skip
        folder = tmp_path / f"{mode:o}-{owner}"
        folder.mkdir()
        folder.chmod(mode)
        os.chown(folder, owner, -1)
        config = ActuatorConfig(
            socket_path=folder / "s", allowed_uids=frozenset({4242}), owner_uid=4242
        )
        if is_good:
            actuator = Actuator(recorder, config)
            assert (folder / "s").stat().st_uid == 4242
            actuator.stop()
            actuator.serve()
        else:
            with pytest.raises(VoltanaError, match="only root renames files"):
                Actuator(recorder, config)
            assert not (folder / "s").exists()


def test_a_driver_that_takes_long_is_not_the_clients_silence(
    tmp_path: Path, recorder: Recorder
) -> None:
    """A lock of 0.5 s, where 0.3 s of silence are allowed: the beats wait to be read meanwhile."""
    recorder.lock_s = 0.5
    with serving(tmp_path / "s", recorder, silence_s=0.3):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert beating(client, lambda: client.clock_mhz == 1005)
        client.close()


def test_silence_restores_and_the_client_learns_of_it(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder, silence_s=0.3):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert eventually(lambda: (0, 1005) in recorder.calls)
        assert eventually(lambda: recorder.held == {})
        with pytest.raises(ActuatorLostError, match="start it again"):
            while True:
                client.beat()
        client.close()


def test_beats_keep_the_clock(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder, silence_s=0.5):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert not beating(client, lambda: (0, 0) in recorder.calls, limit_s=1.5)
        client.close()


def test_a_closed_connection_restores(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder):
        ask(tmp_path / "s", lock(0, 705), lock(1, 1410))
        assert eventually(lambda: recorder.held == {})


def test_a_refusal_makes_the_next_wish_a_message(tmp_path: Path, recorder: Recorder) -> None:
    with serving(tmp_path / "s", recorder):
        client = ActuatorClient(tmp_path / "s", [0])
        for _ in range(2):
            client.set_clock(999)
            assert beating(client, lambda: not client.unanswered)
        assert client.refused == {Status.VALUE_NOT_ALLOWED: 2}
        assert "999 MHz on GPU 0" in client.last_refusal
        assert "--clocks" in client.last_refusal
        assert client.clock_mhz == 0
        client.close()


def test_the_socket_of_a_killed_actuator_is_replaced(tmp_path: Path, recorder: Recorder) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "s"))
    with serving(tmp_path / "s", recorder):
        ActuatorClient(tmp_path / "s", [0]).close()
        with pytest.raises(VoltanaError, match="in use"), serving(tmp_path / "s", recorder):
            pass
        ActuatorClient(tmp_path / "s", [0]).close()  # the first one is unharmed


def test_a_file_in_the_way_is_kept(tmp_path: Path, recorder: Recorder) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(VoltanaError, match="in use"), serving(tmp_path / "s", recorder):
        pass
    assert (tmp_path / "s").read_text() == "mine"


def test_a_socket_in_no_folder_says_which_to_make(tmp_path: Path, recorder: Recorder) -> None:
    place = tmp_path / "run" / "s"
    with (
        pytest.raises(VoltanaError, match=f"make the folder {place.parent}$"),
        serving(place, recorder),
    ):
        pass


MESSAGE = st.builds(
    Request,
    operation=st.sampled_from(Operation),
    gpu=st.integers(0, 2) | st.integers(0, 2**16 - 1),
    value=st.sampled_from(ALLOWED_MHZ) | st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**32 - 1),
).map(Request.pack)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Recorder]]:
    path, recorder = tmp_path_factory.mktemp("fuzz") / "s", Recorder()
    with serving(path, recorder):
        yield path, recorder


@given(st.lists(st.binary(min_size=1, max_size=64) | MESSAGE, max_size=8))
def test_fuzzed_peers_change_nothing_that_is_not_allowed(
    fuzzed: tuple[Path, Recorder], messages: list[bytes]
) -> None:
    path, recorder = fuzzed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(20)
        raw.connect(str(path))
        for message in messages:
            try:
                raw.send(message)
                assert len(raw.recv(64)) in (0, 16)
            except (BrokenPipeError, ConnectionResetError):
                break  # dropped, as it deserves
    assert ask(path, Request(operation=Operation.HELLO)) == [Status.OK]
    assert eventually(lambda: recorder.held == {})
    assert all(gpu in (0, 1) and value in (0, *ALLOWED_MHZ) for gpu, value in recorder.calls)


def test_wishes_that_come_faster_than_the_device_replace_each_other(
    tmp_path: Path, recorder: Recorder
) -> None:
    """Two cards, 50 changes, locks of 20 ms: in a row they would take 2 s, and each beat and the
    release would wait behind them. One message a card is under way, and the last wish wins."""
    recorder.lock_s = 0.02
    with serving(tmp_path / "s", recorder, silence_s=0.5):
        client = ActuatorClient(tmp_path / "s", [0, 1])
        for number in range(50):
            client.set_clock((705, 1005)[number % 2])
            client.collect()
            assert client.unanswered <= 2
            time.sleep(0.002)
        client.set_clock(1410)
        assert beating(client, lambda: client.clock_mhz == 1410)
        assert recorder.held == {0: 1410, 1: 1410}
        assert len(recorder.calls) < 50
        assert client.num_refused == client.unanswered == 0
        client.set_clock(705)
        client.set_clock(0)  # behind the lock that is under way, and no longer
        assert beating(client, lambda: client.clock_mhz == 0)
        client.close()


def test_a_refusal_with_a_newer_wish_waiting_leaves_the_wish(
    tmp_path: Path, recorder: Recorder
) -> None:
    recorder.lock_s = 0.05
    with serving(tmp_path / "s", recorder):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(999)
        client.set_clock(1005)
        assert beating(client, lambda: client.clock_mhz == 1005)
        assert client.num_refused == 1
        client.close()


def test_a_card_is_found_by_its_uuid_however_a_container_numbers_it(
    tmp_path: Path, recorder: Recorder
) -> None:
    """The container's 0 is the host's 1, and the other way round."""
    with serving(tmp_path / "s", recorder):
        client = ActuatorClient(tmp_path / "s", [0, 5], uuids=["GPU-0001", "GPU-0000"])
        client.set_clock(1005)
        assert beating(client, lambda: client.clock_mhz == 1005)
        assert recorder.calls == [(1, 1005), (0, 1005)]
        client.close()
        with pytest.raises(VoltanaError, match=r"must have GPU 1 \(GPU-0009\), it has not"):
            ActuatorClient(tmp_path / "s", [1], uuids=["GPU-0009"])
        assert recorder.calls[2:] == [(0, 0), (1, 0)]


def test_cards_that_cannot_be_told_apart_are_refused(tmp_path: Path, recorder: Recorder) -> None:
    recorder.uuids = dict.fromkeys(recorder.gpus, "GPU-0")
    with pytest.raises(VoltanaError, match="must differ"), serving(tmp_path / "s", recorder):
        pass


def test_dry_run_records_changes_only(tmp_path: Path) -> None:
    """And confirms none: no clock was touched."""
    actuator = DryRun(tmp_path / "d.jsonl")
    for clock in (1005, 1005, 1410):
        actuator.set_clock(clock)
        actuator.beat()
        assert actuator.clock_mhz == 0
    actuator.close()
    lines = (tmp_path / "d.jsonl").read_text().splitlines()
    assert [line.split('"clock_mhz": ')[1] for line in lines] == ["1005}", "1410}", "0}"]
