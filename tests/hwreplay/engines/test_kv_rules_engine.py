"""Admission and retraction of the simulator against the methods of the installed SGLang."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hwreplay.conftest import ENGINE
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import Falling, make_requests
from tests.sim.policies.doubles import make_context
from voltana.profiles.catalog import Profile
from voltana.sim.config import make_config
from voltana.sim.engine.decode import DecodeInstance
from voltana.sim.engine.logs.exact import ExactLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.controllers.fixed import NoParameters

Row = list[int]
"""Prompt, output tokens so far, output tokens in all."""


def instance(
    profile: Profile, running: list[Row], *, capacity_tokens: int, reserve_tokens: int
) -> DecodeInstance:
    """A decode instance amid these requests."""
    made = DecodeInstance(
        make_config({"kv_reserve_tokens": reserve_tokens}),
        ExactLog(make_requests(*[(0.0, 1, 1)] * (len(running) + 1))),
        InstanceState(instance_id=0, phase="decode", kv_capacity_tokens=capacity_tokens),
        ControllerAnswers(Falling(NoParameters(), make_context()), profile.clocks_mhz, "decode 0"),
        GpuTrack(profile.truth(), "decode", clock_mhz=0, actuation_s=0.0),
        max_running=64,
    )
    for number, (prompt, outputs, wanted) in enumerate(running):
        made.join(SimRequest(number, 0.0, prompt, wanted), prompt + outputs, 0.0)
    return made


@pytest.mark.engine
def test_we_admit_and_retract_as_the_engine_s_own_methods(tmp_path: Path) -> None:
    """300 batches with many ties, in the order in which all but one would go; 300 queues whose
    first request needs a little less or more than there is."""
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    rng = np.random.default_rng(8)
    batches = [
        [[int(p), int(o), 9] for p, o in rng.integers((1, 0), (6, 5), (n, 2))]
        for n in rng.integers(1, 12, 300)
    ]
    queues: list[dict[str, Any]] = []
    for n in rng.integers(1, 9, 300).tolist():
        running = [[int(p), int(o), int(o) + 9] for p, o in rng.integers(1, 60, (n, 2))]
        first, reserve = [int(rng.integers(1, 60)), 0, 1], int(rng.integers(40, 90))
        needed = sum(p + o for p, o, _ in running) + first[0] + reserve * (n + 1)
        queues.append(
            {"running": running, "first": first, "reserve_tokens": reserve,
             "capacity_tokens": needed + int(rng.integers(-2, 3))}
        )  # fmt: skip
    done = subprocess.run(
        [ENGINE / "venv" / "bin" / "python", "-W", "ignore",
         Path(__file__).parent / "engine_kv_rules.py"],
        input=json.dumps({"batches": batches, "queues": queues}),
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    theirs = json.loads(done.stdout.splitlines()[-1])
    profile = write_synthetic_profile(tmp_path)
    for batch, order in zip(batches, theirs["retracted"], strict=True):
        made = instance(profile, batch, capacity_tokens=10_000, reserve_tokens=0)
        ours = []
        while made.state.num_running > 1:
            victim = made.least_far()
            made.retract(victim, 0.0)
            ours.append(victim.request_id)
        assert ours == order[:-1], batch
    for queue, admitted in zip(queues, theirs["admitted"], strict=True):
        made = instance(
            profile, queue["running"], capacity_tokens=queue["capacity_tokens"],
            reserve_tokens=queue["reserve_tokens"],
        )  # fmt: skip
        made.waiting.append(SimRequest(99, 0.0, queue["first"][0], queue["first"][2]))
        made.state.num_waiting = 1
        assert made.has_room(made.state.kv_tokens) == admitted, queue
    assert 50 < sum(theirs["admitted"]) < 250
