"""The simulator against hand-computed schedules and queueing theory."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.profiles.synthetic import Surface, write_synthetic_profile
from tests.sim.engine.fixtures import Falling, make_requests, run
from voltana.profiles.catalog import Profile
from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import CONTROLLERS, Entry
from voltana.sim.workload.workload import Workload


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes 0.5 s at 256 W busy and 64 W idle: sums are exact in binary."""
    return write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.5,
        power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )


def test_hand_computed_schedule(halves: Profile) -> None:
    """Two requests, three tokens each, one prefill and one decode instance.

    prefill: A 0.0-0.5, B (arrives 0.25, waits) 0.5-1.0
    decode:  A's tokens at 1.0 1.5 2.0; B joins at 1.0: tokens at 1.5 2.0 2.5
    """
    record, summary = run(halves, make_requests((0.0, 4, 3), (0.25, 4, 3)))
    assert record.requests.first_token_s.tolist() == [1.0, 1.5]
    assert record.requests.finish_s.tolist() == [2.0, 2.5]
    assert record.makespan_s == 2.5
    # gaps: iterations ending 1.5 (A), 2.0 (A and B), 2.5 (B)
    assert sorted(record.itl_weight.tolist()) == [1, 1, 2]
    assert set(record.itl_s.tolist()) == {0.5}
    # prefill busy 1.0 s of 2.5, decode busy from 0.5 to 2.5
    assert summary["prefill_energy_j"] == 256.0 * 1.0
    assert summary["decode_energy_j"] == 256.0 * 2.0
    assert summary["idle_energy_j"] == 64.0 * (1.5 + 0.5)
    assert summary["energy_j"] == 256.0 + 512.0 + 128.0
    assert summary["energy_busy_window_j"] == 256.0 + 512.0
    assert summary["energy_per_output_token_j"] == 896.0 / 6


def test_hosts_draw_the_same_whatever_happens(halves: Profile) -> None:
    """The schedule above takes 2.5 s on two instances: 100 W each make 500 J on top of 896."""
    _, summary = run(halves, make_requests((0.0, 4, 3), (0.25, 4, 3)), host_power_w=100.0)
    assert summary["host_energy_j"] == 500.0
    assert summary["energy_j"] == 896.0 + 500.0
    assert summary["energy_busy_window_j"] == 768.0  # of GPUs


