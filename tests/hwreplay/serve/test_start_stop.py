"""`voltana serve` while its parts start, and with one that does not stay up."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.hwreplay.actuator.conftest import actuator_process
from tests.hwreplay.replay.test_parts import pids_of
from tests.hwreplay.serve.bench import Served, started, write_fleet
from tests.hwreplay.serve.test_serve import parent
from tests.hwreplay.stub_worker import stub_fleet
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import Standin
from voltana.hwreplay.serve.agents import NICE

STARTING = "it starts: not every agent is up"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def health(client: aiohttp.ClientSession, port: int) -> tuple[int, list[str]]:
    """Waits for the listener, and then in its queue for the router."""
    while True:
        with suppress(aiohttp.ClientConnectorError):
            async with client.get(f"http://127.0.0.1:{port}/healthz") as answer:
                found: dict[str, Any] = await answer.json()
                return answer.status, found["reasons"]
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_a_service_is_healthy_when_it_is_whole_and_a_reload_waits_until_then(
    tmp_path: Path,
) -> None:
    """The agents' start takes longer than the router's answer that comes before it."""
    metrics, file, port = f"ipc://{tmp_path}/{{phase}}", tmp_path / "fleet.toml", free_port()

    async def play() -> None:
        async with stub_fleet(1, 1, metrics=metrics) as fleet, aiohttp.ClientSession() as client:
            write_fleet(file, fleet, metrics, router={"port": port})
            async with started(file) as service:
                assert await health(client, port) == (503, [STARTING])
                file.write_text(file.read_text().replace('"ecofreq"', '"static"'))
                service.process.send_signal(signal.SIGHUP)
                await service.until(lambda: bool(service.events("reloaded")))
                assert await health(client, port) == (200, [])
                said = [line["event"] for line in service.lines]
                waits = said.index("a reload waits until every part is up")
                assert waits < said.index("serving") < said.index("reloaded")
                await kill_often(service, "agent-decode-0.json")
                async with asyncio.timeout(30):
                    while (answer := await health(client, port))[0] == 200:
                        await asyncio.sleep(0.05)
                (reason,) = answer[1]
                assert reason.startswith("agent-decode-0 is down: agent-decode-0 must stay up")

    asyncio.run(play())


def own(service: Served, words: str) -> list[int]:
    """Its child with these words, and nobody else's."""
    parent_pid = str(service.process.pid)
    return [pid for pid in pids_of(words) if parent(pid) == [parent_pid]]


async def kill_often(service: Served, words: str) -> None:
    """Three times in a row, as soon as it is there again."""
    died = "an agent died, its clock is unlocked"
    for times in range(1, 4):
        await service.until(lambda: bool(own(service, words)))
        os.kill(own(service, words)[0], signal.SIGKILL)
        await service.until(lambda n=times: len(service.events(died)) == n)  # type: ignore[misc]


@pytest.mark.slow
def test_an_end_while_agents_start_does_not_wait_for_them(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One agent stands still in its start: whoever waited for it would wait for a minute."""
    metrics, file, port = f"ipc://{tmp_path}/{{phase}}", tmp_path / "fleet.toml", free_port()
    actuator = tmp_path / "actuator"
    standin["num_gpus"] = 2
    cards = {"actuator": str(actuator), "gpus": {"prefill": [[0]], "decode": [[1]]}}

    async def play() -> None:
        async with stub_fleet(1, 1, metrics=metrics) as fleet:
            write_fleet(file, fleet, metrics, router={"port": port}, serve=cards)
            async with started(file, standin.env) as service:
                await service.until(lambda: bool(own(service, "agent-prefill-0.json")))
                (held,) = own(service, "agent-prefill-0.json")
                os.kill(held, signal.SIGSTOP)
                await service.until(lambda: standin.cards[1].look().wanted_mhz != 0)
                service.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
                os.kill(held, signal.SIGCONT)  # takes the end that it has been asked for
                assert await asyncio.wait_for(service.process.wait(), 30) == 0
            assert service.events("stopped while starting")
            assert not service.events("serving")
            assert [card.look().wanted_mhz for card in standin.cards] == [0, 0]

    with actuator_process(standin, actuator, "--gpu", "1"):
        asyncio.run(play())


@pytest.mark.slow
def test_agents_are_nicer_than_their_service_however_nice_it_is() -> None:
    """Niceness that is less than one's own is for nobody but root."""
    script = (
        "import os; os.nice(7); pid = os.fork(); pid or os.execlp('sleep', 'sleep', '5');"
        "from voltana.hwreplay.serve.agents import give_way; give_way(pid);"
        "print(os.nice(0), os.getpriority(os.PRIO_PROCESS, pid)); os.kill(pid, 9)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    mine, agents = map(int, ran.stdout.split())
    assert agents == min(mine + NICE, 19)
