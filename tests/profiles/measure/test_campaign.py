"""A campaign over engines that die, cards that fail and processes that come, without a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.profiles.measure.fake_engine import BIG, FAST, Fake, plan, run
from tests.profiles.measure.quiet import Quiet
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.gpu import ClockTimeoutError, GpuBusyError
from voltana.profiles.device.lock import ClockSession
from voltana.profiles.engines.base import (
    EngineCrashError,
    Point,
    Window,
)
from voltana.profiles.measure import trial as trial_module
from voltana.profiles.measure.assemble import assemble
from voltana.profiles.measure.campaign import Campaign, Plan
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.power import SampleGapError
from voltana.profiles.measure.progress import Standing
from voltana.profiles.measure.run import check_parallel, measure_profile


def test_a_crash_is_recorded_the_engine_restarted_and_the_point_tried_by_the_next_run(
    tmp_path: Path,
) -> None:
    engine = Fake(deadly=[BIG])
    log = run(engine, tmp_path / "j")
    assert (engine.num_starts, log.failures) == (2, {(0, BIG): "died of 2 tokens"})
    assert engine.opened.count(BIG) == 1
    assert len(log.points) == len(set(engine.opened)) - 1
    again = Fake()
    assert (0, BIG) in run(again, tmp_path / "j").points
    assert set(again.opened) == {BIG}


def test_chunks_are_measured_beside_decoding_where_asked_and_within_the_limits(
    tmp_path: Path,
) -> None:
    """A pass of this engine takes 10 ms whatever is in it, so that a step beside a chunk is free:
    both ends of the grid say so, and what they were not asked for too."""
    wanted = plan(phases=("prefill", "decode", "mixed"))
    log = run(Fake(), tmp_path / "j", wanted)
    mixed = [point for _, point in log.points if point.phase == "mixed"]
    assert {point.chunk_tokens for point in mixed} == {1, 15}
    for point in mixed:  # one place, the prompt's room and a token of its budget are taken
        assert point.batch_size == 1
        assert point.tokens + point.chunk_tokens <= 32
    assert len(mixed) == len(set(mixed)) >= 2
    again = Fake()
    read = run(again, tmp_path / "j", wanted)
    assert again.opened == []
    made = assemble(tmp_path / "p", read, [ConstantPowerGpu(100.0).identity], Fake().facts)
    time_s, power_w = made.mixed_step().time_and_power(0, (1.0, 8), (1, 12))
    assert time_s == pytest.approx(0.01)
    assert power_w == pytest.approx(100.0, rel=0.05)  # read a moment before and after
    assert made.mixed_step(overlap_frac=0.0).time_and_power(0, (1.0, 8), (1, 12))[0] > 0.019
    run(Fake(), tmp_path / "apart")
    log = Journal.open(tmp_path / "apart")
    left = assemble(tmp_path / "p", log, [ConstantPowerGpu(100.0).identity], Fake().facts)
    assert left.mixed is None


def test_a_point_that_kills_every_run_is_given_up_after_three(tmp_path: Path) -> None:
    """Else a broken CUDA context would end each run at the same point."""
    tried = []
    for _ in range(5):
        engine = Fake(deadly=[BIG])
        run(engine, tmp_path / "j")
        tried.append(BIG in engine.opened)
    assert tried == [True, True, True, False, False]


def test_two_crashes_in_a_row_end_the_run_and_what_had_finished_is_a_profile(
    tmp_path: Path,
) -> None:
    """It dies at the last two of the grid."""
    order = run(Fake(), tmp_path / "order").points
    last = [point for _, point in order][-2:]
    engine = Fake(deadly=last)
    out = tmp_path / "p"
    with pytest.raises(EngineCrashError, match=r"2 in a row: died of .* run the same command"):
        measure_profile([ConstantPowerGpu(100.0)], engine, plan(), out, Quiet())
    assert set(load_profile(out).decode["batch_size"]) == {1, 2}


def test_an_engine_that_cannot_be_restarted_says_what_died_and_what_to_do(tmp_path: Path) -> None:
    engine = Fake(deadly=[BIG], can_restart=False)
    with pytest.raises(EngineCrashError, match="died of 2 tokens; run the same command again"):
        run(engine, tmp_path / "j")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "j").read_text().splitlines()]
    assert kinds[-1] == "failure"


def test_ctrl_c_leaves_a_profile_where_the_grid_is_spanned(tmp_path: Path) -> None:
    order = [point for _, point in run(Fake(), tmp_path / "order").points]
    out = tmp_path / "p"
    with pytest.raises(KeyboardInterrupt):
        measure_profile([ConstantPowerGpu(1.0)], Fake(stops_at=order[-1]), plan(), out, Quiet())
    assert load_profile(out).meta.engine.name == "fake"
    early = Fake(stops_at=order[1])
    with pytest.raises(KeyboardInterrupt):
        measure_profile([ConstantPowerGpu(1.0)], early, plan(), tmp_path / "q", Quiet())
    assert not (tmp_path / "q" / "profile.toml").exists()


def test_clocks_that_have_no_point_yet_leave_no_idle_power_in_a_profile(tmp_path: Path) -> None:
    """Idle power comes first, at every clock: a run ended after one clock still makes a profile."""
    out = tmp_path / "p"
    order = [point for _, point in run(Fake(), tmp_path / "order").points]
    with pytest.raises(KeyboardInterrupt):
        measure_profile([ConstantPowerGpu(1.0)], Fake(stops_at=order[-1]), plan(), out, Quiet())
    log = Journal.open(out / "journal.jsonl")
    log.add_idle(1234, is_loaded=True, power_w=[70.0])
    facts = Fake().facts
    made = assemble(out, log, [ConstantPowerGpu(1.0).identity], facts)
    assert 1234 not in set(made.idle["frequency_mhz"])


def test_where_a_row_cannot_be_held_to_its_end_the_next_point_is_measured_at_once(
    tmp_path: Path,
) -> None:
    """Batch 1 to 16 tokens does not fit: a budget of 0 covers the corners, that row to 1 token."""
    end = Point(phase="decode", batch_size=2, tokens=32)
    engine = Fake(too_big=[end])
    log = run(engine, tmp_path / "j", plan(("decode",), budget_s=0.0))
    at = engine.opened.index(end)
    assert engine.opened[at + 1] == BIG
    assert len(log.points) == 3  # every point of the grid but that one


def test_a_window_that_cannot_be_metered_is_dropped_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial of the run fails, then every trial of one point."""
    whole = trial_module.run_trial
    failing = iter([True, False, True, True])

    def stalled(*args: object) -> object:
        if next(failing, False):
            raise SampleGapError("the machine is overloaded")
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_module, "run_trial", stalled)
    log = run(Fake(), tmp_path / "j")
    first, *rest = log.points.values()
    assert len(first) == 1
    assert all(len(trials) == 2 for trials in rest)
    assert list(log.failures.values()) == ["the machine is overloaded"]
    assert len(log.dropped) == 3
    again = Journal.open(tmp_path / "j")
    assert not any(again.is_done(*key) for key in log.failures)