class Spy(Controller):
    """Keeps what it is shown of delays and durations."""

    seen: ClassVar[list[tuple[float, float, float, int]]] = []

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None: ...

    def decide(self, state: InstanceState) -> int:
        self.seen.append(
            (state.last_queue_delay_s, state.ended_queue_delay_s, state.last_duration_s,
             state.ended_batch_size)
        )  # fmt: skip
        return 1400


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_a_batch_s_delay_goes_with_its_own_duration(
    halves: Profile, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches at 0.0 (one that has just come), 0.5 (two, since 0.125) and 1.0 (one, since 0.75).
    Before each the batch to come has waited 0, 0.375 and 0.25 s; the one that has ended had
    waited 0 s of the first, 0.375 s of the second, and took half a second."""
    monkeypatch.setitem(CONTROLLERS, "spy", Entry(make=Spy, parameters=NoParameters))
    Spy.seen.clear()
    requests = make_requests((0.0, 4, 1), (0.125, 4, 1), (0.25, 4, 1), (0.75, 4, 1))
    run(halves, requests, prefill_controller="spy", engine=engine)
    assert Spy.seen == [(0.0, 0.0, 0.0, 0), (0.375, 0.0, 0.5, 1), (0.25, 0.375, 0.5, 2)]


def test_first_token_from_prefill_ends_ttft_when_decode_takes_over(halves: Profile) -> None:
    """Prefill makes token 1, so decode makes two steps; one token needs no decode at all."""
    record, summary = run(halves, make_requests((0.0, 4, 3), (4.0, 4, 1)), first_token="prefill")
    assert record.requests.first_token_s.tolist() == [0.5, 4.5]
    assert record.requests.finish_s.tolist() == [1.5, 4.5]
    assert summary["itl_s"]["mean"] == 0.5
    assert record.itl_weight.sum() == 2
    assert summary["decode_energy_j"] == 256.0


def test_kv_transfer_delays_decode_by_latency_and_size(halves: Profile) -> None:
    """8 tokens of 1,024 B over 16,384 B/s take 0.5 s, plus 0.25 s latency."""
    record, _ = run(
        halves,
        make_requests((0.0, 8, 1)),
        kv_transfer_bytes_per_s=16_384,
        kv_transfer_latency_s=0.25,
    )
    assert record.requests.first_token_s.tolist() == [0.5 + 0.5 + 0.25 + 0.5]


def test_kv_transfers_in_turn_share_a_link(halves: Profile) -> None:
    """Three prompts of one batch, a transfer 0.25 s long each: there at 0.75, 1.0 and 1.25 s.

    The first starts an iteration at once; the other two, there when it ends, join the second.
    """
    requests = make_requests(*[(0.0, 8, 1)] * 3)
    record, _ = run(halves, requests, kv_transfer_latency_s=0.25, kv_transfers="in_turn")
    assert record.requests.first_token_s.tolist() == [1.25, 1.75, 1.75]


def test_a_link_is_one_prefill_instances_own(halves: Profile) -> None:
    """Two instances, two prompts each, sent at 0.5 s: there at 0.75 and 1.0 s from either."""
    requests = make_requests(*[(0.0, 8, 1)] * 4)
    record, _ = run(
        halves, requests, kv_transfer_latency_s=0.25, kv_transfers="in_turn",
        num_prefill=2, num_decode=4,
    )  # fmt: skip
    assert sorted(record.requests.first_token_s.tolist()) == [1.25, 1.25, 1.5, 1.5]


def test_long_prompts_are_chunked(halves: Profile) -> None:
    """1,500 tokens at a budget of 1,024 are two iterations; the second has room for B."""
    record, _ = run(halves, make_requests((0.0, 1500, 1), (0.0, 100, 1)), max_prefill_tokens=1024)
    assert record.requests.first_token_s.tolist() == [1.5, 1.5]
    assert record.instances[0].num_iterations == 2


def test_a_chunk_attends_to_the_part_of_its_prompt_done_before(tmp_path: Path) -> None:
    """An iteration that takes T²/b for T tokens in b equal prompts takes, for chunks of c tokens
    after p, Σ c·(c + 2p): the triangle of its own tokens and the rectangle before it.

    A of 1,088 tokens and sixteen of 60 at a budget of 1,024: A's first chunk alone takes 1024²;
    then its last 64 tokens 64·(64 + 2·1024) = 135,168 beside 16·60² = 57,600 of the others. That
    batch would take 61,696 without the prefix.
    """
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: t * t / b / 2**20 if p == "prefill" else 0.5
    )
    requests = make_requests((0.0, 1088, 1), *[(0.0, 60, 1)] * 16)
    record, _ = run(profile, requests, max_prefill_tokens=1024)
    # the grid has no b = 1024²/192768 = 5.44, but T²/b is linear in 1/b
    expected_s = 1.0 + (135_168 + 57_600) / 2**20 + 0.5
    assert record.requests.first_token_s == pytest.approx([expected_s] * 17)


@pytest.mark.parametrize(("capacity_tokens", "b_ends_s"), [(72, 5.0), (73, 1.5)])
def test_a_joiner_leaves_room_for_those_who_run(
    halves: Profile, capacity_tokens: int, b_ends_s: float
) -> None:
    """A (4 + 8 tokens) runs from 0.5 to 4.5. B (4 + 1) comes to decode at 1.0, where A has 5: they
    need these 9 and 32 in reserve each, 73 in all. One token less, and B waits until A is gone."""
    record, _ = run(
        halves,
        make_requests((0.0, 4, 8), (0.25, 4, 1)),
        kv_capacity_tokens=capacity_tokens,
        kv_reserve_tokens=32,
    )
    assert record.requests.finish_s.tolist() == [4.5, b_ends_s]


def test_clock_change_splits_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration of 1 s at 1000 MHz is half done when 2000 MHz halves the rest: 0.75 s.

    The window: unlocked (2000 MHz) at the start, the first decision (1000) lands at once in
    prefill; here decode asks for 1000 at the start of its second iteration, 0.25 s late.
    """
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    profile = write_synthetic_profile(
        tmp_path,
        time_s=lambda p, f, b, t: 1000.0 / f,
        power_w=lambda p, f, b, t: float(f),
        clocks_mhz=(1000, 2000),
    )
    record, summary = run(
        profile,
        make_requests((0.0, 4, 2)),
        prefill_controller="static:f=2000",
        decode_controller="falling",
        actuation_latency_s=0.25,
        slo_itl_s=10.0,
    )
    # prefill 0.5 s; decode step 1 unlocked 0.5 s; step 2 begins at 1.0 at 2000 MHz, half done at
    # 1.25 when 1000 MHz takes over: 0.5 of 1 s left, ends at 1.75
    assert record.requests.finish_s.tolist() == [1.75]
    assert summary["decode_energy_j"] == 0.75 * 2000 + 0.5 * 1000
    assert record.instances[1].num_clock_changes == 1


def test_a_controller_that_acts_at_once_waits_for_no_actuator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with what is decided in force: decode's second iteration is at 1000 MHz, whole."""
    monkeypatch.setattr(Falling, "acts_at_once", True)
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 1000.0 / f, clocks_mhz=(1000, 2000)
    )
    record, _ = run(
        profile,
        make_requests((0.0, 4, 2)),
        prefill_controller="static:f=2000",
        decode_controller="falling",
        actuation_latency_s=0.25,
    )
    assert record.requests.finish_s.tolist() == [0.5 + 0.5 + 1.0]


