"""How many clocks a time budget holds."""

from __future__ import annotations

from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.measure.campaign import Plan
from voltana.profiles.measure.trial import NVML_PERIOD_S

USEFUL_POINTS: Final = 10
"""Of a phase and clock: both ends of five batch sizes. Ours; fewer than that is a poor profile."""
PREPARING_S: Final = 1.0
"""Of a point, beside warm-up and windows. Ours."""
MIN_CLOCKS: Final = 2


def clock_s(plan: Plan) -> float:
    """Time that a useful set of points at one clock takes, idle power included; cooling is not."""
    rules = plan.protocol
    trials_s = rules.num_trials * (rules.window_s + NVML_PERIOD_S)
    idle_s = rules.settle_s + trials_s  # once loaded, once bare: the latter is not in the budget
    point_s = PREPARING_S + rules.point_s
    return idle_s + len(plan.phases) * USEFUL_POINTS * point_s


def thinned(clocks_mhz: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    """As many clocks as the budget holds, evenly spaced, both ends among them.

    Raises:
        VoltanaError: It holds fewer than two.
    """
    number = int(plan.budget_s / clock_s(plan))
    if number >= len(clocks_mhz):
        return clocks_mhz
    if number < MIN_CLOCKS:
        raise VoltanaError(
            f"--frequencies all needs {clock_s(plan):.0f} s a clock and {MIN_CLOCKS} clocks at "
            f"least, got a --budget of {plan.budget_s:g} s: raise it, or shorten --window, --trials"
        )
    last = len(clocks_mhz) - 1
    return tuple(clocks_mhz[round(i * last / (number - 1))] for i in range(number))
