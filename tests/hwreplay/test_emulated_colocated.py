"""A colocated server, the real SGLang, on an emulated card: it runs as the simulator says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
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
from voltana.sim.workload.generate import make_workload

EXAMPLE = ROOT / "hwreplay/replay-colocated.toml"


def test_the_example_is_a_configuration() -> None:
    config = read_replay_config(EXAMPLE)
    assert config.engine is not None
    assert "--enable-mixed-chunk" in config.engine.arguments
    assert config.gpus == {"colocated": ((0,),)}
    assert config.sim.counts == {"colocated": 1}


@pytest.mark.engine
@pytest.mark.slow
def test_chunks_run_beside_decoding_and_the_clock_is_one_agents(tmp_path: Path) -> None:
    """Where the host is busy its own time is in the latencies: those are not judged here. What a
    pass takes and draws is the card's: iterations in sum, energy by the clocks that were set."""
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    config = read_replay_config(EXAMPLE)
    work = make_workload("sharegpt", rate_rps=10.0, duration_s=4.0, seed=13)
    work = replace(work, output_tokens=np.minimum(work.output_tokens, 40))
    work.write(tmp_path / "trace.csv")
    simulate = config.sim.as_dict() | {"trace": str(tmp_path / "trace.csv")}
    del simulate["workload"], simulate["rate_rps"], simulate["duration_s"]
    told = {
        "simulate": simulate,
        "fleet": {"engine": str(ENGINE)},
        "replay": {"emulate": config.emulate, "dilation": 3.0},
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
    table = observed.iterations
    assert table is not None
    assert table.chunk_tokens is not None
    assert set(table.phase.tolist()) == {"colocated"}
    both = (table.chunk_tokens > 0) & (table.batch_size > 0)
    assert both.sum() > 5
    # a prompt of 509 token ids may begin as one in the prefix cache does; that is switched off
    assert table.chunk_tokens.sum() == observed.requests.input_tokens.sum()
    made = table.batch_size.sum() + len(observed.requests)  # a prompt makes its first token
    assert made == observed.requests.output_tokens.sum()
    simulated = run(make_config(simulate))
    write_run(simulated, tmp_path / "simulated")
    limits = Thresholds(energy_frac=0.15, p50_frac=None, p99_frac=None)
    passes, text, found = run_validation(
        tmp_path / "simulated", tmp_path / "real", tmp_path / "v", thresholds=limits
    )
    assert passes, text
    errors = json.loads(found)["iterations"]["colocated"]
    assert abs(errors["total_error_frac"]) < 0.05, text
    report = json.loads((tmp_path / "real/agent-colocated-0.report.json").read_text())
    assert report["counts"]["decisions"] > 0.9 * len(table.start_s)
    clocks = np.unique(table.clock_mhz)
    assert set(clocks.tolist()) <= {1005, 1410}
    assert 1005 in clocks  # ecofreq takes it wherever the promise allows
