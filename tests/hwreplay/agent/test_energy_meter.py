"""An agent's meter on cards of every kind."""

from __future__ import annotations

import time

import pytest

from voltana.hwreplay.agent.energy_meter import CardMeter, EnergyMeter
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.gpu import UnsupportedQueryError


class Uncounted(ConstantPowerGpu):
    """A card without an energy counter, as older ones are."""

    def energy_j(self) -> float:
        raise UnsupportedQueryError("no counter")


def test_a_card_without_a_counter_is_integrated_from_its_power() -> None:
    """200 W over the time between two looks, to the time that the looks themselves take."""
    meter, begun_s = CardMeter(Uncounted(200.0)), time.monotonic()
    time.sleep(0.05)
    found_j = meter.energy_j()
    assert found_j == pytest.approx(200.0 * (time.monotonic() - begun_s), abs=200.0 * 0.01)


def test_an_agents_meter_goes_on_where_one_of_its_cards_does_not_count() -> None:
    """Such a card ended the agent, while the recorder beside it integrated its power."""
    meter = EnergyMeter([Uncounted(200.0), ConstantPowerGpu(100.0)], period_s=0.005)
    begun_s = time.monotonic()
    while (found_j := meter.energy_j) is not None and found_j < 300.0 * 0.05:
        assert time.monotonic() - begun_s < 20.0
        time.sleep(0.005)
    assert meter.error is None
    meter.close()
