"""PID and MIAD: decisions worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.sim.policies.doubles import decode_state, make_context
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.registry import make_controller

ALL = "frequencies=1000+1200+1400"
"""Every clock of the doubles: left to themselves these controllers keep above the floor."""


def felt(now_s: float, duration_s: float, batch: int = 10, waiting: int = 0) -> InstanceState:
    state = decode_state(batch=batch, tokens=100, waiting=waiting)
    state.now_s, state.last_duration_s, state.ended_batch_size = now_s, duration_s, batch
    return state


def test_the_window_weighs_by_requests_and_forgets() -> None:
    """19 requests felt 10 ms and one 90 ms: the 19th of 20 is the p95, 10 ms; two make it 90."""
    window = LatencyWindow(1.0, 0.95)
    assert window.quantile_s() is None
    window.add(felt(0.0, 0.010, batch=19), "decode")
    window.add(felt(0.1, 0.090, batch=1), "decode")
    assert window.quantile_s() == 0.010
    window.add(felt(0.2, 0.090, batch=1), "decode")
    assert window.quantile_s() == 0.090
    window.add(felt(1.15, 0.020, batch=1), "decode")
    assert window.quantile_s() == 0.090
    window.add(felt(5.0, 0.020, batch=1), "decode")
    assert window.quantile_s() == 0.020


def test_a_sample_as_old_as_the_window_still_counts() -> None:
    """A window of 0.5 s. The smallest of equals counts for one request, a time of 0 for none, and
    seven tenths of ten are the seventh, whatever 0.7·10 is in binary."""
    window = LatencyWindow(0.5, 0.7)
    for now_s, duration_s, batch in ((0.0, 0.03, 0), (0.25, 0.0, 99), (0.5, 0.01, 0)):
        window.add(felt(now_s, duration_s, batch), "decode")
    assert window.quantile_s() == 0.03
    window.add(felt(0.625, 0.02, 0), "decode")
    assert window.quantile_s() == 0.02
    tenths = LatencyWindow(9.0, 0.7)
    for k in range(1, 11):
        tenths.add(felt(0.0, 0.01 * k, 1), "decode")
    assert tenths.quantile_s() == 0.07


def test_prefill_latency_is_of_the_batch_that_has_ended() -> None:
    """19 requests that waited 10 ms for a batch of 20 ms: 30 ms. The one that is about to run
    has waited for a second; that is not over yet."""
    window = LatencyWindow(1.0, 0.95)
    state = InstanceState(instance_id=0, phase="prefill", now_s=1.0, last_duration_s=0.020)
    state.ended_batch_size, state.ended_queue_delay_s = 19, 0.010
    state.last_batch_size, state.last_queue_delay_s = 40, 1.0
    window.add(state, "prefill")
    state.ended_batch_size, state.ended_queue_delay_s = 1, 0.5
    window.add(state, "prefill")
    assert window.quantile_s() == pytest.approx(0.030)


def test_pid_proportional_part() -> None:
    """Setpoint 45 ms. p95 22.5 ms: error .5, 1400 - 600·.5 = 1100 -> next supported 1200.
    p95 9 ms: error .8, 1400 - 480 = 920 -> 1000. p95 60 ms: saturates at the top."""
    spec = f"pid:ki=0.0,kd=0.0,dwell=0.0,{ALL}"
    for duration_s, clock in ((0.0225, 1200), (0.009, 1000), (0.060, 1400)):
        assert make_controller(spec, make_context()).decide(felt(1.0, duration_s)) == clock


def test_pid_integral_lowers_the_clock_while_there_is_slack() -> None:
    """Error .1 at 40.5 ms; Ki 1000 MHz/s: 100 MHz a second, so 1400 -> 1200 soon after 1 s."""
    made = make_controller(f"pid:kp=0.0,ki=1000.0,kd=0.0,dwell=0.0,{ALL}", make_context())
    clocks = [made.decide(felt(0.1 * k, 0.0405)) for k in range(45)]
    assert clocks[0] == clocks[19] == 1400
    assert clocks[22] == 1200
    assert clocks[44] == 1000


FINE = make_context(clocks_mhz=tuple(range(1000, 1401)))
"""A clock a MHz, so that the output can be read off the decision."""
EVERY = "frequencies=" + "+".join(str(clock) for clock in range(1000, 1401))
ALONE = f"kp=0.0,ki=0.0,dwell=0.0,{EVERY}"


def test_pid_derivative_follows_the_measurement_and_is_filtered() -> None:
    """Setpoint 45 ms. 36 to 27 ms within 0.1 s is -0.2 of it, -2 a second; the filter of 0.2 s
    takes 0.1 / (0.2 + 0.1) = 1/3 of that, 2/3 of it one step later and 4/9 after two. Kd 299 MHz·s:
    1400 - 199.3, then - 132.9, then - 88.6, rounded up.
    """
    made = make_controller(f"pid:kd=299.0,filter=0.2,{ALONE}", FINE)
    felt_s = (0.036, 0.027, 0.027, 0.027)
    weights = (1, 10**3, 10**6, 10**9)  # the quantile is the latest sample's
    clocks = [
        made.decide(felt(0.1 * k, duration_s, weight))
        for k, (duration_s, weight) in enumerate(zip(felt_s, weights, strict=True))
    ]
    assert clocks == [1400, 1201, 1268, 1312]


def test_pid_derivative_raises_the_clock_when_latency_rises() -> None:
    """27 to 36 ms: +2 a second, a third of it, Kd 60: +40 MHz on top of 1400 - 600·(1 - 0.8)."""
    settings = f"pid:kp=600.0,ki=0.0,kd=60.0,filter=0.2,dwell=0.0,{EVERY}"
    made = make_controller(settings, FINE)
    made.decide(felt(0.0, 0.027, 1))
    assert made.decide(felt(0.1, 0.036, 1000)) == 1400 - 120 + 40


@pytest.mark.parametrize("tells", [True, False])
def test_a_rest_is_no_time_for_the_integral(tells: bool) -> None:
    """Error .1 through iterations of 40.5 ms, Ki 1000 MHz/s: 4.05 MHz an iteration.

    Ten seconds of rest after the 20th change nothing: they were no latency. Counted as one second,
    the length of the window, the 21st would weigh as 25. A driver may tell of the rest or not.
    """

    def play(rest_s: float) -> list[int]:
        made = make_controller(f"pid:kp=0.0,ki=1000.0,kd=20.0,dwell=0.0,{EVERY}", FINE)
        clocks = []
        for k in range(40):
            now_s = 0.0405 * k + (rest_s if k >= 20 else 0.0)
            state = felt(now_s, 0.0405)
            if k == 20 and rest_s and tells:
                made.on_idle(state)
            clocks.append(made.decide(state))
        return clocks

    expected = [math.ceil(1400 - 4.05 * max(k - 1, 0) - 1e-6) for k in range(40)]
    assert play(0.0) == expected
    assert play(10.0) == expected


def test_pid_aims_at_the_attainment_target() -> None:
    """3 % of what is felt lies at 60 ms, 97 % at 20: the p99 of a 99 % target sees it, the p95 that
    a 95 % target asks for does not."""
    for spec, target, clock in (
        (f"pid:ki=0.0,kd=0.0,{ALL}", 0.99, 1400),
        (f"pid:ki=0.0,kd=0.0,{ALL}", 0.95, 1200),
        (f"pid:ki=0.0,kd=0.0,quantile=0.95,{ALL}", 0.99, 1200),
    ):
        made = make_controller(spec, replace(make_context(), attainment_target=target))
        made.decide(felt(0.90, 0.060, batch=3))
        assert made.decide(felt(1.0, 0.020, batch=97)) == clock


def test_pid_does_not_wind_up() -> None:
    """Ten seconds of overload at the top clock, then slack: it lowers the clock at once."""
    made = make_controller(
        f"pid:kp=600.0,ki=1000.0,kd=0.0,dwell=0.0,window=0.1,{ALL}", make_context()
    )
    for k in range(100):
        assert made.decide(felt(0.1 * k, 0.100)) == 1400
    assert made.decide(felt(10.2, 0.010)) < 1400


def test_pid_does_not_wind_up_at_the_bottom_either() -> None:
    """4.5 ms of 45: error 0.9, Ki 1000 MHz/s, steps of 1/8 s: 112.5 MHz each, until the output is
    below 1000 MHz with 450 in the integral. Then 60 ms, error -1/3, -41.7 MHz a step: the outputs
    are 950, 992, 1033. Had it gone on for the 40 steps of slack, it would stay at the bottom."""
    made = make_controller(f"pid:kp=0.0,ki=1000.0,kd=0.0,dwell=0.0,window=0.125,{EVERY}", FINE)
    falling = [made.decide(felt(0.125 * k, 0.0045)) for k in range(40)]
    assert falling[:7] == [1400, 1400, 1288, 1175, 1063, 1000, 1000]
    rising = [made.decide(felt(0.125 * k, 0.060, 10**6)) for k in range(40, 43)]
    assert rising == [1000, 1000, 1034]


def test_pid_without_a_setpoint_or_a_measurement_stays_where_it_is() -> None:
    """TTFT 0.1 s less two ITL of 50 ms leaves nothing for prefill: no error can be told."""
    for ttft_s in (0.1, 0.05):
        made = make_controller(f"pid:{ALL}", make_context(phase="prefill", slo_ttft_s=ttft_s))
        assert made.decide(felt(1.0, 0.001)) == 1400
    assert make_controller(f"pid:{ALL}", make_context()).decide(felt(1.0, 0.0)) == 1400


def test_pid_dwells_to_the_last_bit() -> None:
    """Error 0.8 asks for 1000 MHz at once; then 60 ms for the top, which has to wait for 0.5 s."""
    made = make_controller(f"pid:ki=0.0,kd=0.0,dwell=0.5,window=0.125,{ALL}", make_context())
    clocks = [made.decide(felt(0.0, 0.009))]
    clocks += [made.decide(felt(0.125 * k, 0.060, 10**6)) for k in range(1, 5)]
    assert clocks == [1000, 1000, 1000, 1000, 1400]


def test_pid_rests_when_nothing_is_younger_than_its_window() -> None:
    """Ki 1000 MHz/s at an error of 0.1 in iterations of 40.5 ms, calls 1 s apart and a window of
    1 s: 100 MHz each. 1.1 s apart, a rest: the iteration alone counts, 4.05 MHz."""
    for gap_s, clock in ((1.0, 1300), (1.1, 1396)):
        made = make_controller(f"pid:kp=0.0,ki=1000.0,kd=0.0,dwell=0.0,{EVERY}", FINE)
        assert [made.decide(felt(gap_s * k, 0.0405)) for k in range(3)] == [1400, 1400, clock]


def test_pid_keeps_its_dwell() -> None:
    made = make_controller(f"pid:dwell=1.0,window=0.1,{ALL}", make_context())
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
    made = make_controller(f"miad:{ALL}", make_context())
    clocks = [made.decide(felt(float(s), 0.010)) for s in range(1, 15)]
    # 1370 … 1220 round up to 1400, 1190 (7th) to 1200, 1010 (13th) and 1000 (14th)
    assert clocks[:6] == [1400] * 6
    assert clocks[6] == 1200
    assert clocks[13] == 1000
    assert made.decide(felt(15.0, 0.049)) == 1400  # 1000·1.25 = 1250
    assert (
        make_controller(f"miad:{ALL}", make_context()).decide(felt(1.0, 0.010, waiting=1)) == 1400
    )


def test_miad_moves_to_the_megahertz() -> None:
    """Between 40 and 47.5 ms of 50 nothing changes; more: times 1.25, at most 1400; less: minus
    100, at least 1000; a queue is danger too. Every second, from the first on."""
    made = make_controller(f"miad:fall=100,{EVERY}", FINE)
    clocks: list[int] = []
    for now_s, duration_s, waiting in (
        (0.9, 0.010, 0), (1.0, 0.010, 0), (1.9, 0.010, 0), (2.0, 0.010, 0), (3.0, 0.041, 0),
        (4.0, 0.047, 0), (5.0, 0.010, 0), (6.0, 0.010, 0), (7.0, 0.010, 0), (8.0, 0.010, 0),
        (9.1, 0.048, 0), (10.1, 0.010, 0), (11.1, 0.010, 1),
    ):  # fmt: skip
        clocks.append(made.decide(felt(now_s, duration_s, 1000 ** len(clocks), waiting)))
    assert clocks == [1400, 1300, 1300, 1200, 1200, 1200, 1100, 1000, 1000, 1000, 1250, 1150, 1400]


def test_miad_s_quantile_is_the_attainment_target() -> None:
    """3 % of what is felt lies at 60 ms: the p99 of a 99 % target sees it, a p95 does not."""
    for target, clock in ((0.99, 1400), (0.95, 1370)):
        made = make_controller(f"miad:{EVERY}", replace(FINE, attainment_target=target))
        made.decide(felt(0.5, 0.060, batch=3))
        assert made.decide(felt(1.0, 0.020, batch=97)) == clock


def test_miad_s_promise_in_prefill_is_what_ttft_leaves() -> None:
    """0.5 s less two of 50 ms: danger above 0.38 s, of delay and batch together."""
    for delay_s, clock in ((0.30, 1400), (0.20, 1370)):
        made = make_controller(f"miad:{EVERY}", replace(FINE, phase="prefill"))
        state = felt(1.0, 0.090)
        state.phase, state.ended_queue_delay_s = "prefill", delay_s
        assert made.decide(state) == clock


def test_miad_decides_once_a_period() -> None:
    made = make_controller(f"miad:fall=500.0,{ALL}", make_context())
    assert made.decide(felt(1.0, 0.010)) == 1000
    assert made.decide(felt(1.5, 0.049)) == 1000
    assert made.decide(felt(2.0, 0.049)) == 1400  # 1000·1.25 = 1250, the next supported is 1400
