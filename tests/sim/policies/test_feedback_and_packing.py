"""PID, MIAD and the packing routers: decisions worked by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from sim.policies.base import InstanceState, RequestView
from sim.policies.controllers.feedback import LatencyWindow
from sim.policies.registry import make_controller, make_router
from tests.sim.policies.doubles import Formula, decode_state, make_context


def felt(now_s: float, duration_s: float, batch: int = 10, waiting: int = 0) -> InstanceState:
    state = decode_state(batch=batch, tokens=100, waiting=waiting)
    state.now_s, state.last_duration_s, state.ended_batch_size = now_s, duration_s, batch
    return state


def test_the_window_weighs_by_requests_and_forgets() -> None:
    """19 requests felt 10 ms and one 90 ms: the 19th of 20 is the p95, 10 ms; two make it 90."""
    window = LatencyWindow(1.0)
    assert window.p95_s() is None
    window.add(felt(0.0, 0.010, batch=19), "decode")
    window.add(felt(0.1, 0.090, batch=1), "decode")
    assert window.p95_s() == 0.010
    window.add(felt(0.2, 0.090, batch=1), "decode")
    assert window.p95_s() == 0.090
    window.add(felt(1.15, 0.020, batch=1), "decode")
    assert window.p95_s() == 0.090
    window.add(felt(5.0, 0.020, batch=1), "decode")
    assert window.p95_s() == 0.020


def test_prefill_latency_is_of_the_batch_that_has_ended() -> None:
    """19 requests that waited 10 ms for a batch of 20 ms: 30 ms. The one that is about to run
    has waited for a second; that is not over yet."""
    window = LatencyWindow(1.0)
    state = InstanceState(instance_id=0, phase="prefill", now_s=1.0, last_duration_s=0.020)
    state.ended_batch_size, state.ended_queue_delay_s = 19, 0.010
    state.last_batch_size, state.last_queue_delay_s = 40, 1.0
    window.add(state, "prefill")
    state.ended_batch_size, state.ended_queue_delay_s = 1, 0.5
    window.add(state, "prefill")
    assert window.p95_s() == pytest.approx(0.030)


def test_pid_proportional_part() -> None:
    """Setpoint 45 ms. p95 22.5 ms: error .5, 1400 - 600·.5 = 1100 -> next supported 1200.
    p95 9 ms: error .8, 1400 - 480 = 920 -> 1000. p95 60 ms: saturates at the top."""
    spec = "pid:ki=0.0,kd=0.0,dwell=0.0"
    for duration_s, clock in ((0.0225, 1200), (0.009, 1000), (0.060, 1400)):
        assert make_controller(spec, make_context()).decide(felt(1.0, duration_s)) == clock


def test_pid_integral_lowers_the_clock_while_there_is_slack() -> None:
    """Error .1 at 40.5 ms; Ki 1000 MHz/s: 100 MHz a second, so 1400 -> 1200 soon after 1 s."""
    made = make_controller("pid:kp=0.0,ki=1000.0,kd=0.0,dwell=0.0", make_context())
    clocks = [made.decide(felt(0.1 * k, 0.0405)) for k in range(45)]
    assert clocks[0] == clocks[19] == 1400
    assert clocks[22] == 1200
    assert clocks[44] == 1000


def test_pid_does_not_wind_up() -> None:
    """Ten seconds of overload at the top clock, then slack: it lowers the clock at once."""
    made = make_controller("pid:kp=600.0,ki=1000.0,kd=0.0,dwell=0.0,window=0.1", make_context())
    for k in range(100):
        assert made.decide(felt(0.1 * k, 0.100)) == 1400
    assert made.decide(felt(10.2, 0.010)) < 1400


def test_pid_keeps_its_dwell() -> None:
    made = make_controller("pid:dwell=1.0,window=0.05", make_context())
    changes, last = [], 1400
    for k in range(100):
        clock = made.decide(felt(0.1 * k, 0.060 if k % 2 else 0.005))
        if clock != last:
            changes.append(0.1 * k)
            last = clock
    assert len(changes) >= 3
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(changes))


def test_miad_falls_by_steps_and_rises_by_a_factor() -> None:
    """Slack: 1400 - 30 a second, supported clocks rounded up; danger at 1010: 1010·1.25 -> 1400."""
    made = make_controller("miad", make_context())
    clocks = [made.decide(felt(float(s), 0.010)) for s in range(1, 15)]
    # 1370 … 1220 round up to 1400, 1190 (7th) to 1200, 1010 (13th) and 1000 (14th)
    assert clocks[:6] == [1400] * 6
    assert clocks[6] == 1200
    assert clocks[13] == 1000
    assert made.decide(felt(15.0, 0.049)) == 1400  # 1000·1.25 = 1250
    assert make_controller("miad", make_context()).decide(felt(1.0, 0.010, waiting=1)) == 1400


def test_miad_decides_once_a_period() -> None:
    made = make_controller("miad:fall=500.0", make_context())
    assert made.decide(felt(1.0, 0.010)) == 1000
    assert made.decide(felt(1.5, 0.049)) == 1000
    assert made.decide(felt(2.0, 0.049)) == 1400  # 1000·1.25 = 1250, the next supported is 1400


PER_REQUEST = Formula(lambda p, f, b, t: 1e-3 * b * 1400 / f)
"""1 ms a request at the top clock."""


def route(name: str, *opened: int) -> int:
    context = make_context(PER_REQUEST)
    decode = [decode_state(opened=n) for n in opened]
    prefill = [InstanceState(instance_id=0, phase="prefill")]
    return make_router(name, context).route(RequestView(0, 0.0, 10, None), prefill, decode)[1]


@pytest.mark.parametrize(
    ("name", "opened", "chosen"),
    [
        ("slo-pack", (3, 30, 20), 1),  # limit 45 ms: 31 fits, the fullest
        ("slo-pack", (3, 45, 20), 2),  # 46 ms does not: the next fullest
        ("slo-pack", (60, 45, 50), 1),  # none fits: fewest requests
        ("slo-pack:headroom=0.0", (3, 49, 20), 1),  # 50 ms fits exactly
        ("latency-headroom", (3, 30, 20), 0),  # spread: most headroom
        ("latency-headroom:mode=pack", (3, 30, 20), 1),
        ("latency-headroom:mode=pack,explore=0.0", (3, 60, 20), 2),
        ("latency-headroom", (60, 55, 70), 1),  # none positive: least bad
    ],
)
def test_packing(name: str, opened: tuple[int, ...], chosen: int) -> None:
    assert route(name, *opened) == chosen


class LevelPower:
    """MHz / 10 in watts, and one watt for each of the first 16 requests."""

    def power_w(self, phase: str, frequency_mhz: int, batch_size: int, tokens: int) -> float:
        return frequency_mhz / 10 + min(batch_size, 16)

    def idle_power_w(self, frequency_mhz: int) -> float:
        return 40.0


def test_min_delta_energy_avoids_the_step_to_the_next_level() -> None:
    """1.4 ms a request at 1000 MHz, limit 47 ms: 33 requests fit there (46.2 ms), 34 do not.

    At 33: +40 W for the higher level. At 16 to 32: +0 W. At 1 to 15: +1 W. An empty one:
    100 + 1 - 40 = +61 W. All at the top level and over the limit come last; a tie goes to the
    fewest requests.
    """
    context = replace(make_context(PER_REQUEST), power=LevelPower())
    router = make_router("min-delta-energy", context)
    prefill = [InstanceState(instance_id=0, phase="prefill")]

    def pick(*opened: int) -> int:
        states = [decode_state(opened=n, kv=100) for n in opened]
        return router.route(RequestView(0, 0.0, 10, None), prefill, states)[1]

    assert pick(33, 20, 0) == 1
    assert pick(33, 0) == 0
    assert pick(47, 33) == 1
    assert pick(20, 10) == 0
    assert pick(8, 4) == 1
    assert pick(30, 20) == 1
