"""Decision tables of the controllers, worked out by hand from the reference's rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.policies.doubles import CLOCKS, Formula, LineFormula, decode_state, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import UNLOCKED_MHZ, IdlePlan, InstanceState
from voltana.sim.policies.parts.prediction import ScaledPredictor
from voltana.sim.policies.registry import CONTROLLERS, make_controller

# LineFormula: T(f, b, t) = (1 ms·b + 1 µs·t)·1000/f; promise 50 ms
ECOFREQ_DECODE = [
    # batch, tokens, waiting, margin, clock
    (10, 10_000, 0, 0.0, 1000),  # 20 ms at 1000 MHz
    (30, 20_000, 0, 0.0, 1000),  # 50 ms: exactly the promise still fits
    (30, 20_001, 0, 0.0, 1200),  # 50.001 ms; 41.7 ms at 1200
    (40, 20_001, 0, 0.0, 1400),  # 60.001 ms; 50.001 at 1200; the last clock is not asked
    (90, 90_000, 0, 0.0, 1400),  # fits nowhere: top clock
    (10, 10_000, 1, 0.0, 1400),  # anybody waiting: top clock
    (30, 37_500, 0, 0.35, 1000),  # 67.5 ms = 50 ms·1.35, the reference demo's margin
    (30, 37_501, 0, 0.35, 1200),
]


@pytest.mark.parametrize(("batch", "tokens", "waiting", "margin", "clock"), ECOFREQ_DECODE)
def test_ecofreq_decode(batch: int, tokens: int, waiting: int, margin: float, clock: int) -> None:
    spec = f"ecofreq:margin={margin},frequencies=1000+1200+1400"
    controller = make_controller(spec, make_context())
    state = decode_state(batch=batch, tokens=tokens, waiting=waiting)
    assert controller.decide(state) == clock


@pytest.mark.parametrize(
    ("delay_s", "clock"),
    [(0.0, 1000), (0.3, 1000), (0.3001, 1400), (0.6, 1400)],
)
def test_ecofreq_prefill_takes_the_queueing_delay_off(delay_s: float, clock: int) -> None:
    """Batch of 0.2 s at 1000 MHz, promise 0.5 s: fits while the oldest waited 0.3 s at most."""
    predictor = Formula(lambda phase, f, b, t: 0.2 * 1000 / f)
    controller = make_controller("ecofreq", make_context(predictor, phase="prefill"))
    state = InstanceState(
        instance_id=0, phase="prefill", last_batch_size=1, last_tokens=9,
        last_queue_delay_s=delay_s,
    )  # fmt: skip
    assert controller.decide(state) == clock


def test_ecofreq_idle_goes_to_its_lowest_listed_clock_after_five_seconds() -> None:
    controller = make_controller("ecofreq:frequencies=1200+1400", make_context())
    assert controller.on_idle(decode_state()) == IdlePlan(after_s=5.0, clock_mhz=1200)


@given(
    batch=st.integers(1, 60), tokens=st.integers(1, 80_000), waiting=st.integers(0, 1),
)  # fmt: skip
def test_ecofreq_steady_iterations_never_promise_too_much(
    batch: int, tokens: int, waiting: int
) -> None:
    """Replay the promised span call by call; the decision may not change within it."""
    controller = make_controller("ecofreq:frequencies=1000+1200+1400", make_context())
    state = decode_state(batch=batch, tokens=tokens, waiting=waiting)
    decided = controller.decide(state)
    span = controller.steady_iterations(state, batch, tokens)
    assert span >= 0
    for k in {1, span // 2, span - 1, span} if span else set():
        if 1 <= k <= span and k < 10**6:
            state.last_tokens = tokens + k * batch
            assert controller.decide(state) == decided


def test_ecofreq_steady_iterations_are_sharp() -> None:
    """10 + 10 ms at 1000 MHz, +10 µs an iteration: 50 ms is passed after 3,000 more."""
    controller = make_controller("ecofreq", make_context(LineFormula()))
    state = decode_state(batch=10, tokens=10_000)
    assert controller.decide(state) == 1000
    assert controller.steady_iterations(state, 10, 10_000) in (2999, 3000)


def test_ecofreq_steady_iterations_by_what_it_last_decided() -> None:
    """Somebody waits: the top clock, for good, in decode. In prefill each batch is asked for. 10 +
    10 ms at 1000 MHz, promise 50 ms·0.8: 30,000 tokens of ten requests, 1,999 or 2,000 more."""
    spec = "ecofreq:margin=-0.2,frequencies=1000+1200+1400"
    made = make_controller(spec, make_context())
    state = decode_state(batch=10, tokens=10_000, waiting=1)
    assert made.steady_iterations(state, 10, 10_000) == 0  # it has not decided so yet
    assert made.decide(state) == 1400
    assert made.steady_iterations(state, 10, 10_000) >= 10**9
    state.num_waiting = 0
    assert made.steady_iterations(state, 10, 10_000) == 0  # the next decision is another clock
    assert made.decide(state) == 1000
    assert made.steady_iterations(state, 10, 10_000) in (1999, 2000)
    prefill = make_controller(spec, make_context(phase="prefill"))
    assert prefill.decide(state) == 1000
    assert prefill.steady_iterations(state, 10, 10_000) == 0
    for fixed in ("static", "boost"):
        assert make_controller(fixed, make_context()).steady_iterations(state, 10, 9) >= 10**9


def test_ecofreq_keeps_its_clock_while_there_is_no_record() -> None:
    """At the start the lowest; after a decision for 1200 MHz that one."""
    made = make_controller("ecofreq:frequencies=1000+1200+1400", make_context())
    empty = decode_state()
    assert made.decide(empty) == 1000
    assert made.decide(decode_state(batch=30, tokens=20_001)) == 1200
    assert made.decide(empty) == 1200


@pytest.mark.parametrize(("tokens", "clock"), [(400, 1000), (401, 1200), (481, 1400)])
def test_ecofreq_prefill_plans_with_the_whole_ttft(tokens: int, clock: int) -> None:
    """1 ms a token at 1000 MHz; 0.5 s, less a fifth, all of it for prefill."""
    context = make_context(Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f), phase="prefill")
    made = make_controller("ecofreq:margin=-0.2,frequencies=1000+1200+1400", context)
    assert made.decide(decode_state(batch=1, tokens=tokens)) == clock


def test_fixed_controllers() -> None:
    context = make_context()
    static = make_controller("static:f=1200", context)
    assert static.initial_clock_mhz() == static.decide(decode_state()) == 1200
    assert static.on_idle(decode_state()) is None
    assert make_controller("static", context).decide(decode_state()) == 1400
    assert make_controller("boost", context).decide(decode_state(batch=3)) == UNLOCKED_MHZ


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
@given(batch=st.integers(0, 300), tokens=st.integers(0, 10**6), waiting=st.integers(0, 5))
def test_every_controller_names_only_supported_clocks(
    name: str, batch: int, tokens: int, waiting: int
) -> None:
    controller = make_controller(name, make_context())
    state = decode_state(batch=batch, tokens=tokens, waiting=waiting)
    allowed = {UNLOCKED_MHZ, *CLOCKS}
    assert controller.initial_clock_mhz() in allowed
    assert controller.decide(state) in allowed
    plan = controller.on_idle(state)
    assert plan is None or (plan.clock_mhz in allowed and plan.after_s >= 0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ecofrq", "unknown controller 'ecofrq'.*did you mean 'ecofreq'"),
        ("ecofreq:margn=0.1", "no parameter 'margn'.*did you mean 'margin'"),
        ("ecofreq:margin=high", "margin must be a number, got 'high'"),
        ("ecofreq:margin=nan", "margin must be finite"),
        ("ecofreq:margin=-2", "must be >= -0.95, got -2"),
        ("static:f=1007", "must be a clock the profile supports, got 1007 MHz: nearest 1000"),
        ("static:f", "must be key=value, got 'f'"),
        ("static:f=1000,f=1200", "must come once"),
        ("", "give its name first"),
    ],
)
def test_a_bad_spec_gets_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(VoltanaError, match=words) as caught:
        make_controller(spec, make_context())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [n for n, e in CONTROLLERS.items() if "frequencies" in [i.key for i in e.parameter_infos]],
)
def test_an_unsupported_clock_is_refused_by_the_policy_s_own_name(name: str) -> None:
    with pytest.raises(VoltanaError) as caught:
        make_controller(f"{name}:frequencies=1000+1007", make_context())
    assert str(caught.value).startswith(
        f"{name}: frequencies must be a clock the profile supports, got 1007 MHz: nearest 1000"
    )


def test_a_predictor_scaled_by_one_is_the_predictor_itself() -> None:
    """Policies use what a plain predictor offers beyond the protocol."""
    predictor = Formula(lambda p, f, b, t: 0.5)
    assert ScaledPredictor.wrap(predictor, 1.0) is predictor
    assert ScaledPredictor.wrap(predictor, 1.25).predict_s("decode", 1000, 1, 1) == 0.625
