"""The guard by hand-worked minutes, and what a controller sees without a router."""

from __future__ import annotations

import pytest

from tests.hwreplay.agent.scripted import Clock
from voltana.hwreplay.agent.account import saved_j
from voltana.hwreplay.agent.guard import Guard, GuardedClock, GuardLimits, token_gap_s
from voltana.hwreplay.view.context import PolicySource
from voltana.hwreplay.view.engine_only import UnseenError, engine_only
from voltana.hwreplay.view.open_request import engine_queue
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.config import make_config
from voltana.sim.policies.base import InstanceState, Phase


def test_the_guard_releases_below_the_floor_and_resumes_above_its_margin() -> None:
    """Floor 0.9, resume 0.95. 100 kept at 0 s, 12 of 100 missed at 10 s: 188/200 = 0.94, above.

    25 more missed at 20 s: 188/225 = 0.836, released. At 60.5 s the first hundred are out: 88/125,
    still. At 71 s the next are: 0/25 = 0, but a hundred samples are needed to judge: still. 475
    kept at 75 s: 475/500 = 0.95: resumed.
    """
    guard, setter = Guard(GuardLimits(floor=0.9, resume=0.95, least=100)), Clock()
    clock = GuardedClock(setter, guard)

    def at(now_s: float, kept: int, total: int) -> bool:
        if total:
            guard.attainment.add(now_s, kept=kept, total=total)
        if guard.look(now_s):
            clock.set_clock(1005)  # the loop repeats the wish
        return guard.is_released

    clock.set_clock(1005)
    assert not at(0.0, 100, 100)
    assert not at(10.0, 88, 100)
    assert guard.share == pytest.approx(0.94)
    assert setter.wishes == [1005]
    assert at(20.0, 0, 25)
    clock.set_clock(705)  # a decision meanwhile reaches no card
    assert setter.wishes == [1005, 0, 0]
    assert at(60.5, 0, 0)
    assert guard.share == pytest.approx(88 / 125)
    assert at(71.0, 0, 0)
    assert guard.share is None
    assert not at(75.0, 475, 475)
    assert setter.wishes == [1005, 0, 0, 1005]
    with pytest.raises(VoltanaError, match=r"floor must be >= 0 and below its resume"):
        GuardLimits(floor=0.99, resume=0.98)


def source_of(controller: str) -> PolicySource:
    config = make_config({"controller": controller, "router": "round-robin"})
    return PolicySource(config=config, profile=load_profile(config.profile))


@pytest.mark.parametrize(
    ("controller", "phase", "unseen"),
    [
        ("ecofreq", "prefill", "last_queue_delay_s"),
        ("ecofreq", "decode", None),
        ("static", "prefill", None),
        ("ecomin", "decode", "open_requests"),
        ("throttllm", "decode", "list_running"),
    ],
)
def test_a_controller_that_looks_at_the_router_s_knowledge_is_refused(
    controller: str, phase: Phase, unseen: str | None
) -> None:
    if unseen is None:
        state = InstanceState(instance_id=0, phase=phase, last_batch_size=4, last_tokens=2000)
        state.kv_capacity_tokens = 100_000
        own = source_of(controller).make_controller(phase, 0)
        assert engine_only(source_of(controller), phase, 0).decide(state) == own.decide(state)
        return
    with pytest.raises(UnseenError, match=rf"{phase} controller {controller} looks at {unseen},"):
        engine_only(source_of(controller), phase, 0)


@pytest.mark.parametrize(
    ("running", "kv_tokens", "waiting"),
    [
        (2, 1000, 0),  # 100 + 3·10 tokens fit into 9,000 free ones
        (2, 9880, 3),  # and not into 120
        (8, 1000, 3),  # the batch is full
    ],
)
def test_an_engine_s_queue_waits_where_there_is_no_room(
    running: int, kv_tokens: int, waiting: int
) -> None:
    record = IterationMetrics(
        sequence=0, received_s=1.0, wall_time_s=0.01,
        queued_decode_requests=3, queued_decode_tokens=300,
    )  # fmt: skip
    state = InstanceState(instance_id=0, phase="decode", kv_capacity_tokens=10_000)
    state.num_running, state.kv_tokens = running, kv_tokens
    assert engine_queue(record, state, 8, 10) == (waiting, 100 * waiting)


class Line:
    """1 s and 400 W at 1410 MHz, 1.5 s and 200 W at 705; 50 W at rest."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        return (1.0, 400.0) if clock_mhz == 1410 else (1.5, 200.0)

    def idle_power_w(self, clock_mhz: int) -> float:
        return 50.0


@pytest.mark.parametrize(
    ("clock_mhz", "ran_at_mhz", "duration_s", "saved"),
    [
        (705, 705, 1.5, 125.0),  # 400 J + 0.5 s · 50 W - 300 J
        (705, 0, 1.0, 125.0),  # a shadow of the same work, which ran unlocked
        (705, 0, 2.0, 250.0),  # it took twice as long as the profile says, so all is twice
        (0, 0, 1.0, 0.0),
        (1410, 0, 1.0, 0.0),
    ],
)
def test_the_saving_is_of_the_same_work_in_the_same_time(
    clock_mhz: int, ran_at_mhz: int, duration_s: float, saved: float
) -> None:
    state = InstanceState(
        instance_id=0, phase="decode", ended_batch_size=1, ended_tokens=10,
        last_duration_s=duration_s,
    )  # fmt: skip
    found = saved_j(Line(), state, clock_mhz, ran_at_mhz=ran_at_mhz, top_mhz=1410)
    assert found == pytest.approx(saved)


@pytest.mark.parametrize(
    ("batch", "tokens", "sequence", "gap"),
    [
        (3, 303, 2, 0.09),  # the same three, a token longer each: since the last record
        (3, 304, 2, 0.01),  # one left and another came
        (2, 202, 2, 0.01),  # one left
        (3, 303, 3, 0.01),  # a record is missing
    ],
)
def test_a_token_gap_is_the_client_s_where_the_same_requests_go_on(
    batch: int, tokens: int, sequence: int, gap: float
) -> None:
    before, after = (
        IterationMetrics(
            sequence=number, received_s=at_s, wall_time_s=0.01,
            num_decode_requests=size, sum_decode_kv_tokens=context,
        )
        for number, at_s, size, context in ((1, 1.0, 3, 300), (sequence, 1.09, batch, tokens))
    )  # fmt: skip
    assert token_gap_s(after, before, 0.01) == pytest.approx(gap)
