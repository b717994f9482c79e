"""POLCA and RAPID: one plan for the fleet, worked by hand; a budget that is kept in a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.sim.policies.doubles import make_cluster, make_context, require_point
from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import DECODE, PREFILL, Cluster, Phase, PolicyContext
from voltana.sim.policies.controllers.polca import (
    BRAKE,
    FREE,
    HARD,
    HARD_ALL,
    MILD,
    Polca,
    PolcaParameters,
    PolcaPlan,
)
from voltana.sim.policies.parts.clocks import fleet_power_w
from voltana.sim.policies.reconstructed.rapid import RapidParameters, RapidPlan
from voltana.sim.policies.registry import make_controller

CLOCKS = (700, 1100, 1275, 1305, 1410)


class Power:
    """Prefill 100, 200, 250, 300, 400 W by clock; decode half of it; idle 50 W."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        watts = dict(zip(CLOCKS, (100.0, 200.0, 250.0, 300.0, 400.0), strict=True))[clock_mhz]
        return watts if phase == "prefill" else watts / 2

    def idle_power_w(self, clock_mhz: int) -> float:
        assert clock_mhz >= 0, clock_mhz
        return 50.0


def context(cluster: Cluster, phase: Phase = "decode") -> PolicyContext:
    made = make_context(phase=phase, clocks_mhz=CLOCKS, levels_mhz=CLOCKS, slo_ttft_s=0.6)
    return replace(made, power=Power(), cluster=cluster, num_prefill=1, num_decode=2)


def polca(cluster: Cluster, **parameters: float) -> PolcaPlan:
    return PolcaPlan(PolcaParameters(**parameters), context(cluster), cluster)  # type: ignore[arg-type]


def told(made: PolicyContext, plan: PolcaPlan, now_s: float) -> tuple[int, int]:
    """Clocks of decode and of prefill, on the cards of `made`."""
    level = plan.level_at(now_s)
    decode, prefill = (
        Polca(PolcaParameters(), replace(made, phase=phase)) for phase in (DECODE, PREFILL)
    )
    return decode.caps_mhz[level], prefill.caps_mhz[level]


@pytest.mark.parametrize(
    ("level", "use", "asked"),
    [
        (FREE, 0.70, FREE), (FREE, 0.80, FREE), (FREE, 0.81, MILD), (FREE, 0.90, HARD),
        (FREE, 1.01, BRAKE), (MILD, 0.76, MILD), (MILD, 0.74, FREE), (MILD, 0.89, MILD),
        (MILD, 0.90, HARD), (HARD, 0.85, HARD), (HARD, 0.83, MILD), (HARD, 0.90, HARD_ALL),
        (HARD_ALL, 0.95, HARD_ALL), (HARD_ALL, 0.85, HARD_ALL), (HARD_ALL, 0.70, MILD),
        (HARD_ALL, 1.01, BRAKE), (BRAKE, 0.90, BRAKE), (BRAKE, 0.83, MILD),
        # at each threshold nothing happens yet: above and below are strict
        (FREE, 0.75, FREE), (MILD, 0.80, MILD), (MILD, 0.75, MILD), (FREE, 0.89, MILD),
        (HARD, 0.89, HARD), (HARD, 0.84, HARD), (HARD_ALL, 0.84, HARD_ALL), (BRAKE, 0.84, BRAKE),
        (FREE, 1.0, HARD), (HARD, 1.0, HARD_ALL), (BRAKE, 1.0, BRAKE),
    ],
)  # fmt: skip
def test_polca_levels(level: int, use: float, asked: int) -> None:
    plan = polca(make_cluster())
    plan.level = level
    assert plan.next_level(use) == asked


def test_polca_escalates_in_its_own_time() -> None:
    """Budget 1000 W; the fleet draws 950 W from 0 s on, then 1050 W, then 500 W.

    2 s: 0.95 -> hard cap of decode, in force at 42 s. Until then nothing else. At 42 s still 0.95:
    prefill too, in force at 82 s; 84 s: 1.05, the brake, at 89 s. From 90 s on 0.5: mild, at 130 s;
    then free, at 170 s.
    """
    cluster = make_cluster(1, 2)
    plan = polca(cluster, budget_w=1000.0)
    energy_j, seen = 0.0, []
    for second in range(200):
        for state, share in zip((*cluster.prefill, *cluster.decode), (0.5, 0.3, 0.2), strict=True):
            state.energy_j = share * energy_j
        seen.append(told(context(cluster), plan, float(second)))
        energy_j += 950.0 if second < 82 else 1050.0 if second < 88 else 500.0
    changes = [(t + 1, b) for t, (a, b) in enumerate(pairwise(seen)) if a != b]
    assert seen[0] == (0, 0)
    assert changes == [
        (42, (1100, 0)), (82, (1100, 1305)), (89, (700, 700)), (130, (1275, 0)), (170, (0, 0)),
    ]  # fmt: skip


