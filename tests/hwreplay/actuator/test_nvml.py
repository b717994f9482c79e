"""The real command on the emulated card: locks, caps, and every way to die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hwreplay.actuator.conftest import actuator_process, beating, eventually
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.actuator.client import ActuatorClient, ActuatorLostError
from voltana.hwreplay.messages.actuation import Status
from voltana.profiles.common.errors import VoltanaError

UNKNOWN = 999
"""NVML's word for what passes."""
CLIENT = (
    "import sys, time\nfrom pathlib import Path\n"
    "from voltana.hwreplay.actuator.client import ActuatorClient\n"
    "client = ActuatorClient(Path({path!r}), [0])\nclient.set_clock(1005)\n"
    "print('sent', flush=True)\n"
    "while True:\n    client.beat()\n    time.sleep(0.05)\n"
)


def locked(standin: Standin, client: ActuatorClient, clock_mhz: int) -> None:
    client.set_clock(clock_mhz)
    assert beating(client, lambda: client.clock_mhz == clock_mhz)
    assert standin["locked_mhz"] == clock_mhz


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_clocks_come_back_whatever_ends_the_actuator(
    standin: Standin, tmp_path: Path, signum: signal.Signals
) -> None:
    with actuator_process(standin, tmp_path / "s") as process:
        client = ActuatorClient(tmp_path / "s", [0])
        locked(standin, client, 1005)
        locked(standin, client, 705)
        process.send_signal(signum)
        assert eventually(lambda: standin["locked_mhz"] == 0)
        with pytest.raises(ActuatorLostError):
            while True:
                client.beat()
        client.close()
    assert standin["num_resets"] == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_clocks_come_back_when_the_client_dies_or_freezes(
    standin: Standin, tmp_path: Path, signum: signal.Signals
) -> None:
    with actuator_process(standin, tmp_path / "s", "--silence-s", "0.5"):
        client = standin.popen(CLIENT.format(path=str(tmp_path / "s")))
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "sent\n"
            assert eventually(lambda: standin["locked_mhz"] == 1005)
            client.send_signal(signum)
            assert eventually(lambda: standin["locked_mhz"] == 0)
        finally:
            client.kill()
            client.communicate()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_power_limit_comes_back(standin: Standin, tmp_path: Path, signum: signal.Signals) -> None:
    with actuator_process(standin, tmp_path / "s", "--power-cap") as process:
        client = ActuatorClient(tmp_path / "s", [0], make_caps_w=lambda: {705: 180.0, 1410: 401.0})
        client.set_clock(705)
        assert beating(client, lambda: client.clock_mhz == 705)
        assert standin["limit_mw"] == 180_000
        client.set_clock(1410)  # above the limit found at start: never
        assert beating(client, lambda: bool(client.refused))
        assert client.refused == {Status.VALUE_NOT_ALLOWED: 1}
        client.set_clock(1005)  # no limit stands for it
        assert client.refused == {Status.VALUE_NOT_ALLOWED: 2}
        process.send_signal(signum)
        assert eventually(lambda: standin["limit_mw"] == 400_000)
        client.close()
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)


def test_who_knows_no_limits_cannot_use_an_actuator_that_sets_them(
    standin: Standin, tmp_path: Path
) -> None:
    with (
        actuator_process(standin, tmp_path / "s", "--power-cap"),
        pytest.raises(VoltanaError, match="limits power"),
    ):
        ActuatorClient(tmp_path / "s", [0])


def test_allowed_clocks_are_the_commands(standin: Standin, tmp_path: Path) -> None:
    with actuator_process(standin, tmp_path / "s", "--clocks", "705,1410"):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert beating(client, lambda: bool(client.refused))
        locked(standin, client, 1410)
        client.close()
        assert eventually(lambda: standin["locked_mhz"] == 0)


def test_a_card_that_refuses_is_reported_and_not_touched(standin: Standin, tmp_path: Path) -> None:
    standin["deny_lock"] = 1
    with actuator_process(standin, tmp_path / "s") as process:
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert beating(client, lambda: bool(client.refused))
        assert client.refused == {Status.DEVICE_FAILED: 1}
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        client.close()
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)


def test_restoring_is_tried_until_it_works(standin: Standin, tmp_path: Path) -> None:
    with actuator_process(standin, tmp_path / "s"):
        client = ActuatorClient(tmp_path / "s", [0])
        locked(standin, client, 1005)
        standin["lock_error"] = UNKNOWN
        client.close()
        assert not eventually(lambda: standin["locked_mhz"] == 0, limit_s=0.3)
        standin["lock_error"] = 0
        assert eventually(lambda: standin["locked_mhz"] == 0)


