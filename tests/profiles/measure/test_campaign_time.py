"""What a campaign does with its time: the budget, what is left of it, pauses."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.profiles.measure.fake_engine import FAST, Fake, plan, run
from tests.profiles.measure.quiet import Quiet
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.lock import ClockSession
from voltana.profiles.measure import trial as trial_module
from voltana.profiles.measure.campaign import Campaign
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.progress import Standing
from voltana.profiles.measure.trial import Trial


def test_time_left_is_the_budget_or_less(tmp_path: Path) -> None:
    """At first the budget; when the first points took a moment each, that times their number."""
    seen: list[Standing] = []

    class Watching(Quiet):
        def at(self, standing: Standing) -> None:
            seen.append(standing)

    card, engine = ConstantPowerGpu(100.0), Fake()
    log = Journal.open(tmp_path / "j")
    with ClockSession([card]) as session, engine:
        Campaign(engine, [card], plan(budget_s=3600.0), session, log, Watching()).run()
    assert seen[0].left_s == pytest.approx(3600.0, abs=60.0)
    assert all(standing.left_s < 600.0 for standing in seen[1:])
    assert [standing.num_done for standing in seen] == list(range(len(seen)))


@dataclass(slots=True)
class Heard:
    """Keeps what it is told."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def at(self, standing: Standing) -> None:
        self.lines.append(standing.text)


def test_a_budget_that_is_too_short_is_said_and_no_zero_is_promised(tmp_path: Path) -> None:
    """The ends of the grid are measured past it: 8 points of at least 0.2 s each."""
    heard = Heard()
    log = Journal.open(tmp_path / "j")
    card = ConstantPowerGpu(100.0)
    # cards that settle for longer than the budget: it is over before the first point
    rules = replace(FAST, warm_up_s=1.0, settle_s=0.02)
    short = replace(plan(budget_s=0.01), protocol=rules)
    with ClockSession([card]) as session, Fake() as engine:
        Campaign(engine, [card], short, session, log, heard).run()
    first = next(line for line in heard.lines if "budget" in line)
    assert first.startswith("the budget of 0.01 s is too short for the 8 points")
    assert "about 10 s" in first  # 8 x (1 s + 2 x 0.101 s)
    at = [line for line in heard.lines if line.startswith("[")]
    assert len(log.points) == 8
    assert not any("at most 0:00 left" in line for line in at)
    assert all("past the budget, about" in line for line in at[1:])


def test_pauses_of_prefill_are_idle_and_those_of_decode_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two stretches of decode the engine prefills: nobody knows that power."""
    seen: dict[str, set[float | None]] = {"prefill": set(), "decode": set()}
    whole = trial_module.measure_point

    def watched(*args: Any, **options: Any) -> list[Trial]:  # noqa: ANN401
        seen[args[2].phase].add(options["pause_w"])
        return whole(*args, **options)

    monkeypatch.setattr("voltana.profiles.measure.campaign.measure_point", watched)
    log = run(Fake(), tmp_path / "j")
    idle_w = statistics.median(log.idle_w[0, True])
    assert seen == {"prefill": {idle_w}, "decode": {None}}
