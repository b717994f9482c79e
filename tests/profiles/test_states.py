"""States out of service of profiles: the shipped ones, and files that say something wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltana.profiles.build.states import CARDS, PARAMETERS, make_states
from voltana.profiles.catalog import DATA, list_profiles, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.states import LOW_STATES, read_states, states_toml


def test_shipped_files_are_what_the_builder_makes() -> None:
    for name in list_profiles():
        gpu, _, model = name.partition("/")
        card = next(found for key, found in CARDS.items() if gpu.startswith(key))
        made = make_states(load_profile(name), card, 2.0 * PARAMETERS[model.removesuffix("-tp2")])
        assert (DATA / name / "states.toml").read_text() == states_toml(made)


def test_a_deeper_sleep_draws_no_more_and_wakes_no_sooner() -> None:
    for name in list_profiles():
        states = load_profile(name).states
        assert states is not None
        each = [states.of(state) for state in LOW_STATES]
        assert each[0].power_w >= each[1].power_w >= each[2].power_w
        assert each[0].wake_s <= each[1].wake_s <= each[2].wake_s
        assert 0.1 <= states.asleep.wake_s <= 6.0  # as published, and so is the next
        assert 30.0 <= states.stopped.wake_s <= 100.0


def test_wake_up_by_hand() -> None:
    """16.06 GB over 24 GB/s are 0.669 s, and one second for the context. The idle card of 63 W
    without 26.3 W of context draws 36.7 W."""
    states = load_profile("a100-80g-sxm/llama-3.1-8b").states
    assert states is not None
    assert (states.asleep.wake_s, states.asleep.power_w) == (1.669, 36.7)
    assert states.stopped.wake_s == 33.212  # 3.212 s at 5 GB/s and 30 s


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wake_s = 1.669\n", "", r"missing key 'wake_s' of \[asleep\]"),
        ("wake_s = 1.669", "wake_s = -1.0", "wake_s of a state must be >= 0 and finite, got -1.0"),
        ("[asleep]", "[dozing]", "unknown state 'dozing'"),
        ('"modelled"', '"guessed"', "status must be one of measured, calibrated, modelled"),
        ("[parked]", "[parked", "cannot read"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (DATA / "a100-80g-sxm/llama-3.1-8b/states.toml").read_text()
    path = tmp_path / "states.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(VoltanaError, match=message):
        read_states(path)
    assert read_states(tmp_path / "none.toml") is None
