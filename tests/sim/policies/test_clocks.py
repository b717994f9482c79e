"""The floor under the clocks, the one budget of prefill, and choosing from a list."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.sim.policies.doubles import Formula, Known, decode_state, make_context, require_point
from voltana.profiles.catalog import load_profile
from voltana.sim.policies.base import InstanceState, Phase, PolicyContext, RunningRequest
from voltana.sim.policies.parts.clocks import (
    cheapest_clock_mhz,
    clock_at_least_mhz,
    clock_list,
    clocks_above_floor,
    fastest_within_mhz,
    first_clock_mhz,
    least_energy_clock_mhz,
    nearest_clock_mhz,
    spread_clocks_mhz,
)
from voltana.sim.policies.parts.fitting import LowestFitting
from voltana.sim.policies.registry import make_controller


class CubicPower:
    """50 W idle; busy 100, 150 and 300 W at 1000, 1200 and 1400 MHz."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return {1000: 100.0, 1200: 150.0, 1400: 300.0}[clock_mhz]

    def idle_power_w(self, clock_mhz: int) -> float:
        assert clock_mhz >= 0, clock_mhz
        return 50.0


def with_times(
    phase: Phase, decode_s: tuple[float, ...], prefill_s: tuple[float, ...] = (0.1, 0.09, 0.08)
) -> PolicyContext:
    """Iterations of those times at 1000, 1200 and 1400 MHz, whatever the batch."""
    times = {"decode": decode_s, "prefill": prefill_s}
    formula = Formula(lambda p, f, b, t: times[p][(1000, 1200, 1400).index(f)])
    return replace(make_context(formula, phase=phase), power=CubicPower())


@pytest.mark.parametrize(
    ("times_s", "floor"),
    [
        ((0.010, 0.009, 0.008), 1000),  # 50·10 = .5 J, 100·9 = .9, 250·8 = 2
        ((0.040, 0.018, 0.015), 1200),  # 2, 1.8, 3.75 J
        ((0.040, 0.019, 0.007), 1400),  # 2, 1.9, 1.75 J
    ],
)
def test_the_floor_is_the_bottom_of_the_u(times_s: tuple[float, ...], floor: int) -> None:
    assert least_energy_clock_mhz(with_times("decode", times_s)) == floor
    assert least_energy_clock_mhz(with_times("prefill", (0.1, 0.1, 0.1), times_s)) == floor


@pytest.mark.parametrize("model", ["llama-3.1-8b", "ministral-3b", "qwen3-32b-tp2"])
def test_no_batch_moves_the_floor_of_the_a100(model: str) -> None:
    """Each table, at each of its batches by itself: the floor is where that batch costs least."""
    profile = load_profile(f"a100-80g-sxm/{model}")
    truth, clocks = profile.truth(), profile.meta.clocks.supported_mhz
    context = replace(
        make_context(), predictor=truth, power=truth, clocks_mhz=clocks,
        kv_capacity_tokens=profile.meta.engine.kv_capacity_tokens,
    )  # fmt: skip
    batches: dict[Phase, list[tuple[int, int]]] = {
        "prefill": [(1, 512), (4, 2048), (8, 8192)],
        "decode": [(8, 4000), (64, 32_000), (128, 64_000), (256, 120_000)],
    }
    for phase, points in batches.items():
        floor = least_energy_clock_mhz(replace(context, phase=phase))
        for point in points:
            energy_j = [
                (truth.power_w(phase, f, *point) - truth.idle_power_w(f))
                * truth.predict_s(phase, f, *point)
                for f in clocks
            ]
            assert clocks[int(np.argmin(energy_j))] == floor
        assert clocks[0] < floor < clocks[-1]


def test_the_users_clocks_go_below_the_floor() -> None:
    context = with_times("decode", (0.040, 0.018, 0.015))
    assert clocks_above_floor(context, (), "x") == (1200, 1400)
    assert clocks_above_floor(context, (1400, 1000), "x") == (1000, 1400)


FLOORED = ("pid", "miad", "throttllm", "greenllm", "dualscale-mpc", "kairos")


