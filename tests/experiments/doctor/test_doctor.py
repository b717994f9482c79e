"""`voltana doctor`: right on a machine without a GPU, on one with cards, and about a file."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.hwreplay.actuator.conftest import actuator_process
from tests.hwreplay.stub_worker import VOCAB_SIZE, StubTimes, stub_fleet
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.experiments.doctor import cards, program
from voltana.experiments.doctor.finding import Finding
from voltana.experiments.doctor.report import abilities, as_text, is_well
from voltana.experiments.doctor.services import find_engine
from voltana.profiles.device.gpu import DriverMissingError

ENGINE = '#!/bin/sh\nprintf "%s\\n" "a warning first" \'{said}\'\nexit {code}\n'


def doctor(env: Mapping[str, str], *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "voltana.experiments.cli", "doctor", "--json", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def states(told: Mapping[str, Any]) -> dict[str, str]:
    return {line["name"]: line["state"] for line in told["findings"]}


@pytest.mark.slow
def test_cards_their_clocks_and_the_actuator_are_found(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    standin["num_gpus"] = 2
    standin.cards[1].faults.mig_mode = 2
    file = tmp_path / "fleet.toml"
    told_file = {
        "fleet": {"decode": [{"metrics": f"ipc://{tmp_path}/decode-0.0"}]},
        "serve": {"actuator": str(tmp_path / "actuator"), "gpus": {"decode": [[0]]}},
    }
    file.write_text(tomli_w.dumps(told_file))
    with actuator_process(standin, tmp_path / "actuator"):
        code, told = doctor(standin.env, str(file))
    lines = {line["name"]: line for line in told["findings"]}
    assert standin.cards[0].uuid in lines["GPU 0"]["found"]
    assert "clocks 705 to 1410 MHz; energy counter" in lines["GPU 0"]["found"]
    assert "MIG mode" in lines["GPU 1"]["found"]
    assert "voltana agent takes it; voltana serve does not" in lines[str(file)]["found"]
    assert lines["decode-0 card 0"]["state"] == "ok"
    assert "answers this user, and locks clocks" in lines["actuator"]["found"]
    assert lines["decode-0 metrics"]["state"] == "broken"
    assert (code, told["is_well"]) == (1, False)
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)


@pytest.mark.slow
def test_a_file_whose_servers_run_is_well_and_one_whose_do_not_is_not(tmp_path: Path) -> None:
    metrics, file = f"ipc://{tmp_path}/{{phase}}-{{index}}.0", tmp_path / "fleet.toml"

    async def play() -> tuple[int, dict[str, Any]]:
        async with stub_fleet(1, 1, StubTimes(), metrics) as fleet:
            whole = {
                "simulate": {"prefill_metrics": "after"},
                "fleet": fleet.table(metrics),
                "router": {"port": 0, "vocab_size": VOCAB_SIZE},
            }
            file.write_text(tomli_w.dumps(whole))
            return await asyncio.to_thread(doctor, {}, str(file))

    code, told = asyncio.run(play())
    found = states(told)
    names = ("prefill-0", "decode-0", "prefill-0 metrics", "decode-0 metrics")
    assert {name: found[name] for name in names} == dict.fromkeys(names, "ok")
    assert (code, told["is_well"]) == (0, True)
    code, told = doctor({}, str(file))
    assert {name for name, state in states(told).items() if state == "broken"} == set(names)
    assert code == 1


def test_no_driver_is_no_fault_and_half_a_driver_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_nvml() -> list[str]:
        raise DriverMissingError("NVML must answer init")

    monkeypatch.setattr(cards, "list_uuids", no_nvml)
    monkeypatch.setattr(cards, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(cards, "DEVICES", tmp_path / "nvidiactl")
    (absent,) = cards.find_cards()
    assert (absent.name, absent.state) == ("GPU", "absent")
    (tmp_path / "version").touch()
    (broken,) = cards.find_cards()
    assert (broken.name, broken.state) == ("NVML", "broken")
    assert "NVIDIA_DRIVER_CAPABILITIES" in broken.remedy


def test_who_may_lock_is_the_kernels_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(cards, "STATUS", status)
    for mask, may in (("000001ffffffffff", True), ("00000000a80425fb", False), ("200000", True)):
        status.write_text(f"Name:\tx\nCapEff:\t{mask}\n")
        assert cards.may_lock() is may


def test_an_extra_lacks_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1", 'pytest>=1; extra == "x"', 'pytest<2; extra == "y"',
             'no-such-thing; extra == "y"']  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert program.lacking_of("x") == []
    old, gone = program.lacking_of("y")
    assert old == f"pytest<2 (has {importlib.metadata.version('pytest')})"
    assert gone == "no-such-thing"


@pytest.mark.parametrize(
    ("said", "code", "state", "word"),
    [
        ('{"version": "0.5.23", "plugins": ["voltana_observer"]}', 0, "ok", "plug-ins voltana_obs"),
        ('{"version": "0.5.14.post1", "plugins": []}', 0, "ok", "without our plug-in"),
        ('{"version": "0.6.0", "plugins": []}', 0, "broken", "not tried"),
        ("", 1, "broken", "does not import: no reason given"),
    ],
)
def test_an_engine_is_imported_and_its_version_judged(
    tmp_path: Path, said: str, code: int, state: str, word: str
) -> None:
    python = tmp_path / "python"
    python.write_text(ENGINE.format(said=said, code=code))
    python.chmod(0o755)
    found = find_engine(python)
    assert found.state == state
    assert word in found.found


def test_abilities_say_what_they_lack() -> None:
    def line(area: str, name: str) -> Finding:
        return Finding(area=area, name=name, state="ok", found="")

    bare = {a.what.split(" (")[0]: a.lacks for a in abilities([])}
    assert bare["simulate, sweep, recommend"] == ()
    assert bare["measure a profile of a card"] == ("a GPU", "SGLang or the extra torch")
    whole = [line("cards", "GPU 0"), line("engine", "SGLang"), line("services", "zeusd")]
    assert [a.what for a in abilities(whole) if a.lacks] == []
    broken = Finding(area="cards", name="NVML", state="broken", found="x", remedy="do y")
    assert not is_well([*whole, broken])
    text = as_text([*whole, broken])
    assert "  ! NVML: x\n      -> do y" in text
    assert text.endswith("broken: NVML")
