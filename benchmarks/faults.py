"""Fault campaign on emulated cards: `python -m benchmarks.faults [--tries 100] [--only actuator]`.

Kills actuator, agents, router and servers (SIGKILL) at random moments under load, and lets cards
refuse, lag, sag and disappear. After each try no clock may be locked that nobody owns, and every
request must have ended in a way that its client was told. Real: actuator, watchdog, agents, router
and all that they say to each other and to NVML. Stubs: the servers' computation. The exit status is
the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.fault_bench import PAIRS, PROFILE, Bench, NotInTimeError, no_watchdog_left, until
from voltana.hwreplay.emulated.build import build_library, show_here
from voltana.hwreplay.emulated.card import Card
from voltana.hwreplay.emulated.state import create_cards, open_cards
from voltana.profiles.common.signals import stops_as_interrupts

SEED = 7
UNLOCK_S = 20.0
"""A clock that is locked for longer after its owner's death stays locked. Far above what is needed:
a busy machine is no fault."""
UNKNOWN = 999
NO_PERMISSION = 4
LAG_S = 0.2


@dataclass(slots=True)
class Row:
    """One fault's line in the table."""

    fault: str
    asked: int
    """Tries that were to be made; `tries` are fewer where time was up."""
    tries: int = 0
    unlock_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def text(self) -> str:
        took = [f"{1e3 * f(self.unlock_s):.0f}" for f in (np.median, np.max) if self.unlock_s]
        median, most = took or ("", "")
        ends = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        return (
            f"{self.fault:<34}{self.tries:>6}{median:>11}{most:>9}"
            f"{len(self.wrong):>7}{self.sent:>7}{self.outcomes['lost']:>6}  {ends}"
        )


HEAD = (
    f"{'fault':<34}{'tries':>6}{'unlock ms':>11}{'max':>9}{'wrong':>7}{'sent':>7}{'lost':>6}"
    "  how requests ended"
)
Try = Callable[[Bench, np.random.Generator, int], Awaitable[float | None]]


async def unlocked(bench: Bench, names: list[str], since_s: float) -> float:
    """Seconds until none of these cards has a lock, or one under way."""
    await until(lambda: not set(names) & set(bench.locked()), f"{names} must be unlocked", UNLOCK_S)
    return time.monotonic() - since_s


async def victim(bench: Bench, number: int) -> str:
    """The next instance in turn, all of it up and its card locked."""
    name = bench.places[number % len(bench.places)]
    for other in bench.places:  # two servers of a phase that are down at once would serve nobody
        await bench.up(f"server {other}")
    await bench.up(f"agent {name}")
    await bench.all_locked([name])
    return name


