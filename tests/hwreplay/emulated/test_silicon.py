"""Passes on an emulated card: their length and energy against the profile, clocks that change."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from voltana.hwreplay.emulated import plan as plan_module
from voltana.hwreplay.emulated import silicon
from voltana.hwreplay.emulated.overruns import count_overruns
from voltana.hwreplay.emulated.plan import ENVIRONMENT, Passes, Plan
from voltana.hwreplay.emulated.silicon import Noise, Pass, Silicon, Work, effective_batch
from voltana.profiles.catalog import load_profile

PROFILE = load_profile("a100-80g-sxm/llama-3.1-8b")
TRUTH = PROFILE.truth(extrapolate=True)
STEP = PROFILE.mixed_step(extrapolate=True)


def decodes(batch: int, tokens: int) -> Work:
    return Work(decode=(batch, tokens))


def computes(batch: int, tokens: int) -> Work:
    return Work(chunk=(batch, tokens))


@dataclass
class Clock:
    """Time that passes by sleeping alone."""

    now_s: float = 100.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def monotonic(self) -> float:
        self.now_s += 1e-6  # reading it takes a moment, so that a spin ends
        return self.now_s


@dataclass
class Card:
    """Keeps what it was told to draw; its clock changes at set times."""

    clock: Clock
    changes: list[tuple[float, int]] = field(default_factory=list)
    energy_j: float = 0.0
    at_s: float = 100.0
    pass_w: float = 0.0
    pass_end_s: float = 0.0
    idle_w: float = 63.0

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    @property
    def clock_mhz(self) -> int:
        return [mhz for at_s, mhz in [(0.0, 1410), *self.changes] if at_s <= self.now_s][-1]

    @property
    def next_change_s(self) -> float:
        return min((at_s for at_s, _ in self.changes if at_s > self.now_s), default=float("inf"))

    @property
    def power_w(self) -> float:
        return self.pass_w if self.now_s < self.pass_end_s else self.idle_w

    def look(self) -> Card:
        self.book()
        return self

    def book(self) -> None:
        busy_s = max(min(self.pass_end_s, self.now_s) - self.at_s, 0.0)
        self.energy_j += self.pass_w * busy_s + self.idle_w * (self.now_s - self.at_s - busy_s)
        self.at_s = self.now_s

    def begin_pass(self, power_w: float, duration_s: float) -> None:
        self.book()
        self.pass_w, self.pass_end_s = power_w, self.now_s + duration_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(silicon, "time", made)
    return made


def test_a_pass_lasts_and_draws_what_the_profile_says(clock: Clock) -> None:
    card = Card(clock)
    found = Silicon(STEP, [card]).run(decodes(8, 4000))
    time_s, power_w = TRUTH.time_and_power("decode", 1410, 8, 4000)
    assert found.end_s - found.begin_s == pytest.approx(time_s, abs=5e-6)
    card.book()
    assert card.energy_j == pytest.approx(power_w * time_s, rel=2e-3)


def test_what_the_host_does_between_passes_is_part_of_the_next(clock: Clock) -> None:
    card = Card(clock)
    cards = Silicon(STEP, [card])
    first = cards.run(decodes(8, 4000))
    clock.sleep(0.004)
    second = cards.run(decodes(8, 4008))
    assert second.begin_s == first.end_s
    time_s, power_w = TRUTH.time_and_power("decode", 1410, 8, 4008)
    assert second.end_s - first.end_s == pytest.approx(time_s, abs=5e-6)
    card.book()
    assert card.energy_j == pytest.approx(power_w * 2 * time_s, rel=3e-3)
    cards.rest()
    clock.sleep(0.004)
    third = cards.run(decodes(8, 4016))
    assert third.begin_s == pytest.approx(second.end_s + 0.004, abs=1e-5)


def test_a_clock_that_changes_splits_the_pass(clock: Clock) -> None:
    """By hand: the share done before the change at the old clock, the rest at the new one."""
    before_s, _ = TRUTH.time_and_power("prefill", 1410, 1, 4096)
    after_s, _ = TRUTH.time_and_power("prefill", 705, 1, 4096)
    change_s = 0.4 * before_s
    card = Card(clock, changes=[(100.0 + change_s, 705)])
    found = Silicon(STEP, [card]).run(computes(1, 4096))
    assert found.end_s - 100.0 == pytest.approx(change_s + 0.6 * after_s, rel=1e-3)
    assert found.clock_mhz == 705


def test_the_slowest_card_sets_the_pace_and_each_draws_its_share(clock: Clock) -> None:
    cards = [Card(clock), Card(clock, changes=[(0.0, 705)])]
    found = Silicon(STEP, cards, rank=1).run(decodes(8, 4000))
    time_s, power_w = TRUTH.time_and_power("decode", 705, 8, 4000)
    assert found.end_s - found.begin_s == pytest.approx(time_s, abs=5e-6)
    cards[1].book()
    assert cards[1].energy_j == pytest.approx(power_w / 2 * time_s, rel=2e-3)
    assert cards[0].pass_w == 0.0


def test_a_colocated_card_does_both_parts_in_one_pass_from_boundary_to_boundary(
    clock: Clock,
) -> None:
    """The step that follows a chunk, too, begins where the chunk has ended."""
    hidden = PROFILE.mixed_step(extrapolate=True, overlap_frac=0.25)
    card = Card(clock)
    cards = Silicon(hidden, [card], is_colocated=True)
    first = cards.run(computes(1, 512))
    clock.sleep(0.003)
    both = cards.run(Work(decode=(8, 4000), chunk=(1.0, 512)))
    clock.sleep(0.003)
    last = cards.run(decodes(9, 4520))
    assert [both.begin_s, last.begin_s] == [first.end_s, both.end_s]
    chunk_s, chunk_w = TRUTH.time_and_power("prefill", 1410, 1, 512)
    step_s, step_w = TRUTH.time_and_power("decode", 1410, 8, 4000)
    lasts_s = chunk_s + step_s - 0.25 * min(chunk_s, step_s)
    assert both.end_s - both.begin_s == pytest.approx(lasts_s, abs=5e-6)
    after_s, after_w = TRUTH.time_and_power("decode", 1410, 9, 4520)
    card.book()
    parts_j = (chunk_s * chunk_w + step_s * step_w) / (chunk_s + step_s) * lasts_s
    energy_j = chunk_s * chunk_w + parts_j + after_s * after_w
    assert card.energy_j == pytest.approx(energy_j, rel=2e-3)


def test_noise_has_mean_one_and_the_profile_s_spread() -> None:
    noise = Noise(PROFILE, "decode", 0, seed=13, scale=1.0)
    drawn = np.array([noise.next("decode", 1410, 8) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(1.0, abs=4 * 0.02 / np.sqrt(20_000))
    assert drawn.std() == pytest.approx(0.02, rel=0.03)


def test_effective_batch_of_a_chunk() -> None:
    """100 tokens behind 100 others: the work of a prompt of 200 less that of one of 100."""
    assert effective_batch([100], [100]) == pytest.approx(100**2 / (200**2 - 100**2))


def test_overruns_are_counted_within_a_time(tmp_path: object) -> None:
    path = tmp_path / "decode-0.passes"  # type: ignore[operator]
    kept = Passes(path)
    for begin_s, late_s in ((0.0, 0.5), (1.0, 0.0), (2.0, 0.0005), (3.0, 0.02)):
        kept.keep(
            Pass(
                begin_s=begin_s,
                due_s=begin_s + 0.1,
                end_s=begin_s + 0.1 + late_s,
                clock_mhz=1410,
                work=decodes(1, 1),
            )
        )
    found = count_overruns([path], 1.0, time.monotonic())
    assert (found.num_passes, found.num_overran) == (3, 1)
    assert found.late_frac == pytest.approx(0.0205 / 0.3)
    assert found.fault is not None
    assert "1 of 3 overran" in found.fault


def test_an_engine_s_own_python_finds_the_package_by_the_plan() -> None:
    """It knows nothing of ours but the path in the plan."""
    plan = Plan(
        profile="p", phase="decode", instance_id=0, cards=(0,), state="s", passes="f",
        max_requests=1,
    )  # fmt: skip
    code = json.loads(plan.environment()[ENVIRONMENT])["code"]
    ask = (
        "import sys, importlib.util as u; sys.path.append(sys.argv[1]);"
        "print(u.find_spec('voltana.hwreplay.emulated.plan').origin)"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ask, code], capture_output=True, text=True, check=False
    )
    assert Path(found.stdout.strip()) == Path(plan_module.__file__), found.stderr