def test_polca_caps_each_phase_by_its_level() -> None:
    """Caps of 1275, 1110 and 1305 MHz among 1000, 1200 and 1400: 1200, 1200 and 1400. The brake is
    the lowest clock. Before two seconds have passed nothing is measured."""
    cluster = make_cluster()
    made = replace(make_context(), cluster=cluster)
    plan = PolcaPlan(PolcaParameters(), made, cluster)
    caps = []
    for plan.level in (FREE, MILD, HARD, HARD_ALL, BRAKE):
        caps.append(told(made, plan, 1.9))
    assert caps == [(0, 0), (1200, 0), (1200, 0), (1200, 1400), (1000, 1000)]


def test_polca_caps_unlike_cards_by_their_own_clocks() -> None:
    """One plan; a card of 500, 1,000 and 2,000 MHz has 1,000 for each cap, and brakes to 500."""
    cluster = make_cluster(1, 2)
    first = Polca(PolcaParameters(), context(cluster))
    other = Polca(PolcaParameters(), replace(context(cluster), clocks_mhz=(500, 1000, 2000)))
    assert first.plan is other.plan
    assert first.caps_mhz == (0, 1275, 1100, 1100, 700)
    assert other.caps_mhz == (0, 1000, 1000, 1000, 500)


def test_polca_counts_energy_since_it_last_looked() -> None:
    """Budget 100 W, 160 J at 2 s: 80 W, at the threshold. 350 J at 4 s: 95 W since then, not 87.5
    since the start: a hard cap, 3 s later."""
    cluster = make_cluster()
    plan = polca(cluster, budget_w=100.0, lag_s=3.0)
    seen = []
    for now_s, energy_j in ((2.0, 160.0), (4.0, 350.0), (6.9, 350.0), (7.0, 350.0)):
        cluster.prefill[0].energy_j = energy_j
        seen.append(told(context(cluster), plan, now_s)[0])
    assert seen == [0, 0, 0, 1100]


def test_polca_sizes_its_budget_by_the_full_draw() -> None:
    """400 + 2·200 W, of which 0.8."""
    assert fleet_power_w(context(make_cluster())) == 800.0
    plan = polca(make_cluster())
    assert plan.budget_w == 640.0


def test_all_instances_share_one_plan() -> None:
    cluster = make_cluster(1, 2)
    phases: tuple[Phase, ...] = ("prefill", "decode", "decode")
    plans = [make_controller("polca", context(cluster, phase)).plan for phase in phases]  # type: ignore[attr-defined]
    assert plans[0] is plans[1] is plans[2]
    assert cluster.is_observed
    for name in ("polca", "rapid"):
        with pytest.raises(VoltanaError, match=f"{name} sees the whole fleet"):
            make_controller(name, replace(context(cluster), cluster=None))


def rapid(cluster: Cluster | None = None, **parameters: float) -> RapidPlan:
    cluster = cluster or make_cluster(1, 2)
    return RapidPlan(RapidParameters(**parameters), context(cluster), cluster)  # type: ignore[arg-type]


def test_rapid_splits_in_proportion_and_moves_within_the_limits() -> None:
    """Budget 600 of 800 W: 300 W of prefill's 400, 150 of decode's 200. Decode at its lowest
    clock needs 50 W: of steps of 40 W two decode instances give 80, 20 and then nothing, as
    prefill has room for 100 W only."""
    plan = rapid(budget_w=600.0, step_w=40.0)
    assert plan.caps_w == {"prefill": 300.0, "decode": 150.0}
    assert plan.shift("decode", "prefill")
    assert plan.caps_w == {"prefill": 380.0, "decode": 110.0}
    assert plan.shift("decode", "prefill")
    assert plan.caps_w == {"prefill": 400.0, "decode": 100.0}
    assert not plan.shift("decode", "prefill")
    for _ in range(20):
        plan.shift("prefill", "decode")
    assert plan.caps_w == {"prefill": 200.0, "decode": 200.0}


def feed(plan: RapidPlan, phase: Phase, now_s: float, latency_s: float, waiting: int = 0) -> float:
    state = plan.fleet.prefill[0] if phase == "prefill" else plan.fleet.decode[0]
    state.now_s, state.last_duration_s, state.last_batch_size = now_s, latency_s, 1
    state.num_waiting = waiting
    return plan.cap_w(phase, state)