def test_modules_in_the_working_folder_are_not_run(standin: Standin, tmp_path: Path) -> None:
    """Root may stand in a folder where somebody has put a module of a name that is imported."""
    trap = tmp_path / "trap"
    for name in ("voltana", "json", "selectors", "pynvml"):
        (trap / name).mkdir(parents=True)
        (trap / name / "__init__.py").write_text(
            f"open({str(tmp_path / 'sprung')!r}, 'a').write({name!r})\n"
        )
    command = [
        sys.executable,
        "-P",
        "-m",
        "voltana.experiments.cli",
        "actuator",
        str(tmp_path / "s"),
    ]
    process = subprocess.Popen(
        [*command, "--gpu", "0"], env=standin.env, cwd=trap, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "listening on" in process.stderr.readline()
        client = ActuatorClient(tmp_path / "s", [0])
        locked(standin, client, 1005)
        process.kill()
        assert eventually(lambda: standin["locked_mhz"] == 0)
        client.close()
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "sprung").exists()


def test_a_clock_the_card_lacks_is_one_line(standin: Standin, tmp_path: Path) -> None:
    out = standin.run(
        "import subprocess, sys\n"
        f"p = subprocess.run([sys.executable, '-m', 'voltana.experiments.cli', 'actuator', "
        f"{str(tmp_path / 's')!r}, '--gpu', '0', '--clocks', '1007'], "
        "capture_output=True, text=True)\nprint(p.returncode, p.stderr)"
    )
    assert out.startswith("2 voltana: --clocks must be clocks that GPU 0 supports, got [1007]")
    assert "\n" not in out
    assert standin["num_locks"] == 0


def test_dry_run_needs_no_driver(standin: Standin, tmp_path: Path) -> None:
    standin.env["LD_LIBRARY_PATH"] = ""
    record = tmp_path / "record.jsonl"
    with actuator_process(standin, tmp_path / "s", "--dry-run", str(record)):
        client = ActuatorClient(tmp_path / "s", [0])
        client.set_clock(1005)
        assert beating(client, lambda: record.read_text() != "" and not client.unanswered)
        assert (client.clock_mhz, client.num_refused) == (0, 0)  # nothing was touched
        client.close()
        assert eventually(lambda: record.read_text().count("\n") == 2)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["gpu"], line["clock_mhz"]) for line in lines] == [(0, 1005), (0, 0)]
    assert standin["num_locks"] == 0


def test_cards_may_be_named_by_uuid_and_all(standin: Standin, tmp_path: Path) -> None:
    standin["num_gpus"] = 3
    uuids = [card.uuid for card in standin.cards]
    for words, allowed in (((uuids[2],), {0, 2}), (("all",), {0, 1, 2})):
        options = [word for name in words for word in ("--gpu", name)]
        with actuator_process(standin, tmp_path / "s", *options):
            for gpu, uuid in enumerate(uuids):
                if gpu in allowed:
                    ActuatorClient(tmp_path / "s", [0], uuids=[uuid]).close()
                else:
                    with pytest.raises(VoltanaError, match="must have GPU"):
                        ActuatorClient(tmp_path / "s", [0], uuids=[uuid])
    command = [sys.executable, "-m", "voltana.hwreplay.actuator", str(tmp_path / "s")]
    command += ["--gpu", "GPU-nobody's"]
    done = subprocess.run(command, env=standin.env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert uuids[0] in done.stderr


def test_what_was_killed_together_with_its_watchdog_is_given_back_at_the_next_start(
    standin: Standin, tmp_path: Path
) -> None:
    """As in a container, whose end takes every process in it."""
    with actuator_process(standin, tmp_path / "s") as process:
        client = ActuatorClient(tmp_path / "s", [0])
        locked(standin, client, 1005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGSTOP)  # lest the watchdog's end be noticed
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait()
        client.close()
    assert standin["locked_mhz"] == 1005
    with actuator_process(standin, tmp_path / "s", "--restore-first"):
        assert standin["locked_mhz"] == 0


def test_told_together_with_its_watchdog_it_ends_in_order(standin: Standin, tmp_path: Path) -> None:
    """As systemd ends a unit: whoever comes second has nothing left to do, and nothing to say."""
    with actuator_process(standin, tmp_path / "s") as process:
        client = ActuatorClient(tmp_path / "s", [0])
        locked(standin, client, 1005)
        (watchdog,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(watchdog), signal.SIGTERM)
        assert eventually(lambda: standin["locked_mhz"] == 0)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        client.close()


def test_with_the_rights_of_its_container_alone_it_starts_again_after_a_kill(
    standin: Standin, tmp_path: Path
) -> None:
    """Root without CAP_DAC_OVERRIDE may not open the stale socket, which is another user's."""
    if os.geteuid() or shutil.which("setpriv") is None:
        pytest.skip("root and setpriv are needed")
    rights = ("setpriv", "--no-new-privs", "--bounding-set=-all,+sys_admin,+chown")
    command = [*rights, sys.executable, "-m", "voltana.hwreplay.actuator", str(tmp_path / "s")]
    command += ["--gpu", "all", "--uid", "990", "--restore-first", "--allow-writable-code"]
    for _ in range(2):
        process = subprocess.Popen(
            command, env=standin.env, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert "listening on" in process.stderr.readline()
        assert (tmp_path / "s").stat().st_uid == 990
        process.kill()
        process.wait()
        process.stderr.close()
