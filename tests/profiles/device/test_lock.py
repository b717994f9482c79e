"""Clocks come back: normal exit, exception, signals, and kill -9 through the watchdog."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.profiles.device.standin import Standin

OPEN = (
    "from voltana.profiles.device.nvml import NvmlGpu\n"
    "from voltana.profiles.device.lock import ClockSession\n"
    "from voltana.profiles.device import gpu as g\n"
    "gpu = NvmlGpu(0)\n"
)
HOLD = (
    OPEN + "import time\nwith ClockSession([gpu]) as clocks:\n"
    "    clocks.lock(1005)\n    print('locked', clocks.watchdog_pid, flush=True)\n"
    "    time.sleep(300)"
)


def eventually(standin: Standin, field: str, value: int) -> bool:
    for _ in range(1200):
        if standin[field] == value:
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid: int) -> bool:
    for _ in range(1200):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_normal_exit_restores(standin: Standin) -> None:
    out = standin.run(
        OPEN
        + "with ClockSession([gpu]) as clocks:\n    clocks.lock(1005)\n    print(gpu.clock_mhz())"
    )
    assert out == "1005"
    assert (standin["locked_mhz"], standin["num_locks"]) == (0, 1)


def test_exception_restores_and_goes_on(standin: Standin) -> None:
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu]) as clocks:\n        clocks.lock(1200)\n"
        "        raise RuntimeError('boom')\nexcept RuntimeError as e:\n    print(e)"
    )
    assert out == "boom"
    assert (standin["locked_mhz"], standin["num_resets"]) == (0, 1)


def test_returns_to_a_stated_previous_lock(standin: Standin) -> None:
    standin.run(
        OPEN + "with ClockSession([gpu], previous_clock_mhz=1410) as clocks:\n    clocks.lock(705)"
    )
    assert (standin["locked_mhz"], standin["num_resets"]) == (1410, 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_restore(standin: Standin, signum: signal.Signals) -> None:
    process = standin.popen(HOLD)
    assert process.stdout is not None
    watchdog_pid = int(process.stdout.readline().split()[1])
    assert standin["locked_mhz"] == 1005
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert standin["locked_mhz"] == 0
    assert gone(watchdog_pid)


def test_kill_9_is_repaired_by_the_watchdog(standin: Standin) -> None:
    process = standin.popen(HOLD)
    assert process.stdout is not None
    watchdog_pid = int(process.stdout.readline().split()[1])
    assert standin["locked_mhz"] == 1005
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert eventually(standin, "locked_mhz", 0)
    assert gone(watchdog_pid)


def test_kill_9_with_the_pipe_held_open_by_a_forked_child(standin: Standin) -> None:
    """A fork without exec inherits the pipe's write end, so that its end of file never comes."""
    fork = (
        OPEN + "import os, time\nwith ClockSession([gpu]) as clocks:\n    clocks.lock(1005)\n"
        "    child = os.fork()\n    if child == 0:\n        time.sleep(120); os._exit(0)\n"
        "    print('locked', child, flush=True)\n    time.sleep(300)"
    )
    process = standin.popen(fork)
    assert process.stdout is not None
    child_pid = int(process.stdout.readline().split()[1])
    try:
        process.kill()
        process.wait(timeout=60)
        assert eventually(standin, "locked_mhz", 0)
        assert is_alive(child_pid)
    finally:
        os.kill(child_pid, signal.SIGKILL)
        process.communicate(timeout=60)


def test_a_terminated_watchdog_unlocks_first(standin: Standin) -> None:
    process = standin.popen(HOLD)
    assert process.stdout is not None
    watchdog_pid = int(process.stdout.readline().split()[1])
    os.kill(watchdog_pid, signal.SIGTERM)
    assert eventually(standin, "locked_mhz", 0)
    process.kill()
    process.communicate(timeout=60)