@pytest.mark.parametrize(
    ("prefill_s", "waiting", "decode_s", "moved"),
    [
        # 0.5 s (TTFT less two ITL) and 50 ms: pressed above 0.45 s and 45 ms, slack below 0.40 s
        # and 40 ms
        (0.46, 0, 0.030, 80.0),
        (0.44, 0, 0.030, 0.0),
        (0.46, 0, 0.041, 0.0),
        (0.30, 8, 0.030, 0.0),
        (0.30, 9, 0.030, 80.0),  # nine wait
        (0.30, 0, 0.046, -40.0),
        (0.41, 0, 0.046, 0.0),
        (0.60, 0, 0.060, 0.0),  # both pressed: power does not help
        (0.45, 0, 0.030, 0.0),  # at the threshold of pressure, and at that of slack
        (0.40, 0, 0.046, 0.0),
        (0.39, 0, 0.046, -40.0),
        (0.30, 0, 0.044, 0.0),
    ],
)
def test_rapid_moves_power_to_the_pressed_phase(
    prefill_s: float, waiting: int, decode_s: float, moved: float
) -> None:
    """A step of 40 W: two decode instances give 80 W, or one prefill instance gives 40."""
    plan = rapid(budget_w=600.0, step_w=40.0, cooldown_s=3.0)
    feed(plan, "decode", 0.1, decode_s)
    feed(plan, "prefill", 0.2, prefill_s, waiting)
    assert plan.caps_w["prefill"] == 300.0  # no look before 0.5 s, no move before 3 s
    feed(plan, "decode", 3.0, decode_s)
    feed(plan, "prefill", 3.0, prefill_s, waiting)
    feed(plan, "decode", 3.6, decode_s)
    assert plan.caps_w["prefill"] == pytest.approx(300.0 + moved)
    assert plan.caps_w["decode"] == pytest.approx(150.0 - moved / 2)


def test_rapid_counts_the_queue_of_all_prefill_instances() -> None:
    """Two instances may queue 16 together. Prefill's caps: 600 W of 1200 full draw, half of 400 W;
    a move of 2·40 W is 40 W for each of two."""
    for waiting, cap_w in (((10, 6), 200.0), ((10, 7), 240.0)):
        cluster = make_cluster(2, 2)
        settings = RapidParameters(budget_w=600.0, step_w=40.0, cooldown_s=3.0)
        plan = RapidPlan(settings, replace(context(cluster), num_prefill=2), cluster)
        cluster.prefill[1].num_waiting = waiting[1]
        feed(plan, "decode", 2.4, 0.030)
        assert feed(plan, "prefill", 3.0, 0.30, waiting[0]) == pytest.approx(cap_w)


def test_rapid_looks_twice_a_second_and_begins_after_its_cooldown() -> None:
    """The first move at 3 s, the second at 6 s; the phase that felt nothing yet can give."""
    plan = rapid(budget_w=600.0, step_w=10.0)
    caps = [feed(plan, "prefill", at_s, 0.60) for at_s in (2.9, 3.0, 3.4, 5.9, 6.0, 6.4)]
    assert caps == [300.0, 300.0, 320.0, 320.0, 320.0, 340.0]
    plan = rapid(budget_w=600.0, step_w=10.0)
    assert [feed(plan, "prefill", at_s, 0.60) for at_s in (0.4, 0.5, 3.0)] == [300.0, 300.0, 320.0]


def test_rapid_does_not_rest_after_a_look_that_moved_nothing() -> None:
    """Nobody pressed at 3 s, prefill at 3.5 s. And a phase that has nothing to give rests nobody:
    with decode at its least of 50 W, power goes the other way half a second later."""
    plan = rapid(budget_w=600.0, step_w=10.0)
    assert [feed(plan, "prefill", s, t) for s, t in ((3.0, 0.3), (3.5, 0.6))] == [300.0, 320.0]
    plan = rapid(budget_w=400.0, step_w=60.0, window_s=0.1)  # 200 W, and 100 W each
    assert feed(plan, "prefill", 3.0, 0.6) == 300.0
    assert plan.caps_w["decode"] == 50.0
    assert feed(plan, "prefill", 6.0, 0.6) == 300.0
    feed(plan, "prefill", 6.4, 0.1)
    assert feed(plan, "decode", 6.5, 0.06) == 80.0


def test_rapid_rests_after_a_move() -> None:
    plan = rapid(budget_w=600.0, step_w=10.0, cooldown_s=3.0)
    caps = []
    for step in range(100):
        feed(plan, "decode", 0.1 * step, 0.030)
        caps.append(feed(plan, "prefill", 0.1 * step, 0.60))
    moves = [0.1 * (k + 1) for k, (a, b) in enumerate(pairwise(caps)) if a != b]
    assert len(moves) == 3
    assert all(b - a >= 3.0 - 1e-9 for a, b in pairwise(moves))


def test_a_cap_is_the_fastest_clock_within_it() -> None:
    """Budget 560 of 800 W: prefill's 280 W allow 1275 MHz (250 W), decode's 140 W too (125 W)."""
    cluster = make_cluster(1, 2)
    for phase, states in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        made = make_controller("rapid", context(cluster, phase))  # type: ignore[arg-type]
        states[0].last_batch_size = 1
        assert made.decide(states[0]) == 1275


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["rapid:budget=800", "polca:lag=1,brake_lag=1,budget=800"])
def test_the_fleet_keeps_its_budget(controller: str) -> None:
    """2P2D at 36 requests/s draws more than 950 W at the top clock, of a budget of 800 W.

    RAPID keeps it by construction, as its caps are the model's; POLCA by feedback, on the mean.
    """
    values = {"rate_rps": 36, "duration_s": 60, "slo_itl_s": 0.045}
    free = run(make_config(values | {"controller": "static"}))
    assert summarise(free)["energy_j"] / free.makespan_s > 950.0
    kept = run(make_config(values | {"controller": controller}))
    assert summarise(kept)["energy_j"] / kept.makespan_s < 800.0
