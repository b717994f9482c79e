"""Energy from DCGM exporter's page, as versions 3 and 4 of it write it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tomli_w

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.agent.test_agent import SMALL, voice  # noqa: F401 (fixture)
from tests.hwreplay.engine_voice import EngineVoice, repeating
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.hwreplay.agent.agent import AgentConfig
from voltana.hwreplay.agent.energy_meter import EnergyMeter
from voltana.hwreplay.agent.make import make_meter
from voltana.hwreplay.energy.dcgm import DcgmCards
from voltana.profiles.device.gpu import DeviceError, NoAnswerError, UnsupportedQueryError

FIRST, SECOND = (
    "GPU-5b4e07f6-3a86-4340-039d-25f2a83cdc43",
    "GPU-0d1c2b3a-0000-0000-0000-000000000001",
)
LABELS = (
    'gpu="{gpu}",UUID="{uuid}",pci_bus_id="00000000:00:07.0",device="nvidia{gpu}",'
    'modelName="NVIDIA L40S",Hostname="gpu1-wl8sg",DCGM_FI_DRIVER_VERSION="595.58.03"'
)
HEAD = """# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{{{first}}} 210
# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{{{first}}} 35.686000
DCGM_FI_DEV_POWER_USAGE{{{second}}} 64.314000
"""
COUNTERS = """# HELP DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION Total energy since boot (in mJ).
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{first}}} {first_mj}
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{second}}} 1000
# HELP DCGM_FI_PROF_DRAM_ACTIVE Ratio of cycles the device memory interface is active.
# TYPE DCGM_FI_PROF_DRAM_ACTIVE gauge
DCGM_FI_PROF_DRAM_ACTIVE{{{first}}} 0.000131
"""


class Exporter:
    """A page that a test writes."""

    def __init__(self) -> None:
        self.status = 200
        self.text = ""
        self.write(5_551_899_580)
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = page.text.encode()
                self.send_response(page.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"

    def write(self, first_mj: int | None) -> None:
        """None: the exporter was told to show no counter."""
        first, second = (
            LABELS.format(gpu=gpu, uuid=uuid) for gpu, uuid in enumerate((FIRST, SECOND))
        )
        text = HEAD if first_mj is None else HEAD + COUNTERS
        self.text = text.format(first=first, second=second, first_mj=first_mj)


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    found = Exporter()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


def test_counters_are_in_mj_and_cards_by_uuid_or_number(exporter: Exporter) -> None:
    assert DcgmCards(exporter.url, [FIRST]).energy_j() == pytest.approx(5_551_899.580)
    assert DcgmCards(exporter.url, [1]).energy_j() == pytest.approx(1.0)
    assert DcgmCards(exporter.url, [FIRST, "1"]).power_w() == pytest.approx(100.0)


def test_a_page_that_lacks_something_says_what(exporter: Exporter) -> None:
    with pytest.raises(DeviceError, match=r"must show \['GPU-none'\], .* 0, 1, GPU-0d1c"):
        DcgmCards(exporter.url, ["GPU-none"])
    cards = DcgmCards(exporter.url, [FIRST])
    exporter.write(None)
    with pytest.raises(UnsupportedQueryError, match="TOTAL_ENERGY"):
        cards.energy_j()
    exporter.text = exporter.text.replace('gpu="0"', 'gpu="0",GPU_I_ID="3"')
    with pytest.raises(DeviceError, match="MIG mode"):
        cards.power_w()
    exporter.text = "<html>"
    with pytest.raises(NoAnswerError, match="Prometheus's format"):
        cards.power_w()
    exporter.status = 503
    with pytest.raises(NoAnswerError, match="does not"):
        cards.power_w()


def test_a_reading_counts_as_of_its_change_and_an_exporter_may_be_started_again(
    exporter: Exporter,
) -> None:
    def until(energy_j: float) -> None:
        for _ in range(2000):
            if meter.energy_j == energy_j:
                return
            time.sleep(0.005)
        raise AssertionError(meter.energy_j)

    exporter.write(1_000)
    meter = EnergyMeter([DcgmCards(exporter.url, [FIRST])], period_s=0.01, repeats=True)
    try:
        exporter.write(4_000)
        until(3.0)
        read_ns = meter.read_ns
        time.sleep(0.1)
        assert meter.read_ns == read_ns
        exporter.status = 503
        time.sleep(0.1)
        assert (meter.energy_j, meter.error) == (3.0, None)
        exporter.status = 200
        exporter.write(6_000)
        until(5.0)
        assert meter.read_ns > read_ns
    finally:
        meter.close()


@pytest.mark.slow
def test_a_sidecar_without_a_driver_counts_energy_and_sets_clocks_by_uuid(
    exporter: Exporter,
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,  # noqa: F811
) -> None:
    """As in deploy/kubernetes/agent.yaml: its cards stand in a file, the actuator is the node's."""
    (tmp_path / "uuids").write_text(standin.cards[0].uuid + "\n")
    exporter.text = exporter.text.replace(FIRST, standin.cards[0].uuid)
    page, text = exporter, exporter.text
    serve = {
        "actuator": str(tmp_path / "actuator"),
        "gpus": {"decode": [str(tmp_path / "uuids")]},
        "dcgm": exporter.url,
    }
    whole = {
        "simulate": {"controller": "ecofreq"},
        "fleet": {"decode": [{"metrics": voice.address}]},
        "serve": serve,
    }
    file, log = tmp_path / "fleet.toml", tmp_path / "log"
    file.write_text(tomli_w.dumps(whole))
    command = [sys.executable, "-m", "voltana.experiments.cli", "agent", str(file), "--act"]
    batch, tokens = SMALL
    say = partial(voice.say, num_decode_requests=batch, sum_decode_kv_tokens=tokens)

    def energy_j() -> float | None:
        """None while there is no meter, or no page yet."""
        if not (line := log.read_text().partition("\n")[0]):
            return None
        with urllib.request.urlopen(json.loads(line)["metrics"]) as answer:
            text = answer.read().decode()
        found = re.findall(r"^voltana_energy_joules_total.* (\S+)$", text, re.MULTILINE)
        return float(found[0]) if found else None

    with (
        actuator_process(standin, tmp_path / "actuator"),
        log.open("wb") as out,
        repeating(say, 0.05),
    ):
        agent = subprocess.Popen([*command, "--port", "0"], cwd=ROOT, stderr=out)  # no cards here
        try:
            assert eventually(lambda: standin["locked_mhz"] == 1005)
            assert eventually(lambda: energy_j() == 0.0)
            page.text = text.replace("5551899580", "5551999580")
            assert eventually(lambda: energy_j() == pytest.approx(100.0))
        finally:
            agent.terminate()
            assert agent.wait(60) == 0
        assert standin["locked_mhz"] == 0


def test_an_agent_without_a_driver_asks_by_uuid(exporter: Exporter) -> None:
    config = AgentConfig(
        phase="decode", instance_id=0, start_ns=0, settings={}, metrics_address="",
        gpus=(FIRST,), dcgm=exporter.url,
    )  # fmt: skip
    meter = make_meter(config)
    assert meter is not None
    meter.close()
    assert meter.energy_j == 0.0
