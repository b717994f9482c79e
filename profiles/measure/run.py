"""`voltana profile` behind its options: from cards, engine and plan to a profile directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tomli_w

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.device.gpu import Gpu
from voltana.profiles.device.lock import ClockSession
from voltana.profiles.draw.profile_figures import poor_fits, write_report
from voltana.profiles.engines.base import PHASES, Engine, EngineFacts, NotHeldError
from voltana.profiles.measure.assemble import assemble
from voltana.profiles.measure.campaign import Campaign, Plan, measure_bare_idle
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.progress import Progress
from voltana.profiles.places import SERVING

JOURNAL: Final = "journal.jsonl"


def measure_profile(
    cards: Sequence[Gpu],
    engine: Engine,
    plan: Plan,
    out: Path,
    progress: Progress,
    *,
    allow_shared: bool = False,
    previous_clock_mhz: int | None = None,
) -> Profile:
    """Measure what `out` does not hold yet, and write the profile of all that it holds.

    What ends the run early (a dying engine, Ctrl-C, SIGTERM, SIGHUP) is raised again after the
    profile of what had finished is written, if it spans a grid.

    Args:
        cards: All the cards the engine runs on.
        engine: Not entered yet.
        plan: What to measure.
        out: Profile directory.
        progress: Is told.
        allow_shared: Go on although others use the cards.
        previous_clock_mhz: Lock to return to; None returns control to the driver.

    Raises:
        VoltanaError: The journal is of another run, the engine cannot run, or too few points.
    """
    log = Journal.open(out / JOURNAL)
    log.check(_of_cards(cards, plan))
    _announce_missing_phases(log, plan, progress)
    stopped: VoltanaError | KeyboardInterrupt | SystemExit | None = None
    lock = ClockSession(cards, allow_shared=allow_shared, previous_clock_mhz=previous_clock_mhz)
    with lock as session:
        if not engine.is_attached:
            measure_bare_idle(cards, plan, session, log, progress)
        progress.say("the engine starts and loads its model")
        with engine:
            facts = _accepted(engine.facts, cards, plan, log, progress)
            try:
                Campaign(engine, cards, plan, session, log, progress).run()
                _measure_serving(engine, out, progress)
            except (VoltanaError, KeyboardInterrupt, SystemExit) as error:
                stopped = error
    _tell_left_out(log, progress)
    made = _assembled(log, cards, facts, out, stopped, progress)
    if stopped is not None:
        progress.say(f"{out} is a profile of the points that had finished")
        if isinstance(stopped, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"stopped; {out} keeps what had finished: run it again to go on"
            )
        raise stopped
    return made


def _tell_left_out(log: Journal, progress: Progress) -> None:
    for reason in (*log.failures.values(), *log.dropped):
        progress.say(f"left out: {reason}")


def _accepted(
    facts: EngineFacts, cards: Sequence[Gpu], plan: Plan, log: Journal, progress: Progress
) -> EngineFacts:
    """The engine's facts, once they fit the cards and the journal."""
    check_parallel(cards, facts)
    if cards[0].identity.is_power_measured and not facts.is_on_gpu:
        progress.say("the engine computes elsewhere: the card's power is called modelled")
    log.describe(identity(cards, facts, plan))
    return facts


def _assembled(
    log: Journal,
    cards: Sequence[Gpu],
    facts: EngineFacts,
    out: Path,
    stopped: VoltanaError | KeyboardInterrupt | SystemExit | None,
    progress: Progress,
) -> Profile:
    try:
        made = assemble(out, log, [card.identity for card in cards], facts)
    except VoltanaError as error:
        raise stopped or error from None
    for line in (*poor_fits(made), *write_report(made, out / "report").left_out):
        progress.say(line)
    return made


def check_parallel(cards: Sequence[Gpu], facts: EngineFacts) -> None:
    """Refuse to meter fewer or more cards than the engine uses; a stated power is of all of them.

    Raises:
        VoltanaError: Their numbers differ.
    """
    if cards[0].identity.is_power_measured and len(cards) != facts.tensor_parallel:
        raise VoltanaError(
            f"--gpu must name every card of the engine and no other, got {len(cards)} for a "
            f"tensor parallelism of {facts.tensor_parallel}: power is that of all of them; "
            "e.g. --gpu 0,1 for two"
        )


def identity(cards: Sequence[Gpu], facts: EngineFacts, plan: Plan) -> dict[str, Any]:
    """What must not change from a run to the one that resumes it.

    Args:
        cards: All of the engine.
        facts: Of engine and model.
        plan: What is measured.
    """
    return {
        **_of_cards(cards, plan),
        "engine": facts.engine_name,
        "engine_version": facts.engine_version,
        "model": facts.model_name,
        "model_shape": dict(facts.model_shape),
        "tensor_parallel": facts.tensor_parallel,
        "is_on_gpu": facts.is_on_gpu,
        "notes": dict(facts.notes),
    }


def _of_cards(cards: Sequence[Gpu], plan: Plan) -> Mapping[str, Any]:
    identities = [card.identity for card in cards]
    return {
        "gpu": [card.uuid for card in identities],
        "driver_version": identities[0].driver_version,
        "power_limit_w": [card.power_limit_w for card in identities],
        "is_power_measured": identities[0].is_power_measured,
        "is_clock_left_alone": plan.clocks_mhz is None,
        "trial_settings": dataclasses.asdict(plan.protocol),
    }


def _announce_missing_phases(log: Journal, plan: Plan, progress: Progress) -> None:
    known = {point.phase for _, point in log.points}
    for phase in PHASES:
        if phase not in plan.phases and phase not in known:
            progress.say(
                f"a profile needs both phases: without {phase} this run fills the journal alone; "
                f"complete it with --phases {phase} and the same --out"
            )


def _measure_serving(engine: Engine, out: Path, progress: Progress) -> None:
    """What a request spends outside the iterations; only a serving engine has it."""
    progress.say("what a request spends outside the iterations is measured, if it is served")
    try:
        table = engine.measure_serving()
    except NotHeldError as error:
        progress.say(f"no {SERVING}: {error}")
        return
    if table is not None:
        write_text(tomli_w.dumps(table), out / SERVING)