class Lockable(ConstantPowerGpu):
    """Reaches one of its two clocks."""

    def __init__(self) -> None:
        super().__init__(100.0)
        self.held_mhz = 1000

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        return (1000, 1980)

    def clock_mhz(self) -> int:
        return self.held_mhz

    def lock_clock(self, clock_mhz: int) -> None:
        pass

    def unlock_clock(self) -> None:
        pass


def locked_run(card: Lockable, path: Path, engine: Fake) -> Journal:
    log = Journal.open(path)
    wanted = Plan(
        clocks_mhz=(1000, 1980), phases=("decode",), budget_s=60.0, max_batch_size=2,
        max_tokens=32, protocol=FAST,
    )  # fmt: skip
    session = ClockSession([card], has_watchdog=False, timeout_s=0.01)
    with session, engine:
        Campaign(engine, [card], wanted, session, log, Quiet()).run()
    return log


def test_a_clock_that_is_not_reached_is_dropped_and_the_others_measured(tmp_path: Path) -> None:
    log = locked_run(Lockable(), tmp_path / "j", Fake())
    assert {clock for clock, _ in log.points} == {1000}
    assert "must reach 1980 MHz" in log.dropped[0]
    assert issubclass(ClockTimeoutError, VoltanaError)


def test_a_clock_lost_under_load_is_flagged_and_stands_under_the_lock(tmp_path: Path) -> None:
    """16 MHz below the 1000 MHz locked while the work runs; 15 would pass."""

    class Sagging(Fake):
        def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
            card.held_mhz = sag_mhz
            return super().run(min_duration_s=min_duration_s, min_iterations=min_iterations)

    for sag_mhz, flags in ((984, {"clock-off"}), (985, set())):
        card = Lockable()
        log = locked_run(card, tmp_path / str(sag_mhz), Sagging())
        seen = {f for (clock, _), trials in log.points.items() for t in trials for f in t.flags}
        assert seen == flags
        assert {clock for clock, _ in log.points} == {1000}