def test_retraction_keeps_tokens_and_finishes(halves: Profile) -> None:
    """KV room for 16 tokens: two requests of 4 + 8 grow to 24, so the later one steps aside."""
    record, summary = run(halves, make_requests((0.0, 4, 8), (0.0, 4, 8)), kv_capacity_tokens=16)
    assert summary["retractions"] == 1
    assert record.requests.retractions.tolist() == [0, 1]
    # both join at 0.5; before step k the cache holds 2·(4 + k - 1) and needs 2 more: steps 1-4
    # fit (8…14 + 2), step 5 does not. A runs steps 5-8 alone to 4.5, then B its last four.
    assert record.requests.finish_s.tolist() == [4.5, 6.5]
    assert summary["itl_s"]["p99"] == 2.5  # B's gap: retracted at 2.5, next token at 5.0
    assert record.itl_weight.sum() == 14


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_retraction_goes_by_outputs_prompt_and_joining_and_resumes_in_order(
    halves: Profile, engine: str
) -> None:
    """A (4 + 12), B (10 + 12), C (4 + 12) join at 0.5 with room for 30 tokens, 18 in use.

    Steps 1 to 4 fill it (21, 24, 27, 30). All have four outputs at 2.5: B has the longest prompt
    and steps aside with 14. A and C go on from 16 to 30 in steps 5 to 11; at 6.0 both have eleven
    outputs and prompts of 4: C joined later and steps aside with 15. A ends at 6.5. B, which went
    first, resumes; C does not fit beside it (14 + 15 + 2 > 30) until B has made its eight and ends
    at 10.5. D (1 + 1) has been there since 3.5 and would have fitted, but waits for both.
    """
    requests = make_requests((0.0, 4, 12), (0.0, 10, 12), (0.0, 4, 12), (3.0, 1, 1))
    record, _ = run(halves, requests, kv_capacity_tokens=30, engine=engine)
    assert record.requests.retractions.tolist() == [0, 1, 1, 0]
    assert record.requests.finish_s.tolist() == [6.5, 10.5, 11.0, 11.0]


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_a_retraction_may_free_more_than_the_next_step(halves: Profile, engine: str) -> None:
    """Four of 4 + 8 in 36 tokens: before step 6 they hold 36. One gone leaves 27 for three.

    That is room for a step; for four tokens each (39 > 36) it is not, and a second goes.
    """
    requests = make_requests(*[(0.0, 4, 8)] * 4)
    for freed, expected in ((1, [0, 0, 0, 1]), (4, [0, 0, 1, 1])):
        record, _ = run(
            halves, requests, kv_capacity_tokens=36, kv_retract_tokens=freed, engine=engine
        )
        assert record.requests.retractions.tolist() == expected


def test_a_request_that_can_never_fit_is_rejected(halves: Profile) -> None:
    _, summary = run(halves, make_requests((0.0, 4, 4), (0.0, 10, 10)), kv_capacity_tokens=16)
    assert summary["requests_rejected"] == 1
    assert summary["requests_completed"] == 1
    assert summary["ttft_attainment"] <= 0.5


def test_idle_plan_lowers_the_clock_after_its_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 s: idle at the unlocked 90 W, then at 1000 MHz and 60 W, to the next arrival."""
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    profile = write_synthetic_profile(
        tmp_path,
        time_s=lambda p, f, b, t: 0.5,
        power_w=lambda p, f, b, t: 100.0,
        idle_w=lambda f: {0: 90.0, 1000: 60.0, 2000: 80.0}[f],
        clocks_mhz=(1000, 2000),
    )
    record, summary = run(
        profile,
        make_requests((8.0, 4, 1)),
        prefill_controller="static:f=2000",
        decode_controller="falling",
        actuation_latency_s=0.25,
    )
    decode = record.instances[1]
    assert decode.clock_idle_s == {0: 5.25, 1000: 3.25}
    assert decode.idle_energy_j == 5.25 * 90.0 + 3.25 * 60.0
    assert summary["makespan_s"] == 9.0


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_prefill_queue_is_m_d_1(tmp_path: Path, load: float) -> None:
    """One request a batch and constant service D: mean wait = ρ·D / (2·(1 - ρ)), within 2 %.

    400,000 arrivals at ρ = .9 keep the standard error of the mean (batch means) under 1 %.
    """
    service_s = 0.5
    profile = write_synthetic_profile(tmp_path, time_s=_instant_decode(service_s))
    rng = np.random.default_rng(7)
    count = 400_000
    workload = Workload(
        arrival_s=np.cumsum(rng.standard_exponential(count)) * service_s / load,
        input_tokens=np.ones(count, dtype=np.int64),
        output_tokens=np.ones(count, dtype=np.int64),
    )
    record, _ = run(
        profile, workload, max_prefill_requests=1, first_token="prefill", slo_ttft_s=1e6
    )
    wait_s = record.requests.first_token_s - record.requests.arrival_s - service_s
    expected_s = load * service_s / (2 * (1 - load))
    assert wait_s.mean() == pytest.approx(expected_s, rel=0.02)


def _instant_decode(service_s: float) -> Surface:
    return lambda phase, f, b, t: service_s if phase == "prefill" else 1e-6


def test_a_lone_request_is_never_slower_at_a_higher_clock(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path)
    times = []
    for clock in (700, 1000, 1400):
        record, _ = run(profile, make_requests((0.0, 500, 50)), controller=f"static:f={clock}")
        times.append(record.requests.finish_s[0])
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]
