"""The oracle: decisions worked by hand; exact in a run, whatever the predictor and the lag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.policies.doubles import Formula, decode_state, make_context, require_point
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import IdlePlan, InstanceState, Phase, PolicyContext, WaitingRequest
from voltana.sim.policies.registry import make_controller


class Hardware:
    """Decode: (1 ms·b + 1 µs·t)·1000/f. Prefill: 1 ms a token·1000/f, as one prompt (effective
    batch 1) twice as long. Busy 100, 150 and 300 W; idle f/20 W, unlocked as at 1400 MHz."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        require_point(phase, clock_mhz, round(batch_size), round(tokens))
        clock = clock_mhz or 1400
        work_s = 1e-3 * batch_size + 1e-6 * tokens
        if phase == "prefill":
            work_s = 1e-3 * tokens * (2.0 if batch_size == 1 else 1.0)
        return work_s * 1000 / clock, {1000: 100.0, 1200: 150.0, 1400: 300.0}[clock]

    def idle_power_w(self, clock_mhz: int) -> float:
        return (clock_mhz or 1400) / 20


def context(phase: Phase = "decode") -> PolicyContext:
    wrong = Formula(lambda p, f, b, t: 1e9)  # what the others believe is not asked
    return replace(make_context(wrong, phase=phase), truth=Hardware())


def running(batch: int, tokens: int, *, clock: int = 1400, waiting: int = 0) -> InstanceState:
    state = decode_state(clock=clock, waiting=waiting)
    state.num_running, state.kv_tokens = batch, tokens
    return state


@pytest.mark.parametrize(
    ("batch", "tokens", "waiting", "clock"),
    [
        # now 14.3 ms at 1400. At 1000 growth 1.4: 14 requests, 14,000 tokens, 28 ms; then growth
        # 1.96 -> 20 (rounded), 39.6 ms; 2.77 -> 28, 55.7 ms: too long. Times are in proportion to
        # the batch here, so no slower clock ever settles, and the top clock it is
        (10, 10_000, 0, 1400),
        (10, 10_000, 1, 1400),
        (40, 40_000, 0, 1400),  # 57 ms even now
    ],
)
def test_decode_that_never_settles_runs_at_the_top_clock(
    batch: int, tokens: int, waiting: int, clock: int
) -> None:
    state = running(batch, tokens, waiting=waiting)
    assert make_controller("oracle", context()).decide(state) == clock


class FixedWork(Hardware):
    """Decode: 20 ms + 0.5 ms a request at 1000 MHz, in proportion to 1/f."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        watts = super().time_and_power(phase, clock_mhz, batch_size, tokens)[1]
        return (0.020 + 0.0005 * batch_size) * 1000 / (clock_mhz or 1400), watts


@pytest.mark.parametrize(
    ("batch", "headroom", "clock"),
    [
        # rate r = b·1400/(20 + b/2) per s; a clock of f GHz settles at T = 20/f / (1 - r·0.0005/f)
        # b = 20: r = 933; 1000 MHz: 20/(1 - .4667) = 37.5 ms <= 50: fits
        (20, 0.0, 1000),
        (20, 0.2, 1000),  # 40 ms
        # limit 35 ms; 1200 MHz: 16.67/(1 - .3889) = 27.3 ms
        (20, 0.3, 1200),
        # b = 30: r = 1200; 1000 MHz: 20/(1 - .6) = 50.0 ms; 1200 MHz: 16.67/(1 - .5) = 33.3 ms
        (29, 0.0, 1000),  # r = 1177: 48.6 ms
        (31, 0.0, 1200),  # r = 1223: 51.4 ms
        # b = 60: r = 1680; 1000 MHz: 125 ms; 1200 MHz: 16.67/(1 - .7) = 55.6 ms; now 35.7 ms
        (60, 0.0, 1400),
    ],
)
def test_decode_looks_at_the_batch_that_the_rate_settles_at(
    batch: int, headroom: float, clock: int
) -> None:
    known = replace(context(), truth=FixedWork())
    made = make_controller(f"oracle:headroom={headroom}", known)
    assert made.decide(running(batch, 1000)) == clock


class ByContext(Hardware):
    """Decode: 10 ms + 1 µs a token of context at 1000 MHz, in proportion to 1/f."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        watts = super().time_and_power(phase, clock_mhz, batch_size, tokens)[1]
        return (0.010 + 1e-6 * tokens) * 1000 / (clock_mhz or 1400), watts


@pytest.mark.parametrize(("headroom", "clock"), [(0.0, 1000), (0.4, 1200), (0.61, 1400)])
def test_the_context_grows_with_the_batch(headroom: float, clock: int) -> None:
    """Ten requests of 10,000 tokens take 20/1.4 = 14.3 ms now. A growth g makes (10 + 10·g)/f of
    14.3·g: at 1000 MHz g = 2.33, 33.3 ms; at 1200 g = 1.4, 20 ms; 50, 30 and 19.5 ms are allowed.
    With the context of now it would be 20 ms at 1000 MHz."""
    made = make_controller(f"oracle:headroom={headroom}", replace(context(), truth=ByContext()))
    assert made.decide(running(10, 10_000)) == clock
    assert made.decide(running(10, 10_000, clock=0)) == clock  # no lock: it runs at 1400


