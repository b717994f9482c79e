"""The lowest clock within a limit, and the fullest batch: to the last token and request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.policies.doubles import Formula, LineFormula, make_context, require_point
from voltana.sim.policies.base import Phase
from voltana.sim.policies.parts.fitting import FOREVER, LowestFitting
from voltana.sim.policies.parts.fullest import FullestBatch

CLOCKS = (1000, 1200, 1400)


class Line(Formula):
    """A line that is told and one that is true: (constant, slope) at 1000 MHz, as 1000/f."""

    def __init__(self, told: tuple[float, float], true: tuple[float, float] | None = None) -> None:
        constant_s, slope_s = true or told
        super().__init__(lambda p, f, b, t: (constant_s + slope_s * t) * 1000 / f)
        self._told = told

    def predict_line(self, phase: Phase, clock_mhz: int, batch_size: int) -> tuple[float, float]:
        require_point(phase, clock_mhz, batch_size, 0)
        return self._told[0] * 1000 / clock_mhz, self._told[1] * 1000 / clock_mhz


def fitting(predictor: Formula, limit_s: float = 0.05) -> LowestFitting:
    return LowestFitting(predictor, "decode", CLOCKS, limit_s)


@pytest.mark.parametrize(
    ("tokens", "clock", "fits"),
    [
        # 10 ms + 1 ms a token at 1000 MHz; 50 ms hold 40 tokens there, 50 at 1200, 60 at 1400
        (0, 1000, True), (40, 1000, True), (41, 1200, True), (50, 1200, True), (51, 1400, True),
        (60, 1400, True), (61, 1400, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "told",
    [
        (0.01, 0.001),
        (0.0099, 0.00095),  # told too short: 42 tokens; the predictor itself says 40
        (0.0101, 0.0011),  # told too long: 36
    ],
)
def test_a_line_is_checked_against_the_predictor_to_the_last_token(
    told: tuple[float, float], tokens: int, clock: int, fits: bool
) -> None:
    made = fitting(Line(told, (0.01, 0.001)), 0.05 * (1 + 1e-12))
    assert made.clock_mhz(1, tokens) == clock
    assert made.fitting_mhz(1, tokens) == (clock if fits else None)


def test_steady_iterations_count_to_the_last_that_fits() -> None:
    """40 tokens fit at 1000 MHz: from 10 in steps of 7 four more (38), of 10 three (40)."""
    made = fitting(Line((0.01, 0.001)), 0.05 * (1 + 1e-12))
    assert made.steady_iterations(1000, 1, 10, 7) == 4
    assert made.steady_iterations(1000, 1, 10, 10) == 3
    assert made.steady_iterations(1000, 1, 40, 1) == 0
    assert made.steady_iterations(1000, 1, 10, 0) == FOREVER  # nothing is added
    assert made.steady_iterations(1400, 1, 51, 1) == FOREVER  # nothing is above the last clock
    assert made.steady_iterations(1200, 1, 10, 1) == 0  # that is not its clock


@pytest.mark.parametrize(
    "line",
    [
        (0.06, -0.001),  # falls with tokens: 60 ms without any, 50 with ten
        (-0.01, 0.001),  # a table continued below zero
        (0.0, 0.001),
    ],
)
def test_where_tokens_alone_do_not_decide_the_predictor_is_asked(line: tuple[float, float]) -> None:
    made = fitting(Line(line))
    assert made.steady_iterations(made.clock_mhz(1, 40), 1, 40, 1) == 0
    if line[1] < 0:
        assert [made.clock_mhz(1, tokens) for tokens in (0, 11)] == [1200, 1000]


def test_a_level_line_that_fits_does_so_forever() -> None:
    """30 or 50 ms whatever the tokens, 90 ms: the first clock for good, or the last."""
    for constant_s in (0.03, 0.05):
        assert fitting(Line((constant_s, 0.0))).steady_iterations(1000, 1, 5, 1) == FOREVER
    never = fitting(Line((0.09, 0.0)))
    assert never.clock_mhz(1, 0) == 1400
    assert never.steady_iterations(1400, 1, 5, 1) == FOREVER


def test_limits_are_those_of_the_batch() -> None:
    """1 ms a request and 1 µs a token: 40,000 tokens fit beside ten requests, 30,000 beside 20."""
    made = fitting(LineFormula())
    assert [made.clock_mhz(10, t) for t in (40_000, 40_001)] == [1000, 1200]
    assert [made.clock_mhz(20, t) for t in (30_000, 30_001)] == [1000, 1200]
    assert made.clock_mhz(51, 0) == 1200


def test_a_predictor_without_a_line_is_asked_each_time() -> None:
    plain = fitting(Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f))
    assert [plain.clock_mhz(1, t) for t in (50, 51, 60, 61, 99)] == [1000, 1200, 1200, 1400, 1400]
    assert plain.fitting_mhz(1, 70) == 1400
    assert plain.fitting_mhz(1, 71) is None
    assert plain.steady_iterations(1000, 1, 5, 1) == 0


def test_the_fullest_batch_is_searched_at_a_context_rounded_up() -> None:
    """1 ms a request and 1 µs a token at 1000 MHz. A context of 1,000 tokens is searched as 1,024:
    2.024 ms a request, 24 in 50 ms; one of 1,023 too; 1,024 as 1,056: 2.056 ms, 24 in 49.4 ms."""
    fullest = FullestBatch(LineFormula(), 1000)
    assert fullest.requests(1000.0, 0.0486) == 24  # 24·2.024 = 48.58 ms
    assert fullest.requests(1023.0, 0.0486) == 24
    assert fullest.requests(1024.0, 0.0486) == 23
    assert fullest.requests(1024.0, 0.0494) == 24
    assert fullest.requests(0.0, 0.0320) == 31  # 1.032 ms


def test_the_fullest_batch_of_a_run_is_of_the_top_clock_and_shared() -> None:
    """2.024 ms·1000/1400: 34 in 50 ms."""
    context = make_context(LineFormula())
    fullest = FullestBatch.of(context)
    assert fullest.requests(1000.0, 0.05) == 34
    assert FullestBatch.of(replace(context, phase="prefill")) is fullest
