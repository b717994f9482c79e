"""What the interface promises: the defaults of a controller, rest and start, sharing, dice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.sim.policies.doubles import (
    FlatPower,
    LineFormula,
    decode_state,
    make_context,
    require_point,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import (
    UNLOCKED_MHZ,
    Cluster,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
)
from voltana.sim.policies.parts.clocks import busy_power_w, fleet_power_w, full_batch, require_clock
from voltana.sim.policies.parts.dice import Dice
from voltana.sim.policies.parts.prediction import ScaledPredictor, SkewedPower
from voltana.sim.policies.registry import make_controller


class Bare(Controller):
    """Decides, and leaves the rest to the interface."""

    def decide(self, state: InstanceState) -> int:
        return 1200


def test_a_controller_that_only_decides_does_nothing_else() -> None:
    """No lock at the start, no plan at rest, the engine's own admission, no holding, asked anew at
    each iteration, nothing learnt."""
    bare, state = Bare(), decode_state(batch=3)
    assert bare.initial_clock_mhz() == UNLOCKED_MHZ == 0
    assert bare.on_idle(state) is None
    assert bare.admit_up_to(state) is None
    assert bare.hold_s(state) == 0.0
    assert bare.steady_iterations(state, 3, 100) == 0
    assert bare.learnt() == {}


LISTED = "frequencies=1200+1400"
"""Its lowest clock is not the profile's, which is 1000 MHz."""


@pytest.mark.parametrize(
    ("spec", "initial", "first", "rest"),
    [
        # clock at the start, decision before the first record, what is planned at rest
        ("static:f=1200", 1200, 1200, None),
        ("boost", 0, 0, None),
        (f"ecofreq:{LISTED}", 1200, 1200, (5.0, 1200)),  # the reference parks at its lowest level
        (f"dualscale-mpc:{LISTED}", 1400, 1400, (5.0, 1200)),
        (f"pid:{LISTED}", 1400, 1400, (5.0, 1000)),
        (f"miad:{LISTED}", 1400, 1400, (5.0, 1000)),
        (f"greenllm:{LISTED}", 1400, 1400, (5.0, 1000)),
        (f"pid:idle=2,{LISTED}", 1400, 1400, (2.0, 1000)),
        # nobody runs: a projection without iterations holds at any clock, in decode
        (f"throttllm:{LISTED}", 1400, None, (5.0, 1000)),
        (f"kairos:{LISTED}", 1200, 1200, (5.0, 1000)),  # an empty cache asks for the lowest listed
        (f"window:{LISTED}", 1400, 1400, None),
        ("powercap", 1400, 1400, None),  # a cap leaves the clock alone
        (f"agft:{LISTED}", 0, 0, (2.4, 1000)),  # three windows of 0.8 s
        ("polca", 0, 0, None),
        ("rapid", 0, 1000, None),
        # idle power is 50 W at every clock: the first of equals is no lock
        (f"ecomin:{LISTED}", 1400, 1400, (0.5, 0)),
        (f"oracle:{LISTED}", 0, 0, (0.0, 0)),
    ],
)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_start_and_rest(
    spec: str, initial: int, first: int | None, rest: tuple[float, int] | None, phase: Phase
) -> None:
    made = make_controller(spec, make_context(phase=phase))
    state = InstanceState(instance_id=0, phase=phase, now_s=1.0)
    assert made.initial_clock_mhz() == initial
    assert first is None or made.decide(state) == first
    plan = None if rest is None else IdlePlan(after_s=rest[0], clock_mhz=rest[1])
    assert made.on_idle(state) == plan


