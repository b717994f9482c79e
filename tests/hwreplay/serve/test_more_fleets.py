"""`voltana serve` where an exporter counts the energy, and in front of servers of both phases."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest

from tests.hwreplay.energy.test_dcgm import (  # noqa: F401 (a fixture)
    COUNTERS,
    FIRST,
    LABELS,
    SECOND,
    Exporter,
    exporter,
)
from tests.hwreplay.router.test_router import events, request_body
from tests.hwreplay.serve.bench import served, write_fleet
from tests.hwreplay.stub_worker import StubTimes, stub_fleet

TOKENS = 12
ATTRIBUTED = re.compile(r'voltana_attributed_joules_total{[^}]*to="(\w+)"} (\S+)')
STEP_MJ = {"first": 50_000, "second": 20_000}
STEPS = 8


def page(steps: int) -> str:
    """Both cards' counters after so many readings of the exporter."""
    labels = {
        name: LABELS.format(gpu=i, uuid=uuid)
        for i, (name, uuid) in enumerate((("first", FIRST), ("second", SECOND)))
    }
    text = COUNTERS.replace("}} 1000", "}} {second_mj}")
    return text.format(
        **labels, first_mj=STEP_MJ["first"] * steps, second_mj=STEP_MJ["second"] * steps
    )


async def stream(client: aiohttp.ClientSession, url: str) -> int:
    async with client.post(url + "/generate", json=request_body(8, TOKENS)) as answer:
        assert answer.status == 200
        return len(events(await answer.read()))


@pytest.mark.slow
def test_the_energy_of_requests_is_what_the_exporter_counts(
    exporter: Exporter,  # noqa: F811
    tmp_path: Path,
) -> None:
    """70 J every 0.2 s, of two cards: all who used it, and requests' own lines, add up to that."""
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}", tmp_path / "fleet.toml"
    exporter.text = page(0)

    async def used(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
        async with client.get(url + "/metrics") as answer:
            found = ATTRIBUTED.findall(await answer.text())
        return {to: sum(float(j) for t, j in found if t == to) for to, _ in found}

    async def play() -> None:
        serve = {"dcgm": exporter.url, "gpus": {"prefill": [[0]], "decode": [[1]]}}
        async with stub_fleet(1, 1, StubTimes(decode_base_s=0.05), metrics) as fleet:
            write_fleet(file, fleet, metrics, serve=serve)
            async with served(file) as (service, client):
                asked = [asyncio.create_task(stream(client, service.url)) for _ in range(4)]
                for step in range(1, STEPS + 1):
                    await asyncio.sleep(0.2)
                    exporter.text = page(step)
                assert await asyncio.gather(*asked) == [TOKENS] * 4
                counted_j = STEPS * sum(STEP_MJ.values()) * 1e-3
                async with asyncio.timeout(30):
                    least_j = counted_j - 1e-6  # it is added up of shares
                    while sum((found := await used(client, service.url)).values()) < least_j:
                        await asyncio.sleep(0.1)
                await service.until(lambda: len(service.events("request")) == 4)
                of_requests_j = sum(line["energy_j"] for line in service.events("request"))
                assert sum(found.values()) == pytest.approx(counted_j)
                assert 0.0 < of_requests_j == pytest.approx(found["requests"], abs=4 * 0.0005)
                assert await service.end() == 0

    asyncio.run(play())


@pytest.mark.slow
def test_a_service_in_front_of_colocated_servers(tmp_path: Path) -> None:
    """An agent each; a request's line says all but its energy, which nobody can tell apart."""
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}", tmp_path / "fleet.toml"

    async def play() -> None:
        async with stub_fleet(0, 0, StubTimes(), metrics, num_colocated=2) as fleet:
            write_fleet(file, fleet, metrics, serve={"power_w": 100.0})
            with file.open("a") as out:
                out.write("[fleet.batch_sockets]\n")
                out.writelines(f"colocated-{i} = '{tmp_path}/{i}'\n" for i in range(2))
            async with served(file) as (service, client):
                assert service.events("serving")[0]["agents"] == 2
                asked = [stream(client, service.url) for _ in range(6)]
                assert await asyncio.gather(*asked) == [TOKENS] * 6
                taken = await service.reload('"ecofreq"', '"static"')
                assert taken["event"] == "reloaded"
                assert await service.end() == 0
        lines = service.events("request")
        assert {(line["outcome"], line["pieces"]) for line in lines} == {("completed", TOKENS)}
        assert sorted(line["decode"] for line in lines) == [0, 0, 0, 1, 1, 1]
        assert not any("energy_j" in line for line in lines)

    asyncio.run(play())
