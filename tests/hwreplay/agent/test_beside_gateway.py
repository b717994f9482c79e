"""Agents beside the real sgl-model-gateway (`sglang-router`), which knows nothing of them.

The servers are stubs and the card is emulated; gateway, agents and actuator are the real ones.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.agent.test_attach import attached
from tests.hwreplay.engine_voice import repeating
from tests.hwreplay.router.test_router import events, request_body
from tests.hwreplay.stub_worker import HOST
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin

pytestmark = pytest.mark.slow

TOKENS = 30


@contextmanager
def stub_servers(folder: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """One server of each phase, in a process of their own."""
    metrics = f"ipc://{folder}/{{phase}}-{{index}}"
    command = [sys.executable, "-m", "tests.hwreplay.stub_worker", "--metrics", metrics]
    with subprocess.Popen([*command, "--decode-s", "0.01"], cwd=ROOT, stdout=subprocess.PIPE) as p:
        try:
            assert p.stdout is not None
            yield json.loads(p.stdout.readline())
        finally:
            p.kill()


@contextmanager
def gateway(fleet: dict[str, list[dict[str, str]]], log: Path) -> Iterator[str]:
    """Its URL, once it sends requests to the servers."""
    program = shutil.which("smg", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("sgl-model-gateway is needed: pip install sglang-router")
    with socket.socket() as one, socket.socket() as two:
        one.bind((HOST, 0))
        two.bind((HOST, 0))
        port, own_metrics = one.getsockname()[1], two.getsockname()[1]
    command = [
        program, "launch", "--pd-disaggregation", "--prefill", fleet["prefill"][0]["url"], "none",
        "--decode", fleet["decode"][0]["url"], "--host", HOST, "--port", str(port),
        "--prometheus-port", str(own_metrics), "--log-level", "warn",
    ]  # fmt: skip
    url = f"http://{HOST}:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            return requests.get(f"{url}/readiness", timeout=5).ok
        except requests.ConnectionError:
            return False

    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            assert eventually(is_ready), log.read_text()[-2000:]
            yield url
        finally:
            process.kill()


def ask(url: str) -> None:
    answer = requests.post(f"{url}/generate", json=request_body(8, TOKENS), timeout=60)
    assert answer.status_code == 200
    assert len(events(answer.content)) == TOKENS


def settled(count: Callable[[], float]) -> float:
    """What it counts when it has stood for a while."""
    found = -1.0
    while found != (found := count()):
        time.sleep(0.3)
    return found


def test_a_shadow_watches_and_an_actor_sets_under_a_router_that_is_not_ours(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    socket_ = tmp_path / "actuator"
    with (
        stub_servers(tmp_path) as fleet,
        gateway(fleet, tmp_path / "gateway.log") as url,
        actuator_process(standin, socket_),
    ):
        address = fleet["decode"][0]["metrics"]
        with attached(standin, tmp_path, address) as shadow:
            assert eventually(lambda: len(shadow.lines()) > 0)

            def seen() -> float:
                return shadow.metrics().get("voltana_iterations_total", 0)

            with repeating(lambda: ask(url)):
                assert eventually(lambda: seen() > 0)
            before = settled(seen)
            ask(url)
            assert eventually(lambda: seen() == before + TOKENS)
            found = shadow.metrics()
        assert shadow.process.returncode == 0
        assert found["voltana_wished_clock_mhz"] == 1005
        assert found["voltana_estimated_saved_joules"] > 0
        assert (standin["num_locks"], standin["num_resets"]) == (0, 0)

        with attached(standin, tmp_path, address, "--act"), repeating(lambda: ask(url)):
            assert eventually(lambda: standin["locked_mhz"] == 1005)
        assert standin["locked_mhz"] == 0
        ask(url)
