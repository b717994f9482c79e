"""Generated sessions and traces with hashes: what prompts share, who waits for whom."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.prompts import Prompts, Turns
from voltana.sim.workload.traces import read_trace
from voltana.sim.workload.workload import Workload

BLOCKS = (
    {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 2000, "input_length": 1024, "output_length": 6, "hash_ids": [7, 8]},
    {"timestamp": 3000, "input_length": 1400, "output_length": 7, "hash_ids": [7, 8, 9]},
)


def write_lines(path: Path, rows: tuple[dict[str, object], ...]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_s_hashes_are_blocks_of_512_and_a_rest(tmp_path: Path) -> None:
    """Block 9 of 276 tokens is another one than block 9 of 376."""
    trace = read_trace(write_lines(tmp_path / "t.jsonl", BLOCKS))
    assert trace.prompts is not None
    prompts = [trace.prompts.prompt(row) for row in range(3)]
    assert [p.ends for p in prompts] == [[512, 1024, 1300], [512, 1024], [512, 1024, 1400]]
    assert prompts[0].names[:2] == prompts[1].names == prompts[2].names[:2]
    assert prompts[0].names[2] != prompts[2].names[2]
    kept = trace.sliced(1.0, 9.0)
    assert kept.prompts is not None
    assert kept.prompts.prompt(1).names == prompts[2].names
    assert kept.content_hash != trace.content_hash


@pytest.mark.parametrize(
    ("hashes", "message"), [([7, 8], "must have 3 blocks of 512, got 2"), (5, "must be a list")]
)
def test_hashes_that_do_not_fit_the_length_are_refused(
    tmp_path: Path, hashes: object, message: str
) -> None:
    path = write_lines(tmp_path / "t.jsonl", ({**BLOCKS[0], "hash_ids": hashes},))
    with pytest.raises(VoltanaError, match=message):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"), [("chat:think=5", None, 325.0), ("agent", 8_596.0, 182.0)]
)
def test_sessions_have_the_rate_and_the_means_that_they_say(
    name: str, inputs: float | None, outputs: float
) -> None:
    """600 s at 20 requests/s: some 3,000 sessions, whose turns spread the number of requests by 5 %
    at most (three deviations of sums of geometric numbers); the agents' means are Mooncake's."""
    made = make_workload(name, rate_rps=20.0, duration_s=600.0, seed=3)
    assert len(made) == pytest.approx(12_000, rel=0.05)
    assert made.output_tokens.mean() == pytest.approx(outputs, rel=0.05)
    if inputs is not None:
        assert made.input_tokens.mean() == pytest.approx(inputs, rel=0.05)
    # as it had always been so: no ramp
    first, last = (made.arrival_s < 300.0).sum(), (made.arrival_s >= 300.0).sum()
    assert first == pytest.approx(last, rel=0.1)


def test_a_turn_repeats_all_that_was_said() -> None:
    made = make_workload("chat:think=5,system=100", rate_rps=10.0, duration_s=60.0, seed=3)
    assert made.prompts is not None
    assert made.turns is not None
    followed = 0
    for row, before in enumerate(made.turns.previous.tolist()):
        prompt = made.prompts.prompt(row)
        assert (prompt.names[0], prompt.ends[0]) == (0, 100)
        if before < 0:
            continue
        followed += 1
        earlier = made.prompts.prompt(before)
        assert prompt.names[: len(earlier.names)] == earlier.names
        answer = prompt.ends[len(earlier.names)] - earlier.ends[-1]
        assert answer == made.output_tokens[before]
        assert len(prompt.names) == len(earlier.names) + 2
        gap_s = made.arrival_s[row] - made.arrival_s[before]
        assert gap_s == pytest.approx(made.turns.think_s[row])
    assert followed > 300
    assert (made.input_tokens + made.output_tokens).max() <= 8_192 + 100
    # each of a session's own segments is nobody else's
    rows = [set(made.prompts.prompt(r).names) - {0} for r in range(len(made))]
    heads = [r for r in range(len(made)) if made.turns.previous[r] < 0]
    assert sum(len(rows[r]) for r in heads) == len(set().union(*(rows[r] for r in heads)))


def test_the_seed_decides_and_whether_turns_wait_does_not() -> None:
    text = "agent:steps=4"
    one, same = (make_workload(text, rate_rps=5, duration_s=60, seed=2) for _ in range(2))
    assert one.content_hash == same.content_hash
    open_loop = make_workload(f"{text},waits=false", rate_rps=5, duration_s=60, seed=2)
    assert open_loop.turns is None
    np.testing.assert_array_equal(open_loop.arrival_s, one.arrival_s)
    faster = one.scaled(2.0)
    assert faster.turns is not None
    assert one.turns is not None
    np.testing.assert_array_equal(2 * faster.turns.think_s, one.turns.think_s)


def test_a_slice_s_first_turns_wait_for_nobody() -> None:
    made = make_workload("chat:think=5", rate_rps=5, duration_s=60, seed=2)
    late = made.sliced(30.0, 60.0)
    assert late.turns is not None
    assert made.turns is not None
    inside = np.flatnonzero(made.arrival_s >= 30.0)
    waited = (made.turns.previous[inside] >= inside[0]).sum()
    assert (late.turns.previous >= 0).sum() == waited > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chat:turns=0.5", "must be >= 1"),
        ("chat:turn=2", "no parameter 'turn'"),
        ("chat:lengths=sharegtp", "unknown choice 'sharegtp'"),
    ],
)
def test_bad_parameters_are_refused(text: str, message: str) -> None:
    with pytest.raises(VoltanaError, match=message):
        make_workload(text, rate_rps=5, duration_s=60, seed=2)
    with pytest.raises(VoltanaError, match="arrivals=poisson"):
        make_workload("chat", rate_rps=5, duration_s=60, seed=2, arrivals="gamma:cv=2")
    assert make_config({"workload": text}).workload == text


def two(prompts: Prompts | None = None, turns: Turns | None = None) -> Workload:
    tokens = np.array([5, 7])
    return Workload(
        arrival_s=np.array([0.0, 1.0]), input_tokens=tokens, output_tokens=tokens,
        prompts=prompts, turns=turns,
    )  # fmt: skip


def test_prompts_and_turns_that_contradict_themselves_are_refused() -> None:
    assert two(Prompts.of_rows([[1, 2], [1, 3]], [[4, 1], [4, 3]])).prompts is not None
    with pytest.raises(VoltanaError, match="add up to its input_tokens, 7, got 6"):
        two(Prompts.of_rows([[1, 2], [1, 3]], [[4, 1], [4, 2]]))
    with pytest.raises(VoltanaError, match="one name must have one length, got 2 and 4"):
        two(Prompts.of_rows([[1, 2], [1, 3]], [[2, 3], [4, 3]]))
    with pytest.raises(VoltanaError, match="earlier request"):
        two(turns=Turns(previous=np.array([-1, 1]), think_s=np.zeros(2)))
    with pytest.raises(VoltanaError, match="finite and >= 0"):
        two(turns=Turns(previous=np.array([-1, 0]), think_s=np.array([0.0, -1.0])))
