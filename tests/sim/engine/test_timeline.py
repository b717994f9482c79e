"""The time series of a run by hand: what each instance shows at each sample, and its thinning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.catalog import Profile


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes 0.5 s at 256 W busy and 64 W idle: sums are exact in binary."""
    return write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.5,
        power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_what_a_sample_shows(halves: Profile, engine: str) -> None:
    """A (4 + 3 tokens) comes at 0, B (4 + 3) at 0.25 and waits for prefill until 0.5.

    Prefill: A to 0.5, B to 1.0. Decode: A's iterations end at 1.0, 1.5 and 2.0, B's at 1.5, 2.0 and
    2.5. A sample is taken after an arrival of its instant (the first begins the run, before all),
    after an end of prefill that was known earlier, and before decode ends or begins an iteration.
    """
    record, _ = run(
        halves, make_requests((0.0, 4, 3), (0.25, 4, 3)), timeline_interval_s=0.25, engine=engine
    )
    seen = record.timeline
    assert seen is not None
    assert seen["time_s"].tolist() == np.repeat(np.arange(11) * 0.25, 2).tolist()
    assert seen["phase"].tolist() == ["prefill", "decode"] * 11
    assert seen["instance_id"].tolist() == [0] * 22
    assert set(seen["clock_mhz"].tolist()) == {1400}
    #                    0  .25 .5 .75  1 1.25 1.5 1.75 2 2.25 2.5
    expected = {
        "prefill": {
            "batch_size": [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
            "num_waiting": [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            "kv_tokens": [0, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0],
            "power_w": [64, *[256] * 3, *[64] * 7],
        },
        "decode": {
            "batch_size": [0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 1],
            "num_waiting": [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0],
            "kv_tokens": [0, 0, 0, 4, 4, 9, 9, 11, 11, 6, 6],
            "power_w": [64, 64, 64, *[256] * 8],
        },
    }
    for phase, columns in expected.items():
        for name, values in columns.items():
            shown = seen[name][seen["phase"] == phase].tolist()
            assert shown == values, (phase, name)


def test_a_full_timeline_drops_every_other_sample_and_samples_half_as_often(
    halves: Profile,
) -> None:
    """Full with four. The fourth, at 0.75, fills it: 0 and 0.5 stay, and the next comes 0.5
    later, at 1.25; the fourth then at 1.75: 0 and 1.25 stay, and the next would come at 2.75."""
    record, _ = run(
        halves, make_requests((0.0, 4, 3)), timeline_interval_s=0.25, timeline_max_samples=4
    )
    assert record.timeline is not None
    assert record.timeline["time_s"].tolist() == [0.0, 0.0, 1.25, 1.25]
    assert len(record.timeline["power_w"]) == 4
