"""The mapped file: whole or refused in one line, and whole whoever is killed while writing it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hwreplay.emulated.conftest import Bench, MakeBench
from tests.profiles.device.standin import ROOT
from voltana.hwreplay.emulated.build import environment
from voltana.hwreplay.emulated.card import PAGE_BYTES, Record
from voltana.hwreplay.emulated.state import open_cards
from voltana.profiles.common.errors import VoltanaError

NAME_AT = PAGE_BYTES + Record.fixed.offset
ACTIVE_AT = PAGE_BYTES + Record.active.offset


def rewrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (0, b"nonsense", "is not a file of emulated cards"),
        (8, (7).to_bytes(4, "little"), r"is of version 7 \(.*\), the library of 1 "),
        (16, (99).to_bytes(4, "little"), r"is of version 1 \(99 bytes a card\)"),
        (NAME_AT, b"X", "is damaged: card 0 does not add up"),
        (ACTIVE_AT, b"\xff", "is damaged: card 0 does not add up"),
        (12, (3).to_bytes(4, "little"), "has been cut short"),
    ],
)
def test_what_is_wrong_is_one_line_here_and_behind_nvml(
    make_bench: MakeBench, offset: int, data: bytes, said: str
) -> None:
    bench = make_bench()
    rewrite(bench.path, offset, data)
    with pytest.raises(VoltanaError, match=said) as done:
        open_cards(bench.path, bench.library)
    assert "make it anew" in str(done.value)
    assert "\n" not in str(done.value)
    script = (
        "from voltana.profiles.device.nvml import NvmlGpu\n"
        "from voltana.profiles.common.errors import VoltanaError\n"
        "try:\n    NvmlGpu(0)\nexcept VoltanaError as error:\n    print(error)"
    )
    out = subprocess.check_output(
        [sys.executable, "-c", script],
        env=os.environ | environment(bench.library, bench.path),
        cwd=ROOT,
        text=True,
    )
    assert "the emulated cards' file must be whole" in out
    assert out.count("\n") == 1


def test_no_file_and_no_library_say_so(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench()
    with pytest.raises(VoltanaError, match="No such file or directory: make it anew"):
        open_cards(tmp_path / "nowhere", bench.library)
    with pytest.raises(VoltanaError, match="run `make engine`"):
        open_cards(bench.path, tmp_path)


def test_a_process_in_another_time_is_refused(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clocks would book one card's energy."""
    bench = make_bench()
    monkeypatch.setenv("VOLTANA_DILATION", "4.0 1 2")
    with pytest.raises(VoltanaError, match="was made in a time of another dilation"):
        open_cards(bench.path, bench.library)


WRITER = (
    "import sys\nfrom voltana.hwreplay.emulated.card import Cards\n"
    "card = Cards()[0]\nprint(flush=True)\n"
    "while True:\n"
    "    card.begin_pass(300.0, 0.0005)\n    card.set_power_limit(300.0)\n    card.look()\n"
)


def killed_writer(bench: Bench, after_s: float) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        env=os.environ | environment(bench.library, bench.path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(after_s)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()


def test_writers_killed_at_any_point_leave_a_file_that_adds_up(make_bench: MakeBench) -> None:
    """Watts lie between rest and pass, so energy does; nobody is left waiting for a dead holder."""
    bench = make_bench().at(-1.0)
    for number in range(12):
        killed_writer(bench, 0.003 * number)
        look = bench.card.look()
        assert 63.0 * look.now_s <= look.energy_j * (1 + 1e-9)
        assert look.energy_j <= 300.0 * look.now_s * (1 + 1e-9)
        others = open_cards(bench.path, bench.library)
        assert others[0].look().num_passes == look.num_passes
    assert bench.card.look().num_passes > 0


def test_a_holder_that_dies_with_the_card_taken_is_survived(make_bench: MakeBench) -> None:
    """The worst moment, made: a child takes the record's mutex and is killed with it."""
    bench = make_bench()
    address = bench.card.address + Record.mutex.offset
    lock = ctypes.CDLL("libc.so.6").pthread_mutex_lock
    lock.argtypes = [ctypes.c_void_p]
    child = os.fork()
    if child == 0:
        lock(address)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert bench.at(1.0).card.look().energy_j == pytest.approx(63.0)