def test_without_permission_one_clear_message_and_nothing_touched(standin: Standin) -> None:
    standin["deny_lock"] = 1
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu]) as clocks:\n        clocks.lock(1005)\n"
        "except g.PermissionDeniedError as e:\n    print(e)"
    )
    assert "must answer lock_clock" in out
    assert "--frequencies current" in out
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)


def test_a_session_that_never_locks_touches_nothing(standin: Standin) -> None:
    out = standin.run(OPEN + "with ClockSession([gpu]) as clocks:\n    print(clocks.watchdog_pid)")
    assert out == "None"
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)


def test_a_clock_that_is_not_reached_times_out_with_the_reason(standin: Standin) -> None:
    standin["stuck_mhz"] = 900
    standin["throttle_bits"] = 0x4
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu], timeout_s=0.1) as clocks:\n"
        "        clocks.lock(1410)\nexcept g.ClockTimeoutError as e:\n    print(e)"
    )
    assert "must reach 1410 MHz within 0.1 s, it stands at 900 MHz (throttling: power)" in out
    assert standin["locked_mhz"] == 0


def test_an_unsupported_clock_names_the_nearest(standin: Standin) -> None:
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu]) as clocks:\n        clocks.lock(1007)\n"
        "except g.DeviceError as e:\n    print(e)"
    )
    assert "the nearest is 1005 MHz" in out
    assert standin["num_locks"] == 0


def test_refuses_a_card_in_use_unless_told_otherwise(standin: Standin) -> None:
    standin["foreign_pid"] = 1
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu]):\n        print('entered')\n"
        "except g.GpuBusyError as e:\n    print(e)\n"
        "with ClockSession([gpu], allow_shared=True):\n    print('shared')\n"
        "with ClockSession([gpu], allowed_pids=frozenset({1})):\n    print('attached')"
    )
    busy, *rest = out.splitlines()
    assert "got processes [1]" in busy
    assert rest == ["shared", "attached"]


@pytest.mark.parametrize(("state", "pid"), [(2**32 - 1, 0), (2**31 - 1, 2**31 - 1)])
def test_a_process_of_another_pid_namespace_is_foreign_and_said_to_be_elsewhere(
    standin: Standin, state: int, pid: int
) -> None:
    """In a container NVML shows host pids, or 0. No pid here is 2**31 - 1: pid_max is lower."""
    standin["foreign_pid"] = state
    out = standin.run(
        OPEN + "try:\n    with ClockSession([gpu]):\n        print('entered')\n"
        "except g.GpuBusyError as e:\n    print(e)\n"
    )
    assert f"got processes [{pid}] on it; [{pid}] are not in this container's" in out
    assert "nvidia-smi on the host" in out
    assert out.count("\n") == 0


def test_own_children_do_not_count_as_foreign(standin: Standin) -> None:
    out = standin.run(
        OPEN + "import subprocess, sys\n"
        "from tests.profiles.device.standin import put\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "put(foreign_pid=child.pid)\n"
        "with ClockSession([gpu]):\n    print(gpu.process_ids() == {child.pid})\n"
        "child.communicate(b'x')"
    )
    assert out == "True"


def test_own_processes_are_told_by_descent_or_by_being_there_first(standin: Standin) -> None:
    """Numbered alike, nothing is unknown; else (host pids in a container) all on the card are."""
    out = standin.run(
        OPEN + "import os\n"
        "from tests.profiles.device.standin import put\n"
        "with ClockSession([gpu]) as clocks:\n"
        "    put(foreign_pid=os.getpid())\n    print(sorted(clocks.unknown_pids()))\n"
        "    clocks.check_free()\n    put(foreign_pid=2**31 - 1)\n"
        "    known = clocks.unknown_pids()\n    print(sorted(known))\n"
        "    clocks.check_free(known)\n"
        "    put(foreign_pid=2**31 - 2)\n"
        "    try:\n        clocks.check_free(known)\n"
        "    except g.GpuBusyError as e:\n        print('busy')\n"
        "with ClockSession([gpu], allow_shared=True) as clocks:\n    clocks.check_free()"
    )
    assert out.splitlines() == ["[]", str([2**31 - 1]), "busy"]
