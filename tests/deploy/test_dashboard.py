"""The dashboard's queries and the alerts on a real Prometheus that scrapes a real service."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.fault_bench import free_port
from tests.conftest import ROOT
from tests.hwreplay.router.test_router import request_body
from tests.hwreplay.serve.bench import served, write_fleet
from tests.hwreplay.stub_worker import StubTimes, stub_fleet

pytestmark = pytest.mark.slow

BOARD = ROOT / "deploy/grafana/voltana.json"
GRAFANA_HOME = "/usr/share/grafana"
"""Of its packages."""
SCRAPES_S = 8.0
"""Of a second each: enough for every rate."""
LIMIT_S = 60.0


def queries() -> dict[str, str]:
    """Of the dashboard by panel, with variables as "All" makes them, and of the alerts."""
    panels = json.loads(BOARD.read_text())["panels"]
    asked = {
        f"{panel['id']} {panel['title']} {target['refId']}": target["expr"].replace("$phase", ".*")
        for panel in panels
        for target in panel["targets"]
    }
    alerts = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    for found in re.findall(r"expr: (\w+) [<=]", alerts):
        asked[f"alert {found}"] = found
    return asked | {"power": "sum(irate(voltana_energy_joules_total[1m]))"}


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """One that scrapes the service once a second, by the shipped file."""
    for name in ("prometheus.yml", "alerts.yml"):
        text = (ROOT / "deploy/prometheus" / name).read_text()
        text = text.replace("scrape_interval: 5s", "scrape_interval: 1s")
        (directory / name).write_text(text.replace("127.0.0.1:8000", target))
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={directory}/prometheus.yml"),
                *(
                    f"--storage.tsdb.path={directory}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


async def samples(client: aiohttp.ClientSession, url: str, query: str) -> list[dict[str, Any]]:
    """What Prometheus answers."""
    async with client.get(f"{url}/api/v1/query", params={"query": query}) as answer:
        told = await answer.json()
    assert told["status"] == "success", (query, told)
    found: list[dict[str, Any]] = told["data"]["result"]
    return found


async def ask(client: aiohttp.ClientSession, url: str, query: str) -> list[float]:
    """The values that are there."""
    values = [float(sample["value"][1]) for sample in await samples(client, url, query)]
    return [value for value in values if not math.isnan(value)]


@contextmanager
def grafana(directory: Path, prometheus_url: str) -> Iterator[str]:
    """One that is given the board and a data source by files, as an operator would."""
    provisioning, boards = directory / "provisioning", directory / "boards"
    for folder in (provisioning / "datasources", provisioning / "dashboards", boards):
        folder.mkdir(parents=True)
    shutil.copy(BOARD, boards)
    (provisioning / "datasources/prometheus.yaml").write_text(
        "apiVersion: 1\ndatasources:\n  - {name: Prometheus, uid: prometheus, type: prometheus,"
        f" access: proxy, isDefault: true, url: '{prometheus_url}'}}\n"
    )
    (provisioning / "dashboards/voltana.yaml").write_text(
        "apiVersion: 1\nproviders:\n  - {name: voltana, type: file,"
        f" options: {{path: '{boards}'}}}}\n"
    )
    port = free_port()
    own = {
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_PATHS_DATA": str(directory / "data"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Admin",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    with (directory / "grafana.log").open("wb") as log:
        process = subprocess.Popen(
            ["grafana", "server", "--homepath", GRAFANA_HOME],
            env=os.environ | own, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def test_grafana_loads_the_board_and_asks_prometheus(tmp_path: Path) -> None:
    for program in ("grafana", "prometheus"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on the PATH; Grafana's server is in none of Debian, "
                        "PyPI and npm: take its own package")  # fmt: skip

    async def answered(client: aiohttp.ClientSession, url: str) -> Any:  # noqa: ANN401
        async with asyncio.timeout(LIMIT_S):
            while True:
                with suppress(aiohttp.ClientError):
                    async with client.get(url) as answer:
                        if answer.status == 200:
                            return await answer.json()
                await asyncio.sleep(0.2)

    async def look(url: str) -> None:
        async with aiohttp.ClientSession() as client:
            board = await answered(client, f"{url}/api/dashboards/uid/voltana")
            shipped = json.loads(BOARD.read_text())
            titles = [panel["title"] for panel in board["dashboard"]["panels"]]
            assert titles == [panel["title"] for panel in shipped["panels"]]
            query = "api/v1/query?query=vector(7)"
            told = await answered(client, f"{url}/api/datasources/proxy/uid/prometheus/{query}")
            assert told["data"]["result"][0]["value"][1] == "7"

    with prometheus(tmp_path, "127.0.0.1:9") as source, grafana(tmp_path, source) as url:
        asyncio.run(look(url))


def test_every_query_finds_something_in_a_service_under_load(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is needed: Debian has it")
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}", tmp_path / "fleet.toml"
    times = StubTimes(prefill_base_s=0.02, decode_base_s=0.02)

    async def play() -> dict[str, list[float]]:
        async with stub_fleet(1, 2, times, metrics) as fleet:
            write_fleet(file, fleet, metrics, serve={"power_w": 100.0})
            async with served(file) as (service, client):
                with prometheus(tmp_path, service.url.removeprefix("http://")) as url:

                    async def load() -> None:
                        body = request_body(32, 40)
                        while True:
                            async with client.post(service.url + "/generate", json=body) as answer:
                                await answer.read()

                    loads = [asyncio.create_task(load()) for _ in range(4)]
                    async with asyncio.timeout(LIMIT_S):
                        while True:
                            try:
                                if await ask(client, url, "up{job='voltana'} == 1"):
                                    break
                            except aiohttp.ClientError:
                                pass
                            await asyncio.sleep(0.2)
                    await asyncio.sleep(SCRAPES_S / 2)
                    fleet.decode[0].abort_after = 3  # some fail, for the panel that says why
                    await asyncio.sleep(SCRAPES_S)
                    found = {name: await ask(client, url, q) for name, q in queries().items()}
                    clocks = await samples(client, url, "voltana_clock_mhz{job='voltana'}")
                    labels = {(x["metric"]["phase"], x["metric"]["instance"]) for x in clocks}
                    assert labels == {("prefill", "0"), ("decode", "0"), ("decode", "1")}
                    for task in loads:
                        task.cancel()
                    return found

    found = asyncio.run(play())
    assert [name for name, values in found.items() if not values] == []
    # Three instances of 100 W, as stated, between two scrapes a second apart, of readings that are
    # up to 0.1 s old at each end.
    assert found["power"] == pytest.approx([300.0], rel=0.3)
    # Of one window both: what is settled up to 2 s later is missing from the 12 s that there are.
    attributed_w = sum(found["8 Whose energy it was A"])
    assert attributed_w == pytest.approx(found["4 Power A"][0], rel=0.3)
