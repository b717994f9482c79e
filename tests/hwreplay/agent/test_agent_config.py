"""What a wrong configuration of an agent says, and to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.agent.test_agent import SETTINGS, config_of, running, voice, with_actuator  # noqa: F401
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import Standin
from voltana.hwreplay.agent.agent import read_agent_config
from voltana.profiles.common.errors import VoltanaError

pytestmark = pytest.mark.slow


def test_who_starts_an_agent_learns_why_it_ended(
    tmp_path: Path,
    voice: Any,  # noqa: ANN401, F811
    standin: Standin,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(tmp_path, voice, settings=SETTINGS | {"controller": "ecofrek"})
    with (
        pytest.raises(VoltanaError, match=r"it ended with 2: voltana agent: .*'ecofreq'"),
        running(config, tmp_path),
    ):
        pass
    shared = config_of(tmp_path, voice, settings=SETTINGS | {"controller": "polca"})
    with (
        pytest.raises(
            VoltanaError, match="the agents of all instances in one process, 1 are missing"
        ),
        running(shared, tmp_path),
    ):
        pass
    cardless = config_of(tmp_path, voice, actuator_socket=str(tmp_path / "actuator"), power_w=50.0)
    with (
        pytest.raises(
            VoltanaError, match="actuator must have gpus to set, agent-decode-0 has none"
        ),
        running(cardless, tmp_path),
    ):
        pass
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)  # there is a card, and no actuator
    lonely = with_actuator(tmp_path, voice)
    with (
        pytest.raises(VoltanaError, match=r"the actuator must answer at .*/actuator"),
        running(lonely, tmp_path),
    ):
        pass


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "agent.json"
    with pytest.raises(VoltanaError, match=r"no agent\.json"):
        read_agent_config(file)
    file.write_text('{"phase": "prefil"}')
    with pytest.raises(VoltanaError, match="an agent's file must hold its configuration"):
        read_agent_config(file)
