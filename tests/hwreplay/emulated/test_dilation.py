"""Slower time: every wait that our programs and SGLang's use, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voltana.hwreplay.emulated import dilation
from voltana.profiles.common.errors import VoltanaError

WAITS = """
import asyncio, queue, select, socket, sys, threading, time
import uvloop, zmq

def over(wait):
    try:
        wait()
    except (queue.Empty, TimeoutError, zmq.Again):
        pass

def condition():
    mine = threading.Condition()
    with mine:
        mine.wait(0.05)

def receive():
    mine = zmq.Context.instance().socket(zmq.PULL)
    mine.setsockopt(zmq.RCVTIMEO, 50)
    mine.bind("inproc://mine")
    mine.recv()

def read():
    mine, _ = socket.socketpair()
    mine.settimeout(0.05)
    mine.recv(1)

waits = [
    lambda: time.sleep(0.05), lambda: threading.Event().wait(0.05), condition, receive, read,
    lambda: select.select([], [], [], 0.05), lambda: select.poll().poll(50),
    lambda: select.epoll().poll(0.05), lambda: queue.Queue().get(timeout=0.05),
    lambda: queue.SimpleQueue().get(timeout=0.05), lambda: asyncio.run(asyncio.sleep(0.05)),
    lambda: uvloop.run(asyncio.sleep(0.05)),
]
for wait in waits:
    before = time.monotonic(), time.time()
    over(wait)
    print(time.monotonic() - before[0], time.time() - before[1])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dilation.build(tmp_path_factory.mktemp("library"))


def test_each_wait_lasts_its_time_on_the_slower_clock(library: Path) -> None:
    """A wait that the library forgets would end after 0.05 s of ours: a tenth of what it says.

    No wait is shorter than asked; how much longer is the machine's.
    """
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=os.environ | dilation.environment(10.0, library),
        capture_output=True,
        text=True,
        check=True,
    )
    took_s = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(took_s) == 12
    assert all(min(pair) > 0.049 for pair in took_s)
    assert time.monotonic() - start_s > 10.0 * 12 * 0.049


def test_processes_of_a_run_share_one_time(library: Path) -> None:
    variables = os.environ | dilation.environment(50.0, library)
    command = [sys.executable, "-c", "import time; print(time.monotonic())"]
    first, second = (
        float(subprocess.run(command, env=variables, capture_output=True, check=True).stdout)
        for _ in range(2)
    )
    assert 0 < second - first < (time.monotonic() - first) / 10


def test_what_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VoltanaError, match=r"dilation must be >= 1"):
        dilation.environment(0.5, library)
    monkeypatch.setenv(dilation.ENVIRONMENT, "4.0 0 0")
    with pytest.raises(VoltanaError, match=r"dilated 4 times already"):
        dilation.environment(2.0, library)
