"""What an agent reports of its cards' energy, and the limits it asks for, on the emulated card."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.agent.test_agent import SMALL, config_of, running, voice, with_actuator  # noqa: F401 (fixture)
from tests.hwreplay.engine_voice import repeating
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.agent.agent import AgentConfig, start_agents
from voltana.hwreplay.messages.agent_reports import AgentReport, ReportFeed
from voltana.profiles.catalog import load_profile

pytestmark = pytest.mark.slow


@pytest.fixture
def card(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> Standin:  # noqa: F811
    """The emulated card, which agents see; there is no actuator."""
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)
    return standin


def test_a_left_over_cap_is_no_ceiling_after_a_reconnection(
    card: Standin,
    tmp_path: Path,
    voice: Any,  # noqa: ANN401, F811
) -> None:
    """A frozen agent is dropped; 120 W, as of a cap of its own not yet undone, wait for its return.

    1005 MHz stands for more than that in the profile, and the agent asks for it again.
    """
    table = load_profile("a100-80g-sxm/llama-3.1-8b").decode
    limit_w = math.ceil(table[table["frequency_mhz"] == 1005]["power_w"].max())
    assert limit_w > 120
    config = with_actuator(tmp_path, voice)
    with (
        actuator_process(card, tmp_path / "actuator", "--power-cap", "--silence-s", "0.6"),
        running(config, tmp_path) as process,
        repeating(lambda: voice.decode(*SMALL)),
    ):
        assert eventually(lambda: card["limit_mw"] == limit_w * 1000)
        process.send_signal(signal.SIGSTOP)
        assert eventually(lambda: card["limit_mw"] == 400_000)
        card["limit_mw"] = 120_000
        process.send_signal(signal.SIGCONT)
        assert eventually(lambda: card["limit_mw"] == limit_w * 1000)


async def reports_over(address: str, seconds: float) -> tuple[AgentReport, AgentReport]:
    """The first report, and the first one that is so much later."""
    feed = ReportFeed(address)
    try:
        first = await feed.receive()
        while (last := await feed.receive()).at_s - first.at_s < seconds:
            pass
        return first, last
    finally:
        feed.close()


def test_a_dry_run_meters_its_cards(
    card: Standin,
    tmp_path: Path,
    voice: Any,  # noqa: ANN401, F811
) -> None:
    """250 W and no actuator: the card is left alone, its energy is reported."""
    address = f"ipc://{tmp_path}/reports"
    config: AgentConfig = config_of(tmp_path, voice, gpus=(0,), report_address=address)
    assert card["power_mw"] == 250_000
    with running(config, tmp_path), repeating(lambda: voice.decode(*SMALL)):
        time.sleep(0.2)
        first, last = asyncio.run(asyncio.wait_for(reports_over(address, 1.0), 30))
    assert first.energy_j is not None
    assert last.energy_j is not None
    # A reading is up to 0.1 s old, and the thread that takes it may wait as long for the CPU.
    assert last.energy_j - first.energy_j == pytest.approx(
        250.0 * (last.at_s - first.at_s), abs=250.0 * 0.3
    )
    assert card["num_locks"] == 0


def test_the_router_is_told_of_clock_decisions_and_energy(
    card: Standin,
    tmp_path: Path,
    voice: Any,  # noqa: ANN401, F811
) -> None:
    """The emulated card draws 250 W: so many joules between two reports."""
    address = f"ipc://{tmp_path}/reports"
    config = with_actuator(tmp_path, voice, report_address=address)
    assert card["power_mw"] == 250_000

    async def collect() -> list[AgentReport]:
        feed = ReportFeed(address)
        try:
            found = [await feed.receive()]
            while found[-1].clock_mhz != 1005 or found[-1].at_s - found[0].at_s < 1.0:
                found.append(await feed.receive())
            return found
        finally:
            feed.close()

    with (
        actuator_process(card, tmp_path / "actuator"),
        running(config, tmp_path),
        repeating(lambda: voice.decode(*SMALL)),
    ):
        reports = asyncio.run(asyncio.wait_for(collect(), 30))
    first, last = reports[0], reports[-1]
    assert (last.phase, last.instance_id, last.clock_mhz) == ("decode", 0, 1005)
    assert last.decisions > first.decisions
    assert first.energy_j is not None
    assert last.energy_j is not None
    # A reading is up to 0.1 s old, and the thread that takes it may wait as long for the CPU.
    assert last.energy_j - first.energy_j == pytest.approx(
        250.0 * (last.at_s - first.at_s), abs=250.0 * 0.3
    )


def test_cards_in_parts_are_refused_by_agent_and_actuator(
    card: Standin,
    tmp_path: Path,
    voice: Any,  # noqa: ANN401, F811
) -> None:
    """Power and clocks of a card in MIG mode are those of all its parts."""
    card["mig_mode"] = 2
    command = [sys.executable, "-m", "voltana.experiments.cli", "actuator", str(tmp_path / "s")]
    command += ["--gpu", "0", "--allow-writable-code"]
    done = subprocess.run(
        command, env=card.env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "must not be partitioned" in done.stderr
    config = config_of(tmp_path, voice, gpus=(0,))
    process = start_agents([config], tmp_path)
    assert process.wait(60) == 2
    assert "must not be partitioned" in (tmp_path / f"{config.name}.log").read_text()
