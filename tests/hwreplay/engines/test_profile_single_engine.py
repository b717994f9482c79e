"""One real SGLang server for both phases, killed in the middle of a run: the profile goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.profiles.measure.quiet import Quiet
from voltana.hwreplay.engines import server
from voltana.hwreplay.engines.launch import run_profiled
from voltana.hwreplay.engines.plan import Installation
from voltana.profiles.catalog import load_profile
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.engines.llama_config import load_shape
from voltana.profiles.engines.sglang import SglangEngine
from voltana.profiles.measure.campaign import Plan
from voltana.profiles.measure.progress import Standing
from voltana.profiles.measure.run import measure_profile
from voltana.profiles.measure.trial import Protocol

ENGINE = ROOT / ".engine"
KILLED_AT = 3


class Killing(Quiet):
    """Kills the first server before a certain point."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def at(self, standing: Standing) -> None:
        if standing.num_done == KILLED_AT and len(self.started) == 1:
            os.killpg(self.started[0].pid, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.slow
def test_a_single_server_is_profiled_and_started_again_when_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    progress = Killing()

    def spawn(*args: object) -> subprocess.Popen[bytes]:
        progress.started.append(whole(*args))  # type: ignore[arg-type]
        return progress.started[-1]

    whole = server.spawn
    monkeypatch.setattr("voltana.hwreplay.engines.launch.spawn", spawn)
    installation = Installation.in_folder(ENGINE)
    engine = SglangEngine(
        lambda: run_profiled(installation, tmp_path / "logs", is_pair=False),
        load_shape(str(installation.model)),
    )
    plan = Plan(
        clocks_mhz=None, phases=("prefill", "decode"), budget_s=0.0, max_batch_size=2,
        max_tokens=256,
        protocol=Protocol(
            window_s=0.01, warm_up_s=0.0, settle_s=0.0, min_iterations=2, num_trials=1
        ),
    )  # fmt: skip
    out = tmp_path / "single"
    measure_profile([ConstantPowerGpu(100.0)], engine, plan, out, progress)
    assert len(progress.started) == 2
    assert all(process.poll() is not None for process in progress.started)
    left_out = [text for text in progress.said if text.startswith("left out: SGLang at")]
    assert len(left_out) == 1
    assert "\n" not in left_out[0]
    profile = load_profile(out)
    assert set(profile.decode["batch_size"]) == {1, 2}
    assert "servers one for both" in profile.meta.provenance["decode_time"].source
    assert profile.meta.provenance["decode_power"].status == "modelled"
    assert (out / "serving.toml").is_file()