def prefill(tokens: int, *, effective: float = 2.0, delay_s: float = 0.0) -> InstanceState:
    return InstanceState(
        instance_id=0, phase="prefill", now_s=1.0, num_running=2, kv_tokens=tokens,
        effective_batch_size=effective, last_queue_delay_s=delay_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "effective", "delay_s", "clock"),
    [
        # promise 0.5 - 2·0.05 = 0.4 s. Energy (P - idle)·T: 1000: 50 W; 1200: 90/1.2 = 75; 1400:
        # 230/1.4 = 164 J a second of work: the slowest that fits
        (140, 2.0, 0.0, 1000),
        (140, 2.0, 0.26, 1000),  # 0.26 + 0.14: to the last millisecond
        (140, 2.0, 0.27, 1200),  # 0.27 + 0.117
        (140, 2.0, 0.29, 1400),  # 0.29 + 0.1
        (140, 2.0, 0.90, 1400),  # lost anyway
        (200, 2.0, 0.0, 1000),  # 2·0.2: who arrives now waits 0.2 s and takes as long
        (210, 2.0, 0.0, 1200),  # 2·0.175
        (140, 1.0, 0.0, 1400),  # one prompt of 140 takes 0.28, 0.233 or 0.2 s: 0.56, 0.467, 0.4
    ],
)
def test_prefill(tokens: int, effective: float, delay_s: float, clock: int) -> None:
    made = make_controller("oracle", context("prefill"))
    assert made.decide(prefill(tokens, effective=effective, delay_s=delay_s)) == clock


class FlatIdle(Hardware):
    """Busy 100, 115 and 130 W, idle 50 W at any clock."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        time_s = super().time_and_power(phase, clock_mhz, batch_size, tokens)[0]
        return time_s, {1000: 100.0, 1200: 115.0, 1400: 130.0}[clock_mhz]

    def idle_power_w(self, clock_mhz: int) -> float:
        return 50.0


class RisingIdle(FlatIdle):
    """Idle f/20 W."""

    def idle_power_w(self, clock_mhz: int) -> float:
        return clock_mhz / 20


@pytest.mark.parametrize(("truth", "clock"), [(FlatIdle(), 1000), (RisingIdle(), 1400)])
def test_prefill_counts_the_energy_above_idle(truth: Hardware, clock: int) -> None:
    """A second of work at 1000 MHz: P·T is 100, 95.8 and 92.9 J; above 50 W idle it is 50, 54.2 and
    57.1 J; above f/20 W 50, 45.8 and 42.9 J."""
    made = make_controller("oracle", replace(context("prefill"), truth=truth))
    assert made.decide(prefill(140)) == clock


def test_a_batch_of_unknown_shape_counts_as_equal_prompts() -> None:
    """Two of them as in the table above; a lone prompt takes twice as long: 0.56 s at 1000 MHz."""
    made = make_controller("oracle", context("prefill"))
    state = prefill(140, effective=0.0)
    assert made.decide(state) == 1000
    state.num_running = 1
    assert made.decide(state) == 1400


@pytest.mark.parametrize(("age_s", "clock"), [(0.11, 1000), (0.13, 1200), (0.15, 1400)])
def test_prefill_leaves_time_for_the_queue(age_s: float, clock: int) -> None:
    """Behind 140 tokens wait 98 in two prompts, as one 0.14 s at the top clock, so that the older's
    age and the batch's 0.14, 0.117 or 0.1 s may make 0.26 s."""
    state = prefill(140)
    waiting = [
        WaitingRequest(request_id=k, arrival_s=1.0 - age, input_tokens=49)
        for k, age in enumerate((age_s, 0.01))
    ]
    state.num_waiting, state.waiting_tokens = 2, 98
    state.list_waiting = lambda: waiting
    assert make_controller("oracle", context("prefill")).decide(state) == clock


def test_idle_parks_at_once_at_the_least_idle_power() -> None:
    made = make_controller("oracle", context())
    assert made.on_idle(decode_state()) == IdlePlan(after_s=0.0, clock_mhz=1000)
    assert made.initial_clock_mhz() == 1000


def test_it_is_refused_where_nobody_knows_the_truth() -> None:
    with pytest.raises(VoltanaError) as caught:
        make_controller("oracle", replace(make_context(), truth=None))
    assert str(caught.value) == (
        "oracle needs the hardware's true times, which only a simulation can show it"
    )


@pytest.mark.parametrize("engine", ["coalesced", "reference"])
def test_neither_a_wrong_predictor_nor_a_slow_actuator_concern_it(
    tmp_path: Path, engine: str
) -> None:
    """Two prompts at once, then decode: the same run to the last digit, and no gap too long."""
    profile = write_synthetic_profile(tmp_path)
    workload = make_requests(*((0.05 * k, 200 + k, 40) for k in range(40)))
    settings = {"controller": "oracle", "slo_itl_s": 0.008, "engine": engine}
    plain, summary = run(profile, workload, **settings)
    other, _ = run(profile, workload, predictor_scale=3.0, actuation_latency_s=0.2, **settings)
    assert summary["itl_attainment"] == 1.0
    assert summary["ttft_attainment"] == 1.0
    assert other.requests.finish_s.tolist() == plain.requests.finish_s.tolist()
    assert [i.busy_energy_j for i in other.instances] == [i.busy_energy_j for i in plain.instances]
    assert sum(i.num_clock_changes for i in plain.instances) > 0