def test_a_process_that_comes_onto_the_card_ends_the_run(tmp_path: Path) -> None:
    class Visited(ConstantPowerGpu):
        visitors: frozenset[int] = frozenset()

        def process_ids(self) -> frozenset[int]:
            return self.visitors

    card, engine = Visited(100.0), Fake()
    log = Journal.open(tmp_path / "j")
    session = ClockSession([card])

    class Telling(Quiet):
        def at(self, standing: Standing) -> None:
            if standing.num_done == 3:
                card.visitors = frozenset({2**31 - 1})

    with session, engine, pytest.raises(GpuBusyError, match=str(2**31 - 1)):
        Campaign(engine, [card], plan(), session, log, Telling()).run()
    assert len(log.points) == 3


def test_the_engine_itself_is_not_foreign_where_its_processes_cannot_be_told(
    tmp_path: Path,
) -> None:
    """In a container NVML names host pids: those there when the engine had started are its own."""

    class Container(ConstantPowerGpu):
        def process_ids(self) -> frozenset[int]:
            return frozenset({2**31 - 1}) if engine.num_starts else frozenset()

    engine = Fake(deadly=[BIG])
    card = Container(100.0)
    log = Journal.open(tmp_path / "j")
    with ClockSession([card]) as session, engine:
        Campaign(engine, [card], plan(), session, log, Quiet()).run()
    assert log.points


@pytest.mark.parametrize(
    "changed", ["engine_version", "driver_version", "trial_settings", "model_shape"]
)
def test_another_identity_is_refused(tmp_path: Path, changed: str) -> None:
    out = tmp_path / "p"
    measure_profile([ConstantPowerGpu(100.0)], Fake(), plan(), out, Quiet())
    path = out / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (described,) = (entry for entry in lines if entry["kind"] == "run")
    described[changed] = "another"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    engine = Fake()
    with pytest.raises(VoltanaError, match=f"got another {changed}") as caught:
        measure_profile([ConstantPowerGpu(100.0)], engine, plan(), out, Quiet())
    assert "\n" not in str(caught.value)
    assert not engine.opened
    is_known_before_the_engine_starts = changed in ("driver_version", "trial_settings")
    assert (engine.num_starts == 0) is is_known_before_the_engine_starts


def test_a_single_phase_is_said_to_make_no_profile_before_it_runs(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    with pytest.raises(VoltanaError, match="prefill points"):
        measure_profile([ConstantPowerGpu(1.0)], Fake(), plan(("decode",)), tmp_path, Listening())
    assert "without prefill this run fills the journal alone" in said[0]
    measure_profile([ConstantPowerGpu(1.0)], Fake(), plan(("prefill",)), tmp_path, Listening())
    assert load_profile(tmp_path).meta.engine.name == "fake"


class Measured(ConstantPowerGpu):
    """A constant that claims to be a card."""

    def __init__(self) -> None:
        super().__init__(100.0)
        object.__setattr__(self._identity, "is_power_measured", True)


@pytest.mark.parametrize(("num_cards", "is_refused"), [(1, False), (2, True)])
def test_all_cards_of_the_engine_are_metered_and_no_other(
    num_cards: int, *, is_refused: bool
) -> None:
    cards = [Measured() for _ in range(num_cards)]
    facts = Fake().facts
    if not is_refused:
        check_parallel(cards, facts)
        return
    with pytest.raises(VoltanaError, match=r"got 2 for a tensor parallelism of 1.*--gpu 0,1"):
        check_parallel(cards, facts)
