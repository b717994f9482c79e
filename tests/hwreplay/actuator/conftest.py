"""Helpers in this process (a recording backend) and in their own (the emulated card)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.actuator.actuator import Actuator, ActuatorConfig
from voltana.hwreplay.actuator.client import ActuatorClient
from voltana.hwreplay.messages.actuation import Operation

ALLOWED_MHZ = (705, 1005, 1410)


class Recorder:
    """A backend that remembers every call, and what is held now."""

    operation = Operation.LOCK
    is_dry = False

    def __init__(self, gpus: Collection[int] = (0, 1)) -> None:
        self.gpus = gpus
        self.uuids = {gpu: f"GPU-{gpu:04x}" for gpu in gpus}
        self.lock_s = 0.0
        """Time that the driver takes for a lock."""
        self.calls: list[tuple[int, int]] = []
        self.held: dict[int, int] = {}

    def uuid_of(self, gpu: int) -> str | None:
        return self.uuids[gpu]

    def allows(self, gpu: int, value: int) -> bool:
        return value in ALLOWED_MHZ

    def hold(self, gpu: int, value: int) -> None:
        time.sleep(self.lock_s)
        self.calls.append((gpu, value))
        self.held[gpu] = value

    def restore(self, gpu: int) -> None:
        self.calls.append((gpu, 0))
        self.held.pop(gpu, None)

    def close(self) -> None:
        self.held.clear()


@contextmanager
def serving(path: Path, backend: Recorder, **settings: Any) -> Iterator[None]:  # noqa: ANN401
    """An actuator in a thread."""
    settings.setdefault("allowed_uids", frozenset({os.getuid()}))
    actuator = Actuator(
        backend, ActuatorConfig(socket_path=path, owner_uid=os.getuid(), **settings)
    )
    thread = threading.Thread(target=actuator.serve)
    thread.start()
    try:
        yield
    finally:
        actuator.stop()
        thread.join()


def eventually(is_so: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Whether something becomes true."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if is_so():
            return True
        time.sleep(0.01)
    return False


def beating(client: ActuatorClient, is_so: Callable[[], bool], limit_s: float = 20.0) -> bool:
    """Whether something becomes true while the client goes on saying that it lives."""

    def beat_and_look() -> bool:
        client.beat()
        return is_so()

    return eventually(beat_and_look, limit_s)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@contextmanager
def actuator_process(
    standin: Standin,  # noqa: F811
    path: Path,
    *options: str,
) -> Iterator[subprocess.Popen[str]]:
    """The real command in its own process, on the emulated card; ready when entered."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "voltana.experiments.cli",
            "actuator",
            str(path),
            "--gpu",
            "0",
            *options,
        ],
        env=standin.env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert "listening on" in line, line + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
