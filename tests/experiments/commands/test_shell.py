"""What every verb has in common: JSON, quiet and verbose, no colour, completion, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from tests.conftest import ROOT
from tests.experiments.grids import TWO_POLICIES
from voltana.experiments import options
from voltana.experiments.cli import make_app
from voltana.experiments.progress import VOICE, progress_bar

SERVICES = {"actuator", "router", "agent", "serve"}
"""They run until they are stopped: no result."""


def commands() -> Iterator[tuple[str, Any]]:
    def below(path: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 (typer's own click)
        if hasattr(command, "commands"):
            for name, each in command.commands.items():
                yield from below(f"{path} {name}".strip(), each)
        else:
            yield path, command

    yield from below("", typer.main.get_command(make_app()))


def run(*arguments: str) -> None:
    make_app()(list(arguments), standalone_mode=False)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(TWO_POLICIES.format(duration=3, rates=[5, 6]))
    return file


@pytest.fixture(autouse=True)
def voice_as_it_was() -> Iterator[None]:
    yield
    VOICE.is_quiet = VOICE.is_verbose = False


def test_every_verb_with_a_result_has_it_as_json_and_a_whole_summary() -> None:
    seen = dict(commands())
    assert {"simulate", "profile measure", "paper fit", "experiment run", "tune pid"} <= set(seen)
    without = {
        name for name, c in seen.items() if "--json" not in [o for p in c.params for o in p.opts]
    }
    assert without == SERVICES
    for name, command in seen.items():
        assert not command.get_short_help_str(limit=52).endswith("..."), name


def test_json_is_all_that_is_printed(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"

    def told(*arguments: str) -> Any:  # noqa: ANN401 (JSON)
        run(*arguments, "--json")
        return json.loads(capsys.readouterr().out)

    assert told("sweep", str(sweep), "--out", str(out), "--jobs", "1") == {
        "points": 4, "results": str(out / "results.csv"), "overloads": [],
    }  # fmt: skip
    drawn = told("plot", str(out), "--out", str(tmp_path / "new" / "place"))
    assert [Path(f).name for f in drawn["files"]] == ["energy_vs_slo.png", "energy_vs_slo.svg"]
    assert all(Path(f).parent == tmp_path / "new" / "place" and Path(f).exists()
               for f in drawn["files"])  # fmt: skip
    assert not (out / "energy_vs_slo.png").exists()
    page = told("report", str(out), "--no-series")
    assert page["bytes"] == Path(page["files"][0]).stat().st_size
    assert told("list")["traces"] == list(told("list", "traces"))
    assert told("list", "controllers", "static")["static"]["parameters"][0]["unit"] == "MHz"
    assert "step-response" in told("experiment", "list")


def test_list_knows_a_policy_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    run("list", "controllers", "voltana.experiments.examples.own_policy:low=3")
    said = capsys.readouterr().out
    assert said.startswith("voltana.experiments.examples.own_policy: The clock rises in a straight")
    assert re.search(r"low=32\.0 +requests +up to this load", said)


def test_flags_count_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    busy = ["simulate", "--rate", "60", "--duration", "3", "--slo-itl-ms", "5"]
    run(*busy)
    assert "voltana: overload: even top clocks" in capsys.readouterr().err
    for arguments in (["-q", *busy], [*busy, "--quiet"]):
        run(*arguments)
        assert capsys.readouterr().err == ""
    run("list", "traces", "--no-color")
    assert os.environ.pop("NO_COLOR") == "1"
    with pytest.raises(Exception, match="opposite things"):
        run("-q", "list", "-v")


def test_verbose_says_each_step(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("sweep", str(sweep), "--out", str(tmp_path / "out"), "--jobs", "1", "-v")
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"voltana: simulating: {n} of 4 done" for n in range(1, 5)]
    assert said.out == f"4 points in {tmp_path / 'out' / 'results.csv'}\n"


def test_an_interrupt_says_what_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match=r"^working stopped, 2 of 9 done and kept in here: "),
        progress_bar("searching", 3, kept=tmp_path),
        progress_bar("working", 9, kept="here") as bar,
    ):
        bar.advance(2)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_another_run_goes_on(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "grid.toml"
    file.write_text(TWO_POLICIES.format(duration=60, rates=[5, 6]))
    call = [sys.executable, "-m", "voltana", "sweep", str(file), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("points/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    kept = list(out.glob("points/*.json"))
    assert process.returncode == 130
    assert said == (
        f"voltana: simulating stopped, {len(kept)} of 4 done and kept in {out / 'points'}: run it "
        "again to go on\n"
    )
    run("sweep", str(file), "--out", str(out), "--jobs", "1")
    assert len(pd.read_csv(out / "results.csv")) == 4


def test_the_shell_completes_names() -> None:
    program = (
        "import sys; sys.argv[0] = 'voltana'; from voltana.experiments.cli import main; main()"
    )
    words = {"_VOLTANA_COMPLETE": "complete_bash", "COMP_WORDS": "voltana simulate --router eco",
             "COMP_CWORD": "3"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=os.environ | words,
    )  # fmt: skip
    assert done.stdout.split() == ["ecoroute", "ecoroute-tile"], done.stderr
    assert options.complete_controller("eco") == ["ecofreq", "ecomin"]
    assert options.complete_profile("h200") == ["h200-sxm/llama-3.1-8b"]
    assert options.complete_setting("slo_") == ["slo_itl_s=", "slo_ttft_s="]
    assert "azure-code-2023" in options.complete_trace("azure")
    assert options.complete_workload("lms") == ["lmsys"]