@pytest.mark.parametrize("name", FLOORED)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_slack_leads_to_the_floor_and_no_further(name: str, phase: Phase) -> None:
    """A minute of iterations far within their promises, under a floor of 1200 MHz."""
    times_s = (0.0040, 0.0018, 0.0015)

    def lowest(spec: str) -> int:
        made = make_controller(spec, with_times(phase, times_s, times_s))
        state = decode_state(batch=1)
        state.phase, state.num_running, state.ended_batch_size = phase, 1, 1
        clocks = []
        for k in range(600):
            state.now_s, state.last_duration_s = 0.1 * k, 0.0018
            clocks.append(made.decide(state))
        return min(clocks[300:])

    assert lowest(name) == 1200
    energy_aware = {"greenllm", "dualscale-mpc"} if phase == "prefill" else set()
    listed = lowest(f"{name}:frequencies=1000+1200+1400")
    assert listed == (1200 if name in energy_aware else 1000)


def test_prefill_has_what_ttft_leaves_after_two_decode_iterations() -> None:
    """TTFT 0.5 s, ITL 50 ms; one iteration where TTFT ends before the first one of its own."""
    context = make_context(phase="prefill")
    assert context.prefill_budget_s == context.budget_s == pytest.approx(0.4)
    early = replace(context, first_token="prefill")
    assert early.prefill_budget_s == pytest.approx(0.45)
    assert replace(context, phase="decode").budget_s == 0.05


@pytest.mark.parametrize("name", ["throttllm", "window", "dualscale-mpc", "greenllm", "ecomin"])
def test_every_planning_prefill_controller_has_the_same_budget(name: str) -> None:
    """0.1 s at 1000 MHz of 0.4 s: 0.29 s of delay leave enough, 0.31 s do not. Nothing queued.

    The arrival rate is low: GreenLLM's mean wait stays far below the delay."""
    spec = f"{name}:frequencies=1000+1200+1400"
    spec += {"ecomin": ",headroom=0.0,dwell=0.0", "window": ",period=0.1"}.get(name, "")
    for delay_s, is_slow in ((0.29, True), (0.31, False)):
        made = make_controller(spec, with_times("prefill", (0.01,) * 3, (0.1, 0.09, 0.08)))
        state = InstanceState(
            instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=9,
            last_queue_delay_s=delay_s, clock_mhz=1400, num_running=1, kv_tokens=9,
        )  # fmt: skip
        assert (made.decide(state) == 1000) is is_slow, delay_s


PLAIN = "frequencies=1000+1200+1400"
EXACT = {
    "ecofreq": "", "throttllm": "", "dualscale-mpc": "", "oracle": "",
    "greenllm": ",window=1", "window": ",period=0.125", "ecomin": ",headroom=0,dwell=0",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXACT))
def test_a_promise_of_prefill_is_kept_to_the_last_bit(name: str) -> None:
    """TTFT 1 s less two ITL of a quarter: half a second; a quarter of delay and one to run. EcoFreq
    alone plans with all of TTFT. The slowest clock costs least: 50 W·0.25 s above idle. All of it
    is exact in binary."""
    for late_s, is_slow in ((0.0, True), (2.0**-40, False)):
        formula = Formula(lambda p, f, b, t: {1000: 0.25, 1200: 0.21875, 1400: 0.203125}[f])
        context = make_context(formula, phase="prefill", slo_ttft_s=1.0, slo_itl_s=0.25)
        truth = Known(formula, CubicPower())
        made = make_controller(
            f"{name}:{PLAIN}{EXACT[name]}", replace(context, power=CubicPower(), truth=truth)
        )
        state = InstanceState(
            instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=9,
            last_queue_delay_s=(0.75 if name == "ecofreq" else 0.25) + late_s, clock_mhz=1400,
            num_running=1, kv_tokens=9,
        )  # fmt: skip
        assert made.decide(state) == (1000 if is_slow else 1200)


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"greenllm"}))  # it goes by what it measures
def test_a_promise_of_decode_is_kept_to_the_last_bit(name: str) -> None:
    """A quarter of a second, whatever the batch."""
    for late_s, clock in ((0.0, 1000), (2.0**-40, 1200)):
        formula = Formula(lambda p, f, b, t: {1000: 0.25, 1200: 0.21875, 1400: 0.203125}[f])
        context = make_context(formula, slo_ttft_s=99.0, slo_itl_s=0.25 - late_s)
        truth = Known(formula, CubicPower())
        made = make_controller(
            f"{name}:{PLAIN}{EXACT[name]}", replace(context, power=CubicPower(), truth=truth)
        )
        state = decode_state(batch=4, tokens=400, kv=400, opened=4)
        state.now_s, state.num_running = 1.0, 4
        running = [
            RunningRequest(
                request_id=k, arrival_s=0.0, input_tokens=99, generated_tokens=1, output_tokens=9,
                first_token_s=0.5,
            )
            for k in range(4)
        ]  # fmt: skip
        state.list_running = lambda running=running: running  # type: ignore[misc]
        assert made.decide(state) == clock


