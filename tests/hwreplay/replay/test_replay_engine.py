"""The whole loop on the real SGLang: probe, simulate, replay, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from tests.conftest import ROOT
from tests.hwreplay.conftest import EngineFleet
from voltana.experiments.hardware.replay import run_probe, run_replay
from voltana.experiments.hardware.validate import run_validation
from voltana.experiments.runs import run, workload_of
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.replay.config import read_replay_config
from voltana.hwreplay.validate.validate import Thresholds
from voltana.sim.metrics import summarise
from voltana.sim.results import read_run, write_run

EXAMPLE = ROOT / "hwreplay/replay-cpu.toml"


def entry(server: Server) -> dict[str, Any]:
    found = {"url": server.plan.url, "metrics": server.plan.metrics}
    return found | (
        {"bootstrap_port": server.plan.bootstrap_port} if server.plan.bootstrap_port else {}
    )


def test_the_example_is_a_configuration() -> None:
    config = read_replay_config(EXAMPLE)
    assert config.engine is not None
    assert config.engine.model == Path(".engine/model")
    assert len(workload_of(config.sim)) == 100


@pytest.mark.engine
@pytest.mark.slow
def test_the_loop_on_the_real_engine(engine_fleet: EngineFleet, tmp_path: Path) -> None:
    """Counts are exact. Times are this machine's, busy with tests: a factor of 3 is a broken model.

    On a quiet machine the errors are smaller; `voltana validate` states them.
    """
    fleet: dict[str, Any] = {
        "prefill": [entry(engine_fleet.prefill)],
        "decode": [entry(engine_fleet.decode[0])],
    }
    fleet["batch_sockets"] = {"prefill-0": str(engine_fleet.prefill.plan.batch_socket)}
    simulate = read_replay_config(EXAMPLE).sim.as_dict() | {"duration_s": 30.0}
    path = tmp_path / "replay.toml"
    path.write_text(
        tomli_w.dumps({"simulate": simulate, "fleet": fleet, "replay": {"power_w": 50.0}})
    )
    overhead, adjusted = run_probe(path, tmp_path / "probe", fits_profile=True)
    assert overhead.idle_s > 0.0
    assert adjusted.kv_transfer_latency_s > 0.0

    config, ours = run_replay(tmp_path / "probe/replay.toml", tmp_path / "real")
    assert config.sim == adjusted
    workload = workload_of(adjusted)
    observed = read_run(tmp_path / "real")
    assert ours["requests_completed"] == len(workload)
    assert len(observed.itl_s) == (workload.output_tokens - 1).sum()
    iterations = observed.iterations
    assert iterations is not None
    is_decode = iterations.phase == "decode"
    # of 509 token ids, some prompts begin as one in the prefix cache does: a token or two each
    sent_tokens = int(workload.input_tokens.sum())
    fresh_tokens = int(iterations.tokens[~is_decode].sum())
    assert sent_tokens - 2 * len(workload) <= fresh_tokens <= sent_tokens
    made = int(iterations.batch_size[is_decode].sum())  # decode makes every token but the first
    assert (workload.output_tokens - 1).sum() <= made <= 1.05 * workload.output_tokens.sum()

    simulated = run(adjusted)
    write_run(simulated, tmp_path / "simulated")
    limits = Thresholds(energy_frac=0.5, p50_frac=2.0, p99_frac=None)
    _, text, _ = run_validation(
        tmp_path / "simulated", tmp_path / "real", tmp_path / "validation", thresholds=limits
    )
    theirs = summarise(simulated)
    for name in ("ttft_s", "itl_s"):
        ratio = theirs[name]["p50"] / ours[name]["p50"]
        assert 1 / 3 < ratio < 3, text
    assert np.isclose(theirs["energy_j"], ours["energy_j"], rtol=0.2)
