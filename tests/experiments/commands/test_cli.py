"""The command line as its users call it, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from voltana.experiments.cli import make_app
from voltana.profiles.common.errors import VoltanaError

QUICK = ["--rate", "20", "--duration", "5"]
JSON_KEYS = {
    "requests_total", "requests_completed", "requests_rejected", "makespan_s", "energy_j",
    "energy_busy_window_j", "prefill_energy_j", "decode_energy_j", "idle_energy_j", "ttft_s",
    "itl_s", "tpot_s", "e2e_s", "ttft_attainment", "itl_attainment", "attainment", "goodput_rps",
    "energy_per_output_token_j", "wall_s",
}  # fmt: skip


def voltana(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "voltana.experiments.cli", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_simulate_prints_the_promised_json() -> None:
    done = voltana(
        "simulate", "--profile", "a100-80g-sxm/llama-3.1-8b", "--workload", "sharegpt", *QUICK,
        "--seed", "13", "--prefill", "2", "--decode", "2", "--controller", "ecofreq",
        "--router", "ecoroute", "--slo-ttft-ms", "600", "--slo-itl-ms", "60",
        "--set", "actuation_latency_s=0.05", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert set(summary) >= JSON_KEYS
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
        assert set(summary[name]) == {"mean", "p50", "p90", "p99"}
    assert summary["requests_completed"] == summary["requests_total"] == 100


def test_what_a_trace_would_ignore_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0.0,100,5\n0.5,200,9\n")
    file = tmp_path / "run.toml"
    file.write_text(f'trace = "{trace}"\nrate_rps = 30.0\n')
    for options, words in (
        (["--trace", str(trace), "--rate", "20"], "rate_rps=20.0"),
        (["--trace", str(trace), "--workload", "lmsys"], "workload=lmsys"),
        (["--config", str(file), "--set", "arrivals=diurnal"], "arrivals=diurnal"),
    ):
        with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
            make_app()(["simulate", *options], standalone_mode=False)
        assert f"a trace has its own, got {words} and trace={trace}" in str(caught.value)
    # a file may keep both: what a run directory holds can be run again; and a trace can be left
    for options in (["--config", str(file)], ["--config", str(file), "--set", "trace=none"]):
        more = ["--duration", "1", "--json", "--rate", "10"] if len(options) > 2 else []
        make_app()(["simulate", *options, *more], standalone_mode=False)


def test_simulate_reads_a_trace_and_writes_a_run(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0.0,100,5\n0.5,200,9\n")
    out = tmp_path / "run"
    done = voltana("simulate", "--trace", str(trace), "--out", str(out), "--json",
                   "--prefill-controller", "static:f=1200",
                   "--decode-controller", "static:f=1005")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["requests_total"] == 2
    assert list(json.loads(done.stdout)["clock_residency"]["prefill"]) == ["1200"]
    again = voltana("simulate", "--trace", str(trace), "--out", str(out))
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


MISTAKES = [
    (["simulate", "--profile", "a100-80g-sxm/llama"], "did you mean 'a100-80g-sxm/llama-3.1-8b'"),
    (["simulate", "--controller", "ecofrek"], "did you mean 'ecofreq'"),
    (["simulate", "--router", "eco-route"], "did you mean 'ecoroute'"),
    (["simulate", "--workload", "share"], "did you mean 'sharegpt'"),
    (["simulate", "--set", "num_decoders=3"], "did you mean 'num_decode'"),
    (["simulate", "--set", "num_decode"], "--set takes key=value"),
    (["simulate", "--rate", "-4"], "rate_rps must be > 0"),
    (["simulate", "--trace", "nowhere.csv"], "no such trace file: nowhere.csv"),
    (["simulate", "--config", "nowhere.toml"], "no such configuration file"),
    (["sweep", "nowhere.toml", "--out", "x"], "no such configuration file"),
    (["list", "profile"], "did you mean 'profiles'"),
    (["plot", "nowhere"], "no results.csv in nowhere"),
    (["plot", "README.md"], "no results.csv in README.md"),
    (["simulate", *QUICK, "--out", "README.md"], "README.md: "),
    (["simulate", *QUICK, "--out", "/proc/x"], "cannot read or write /proc/x: "),
    (["sweep", "experiments/configs/demo.toml", "--out", "README.md"], "README.md: "),
    (["tune", "pid", "--set", "foo=1"], "unknown key 'foo' (tune)"),
    (["experiment", "run", "demo"], "run voltana demo"),
    (
        ["simulate", "--controller", "voltana.experiments.examples.own_policy:high=32"],
        "own_policy needs low < high",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(arguments: list[str], words: str) -> None:
    done = voltana(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize("verb", ["simulate", "sweep", "demo", "plot", "list"])
def test_help_exists(verb: str) -> None:
    done = voltana(verb, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 300


def test_every_verb_is_explained_in_one_whole_line() -> None:
    said = voltana("-h").stdout.partition("Commands:")[2]
    assert len(said.split("\n")) > 15
    assert "..." not in said


@pytest.mark.parametrize("kind", ["controllers", "routers", "workloads"])
def test_list_names_and_explains(kind: str) -> None:
    done = voltana("list", kind)
    assert done.returncode == 0, done.stderr
    assert all(": " in line or line.startswith("    ") for line in done.stdout.split("\n") if line)
    assert len(done.stdout.splitlines()) >= 3


SWEEP = """
[base]
duration_s = {duration}
[grid]
rate_rps = [5, 10]
[[grid.policy]]
name = "static-max"
controller = "static"
router = "round-robin"
[[grid.policy]]
name = "ecofreq"
controller = "{controller}"
[static_pairs]
clocks_mhz = [1005, 1410]
"""


FOREIGN = {
    "empty": "",
    "no rows": "policy,rate_rps,energy_j,ttft_attainment,itl_attainment\n",
    "another table": "a,b\n1,2\n",
    "uneven": "a,b\n1,2,3\n4\n5,6,7,8\n",
    "words": "policy,rate_rps,energy_j,ttft_attainment,itl_attainment\nstatic-max,1,much,1,1\n",
    "no policy": "rate_rps,energy_j,ttft_attainment,itl_attainment,hash\n1,2,1,1,x\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("verb", ["plot", "report"])
def test_what_are_no_results_is_one_line(tmp_path: Path, verb: str, kind: str) -> None:
    (tmp_path / "results.csv").write_text(FOREIGN[kind])
    with pytest.raises(VoltanaError, match=r"^[^\n]*$"):
        make_app()([verb, str(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"energy_j": "much"}'])
def test_what_is_no_run_is_one_line(tmp_path: Path, text: str) -> None:
    for name in ("summary.json", "settings.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(VoltanaError, match=r"^[^\n]*$"):
        make_app()(["report", str(tmp_path)], standalone_mode=False)


def test_files_are_written_into_folders_that_are_made(tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "new" / "page.html"
    spilled = tmp_path / "far" / "away" / "rows.parquet"
    make_app()(
        ["simulate", *QUICK, "--set", "metrics=sketch", "--spill", str(spilled), "--out", str(run)],
        standalone_mode=False,
    )
    assert spilled.exists()
    make_app()(["report", str(run), "--out", str(page), "--no-series"], standalone_mode=False)
    assert page.exists()


def write_sweep(tmp_path: Path, *, duration: int = 4, controller: str = "ecofreq") -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(duration=duration, controller=controller))
    return path


def test_sweep_then_plot(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = voltana("sweep", str(write_sweep(tmp_path)), "--out", str(out), "--jobs", "2")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "results.csv")
    assert len(table) == 2 * (2 + 4)
    assert {"policy", "rate_rps", "energy_j", "ttft_p99_s", "hash"} <= set(table.columns)
    # static-max and the pair 1410/1410 name the same clocks and give the same energy
    energy = table[table["rate_rps"] == 5].set_index("policy")["energy_j"]
    assert energy["static-max"] == energy["static pair 1410/1410"]
    drawn = voltana("plot", str(out))
    assert drawn.returncode == 0, drawn.stderr
    assert (out / "energy_vs_slo.png").stat().st_size > 10_000
    assert (out / "energy_vs_slo.svg").read_text().startswith("<?xml")


def test_a_finished_sweep_is_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = str(write_sweep(tmp_path))
    assert voltana("sweep", sweep, "--out", str(out)).returncode == 0
    before = {p.name: p.stat().st_mtime_ns for p in (out / "points").iterdir()}
    first = (out / "results.csv").read_bytes()
    assert voltana("sweep", sweep, "--out", str(out)).returncode == 0
    assert {p.name: p.stat().st_mtime_ns for p in (out / "points").iterdir()} == before
    assert (out / "results.csv").read_bytes() == first


def test_a_killed_sweep_keeps_what_had_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = str(write_sweep(tmp_path, duration=60))
    process = subprocess.Popen(
        [sys.executable, "-m", "voltana.experiments.cli", "sweep", sweep, "--out", str(out)],
        cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("points/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("points/*.json")}
    done = voltana("sweep", sweep, "--out", str(out))
    assert done.returncode == 0, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("points/*.json")}
    assert kept.items() <= after.items()
    assert len(pd.read_csv(out / "results.csv")) == 12


def test_one_bad_point_does_not_lose_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = write_sweep(tmp_path, controller="static:f=1007")
    done = voltana("sweep", str(sweep), "--out", str(out))
    assert done.returncode == 2
    assert "2 of 12 points failed" in done.stderr
    assert "1007 MHz: nearest" in done.stderr
    assert len(pd.read_csv(out / "results.csv")) == 10
    failures = json.loads((out / "failures.json").read_text())
    assert [f["config"]["controller"] for f in failures.values()] == ["static:f=1007"] * 2


def test_the_command_is_also_a_module_and_names_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "voltana", "--version"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout) == (0, f"voltana {declared}\n")


def test_list_without_a_kind_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    make_app()(["list"], standalone_mode=False)
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["profiles", "controllers", "routers", "scalers", "workloads", "traces"]
    assert "azure-conv-2023" in lines["traces"].split(", ")
    assert "ecofreq" in lines["controllers"].split(", ")
    assert "a100-80g-sxm/llama-3.1-8b" in lines["profiles"].split(", ")
