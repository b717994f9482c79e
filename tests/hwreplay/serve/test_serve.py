"""The service as systemd has it: drained, reloaded, its parts killed, its clocks given back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from tests.hwreplay.actuator.conftest import actuator_process
from tests.hwreplay.replay.test_parts import pids_of
from tests.hwreplay.router.test_router import events, request_body
from tests.hwreplay.serve.bench import served, write_fleet
from tests.hwreplay.stub_worker import StubTimes, stub_fleet
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.agent.attach import read_attached
from voltana.hwreplay.serve.config import read_serve_config
from voltana.hwreplay.serve.service import serve
from voltana.hwreplay.view.context import PolicySource
from voltana.hwreplay.view.engine_only import engine_only
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError

SLOW = StubTimes(decode_base_s=0.05)
TOKENS = 60


@pytest.mark.slow
def test_a_reload_keeps_open_streams_and_a_drain_loses_none(tmp_path: Path) -> None:
    """Streams of 3 s: the policy changes under some, and the service ends under others."""
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}", tmp_path / "fleet.toml"

    async def play() -> None:
        async with stub_fleet(1, 2, SLOW, metrics) as fleet:
            write_fleet(
                file, fleet, metrics, simulate={"slo_itl_s": 0.06}, serve={"power_w": 100.0}
            )
            async with served(file) as (service, client):
                body = request_body(8, TOKENS)

                async def promises() -> str:
                    async with client.get(service.url + "/metrics") as answer:
                        return await answer.text()

                async def stream() -> int:
                    async with client.post(service.url + "/generate", json=body) as answer:
                        assert answer.status == 200
                        return len(events(await answer.read()))

                early = [asyncio.create_task(stream()) for _ in range(4)]
                await asyncio.sleep(0.3)
                refused = await service.reload("vocab_size = 128256", "vocab_size = 128000")
                assert refused["level"] == "error"
                assert "[router] vocab_size has changed" in refused["error"]
                service.file.write_text(
                    service.file.read_text().replace("vocab_size = 128000", "vocab_size = 128256")
                )
                wrong = await service.reload('"ecofreq"', '"ecofrek"')
                assert "ecofreq" in wrong["error"]
                assert 'voltana_promise_seconds{promise="itl"} 0.06' in await promises()
                service.file.write_text(
                    service.file.read_text().replace("slo_itl_s = 0.06", "slo_itl_s = 0.05")
                )
                taken = await service.reload('"ecofrek"', '"static"')
                assert (taken["event"], taken["decode"]) == ("reloaded", "static")
                assert 'voltana_promise_seconds{promise="itl"} 0.05' in await promises()
                late = [asyncio.create_task(stream()) for _ in range(4)]
                await asyncio.sleep(0.3)
                service.process.terminate()
                await service.until(lambda: bool(service.events("draining")))
                async with client.post(service.url + "/generate", json=body) as answer:
                    assert answer.status == 503
                    assert int(answer.headers["Retry-After"]) > 0
                async with client.get(service.url + "/healthz") as answer:
                    assert answer.status == 503
                    assert (await answer.json())["draining"] is True
                assert await asyncio.gather(*early, *late) == [TOKENS] * 8
                assert await asyncio.wait_for(service.process.wait(), 60) == 0
        assert service.events("drained")[0]["cut_off"] == 0
        done = service.events("request")
        assert [x["pieces"] for x in done] == [TOKENS] * 8
        assert {x["outcome"] for x in done} == {"completed"}
        assert min(x["energy_j"] for x in done) > 0

    asyncio.run(play())


@pytest.mark.slow
def test_parts_that_are_killed_come_back_and_clocks_are_given_back(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}", tmp_path / "fleet.toml"
    socket = tmp_path / "actuator"
    standin["num_gpus"] = 2
    cards = {"actuator": str(socket), "gpus": {"prefill": [[0]], "decode": [[1]]}}

    async def play() -> None:
        async with stub_fleet(1, 1, StubTimes(), metrics) as fleet:
            write_fleet(file, fleet, metrics, serve=cards)
            async with served(file, standin.env) as (service, client):

                async def ask(session: aiohttp.ClientSession = client) -> int:
                    body = request_body(8, 4)
                    async with session.post(service.url + "/generate", json=body) as answer:
                        await answer.read()
                        return answer.status

                async def load() -> None:
                    while True:
                        with suppress(aiohttp.ClientError):  # while there is no router
                            assert await ask() == 200
                        await asyncio.sleep(0.1)

                def routers() -> set[int]:
                    of_service = str(service.process.pid)
                    return {p for p in pids_of("hwreplay.router") if of_service in parent(p)}

                def locked() -> set[int]:
                    return {card.look().wanted_mhz for card in standin.cards}

                loading = asyncio.create_task(load())
                await service.until(lambda: 0 not in locked())
                for words in ("agent-decode-0.json", "hwreplay.router"):
                    (pid,) = [p for p in pids_of(words) if str(service.process.pid) in parent(p)]
                    before = len(service.events("part is back"))
                    os.kill(pid, signal.SIGKILL)
                    if "router" in words:  # the next one dies while it starts
                        await service.until(lambda: bool(routers() - {pid}))  # noqa: B023
                        os.kill(min(routers() - {pid}), signal.SIGKILL)
                    async with aiohttp.ClientSession() as new:  # waits for a router, if need be
                        assert await ask(new) == 200
                    await service.until(lambda n=before: len(service.events("part is back")) > n)  # type: ignore[misc]
                    await service.until(lambda: 0 not in locked())
                loading.cancel()
                with suppress(asyncio.CancelledError):
                    await loading
                assert await ask() == 200
                assert await service.end() == 0
                assert locked() == {0}

    with actuator_process(standin, socket, "--gpu", "1"):
        asyncio.run(play())


def parent(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1:2]


def test_the_shipped_file_is_read_by_service_and_agents() -> None:
    """Its controllers are such that an agent needs no router."""
    file = ROOT / "hwreplay/serve.toml"
    config = read_serve_config(file)
    assert (config.drain_s, config.port, config.has_access_log) == (60.0, 8000, True)
    agents = read_attached(file, acts=True)
    assert [(a.phase, a.gpus, a.actuator_socket) for a in agents] == [
        ("prefill", (0,), "/run/voltana/actuator.sock"),
        ("decode", (1,), "/run/voltana/actuator.sock"),
    ]
    assert [a.metrics_address for a in agents] == [w.metrics for w in config.fleet.workers]
    source = PolicySource(config=config.fleet.sim, profile=load_profile(config.fleet.sim.profile))
    for agent in agents:
        engine_only(source, agent.phase, 0)


@pytest.mark.slow
def test_a_wrong_file_is_one_line_and_2(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(
        '[fleet]\nprefill = ["http://h:1"]\ndecode = ["http://h:2"]\n[serve]\ngpu = 1\n'
    )
    command = [sys.executable, "-m", "voltana.experiments.cli", "serve", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("voltana: unknown key 'gpu' of [serve]")
    assert done.stderr.count("\n") == 1


def test_a_router_that_does_not_exist_is_a_wrong_file_too(tmp_path: Path) -> None:
    """Before a process is started, and so 2 and not the 1 of a service that failed."""
    file = tmp_path / "fleet.toml"
    text = (ROOT / "hwreplay/serve.toml").read_text()
    file.write_text(text.replace('router = "ecoroute"', 'router = "ecorute"'))
    with pytest.raises(VoltanaError, match="unknown router 'ecorute': did you mean"):
        serve(file)