async def kill_actuator(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """Its watchdog gives every clock back."""
    await bench.all_locked()
    await asyncio.sleep(rng.uniform(0.0, 0.2))
    took_s = await unlocked(bench, bench.places, bench.kill("actuator"))
    await bench.start("actuator")
    return took_s


async def kill_agent(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """The actuator gives back what it held, and nothing else."""
    name = await victim(bench, number)
    await asyncio.sleep(rng.uniform(0.0, 0.2))
    others = [other for other in bench.locked() if other != name]
    took_s = await unlocked(bench, [name], bench.kill(f"agent {name}"))
    await bench.all_locked(others)
    bench.restart(f"agent {name}")
    return took_s


async def kill_server(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """Its agent hears nothing more and unlocks."""
    name = await victim(bench, number)
    await asyncio.sleep(rng.uniform(0.0, 0.2))
    took_s = await unlocked(bench, [name], bench.kill(f"server {name}"))
    bench.restart(f"server {name}")
    return took_s


async def kill_router(bench: Bench, rng: np.random.Generator, number: int) -> float | None:
    """Without it servers come to rest; agents that hear nothing then unlock."""
    await bench.all_locked()
    await asyncio.sleep(rng.uniform(0.0, 0.2))
    killed_s = bench.kill("router")
    took_s = await unlocked(bench, bench.places, killed_s) if bench.is_silent_at_rest else None
    await bench.start("router")
    return took_s


async def refuse_locks(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """The card takes no lock: its agent goes on without."""
    name = await victim(bench, number)
    card = bench.cards[name]
    took_s = await unlocked(bench, [name], bench.kill(f"agent {name}"))
    card.faults.lock_error = NO_PERMISSION
    await bench.start(f"agent {name}")
    await asyncio.sleep(0.3)
    if name in bench.locked() or not bench.is_alive(f"agent {name}"):
        raise NotInTimeError(f"{name}: a refused lock must leave the agent alive and no lock")
    card.faults.lock_error = 0
    return took_s


async def refuse_to_unlock(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """For a while the driver fails where the clock is to be given back."""
    name = await victim(bench, number)
    bench.cards[name].faults.lock_error = UNKNOWN
    killed_s = bench.kill(f"agent {name}")
    await asyncio.sleep(rng.uniform(0.1, 0.7))
    bench.cards[name].faults.lock_error = 0
    took_s = await unlocked(bench, [name], killed_s)
    bench.restart(f"agent {name}")
    return took_s


async def lag(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """Locks take effect 200 ms late; the actuator is killed while some are under way."""
    for card in bench.cards.values():
        card.faults.lock_lag_s = LAG_S
    try:
        took_s = await kill_actuator(bench, rng, number)
        await until(lambda: all(map(has_settled, bench.cards.values())), "locks must take effect")
        return took_s
    finally:
        for card in bench.cards.values():
            card.faults.lock_lag_s = 0.0


def has_settled(card: Card) -> bool:
    """Whether the lock in force is the one asked for last."""
    look = card.look()
    return look.locked_mhz == look.wanted_mhz


async def sag(bench: Bench, rng: np.random.Generator, number: int) -> None:
    """Under its power limit a card falls to 705 MHz, and comes back to its lock."""
    name = await victim(bench, number)
    card = bench.cards[name]
    card.sag(705, 0.5)
    if card.effective_clock_mhz() != 705:
        raise NotInTimeError(f"{name} must sag")
    await until(lambda: card.effective_clock_mhz() > 705, f"{name} must come back to its clock")
    if not bench.is_alive(f"agent {name}"):
        raise NotInTimeError(f"the agent of {name} must live through a sag")


async def disappear(bench: Bench, rng: np.random.Generator, number: int) -> float:
    """A card falls off the bus, its server with it; after a reset it is there again, unlocked."""
    name = await victim(bench, number)
    bench.cards[name].lose()
    bench.kill(f"server {name}")
    await asyncio.sleep(0.3)
    others = [other for other in bench.places if other != name]
    await bench.all_locked(others)
    if not bench.is_alive("actuator"):
        raise NotInTimeError("the actuator must outlive a lost card")
    killed_s = bench.kill(f"agent {name}")
    bench.cards[name].find_again()
    took_s = await unlocked(bench, [name], killed_s)
    bench.restart(f"server {name}")
    bench.restart(f"agent {name}")
    return took_s


KILLS: dict[str, Try] = {
    "actuator": kill_actuator,
    "agent": kill_agent,
    "server": kill_server,
    "router": kill_router,  # last: a new one has counted nothing
}
CARD_FAULTS: dict[str, Try] = {
    "refuses locks": refuse_locks,
    "refuses to unlock": refuse_to_unlock,
    "lags 200 ms": lag,
    "sags to 705 MHz": sag,
    "disappears": disappear,
}


async def play(bench: Bench, act: Try, row: Row, until_s: float) -> None:
    """One fault again and again under load, until time is up."""
    rng = np.random.default_rng([SEED, len(row.fault), row.asked])
    before = bench.traffic.outcomes.copy(), bench.traffic.sent
    async with bench.traffic.flowing():
        try:
            for number in range(row.asked):
                if time.monotonic() > until_s:
                    break
                took_s = await act(bench, rng, number)
                row.tries += 1
                row.unlock_s += [] if took_s is None else [took_s]
            await bench.up()
        except NotInTimeError as error:
            row.wrong.append(str(error))
    row.outcomes = bench.traffic.outcomes - before[0]
    row.sent = bench.traffic.sent - before[1]
    if sum(row.outcomes.values()) != row.sent:
        row.wrong.append(f"{row.sent} requests were sent, {sum(row.outcomes.values())} ended")


async def check_books(bench: Bench, row: Row) -> None:
    """What the router says it did must be what clients were told; it was not killed meanwhile."""
    counts = await bench.counts()
    if int(sum(counts.values())) != bench.traffic.sent:
        row.wrong.append(f"the router counts {counts}, {bench.traffic.sent} were sent")


async def campaign(
    bench: Bench, faults: dict[str, tuple[Try, int]], rows: list[Row], until_s: float
) -> None:
    """One bench's share: faults in turn; at the end everything is killed and nothing locked.

    Args:
        bench: Not running yet.
        faults: What to do, and how often.
        rows: Takes one row a fault.
        until_s: When time is up, monotonic clock; what is left is shared by what is to come.
    """
    async with bench.running():
        for number, (fault, (act, tries)) in enumerate(faults.items()):
            row = Row(fault, tries)
            rows.append(row)
            now_s = time.monotonic()
            weights = [most for _, most in list(faults.values())[number:]]
            await play(bench, act, row, now_s + (until_s - now_s) * tries / sum(weights))
            if act is not kill_router and "kill -9 router" not in [r.fault for r in rows]:
                await check_books(bench, row)
            print(row.text, flush=True)
            if row.wrong:
                print("\n".join(f"    {wrong}" for wrong in row.wrong), flush=True)
                return  # something is down now that the next fault would need
    await until(lambda: not bench.locked(), "everything killed: no clock may be locked", UNLOCK_S)


async def run(directory: Path, tries: int, card_tries: int, only: str, until_s: float) -> list[Row]:
    """Two benches side by side, each with four cards."""
    kills = {f"kill -9 {name}": (act, tries) for name, act in KILLS.items()}
    cards = {f"card {name}": (act, card_tries) for name, act in CARD_FAULTS.items()}
    shares = (
        {name: kills[f"kill -9 {name.split()[-1]}"] for name in ("kill -9 actuator",)}
        | cards
        | {"kill -9 server": kills["kill -9 server"]},
        {name: kills[name] for name in ("kill -9 agent", "kill -9 router")},
    )
    found: list[list[Row]] = [[], []]
    path = directory / "cards"
    with open_cards(path, directory) as all_cards:
        async with asyncio.TaskGroup() as group:
            for place, share in enumerate(shares):
                wanted = {name: how for name, how in share.items() if only in name}
                if not wanted:
                    continue
                home = directory / str(place)
                home.mkdir()
                first = place * len(PAIRS)
                bench = Bench(
                    home, dict(zip(PAIRS, list(all_cards)[first:], strict=False)), SEED + place
                )
                group.create_task(campaign(bench, wanted, found[place], until_s))
    return [row for rows in found for row in rows]


async def run_on_engine(
    directory: Path, engine: Path, tries: int, only: str, until_s: float
) -> list[Row]:
    """The kills on real servers, whose forward passes alone are emulated."""
    from benchmarks.fault_engine import engine_bench

    rows: list[Row] = []
    kills = {f"kill -9 {name}": (act, tries) for name, act in KILLS.items()}
    with (
        open_cards(directory / "cards", directory) as cards,
        engine_bench(directory, engine, cards) as bench,
    ):
        wanted = {name: how for name, how in kills.items() if only in name}
        await campaign(bench, wanted, rows, until_s)
    return rows


def main() -> int:
    """Run it; 1 if anything was wrong or lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=100, help="kills of each part")
    parser.add_argument("--card-tries", type=int, default=10, help="of each fault of a card")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--minutes", type=float, default=10.0, help="no new try after so long")
    parser.add_argument("--engine", type=Path, help="folder of a real SGLang: 1P1D of it")
    arguments = parser.parse_args()
    start_s = time.monotonic()
    until_s = start_s + 60.0 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="vf-") as scratch:
        directory = Path(scratch)
        build_library(directory)
        show_here(directory, create_cards(directory / "cards", PROFILE, 2 * len(PAIRS), directory))
        print(HEAD, flush=True)
        with no_watchdog_left(), stops_as_interrupts():
            if arguments.engine is None:
                plan = run(
                    directory, arguments.tries, arguments.card_tries, arguments.only, until_s
                )
            else:
                plan = run_on_engine(
                    directory, arguments.engine, arguments.tries, arguments.only, until_s
                )
            rows = asyncio.run(plan)
    is_well = bool(rows) and all(
        row.tries and not row.wrong and not row.outcomes["lost"] for row in rows
    )
    verdict = "every clock given back, every request accounted for" if is_well else "FAILED"
    missed = sum(row.asked - row.tries for row in rows)
    if missed and is_well:
        verdict += f"; time was up for {missed} tries: --minutes gives more"
    print(f"{verdict} ({time.monotonic() - start_s:.0f} s)")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
