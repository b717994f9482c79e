"""The actuator in front of zeusd: the daemon holds the right, ours gives the clocks back."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hwreplay.actuator.conftest import actuator_process, beating, eventually
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.actuator.client import ActuatorClient
from voltana.hwreplay.messages.actuation import Status

pytestmark = pytest.mark.slow


@contextmanager
def zeusd(standin: Standin, path: Path, *token: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.profiles.device.zeusd_stub", str(path), *token],
        env=standin.env, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "listening\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_clocks_go_and_come_back_through_the_daemon_which_gives_nothing_back_by_itself(
    standin: Standin, tmp_path: Path, signum: signal.Signals
) -> None:
    """The actuator has no right of its own: its card refuses whoever is not the daemon."""
    with zeusd(standin, tmp_path / "zeusd"):
        options = ("--zeusd", str(tmp_path / "zeusd"))
        with actuator_process(standin, tmp_path / "s", *options) as process:
            client = ActuatorClient(tmp_path / "s", [0])
            client.set_clock(1005)
            assert beating(client, lambda: client.clock_mhz == 1005)
            assert standin["locked_mhz"] == 1005
            process.send_signal(signum)
            assert eventually(lambda: standin["locked_mhz"] == 0)
            client.close()
    assert (standin["num_locks"], standin["num_resets"]) == (1, 1)


def test_it_is_the_daemon_that_sets(standin: Standin, tmp_path: Path) -> None:
    """Without it nothing is set; while it is away a clock is not given back, and then it is."""
    with zeusd(standin, tmp_path / "zeusd") as daemon:
        options = ("--zeusd", str(tmp_path / "zeusd"), "--silence-s", "30")
        with actuator_process(standin, tmp_path / "s", *options):
            client = ActuatorClient(tmp_path / "s", [0])
            client.set_clock(1005)
            assert beating(client, lambda: client.clock_mhz == 1005)
            daemon.kill()
            daemon.wait()
            client.set_clock(705)
            assert beating(client, lambda: client.refused[Status.DEVICE_FAILED] == 1)
            client.close()
            assert standin["locked_mhz"] == 1005
            (tmp_path / "zeusd").unlink()
            with zeusd(standin, tmp_path / "zeusd"):
                assert eventually(lambda: standin["locked_mhz"] == 0)


def test_power_limits_too(standin: Standin, tmp_path: Path) -> None:
    with zeusd(standin, tmp_path / "zeusd"):
        options = ("--zeusd", str(tmp_path / "zeusd"), "--power-cap")
        with actuator_process(standin, tmp_path / "s", *options):
            client = ActuatorClient(tmp_path / "s", [0], make_caps_w=lambda: {1005: 250.0})
            client.set_clock(1005)
            assert beating(client, lambda: client.clock_mhz == 1005)
            assert standin["limit_mw"] == 250_000
            client.close()
            assert eventually(lambda: standin["limit_mw"] == 400_000)


@pytest.mark.parametrize(
    ("token", "word"), [("right", ""), ("wrong", "401 "), (None, "does not (FileNotFoundError")]
)
def test_a_daemon_that_refuses_or_is_not_there_is_one_line(
    standin: Standin, tmp_path: Path, token: str | None, word: str
) -> None:
    command = [sys.executable, "-m", "voltana.experiments.cli", "actuator", str(tmp_path / "s")]
    command += ["--gpu", "0", "--zeusd", str(tmp_path / "zeusd"), "--restore-first"]

    def said() -> subprocess.Popen[str]:
        env = standin.env | {"ZEUSD_TOKEN": token or ""}
        return subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    if token is None:
        process = said()
        _, err = process.communicate(timeout=60)
    else:
        with zeusd(standin, tmp_path / "zeusd", "right"):
            process = said()
            if not word:
                assert process.stderr is not None
                assert "listening on" in process.stderr.readline()
                process.terminate()
            _, err = process.communicate(timeout=60)
    if word:
        assert process.returncode == 2
        assert word in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("voltana: zeusd must ")
    else:
        assert standin["num_resets"] == 1