def test_what_is_shared_is_made_once_a_run() -> None:
    cluster = Cluster()
    assert (tuple(cluster.prefill), tuple(cluster.decode), cluster.is_observed) == ((), (), False)
    one, other = (replace(make_context(), cluster=cluster) for _ in range(2))
    assert one.share("plan", list) is other.share("plan", list)
    assert one.share("plan", list) is not one.share("another", list)
    assert one.observe_cluster("p") is cluster
    assert cluster.is_observed
    alone = replace(one, cluster=None)
    assert alone.share("plan", list) is not alone.share("plan", list)
    with pytest.raises(VoltanaError) as caught:
        alone.observe_cluster("p")
    assert str(caught.value) == "p sees the whole fleet, which this driver does not show"


def test_dice_are_the_generators_own_draws() -> None:
    """Drawn in blocks of 256, so that 600 need three; a bound of one draws nothing."""
    dice, rng = Dice(np.random.default_rng(5)), np.random.default_rng(5)
    drawn = [(dice.below(1), dice.below(3))[1] for _ in range(600)]
    assert drawn == [int(rng.integers(3)) for _ in range(600)]
    assert {dice.below(1) for _ in range(9)} == {0}


@pytest.mark.parametrize(
    ("clock", "scale", "clock_error", "watts"),
    [
        # FlatPower: 100 W busy, 50 idle, so 50 W that can be wrong; the top clock is 1400 MHz
        (700, 1.0, 1.0, 75.0),  # 50 + 50·(1/2)
        (700, 2.0, 2.0, 75.0),  # 50 + 50·2·(1/4)
        (700, 1.0, -1.0, 150.0),  # 50 + 50·2
        (700, 3.0, 0.0, 200.0),
        (1400, 3.0, 2.0, 200.0),  # right at the top clock but for the scale
        (0, 3.0, 2.0, 200.0),  # no lock runs at the top clock
    ],
)
def test_a_skewed_power_is_wrong_above_idle_alone(
    clock: int, scale: float, clock_error: float, watts: float
) -> None:
    skewed = SkewedPower.wrap(FlatPower(), scale=scale, clock_error=clock_error, top_mhz=1400)
    assert skewed.power_w("decode", clock, 1, 1) == pytest.approx(watts)
    assert skewed.idle_power_w(clock) == 50.0


def test_a_scaled_predictor_passes_the_point_on() -> None:
    """LineFormula at 1000 MHz: 4 requests and 3,000 tokens take 7 ms, half of it 3.5."""
    scaled = ScaledPredictor.wrap(LineFormula(), 0.5)
    assert scaled.predict_s("decode", 1000, 4, 3000) == pytest.approx(0.0035)


class PhasePower(FlatPower):
    """Decode 1 W a request and a watt per 1,000 tokens; prefill ten times that; at 1400 MHz."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return (batch_size + tokens / 1000) * clock_mhz / 1400 * (10 if phase == "prefill" else 1)


def test_a_full_batch_and_what_it_draws() -> None:
    """Decode: 64 requests on a quarter of 100,000 tokens: 64 + 25 = 89 W. Prefill: 8 prompts of
    8,192 tokens: 161.92 W. Two and three of them: 323.84 + 267 W."""
    context = replace(make_context(), power=PhasePower(), num_prefill=2, num_decode=3)
    assert full_batch(context, "decode") == (64, 25_000)
    assert full_batch(context, "prefill") == (8, 8192)
    assert full_batch(replace(context, kv_capacity_tokens=100), "decode") == (64, 64)
    assert busy_power_w(context, "decode", 700) == pytest.approx(44.5)
    assert fleet_power_w(context) == pytest.approx(590.84)
    assert fleet_power_w(replace(context, num_prefill=0, num_decode=0)) == 1.0


def test_an_unsupported_clock_names_the_two_nearest() -> None:
    assert require_clock((700, 1000, 1200), 1000, "p: f") == 1000
    for clocks, near in (((700, 1000, 1200), "1000 and 1200"), ((700,), "700")):
        with pytest.raises(VoltanaError) as caught:
            require_clock(clocks, 1150, "p: f")
        assert str(caught.value) == (
            f"p: f must be a clock the profile supports, got 1150 MHz: nearest {near} MHz"
        )
