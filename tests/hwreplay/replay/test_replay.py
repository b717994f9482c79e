"""The whole replay on stub servers whose iteration times are known: the simulator's other half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from tests.profiles.synthetic import write_synthetic_profile
from voltana.experiments.hardware.replay import run_replay
from voltana.experiments.hardware.validate import run_validation
from voltana.experiments.runs import run, workload_of
from voltana.hwreplay.engines.plan import Installation
from voltana.hwreplay.replay.assembly import Window, assemble
from voltana.hwreplay.replay.config import ReplayConfig, read_replay_config
from voltana.hwreplay.validate.validate import Thresholds
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.records import COMPLETED, FAILED, IN_FLIGHT
from voltana.sim.results import read_run, write_run
from voltana.sim.workload.prompts import Turns
from voltana.sim.workload.workload import Workload

POWER_W = 100.0
CLOCK_MHZ = 1000
PREFILL_BASE_S, PREFILL_TOKEN_S = 0.01, 5e-5
DECODE_BASE_S, DECODE_REQUEST_S = 0.01, 0.001


def stub_time_s(phase: str, clock: int, batch: int, tokens: float) -> float:
    """What the stub servers take, as a profile says it."""
    if phase == "prefill":
        return PREFILL_BASE_S + PREFILL_TOKEN_S * tokens
    return DECODE_BASE_S + DECODE_REQUEST_S * batch


@contextmanager
def stub_process(num_decode: int = 1, prefill_failures: int = 0) -> Iterator[dict[str, Any]]:
    """A fleet in a process of its own, with metrics; gives its `[fleet]` table."""
    with tempfile.TemporaryDirectory(prefix="v-") as folder:
        arguments = {
            "--prefill-s": PREFILL_BASE_S, "--prefill-token-s": PREFILL_TOKEN_S,
            "--decode-s": DECODE_BASE_S, "--decode-request-s": DECODE_REQUEST_S,
            "--decode": num_decode, "--prefill-failures": prefill_failures,
            "--metrics": f"ipc://{folder}/{{phase}}-{{index}}",
        }  # fmt: skip
        flat = [str(part) for pair in arguments.items() for part in pair]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hwreplay.stub_worker", *flat],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def write_config(folder: Path, fleet: dict[str, Any], seconds: float, outputs: int) -> Path:
    """A profile of the stub, a trace of 8 requests a second, and a replay of both."""
    write_synthetic_profile(
        folder / "profile",
        time_s=stub_time_s,
        power_w=lambda *_: POWER_W,
        idle_w=lambda _: POWER_W,
        clocks_mhz=(CLOCK_MHZ,),
    )
    rng = np.random.default_rng(5)
    count = int(8 * seconds)
    Workload(
        arrival_s=np.cumsum(rng.exponential(1 / 8, count)),
        input_tokens=rng.integers(20, 200, count),
        output_tokens=rng.integers(max(outputs // 2, 1), outputs, count),
    ).write(folder / "trace.csv")
    simulate = {
        "profile": str(folder / "profile"), "trace": str(folder / "trace.csv"),
        "controller": "static", "router": "round-robin", "prefill_metrics": "after",
    }  # fmt: skip
    path = folder / "replay.toml"
    whole = {"simulate": simulate, "fleet": fleet, "replay": {"power_w": POWER_W, "rest_s": 1.2}}
    path.write_text(tomli_w.dumps(whole))
    return path


@pytest.mark.slow
def test_a_replay_leaves_what_a_simulation_leaves(tmp_path: Path) -> None:
    """Servers with stated times: nothing can be faster than the simulation of those times."""
    with stub_process() as fleet:
        config_path = write_config(tmp_path, fleet, seconds=6, outputs=20)
        config, summary = run_replay(config_path, tmp_path / "real")
    workload = workload_of(config.sim)
    observed = read_run(tmp_path / "real")
    assert summary["requests_completed"] == summary["requests_total"] == len(workload)
    assert np.array_equal(observed.requests.input_tokens, workload.input_tokens)
    assert (observed.requests.prefill_id == 0).all()
    assert (observed.requests.status == COMPLETED).all()
    assert len(observed.itl_s) == (workload.output_tokens - 1).sum()

    # constant power: both definitions of energy are time times power, to the time that a thread
    # may wait between looking at the clock and at the counter (0.1 s between two readings)
    ends = {i.phase: i for i in observed.instances}
    assert summary["energy_j"] == pytest.approx(2 * POWER_W * summary["makespan_s"], rel=1e-3)
    for instance in ends.values():
        assert instance.busy_energy_j == pytest.approx(POWER_W * instance.busy_s, rel=1e-3)
        assert instance.clock_busy_s == {0: pytest.approx(instance.busy_s)}  # a dry run sets none
    iterations = observed.iterations
    assert iterations is not None
    decode = iterations.phase == "decode"
    window_s = (iterations.start_s + iterations.duration_s)[decode].max() - iterations.start_s[
        decode
    ].min()
    assert ends["decode"].busy_window_energy_j == pytest.approx(POWER_W * window_s, rel=1e-3)

    # every token is of one iteration, every prompt of one prefill batch
    assert iterations.batch_size[decode].sum() == workload.output_tokens.sum()
    assert iterations.tokens[~decode].sum() == workload.input_tokens.sum()
    stated_s = DECODE_BASE_S + DECODE_REQUEST_S * iterations.batch_size[decode]
    assert np.median(iterations.duration_s[decode] / stated_s) > 0.9

    simulated = run(config.sim)
    write_run(simulated, tmp_path / "simulated")
    ours = summarise(simulated)
    for name in ("ttft_s", "itl_s"):
        assert summary[name]["p50"] > 0.9 * ours[name]["p50"]
    limits = Thresholds(energy_frac=None, p50_frac=None, p99_frac=None)
    _, text, _ = run_validation(
        tmp_path / "simulated", tmp_path / "real", tmp_path / "v", thresholds=limits
    )
    assert "differs" not in text.replace("setting", "")
    state = json.loads((tmp_path / "real/replay.json").read_text())
    assert state["load"]["counts"] == {"completed": len(workload)}
    assert state["load"]["lateness_s"]["max"] >= 0
    assert state["agents"]["decode-0"]["counts"]["records"] > 0
    assert observed.settings["is_power_measured"] is False
    assert observed.settings["is_complete"] is True


@pytest.mark.slow
def test_a_random_router_rolls_the_simulations_dice(tmp_path: Path) -> None:
    """Also after the warm-up, whose requests went by other dice and had to be tried again."""
    with stub_process(num_decode=3, prefill_failures=36) as fleet:
        path = write_config(tmp_path, fleet, seconds=3, outputs=4)
        told = tomllib.loads(path.read_text())
        told["simulate"] |= {"router": "random", "num_decode": 3}
        path.write_text(tomli_w.dumps(told))
        config, _ = run_replay(path, tmp_path / "real")
    said = (tmp_path / "real/warm-up.jsonl").read_text()
    assert said.count("planned") == 12  # each was tried three times
    simulated, observed = run(config.sim).requests, read_run(tmp_path / "real").requests
    assert observed.decode_id.tolist() == simulated.decode_id.tolist()
    assert len(set(observed.decode_id.tolist())) == 3


def start_command(config: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "voltana.experiments.cli", "replay", "--config", str(config),
         "--out", str(out), *more],
        stderr=subprocess.PIPE,
    )  # fmt: skip


def await_rows(process: subprocess.Popen[bytes], path: Path, count: int) -> None:
    deadline_s = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_replay_that_is_cut_off_keeps_what_it_has(tmp_path: Path, number: int) -> None:
    with stub_process() as fleet:
        config = write_config(tmp_path, fleet, seconds=60, outputs=10)
        process = start_command(config, tmp_path / "real")
        await_rows(process, tmp_path / "real/requests.jsonl", 5)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 1), said
        if number == signal.SIGKILL:
            again = start_command(config, tmp_path / "real", "--finish")
            _, said = again.communicate(timeout=60)
            assert again.returncode == 0, said
    record = read_run(tmp_path / "real")
    counts = np.bincount(record.requests.status, minlength=5)
    assert counts[COMPLETED] >= 5
    assert counts[IN_FLIGHT] > 300
    assert counts.sum() == len(record.requests)
    assert summarise(record)["energy_j"] > 0
    assert record.settings["is_complete"] is False
    assert record.settings["incomplete_reason"] == "it was interrupted"
    process = start_command(config, tmp_path / "real")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"already holds a run" in said


ATTACHED = {
    "prefill": [{"url": "http://h:1", "metrics": "ipc:///tmp/p.0"}],
    "decode": [{"url": "http://h:2", "metrics": "ipc:///tmp/d.0"}],
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "prefill must be a list of URLs"),
        ({"fleet": {"engine": "e"}}, "either gpus"),
        ({"fleet": {"engine": "e"}, "replay": {"power_w": -1}}, "power_w must be > 0"),
        ({"fleet": {"engine": "e"}, "replay": {"power_W": 1}}, "did you mean 'power_w'"),
        ({"fleet": {"engine": "e"}, "replays": {}}, "did you mean 'replay'"),
        (
            {"fleet": {"engine": "e"}, "replay": {"power_w": 1, "vocabulary": [5, 2]}},
            "vocabulary must be two rising token ids",
        ),
        (
            {
                "fleet": {"prefill": ["http://h:1"], "decode": ["http://h:2"]},
                "replay": {"power_w": 1},
            },
            "prefill-0 must publish forward-pass metrics",
        ),
        (
            {"fleet": ATTACHED, "replay": {"power_w": 1}},
            'prefill_metrics = "before" needs an engine that announces its batches, prefill-0 has',
        ),
        (
            {
                "simulate": {"prefill_metrics": "after", "decode_metrics": "before"},
                "fleet": ATTACHED,
                "replay": {"power_w": 1},
            },
            'decode_metrics = "before" needs an engine that announces its batches, decode-0 has no',
        ),
        (
            {"fleet": {"engine": "e"}, "replay": {"gpus": {"prefill": [[0]], "decode": [[1]]}}},
            "gpus.prefill must list the cards of 2 instances",
        ),
        (
            {
                "simulate": {"num_prefill": 1, "num_decode": 1},
                "fleet": {"engine": "e"},
                "replay": {"gpus": {"prefill": [[0]], "decode": [[]]}},
            },
            "gpus.decode must list the cards of 1 instances, at least one each",
        ),
        (
            {"fleet": {"engine": "e"}, "replay": {"power_w": 50.0, "actuator": "/run/v.sock"}},
            "actuator must have gpus to set, got /run/v.sock without: name the cards",
        ),
        (
            {
                "fleet": {"colocated": [{"url": "http://h:1", "metrics": "ipc:///c"}]},
                "replay": {"power_w": 1},
            },
            "a colocated server must announce its batches, .* colocated-0 has no batch socket",
        ),
        (
            {
                "simulate": {"num_colocated": 2, "colocated_order": "vllm"},
                "fleet": {"engine": "e"},
                "replay": {"power_w": 1},
            },
            "colocated_order must be one that SGLang has, got vllm",
        ),
        (
            {
                "simulate": {"prefix_cache_tokens": 9000},
                "fleet": {"engine": "e"},
                "replay": {"power_w": 1},
            },
            "prefix_cache_tokens is replayed on emulated cards alone, .* set .replay. emulate",
        ),
        (
            {
                "simulate": {"decode_profiles": "h100-sxm/llama-3.1-8b*2"},
                "fleet": {"engine": "e"},
                "replay": {"power_w": 1},
            },
            "on like cards: leave out decode_profiles",
        ),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(
    tmp_path: Path, tables: dict[str, Any], message: str
) -> None:
    path = tmp_path / "replay.toml"
    path.write_text(tomli_w.dumps(tables))
    with pytest.raises(VoltanaError, match=message) as found:
        read_replay_config(path)
    assert "\n" not in str(found.value)


def test_energy_of_windows_by_hand(tmp_path: Path) -> None:
    """Hand-worked: an idle second, 2 s of work at 300 W in all, and a clock change in the second.

    The counter reads 0, 100, 400, 700 and 750 J at 10, 11, 12, 13 and 14 s; the run's time 0 is at
    10 s. One prefill batch runs from 1 to 2 s, another from 2 to 3 s; the last token is at 3.5 s.
    """
    counter = [(10, 0.0), (11, 100.0), (12, 400.0), (13, 700.0), (14, 750.0)]
    lines = [json.dumps(["prefill", 0, at_s, j]) for at_s, j in counter]
    lines += [json.dumps(["decode", 0, at_s, 0.0]) for at_s, _ in counter]
    (tmp_path / "energy.jsonl").write_text("\n".join(lines) + "\n")
    batches = [["prefill", 0, 11.0, 1.0, 1.0, 1, 50], ["prefill", 0, 12.0, 1.0, 0.9, 2, 80]]
    batches.insert(0, ["prefill", 0, 5.0, 1.0, 1.0, 1, 9])  # warming up: not counted
    text = "".join(json.dumps(row) + "\n" for row in batches)
    (tmp_path / "iterations.jsonl").write_text(text)
    clocks = [(4.0, 1000), (12.25, 700), (13.5, 1000)]
    text = "".join(json.dumps({"at_s": at_s, "clock_mhz": mhz}) + "\n" for at_s, mhz in clocks)
    (tmp_path / "agent-prefill-0.clocks.jsonl").write_text(text)
    row: dict[str, Any] = {
        "request_id": 0,
        "status": COMPLETED,
        "sent_s": 0.0,
        "first_token_s": 3.25,
    }
    row |= {"finish_s": 3.5, "tokens": 2, "gaps_s": [0.25], "prefill_id": 0, "decode_id": 0}
    (tmp_path / "requests.jsonl").write_text(json.dumps(row) + "\n")
    work = Workload(arrival_s=np.zeros(2), input_tokens=np.full(2, 50), output_tokens=np.full(2, 2))
    config = make_config({"num_prefill": 1, "num_decode": 1})
    window = Window(start_s=10.0, is_complete=True, wall_s=1.0)
    record = assemble(tmp_path, work, config, window, {})
    prefill, decode = record.instances
    assert record.makespan_s == 3.5
    assert (prefill.busy_energy_j, prefill.idle_energy_j) == (600.0, 125.0)
    assert prefill.busy_window_energy_j == 600.0
    assert (prefill.busy_s, prefill.idle_s) == (2.0, 1.5)
    assert prefill.clock_busy_s == {1000: 1.25, 700: 0.75}
    assert record.iterations is not None
    assert record.iterations.clock_mhz.tolist() == [1000, 700]  # what most of each ran at
    assert prefill.clock_idle_s == {1000: 1.0, 700: 0.5}
    assert prefill.num_clock_changes == 2
    assert (decode.num_iterations, decode.busy_window_energy_j) == (0, 0.0)
    assert record.requests.status.tolist() == [COMPLETED, IN_FLIGHT]
    assert record.itl_s.tolist() == [0.25]


def test_turns_are_in_the_order_in_which_they_came_with_what_each_found(tmp_path: Path) -> None:
    """Row 2 came after row 3 by its answer's time, row 4 was never sent; 6 tokens were computed."""
    work = Workload(
        arrival_s=np.array([0.0, 0.5, 1.0, 2.0, 3.0]),
        input_tokens=np.array([4, 4, 8, 4, 8]),
        output_tokens=np.ones(5, dtype=np.int64),
        turns=Turns(previous=np.array([-1, -1, 0, -1, 1]), think_s=np.zeros(5)),
    )
    lines = [
        {"request_id": 0, "status": COMPLETED, "sent_s": 0, "prefill_id": 0, "finish_s": 1.0},
        {"request_id": 1, "status": FAILED, "sent_s": 0.5, "prefill_id": 0, "cached_tokens": 2},
        {"request_id": 3, "status": COMPLETED, "sent_s": 2, "prefill_id": 0, "cached_tokens": 3},
        {"request_id": 2, "status": COMPLETED, "sent_s": 2.5, "prefill_id": 0, "cached_tokens": 5}
        | {"arrival_s": 2.5, "finish_s": 3.0},
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    iterations = '["prefill",0,0.1,0.2,0.2,1,2,0,0,6]\n["prefill",0,1.1,0.2,0.2,1,4,0,0,0]\n'
    (tmp_path / "iterations.jsonl").write_text(iterations)
    counters = [[p, 0, t, t] for p in ("prefill", "decode") for t in (0.0, 4.0)]
    (tmp_path / "energy.jsonl").write_text("".join(json.dumps(x) + "\n" for x in counters))
    told = {"num_prefill": 1, "num_decode": 1, "prefix_cache_tokens": 100}
    window = Window(start_s=0.0, is_complete=True, wall_s=1.0)
    record = assemble(tmp_path, work, make_config(told), window, {})
    requests = record.requests
    assert requests.workload_row is not None
    assert requests.cached_tokens is not None
    assert requests.workload_row.tolist() == [0, 1, 3, 2]
    assert requests.arrival_s.tolist() == [0.0, 0.5, 2.0, 2.5]
    assert requests.input_tokens.tolist() == [4, 4, 4, 8]
    assert requests.cached_tokens.tolist() == [0, 2, 3, 5]
    prefill, decode = record.instances
    assert (prefill.cached_tokens, prefill.computed_tokens) == (10, 6)
    assert (decode.cached_tokens, decode.unsent_tokens) == (None, None)
    found = summarise(record)
    assert (found["cached_tokens"], found["cached_share"]) == (10, 0.625)
    assert "evicted_tokens" not in found  # the engine does not say
    assert record.iterations is not None
    assert record.iterations.prefix_tokens is not None
    assert record.iterations.prefix_tokens.tolist() == [6, 0]


def test_gpus_are_given_by_instance() -> None:
    config = ReplayConfig(
        sim=make_config({"num_prefill": 1, "num_decode": 1}),
        engine=Installation(python=Path("x"), model=Path("m")),
        gpus={"prefill": ((0, 1),), "decode": ((2,),)},
    )
    assert config.gpus_of("prefill", 0) == (0, 1)
    assert config.gpus_of("decode", 0) == (2,)