def test_first_clock_mhz_does_not_ask_about_the_last() -> None:
    asked: list[int] = []

    def fits(clock: int) -> bool:
        asked.append(clock)
        return False

    assert first_clock_mhz((1000, 1200, 1400), fits) == 1400
    assert asked == [1000, 1200]


FIVE = (700, 1000, 1200, 1300, 1400)


@pytest.mark.parametrize(
    ("wanted", "nearest", "at_least"),
    [
        (0.0, 700, 700), (700.0, 700, 700), (849.0, 700, 1000), (851.0, 1000, 1000),
        (1100.0, 1200, 1200),  # equally near: the faster
        (1099.0, 1000, 1200), (1300.0, 1300, 1300), (1400.0, 1400, 1400), (9999.0, 1400, 1400),
    ],
)  # fmt: skip
def test_a_wanted_clock_is_snapped(wanted: float, nearest: int, at_least: int) -> None:
    assert nearest_clock_mhz(FIVE, wanted) == nearest
    assert clock_at_least_mhz(FIVE, wanted) == at_least


def test_levels_are_spread_from_the_lowest_wanted_to_the_top() -> None:
    """Three from 700: 1400, 1050 and 700, snapped. Two that snap to one clock are one level."""
    assert spread_clocks_mhz(FIVE, 700, 3) == (700, 1000, 1400)
    assert spread_clocks_mhz(FIVE, 1000, 3) == (1000, 1200, 1400)
    assert spread_clocks_mhz(FIVE, 700, 1) == (1400,)
    assert spread_clocks_mhz(FIVE, 700, 99) == FIVE


def test_a_list_of_clocks_is_the_user_s_in_order_and_once_each() -> None:
    assert clock_list(FIVE, (1400, 700, 1400), (1000,), "p") == (700, 1400)
    assert clock_list(FIVE, (), (1300, 1000), "p") == (1000, 1300)


def test_the_cheapest_that_fits_and_the_first_of_equals() -> None:
    cost = {700: 5.0, 1000: 2.0, 1200: 2.0, 1300: 1.0, 1400: 9.0}
    for left_out, cheapest in (((), 1300), ((1300,), 1000), ((700, 1000, 1200, 1300), 1400)):
        costs = cost | dict.fromkeys(left_out, math.inf)
        assert cheapest_clock_mhz(FIVE, costs.__getitem__) == cheapest
    assert cheapest_clock_mhz(FIVE, lambda f: math.inf) == 1400


def test_a_cap_admits_the_fastest_within_it_and_the_slowest_at_least() -> None:
    context = with_times("decode", (0.01, 0.01, 0.01))
    caps = {99.0: 1000, 100.0: 1000, 149.0: 1000, 150.0: 1200, 299.0: 1200, 300.0: 1400}
    assert {w: fastest_within_mhz(context, 1, 9, w) for w in caps} == caps


class Flat:
    """A line that does not rise with tokens: 60 ms at 1000 MHz, 40 ms at 1400."""

    def predict_s(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return self.predict_line(phase, clock_mhz, batch_size)[0]

    def predict_line(self, phase: Phase, clock_mhz: int, batch_size: int) -> tuple[float, float]:
        return {1000: 0.060, 1400: 0.040}[clock_mhz], 0.0


@pytest.mark.parametrize(("limit_s", "clock"), [(0.07, 1000), (0.05, 1400), (0.03, None)])
def test_a_time_without_slope_fits_or_does_not_whatever_the_tokens(
    limit_s: float, clock: int | None
) -> None:
    fitting = LowestFitting(Flat(), "decode", (1000, 1400), limit_s)
    assert fitting.fitting_mhz(8, 10**9) == clock
