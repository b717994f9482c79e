"""A command whose optional part is not installed names it, and is no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from voltana.experiments.extras import needs
from voltana.profiles.common.errors import VoltanaError

BLOCKED = {
    "replay": ("aiohttp", "httptools", "uvloop", "zmq", "prometheus_client"),
    "report": ("plotly",),
}
PROGRAM = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Missing())
from voltana.experiments.cli import main
main()
"""
COMMANDS = {
    "router": ("replay", ["router", "--config", "fleet.toml"]),
    "agent": ("replay", ["agent", "agent.json"]),
    "replay": ("replay", ["replay", "--config", "replay.toml", "--out", "nowhere"]),
    "doctor": ("replay", ["doctor", "hwreplay/serve.toml"]),
    "probe": ("replay", ["replay", "--config", "replay.toml", "--out", "nowhere", "--probe"]),
    "report": ("report", ["report", "results"]),
}


def without(extra: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{blocked}", repr(BLOCKED[extra])), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_its_extra(name: str) -> None:
    extra, arguments = COMMANDS[name]
    done = without(extra, *arguments)
    assert done.returncode == 2
    verb = arguments[0]
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"voltana: voltana {verb} ")
    assert " needs " in line
    assert line.endswith(f": pip install 'voltana[{extra}]'")


@pytest.mark.parametrize(
    "arguments", [["validate", "a", "b"], ["actuator", "--help"], ["doctor", "--json"]]
)
def test_commands_of_the_hardware_that_need_none_go_on_without(arguments: list[str]) -> None:
    done = without("replay", *arguments)
    assert "Traceback" not in done.stderr
    assert "pip install" not in done.stderr
    assert arguments[0] != "doctor" or json.loads(done.stdout)["findings"]


def test_a_module_of_ours_that_is_missing_is_a_fault_and_no_extra() -> None:
    with pytest.raises(ModuleNotFoundError), needs("replay", "voltana router"):
        raise ModuleNotFoundError("No module named 'voltana.sim.gone'", name="voltana.sim.gone")
    line = r"^voltana x needs zmq: pip install 'voltana\[replay\]'$"
    with pytest.raises(VoltanaError, match=line), needs("replay", "voltana x"):
        raise ModuleNotFoundError("No module named 'zmq.asyncio'", name="zmq.asyncio")
