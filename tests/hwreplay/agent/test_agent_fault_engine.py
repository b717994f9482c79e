"""Faults on the real engine: a frozen agent, and metrics that stop."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.conftest import EngineFleet
from tests.hwreplay.engines.gate import (
    LONG_S,
    clocks_of,
)
from tests.hwreplay.engines.test_engine_pair import (
    PROMPT,
    agent_config,
    agents,
    through,
)
from tests.hwreplay.metrics_relay import MetricsRelay
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import Standin
from voltana.hwreplay.agent.loop_record import StaleLimits

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_frozen_agent_loses_the_clock_while_its_engine_serves(
    engine_fleet: EngineFleet,
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)
    server = engine_fleet.decode[0]
    config = agent_config(server, actuator_socket=str(tmp_path / "actuator"), gpus=(0,))
    with (
        actuator_process(standin, tmp_path / "actuator", "--silence-s", "0.6"),
        agents([config], tmp_path) as (agent,),
    ):
        time.sleep(2.0)
        through(engine_fleet.prefill, server, PROMPT)
        assert eventually(lambda: standin["locked_mhz"] == 1005)
        agent.send_signal(signal.SIGSTOP)
        first = through(engine_fleet.prefill, server, PROMPT)
        assert eventually(lambda: standin["locked_mhz"] == 0)
        agent.send_signal(signal.SIGCONT)

        def locks_again() -> bool:
            assert through(engine_fleet.prefill, server, PROMPT) == first
            return standin["locked_mhz"] == 1005

        assert eventually(locks_again, 60)
    assert eventually(lambda: standin["locked_mhz"] == 0)


def test_dropped_metrics_unlock_while_requests_go_on(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """A relay between engine and agent lets nothing pass for a while."""
    server = engine_fleet.decode[0]
    assert server.plan.metrics is not None
    with MetricsRelay(server.plan.metrics, tmp_path / "relay") as relay:
        config = agent_config(
            server,
            metrics_address=relay.address,
            batch_socket=None,
            settings={"controller": "static:f=1005"},
            stale=StaleLimits(least_s=LONG_S, most_s=LONG_S),
        )

        def clocks() -> list[int]:
            return clocks_of(tmp_path, "decode-0")

        with agents([config], tmp_path):
            time.sleep(2.0)
            assert clocks() == [1005]
            tokens = through(engine_fleet.prefill, server, PROMPT, 300)
            assert clocks() == [1005]
            relay.drop_after(100)  # in the middle of the next answer
            assert through(engine_fleet.prefill, server, PROMPT, 300) == tokens
            assert eventually(lambda: clocks() == [1005, 0])
            relay.let_pass()
            assert through(engine_fleet.prefill, server, PROMPT, 300) == tokens
            assert eventually(lambda: clocks() == [1005, 0, 1005])
    report = json.loads((tmp_path / "agent-decode-0.report.json").read_text())
    assert report["counts"]["safe_states"] >= 1
    assert "no metrics for" in report["safe_states"][0]["reason"]
