"""`voltana agent` beside a foreign router's servers, on the emulated card with a real actuator."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from prometheus_client.parser import text_string_to_metric_families

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.agent.test_agent import SMALL, voice  # noqa: F401 (fixture)
from tests.hwreplay.engine_voice import EngineVoice, repeating
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import ROOT, Standin
from voltana.sim.policies.base import COLOCATED, DECODE, Phase

pytestmark = pytest.mark.slow

PERIOD_S = 0.05
TOKEN_S = 0.02
"""Below the promise of 45 ms: of a colocated server the time between two records is a token gap."""


class Attached:
    """The process, its log and its metrics."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def lines(self) -> list[dict[str, Any]]:
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def metrics(self) -> dict[str, float]:
        url = self.lines()[0]["metrics"]
        with urllib.request.urlopen(url) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {s.name: s.value for f in families for s in f.samples if "_created" not in s.name}


@contextmanager
def attached(
    card: Standin, directory: Path, address: str, *options: str, phase: Phase = DECODE
) -> Iterator[Attached]:
    file, log = directory / "fleet.toml", directory / "log"
    whole = {
        "simulate": {"controller": "ecofreq"},
        "fleet": {phase: [{"metrics": address}]},
        "serve": {"actuator": str(directory / "actuator"), "gpus": {phase: [[0]]}},
    }
    file.write_text(tomli_w.dumps(whole))
    command = [sys.executable, "-m", "voltana.experiments.cli", "agent", str(file), "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *options], env=card.env, cwd=ROOT, stderr=out)
    try:
        yield Attached(process, log)
    finally:
        process.terminate()
        process.wait(60)


def test_a_shadow_decides_and_touches_nothing_an_actor_sets_and_its_guard_gives_back(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,  # noqa: F811
) -> None:
    batch, tokens = SMALL
    say = partial(voice.say, num_decode_requests=batch, sum_decode_kv_tokens=tokens)
    with actuator_process(standin, tmp_path / "actuator"):
        with (
            attached(standin, tmp_path, voice.address, "--out", str(tmp_path / "kept")) as shadow,
            repeating(say, PERIOD_S),
        ):
            assert eventually(lambda: len(shadow.lines()) > 0)
            assert eventually(lambda: shadow.metrics().get("voltana_decisions_total", 0) > 20)
            found = shadow.metrics()
        assert shadow.process.returncode == 0
        assert found["voltana_wished_clock_mhz"] == 1005
        assert found["voltana_clock_mhz"] == 0
        assert found["voltana_estimated_saved_joules"] > 0
        assert (standin["num_locks"], standin["num_resets"]) == (0, 0)
        (kept,) = (tmp_path / "kept").glob("*/agent-decode-0.decisions.jsonl")
        (wish, end) = kept.read_text().splitlines()
        assert (json.loads(wish)["clock_mhz"], json.loads(end)["clock_mhz"]) == (1005, 0)

        with attached(standin, tmp_path, voice.address, "--act") as actor:
            with repeating(say, PERIOD_S):
                assert eventually(lambda: standin["locked_mhz"] == 1005)
            # a fifth of a second an iteration, where a gap may take 60 ms
            with repeating(partial(say, wall_time_s=0.2, num_decode_requests=50), PERIOD_S):
                assert eventually(lambda: actor.metrics().get("voltana_guard_released") == 1)
                assert standin["locked_mhz"] == 0
        (line,) = [x for x in actor.lines() if x["event"] == "guard releases the clock"]
        assert (line["instance"], line["level"]) == ("decode-0", "warning")
        assert line["attainment"] < 0.95
        assert standin["locked_mhz"] == 0


def test_what_it_cannot_see_or_set_is_one_line(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    file = tmp_path / "fleet.toml"

    def said(text: str, *options: str) -> str:
        file.write_text(text)
        command = [sys.executable, "-m", "voltana.experiments.cli", "agent", str(file), *options]
        done = subprocess.run(command, env=standin.env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("voltana: ")]
        return line

    queue = '[fleet]\nprefill = [{metrics = "ipc:///tmp/none"}]\n'
    assert "prefill controller ecofreq looks at last_queue_delay_s, which no" in said(
        queue + '[simulate]\nprefill_metrics = "after"\n', "--port", "0"
    )
    assert "--act needs [serve] actuator" in said(queue, "--act")
    both = '[fleet]\ndecode = [{metrics = "ipc:///a"}]\ncolocated = [{metrics = "ipc:///b"}]\n'
    assert "[fleet] must list colocated servers, or prefill and decode ones" in said(both)
    assert "decode-0 must name its forward-pass metrics" in said(
        '[fleet]\ndecode = ["http://h:1"]\n'
    )


def test_a_server_of_both_phases_keeps_the_driver_s_clock(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,  # noqa: F811
) -> None:
    with (
        actuator_process(standin, tmp_path / "actuator"),
        attached(standin, tmp_path, voice.address, "--act") as agent,
    ):
        batch, tokens = SMALL
        load = {"num_decode_requests": batch, "sum_decode_kv_tokens": tokens}
        with repeating(lambda: voice.say(**load), PERIOD_S):
            assert eventually(lambda: len(agent.lines()) > 0)
            assert eventually(lambda: agent.metrics().get("voltana_decisions_total", 0) > 5)
            assert eventually(lambda: standin["locked_mhz"] == 1005)
            load["num_prefill_requests"] = 1
            assert eventually(lambda: bool(refusals(agent)))
            assert eventually(lambda: standin["locked_mhz"] == 0)
        agent.process.send_signal(signal.SIGINT)
        assert agent.process.wait(60) == 0
    assert len(refusals(agent)) == 1


def test_a_colocated_server_obeys_and_speeds_up_for_a_queue_that_does_not_empty(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,  # noqa: F811
) -> None:
    batch, tokens = SMALL
    load = {"num_decode_requests": batch, "sum_decode_kv_tokens": tokens}
    chunk = {"num_prefill_requests": 1, "sum_prefill_tokens": 100}
    with (
        actuator_process(standin, tmp_path / "actuator"),
        attached(standin, tmp_path, voice.address, "--act", phase=COLOCATED) as agent,
    ):
        with repeating(lambda: voice.say(**load, **chunk), TOKEN_S):
            assert eventually(lambda: standin["locked_mhz"] == 1005)
        # nobody says how long a prompt has waited: at most since the queue was empty
        with repeating(lambda: voice.say(queued=1, **load, **chunk), TOKEN_S):
            assert eventually(lambda: standin["locked_mhz"] == 1410)
        with repeating(lambda: voice.say(**load, **chunk), TOKEN_S):
            assert eventually(lambda: standin["locked_mhz"] == 1005)
        assert agent.metrics()["voltana_iteration_predicted_seconds_total"] > 0
        assert refusals(agent) == []
        agent.process.send_signal(signal.SIGINT)
        assert agent.process.wait(60) == 0
    assert standin["locked_mhz"] == 0


def refusals(agent: Attached) -> list[dict[str, Any]]:
    said = "the server computes prompts and tokens alike"
    return [x for x in agent.lines() if x.get("reason", "").startswith(said)]
