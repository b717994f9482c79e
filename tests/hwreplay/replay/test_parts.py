"""What stands around the load: an agent or a recorder that ends early does not go unnoticed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from tests.hwreplay.actuator.conftest import eventually
from tests.hwreplay.engine_voice import EngineVoice, repeating
from tests.hwreplay.replay.test_replay import await_rows, start_command, stub_process, write_config
from voltana.hwreplay.agent.agent import AgentConfig, await_agents, start_agents
from voltana.hwreplay.replay.config import read_replay_config
from voltana.hwreplay.replay.load import LoadGenerator
from voltana.hwreplay.replay.replay import send_all
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.results import read_run

POLCA = "polca:budget_w=300,period_s=0.2,lag_s=0.1,brake_lag_s=0.1"


def pids_of(words: str) -> list[int]:
    """Processes whose command line has these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes().replace(b"\0", b" ").decode():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_whose_agent_died_is_incomplete_and_says_since_when(tmp_path: Path) -> None:
    with stub_process() as fleet:
        config = write_config(tmp_path, fleet, seconds=8, outputs=10)
        process = start_command(config, tmp_path / "real")
        await_rows(process, tmp_path / "real/requests.jsonl", 5)
        (pid,) = pids_of(f"{tmp_path}/real/agent-decode-0.json")
        os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert b"agent-decode-0 ended with -9 at" in said
    record = read_run(tmp_path / "real")
    assert record.settings["is_complete"] is False
    reason = record.settings["incomplete_reason"]
    assert reason.startswith("agent-decode-0 ended with -9 at ")
    assert reason.endswith(" s, its clock was unlocked from then on")
    assert (record.requests.status == 1).all()  # the load went on
    decode = next(i for i in record.instances if i.phase == "decode")
    assert set(decode.clock_busy_s) == {0}  # a dry run sets none


def test_a_recorder_that_fails_ends_the_run() -> None:
    class Endless:
        was_cancelled = False

        async def run(self, on_end: Callable[[], None]) -> None:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise OSError("disk full")

    async def play(generator: Endless) -> None:
        recorders = {"decode-0": asyncio.create_task(fail())}
        await send_all(cast("LoadGenerator", generator), recorders, lambda: None)

    generator = Endless()
    with pytest.raises(VoltanaError, match=r"iterations of decode-0 .* \(OSError: disk full\)"):
        asyncio.run(play(generator))
    assert generator.was_cancelled


def lowest_clock_mhz(profile: str) -> int:
    return min(load_profile(profile).meta.clocks.supported_mhz)


@pytest.mark.slow
def test_agents_of_one_process_share_what_they_see(tmp_path: Path) -> None:
    """POLCA with a budget of 300 W: each instance draws 200, so that only both are over it."""
    settings = {
        "controller": POLCA, "router": "round-robin", "num_prefill": 1, "num_decode": 1,
        "prefill_metrics": "after",
    }  # fmt: skip
    with ExitStack() as stack:
        voices, configs = [], []
        for phase in ("prefill", "decode"):
            voices.append(EngineVoice(tmp_path / phase))
            stack.callback(voices[-1].close)
            own: dict[str, Any] = {"phase": phase, "metrics_address": voices[-1].address}
            configs.append(
                AgentConfig(
                    instance_id=0, start_ns=time.monotonic_ns(), settings=settings, power_w=200.0,
                    **own,
                )
            )  # fmt: skip
        process = start_agents(configs, tmp_path)
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        await_agents(process, configs, tmp_path)
        prefill, decode = voices
        say_prefill = {"num_prefill_requests": 1, "sum_prefill_tokens": 100}
        stack.enter_context(repeating(lambda: prefill.say(**say_prefill)))
        stack.enter_context(repeating(lambda: decode.decode(1, 500)))
        lowest_mhz = lowest_clock_mhz("a100-80g-sxm/llama-3.1-8b")
        for config in configs:
            decisions = tmp_path / f"{config.name}.decisions.jsonl"  # a dry run sets no clock
            assert eventually(lambda path=decisions: lowest_mhz in clocks_in(path))  # type: ignore[misc]


def clocks_in(path: Path) -> list[int]:
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line)["clock_mhz"] for line in lines]


@pytest.mark.slow
def test_a_policy_of_the_whole_fleet_is_replayed(tmp_path: Path) -> None:
    """The stub's 100 W an instance keep the default budget; one process serves both instances."""
    with stub_process() as fleet:
        path = write_config(tmp_path, fleet, seconds=4, outputs=6)
        text = path.read_text().replace('"static"', f'"{POLCA}"')
        path.write_text(text)
        assert read_replay_config(path).sim.controller == POLCA
        process = start_command(path, tmp_path / "real")
        await_rows(process, tmp_path / "real/requests.jsonl", 3)
        (pid,) = pids_of(f"{tmp_path}/real/agent-decode-0.json")
        assert pids_of(f"{tmp_path}/real/agent-prefill-0.json") == [pid]
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    state = json.loads((tmp_path / "real/replay.json").read_text())
    for name in ("prefill-0", "decode-0"):
        assert state["agents"][name]["counts"]["decisions"] > 0
