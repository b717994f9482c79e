"""A colocated server, the real SGLang with its cache, on an emulated card: as simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from tests.conftest import ROOT
from tests.hwreplay.conftest import ENGINE
from voltana.experiments.hardware.validate import run_validation
from voltana.experiments.runs import run
from voltana.hwreplay.replay.config import read_replay_config
from voltana.hwreplay.validate.validate import Thresholds
from voltana.sim.config import make_config
from voltana.sim.results import read_run, write_run
from voltana.sim.workload.prompts import Prompts, Turns
from voltana.sim.workload.workload import Workload

EXAMPLE = ROOT / "hwreplay/replay-colocated.toml"


def test_the_example_is_a_configuration() -> None:
    config = read_replay_config(EXAMPLE)
    assert config.engine is not None
    assert "--enable-mixed-chunk" in config.engine.arguments
    assert config.gpus == {"colocated": ((0,),)}
    assert config.sim.counts == {"colocated": 1}


def conversations(count: int = 14, turns: int = 4) -> Workload:
    """Sessions that begin within 3 s, behind 300 tokens that all share; a turn waits for the last.

    Rows are in order of the turns' earliest arrivals, as a workload's must be.
    """
    rng = np.random.default_rng(5)
    said: list[list[int]] = [[0] for _ in range(count)]
    tokens = [[300] for _ in range(count)]
    names, lengths, answers, outputs, previous = [], [], [], [], []
    for row in range(count * turns):
        session = row % count
        asked, answered = int(rng.integers(20, 200)), int(rng.integers(10, 40))
        said[session] += [2 * row + 1]
        tokens[session] += [asked]
        names.append(list(said[session]))
        lengths.append(list(tokens[session]))
        said[session] += [2 * row + 2]
        tokens[session] += [answered]
        answers.append(2 * row + 2)
        outputs.append(answered)
        previous.append(row - count if row >= count else -1)
    prompts = Prompts.of_rows(names, lengths, answers)
    begins_s = np.sort(rng.uniform(0.0, 3.0, count))
    return Workload(
        arrival_s=np.concatenate([begins_s, np.full(count * (turns - 1), begins_s[-1])]),
        input_tokens=prompts.input_tokens,
        output_tokens=np.array(outputs),
        prompts=prompts,
        turns=Turns(previous=np.array(previous), think_s=np.where(np.array(previous) < 0, 0, 0.2)),
    )


@pytest.mark.engine
@pytest.mark.slow
def test_chunks_run_beside_decoding_and_what_was_said_before_is_not_computed_again(
    tmp_path: Path,
) -> None:
    """Where the host is busy its own time is in the latencies: those are not judged here. What a
    pass takes and draws is the card's: iterations in sum, energy by the clocks that were set."""
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    config = read_replay_config(EXAMPLE)
    conversations().write(tmp_path / "trace.csv")
    simulate = config.sim.as_dict() | {
        "trace": str(tmp_path / "trace.csv"),
        "colocated_cache": True,
    }
    del simulate["workload"], simulate["rate_rps"], simulate["duration_s"]
    told = {
        "simulate": simulate,
        "fleet": {"engine": str(ENGINE)},
        "replay": {"emulate": config.emulate, "dilation": 5.0},
    }
    (tmp_path / "replay.toml").write_text(tomli_w.dumps(told))
    command = [sys.executable, "-m", "voltana.experiments.cli", "replay", "--config",
               str(tmp_path / "replay.toml"), "--out", str(tmp_path / "real")]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "real/summary.json").exists(), done.stderr[-2000:]
    observed = read_run(tmp_path / "real")
    assert observed.settings["power"] == "emulated"
    table, requests = observed.iterations, observed.requests
    assert table is not None
    assert table.chunk_tokens is not None
    assert requests.cached_tokens is not None
    assert set(table.phase.tolist()) == {"colocated"}
    both = (table.chunk_tokens > 0) & (table.batch_size > 0)
    assert both.sum() > 5
    # the engine's own record of what it computed, and its answers' word on what it did not
    assert table.chunk_tokens.sum() == (requests.input_tokens - requests.cached_tokens).sum()
    made = table.batch_size.sum() + len(requests)  # a prompt makes its first token
    assert made == requests.output_tokens.sum()
    simulated = run(make_config(simulate))
    write_run(simulated, tmp_path / "simulated")
    limits = Thresholds(energy_frac=0.15, p50_frac=None, p99_frac=None)
    passes, text, found = run_validation(
        tmp_path / "simulated", tmp_path / "real", tmp_path / "v", thresholds=limits
    )
    assert passes, text
    cached = json.loads(found)["cached"]
    assert cached["simulated"] > 0.4 * requests.input_tokens.sum()
    # a session's own turns are found to the token; who came first with what all share is a race
    assert cached["same"] >= 0.9 * cached["requests"], text
    errors = json.loads(found)["iterations"]["colocated"]
    assert abs(errors["total_error_frac"]) < 0.05, text
    report = json.loads((tmp_path / "real/agent-colocated-0.report.json").read_text())
    assert report["counts"]["decisions"] > 0.9 * len(table.start_s)
    clocks = np.unique(table.clock_mhz)
    assert set(clocks.tolist()) <= {1005, 1410}
    assert 1005 in clocks  # ecofreq takes it wherever the promise allows
