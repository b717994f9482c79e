"""Servers end with the program that started them, whatever ends it. Sleeping Pythons serve."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from tests.hwreplay.actuator.conftest import eventually
from tests.hwreplay.conftest import ENGINE
from voltana.profiles.common.signals import stops_as_interrupts, stops_put_off

pytestmark = pytest.mark.slow

SERVER = """#!{python}
import mmap, os, subprocess, sys, time
if "-m" in sys.argv:  # what launch_server is: a parent that computes in a child
    child = subprocess.Popen([sys.executable, __file__, "child"])
    time.sleep(600)
path = f"/dev/shm/voltana-leak-{{os.getpgrp()}}"
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
with open({started!r}, "a") as out:
    out.write(f"{{os.getpgrp()}}\\n")
time.sleep(600)
"""

PROFILED = """
from pathlib import Path
from voltana.hwreplay.engines.launch import run_profiled
from voltana.hwreplay.engines.plan import Installation
with run_profiled(Installation.in_folder(Path({engine!r})), Path({logs!r}), is_pair=False):
    pass
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Path]:
    """Takes a line a server, its process group; what is left of them at the end is removed."""
    path = tmp_path / "started"
    yield path
    for group in groups_of(path):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for group in groups_of(path):
        memory_of(group).unlink(missing_ok=True)


def groups_of(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def memory_of(group: int) -> Path:
    return Path(f"/dev/shm/voltana-leak-{group}")


def is_there(group: int) -> bool:
    """Whether a process of the group runs; zombies wait for a parent that does not look."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def fake_engine(folder: Path, started: Path) -> Path:
    """What `make engine` would have filled, with a server that never becomes ready."""
    python = folder / "engine/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(SERVER.format(python=sys.executable, started=str(started)))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (folder / "engine/.installed").touch()
    model = folder / "engine/model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 512}')
    return folder / "engine"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name
)
def test_no_server_outlives_a_replay(tmp_path: Path, started: Path, number: signal.Signals) -> None:
    config = tmp_path / "replay.toml"
    fleet = {"engine": str(fake_engine(tmp_path, started))}
    whole = {"simulate": {"controller": "static"}, "fleet": fleet, "replay": {"power_w": 50.0}}
    config.write_text(tomli_w.dumps(whole))
    command = [sys.executable, "-m", "voltana.experiments.cli", "replay", "--config", str(config)]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE)
    assert eventually(lambda: len(groups_of(started)) == 4, 60), process.poll()
    groups = groups_of(started)
    assert all(is_there(group) and memory_of(group).exists() for group in groups)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130), said
    assert eventually(lambda: not any(is_there(group) for group in groups))
    assert eventually(lambda: not any(memory_of(group).exists() for group in groups))


def test_a_killed_profiler_leaves_no_server(tmp_path: Path, started: Path) -> None:
    """kill -9 while the server starts: nobody but the reaper is there to end it."""
    engine = fake_engine(tmp_path, started)
    owner = subprocess.Popen(
        [sys.executable, "-c", PROFILED.format(engine=str(engine), logs=str(tmp_path))]
    )
    try:
        assert eventually(lambda: len(groups_of(started)) == 1, 60)
    finally:
        owner.kill()
        owner.wait()
    assert eventually(lambda: not is_there(groups_of(started)[0]), 60)


def test_a_server_does_not_run_before_the_reaper_knows_of_it(tmp_path: Path, started: Path) -> None:
    """Its owner is killed between the two."""
    log = str(tmp_path / "log")
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from voltana.hwreplay.engines.server import spawn\n"
        "class Dying:\n"
        "    def guard(self, group):\n"
        "        print(group, flush=True)\n        os.kill(os.getpid(), 9)\n"
        f"spawn(['/bin/sh', '-c', 'echo $$ > {started}'], os.environ, Path({log!r}), Dying())\n"
    )
    owner = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.returncode == -signal.SIGKILL
    assert eventually(lambda: not is_there(int(owner.stdout)))
    assert not started.exists()


@pytest.mark.engine
def test_the_real_engine_is_ended_after_kill_9(tmp_path: Path) -> None:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    code = (
        "import time\nfrom pathlib import Path\n"
        "from voltana.hwreplay.engines.launch import run_fleet\n"
        "from voltana.hwreplay.engines.plan import Installation\n"
        f"engine = Installation.in_folder(Path({str(ENGINE)!r}))\n"
        f"with run_fleet(engine, Path({str(tmp_path)!r}), {{'prefill': 1}}, start_s=400)"
        " as (server,):\n"
        "    print(server.process.pid, *server.shared_memory, flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    group, *files = owner.stdout.readline().split()
    try:
        assert is_there(int(group))
        assert files
        owner.kill()
        assert eventually(lambda: not is_there(int(group)))
        assert eventually(lambda: not any(Path(file).exists() for file in files))
    finally:
        owner.kill()
        owner.communicate()


def test_a_server_that_has_ended_is_not_reaped(tmp_path: Path) -> None:
    """Its number may be another's by then: here that of a process which is released and lives."""
    code = (
        "import os, signal, subprocess, sys\nfrom voltana.hwreplay.engines.reaper import Reaper\n"
        "reaper = Reaper()\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "kept, lost = (\n"
        "    subprocess.Popen(sleep, start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "    for _ in range(2)\n)\n"
        "for process in (kept, lost):\n    reaper.guard(process.pid)\n"
        "reaper.release(kept.pid)\n"
        "print(kept.pid, lost.pid, reaper.pid, flush=True)\n"
        "os.kill(reaper.pid, signal.SIGTERM)\n"  # it is not talked out of its duty
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    kept, lost, reaper = map(int, done.stdout.split())
    try:
        assert eventually(lambda: not is_there(lost))
        assert eventually(lambda: not is_there(reaper))
        assert is_there(kept)
    finally:
        os.killpg(kept, signal.SIGKILL)


def test_a_job_that_is_deaf_to_ctrl_c_still_hears_the_others() -> None:
    """A script's background job inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), stops_as_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_to_stop_are_interrupts_and_can_be_put_off() -> None:
    with stops_as_interrupts():
        for number in (signal.SIGTERM, signal.SIGHUP):
            cleaned = False
            with pytest.raises(KeyboardInterrupt):
                with stops_put_off():
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)
                    cleaned = True
                time.sleep(1)
            assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
