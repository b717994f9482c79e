"""Makes the mapped file of emulated cards from a profile.

    library = build_library(Path(".engine/emulated"))
    create_cards(path, "a100-80g-sxm/llama-3.1-8b", 2, library)
    with open_cards(path, library) as cards:
        cards[0].effective_clock_mhz()

What the profile gives: name, memory, power limit, the supported clocks and the idle power at each,
of one card (an instance's tables are sums over its cards). What it does not, `Behaviour` states.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from voltana.hwreplay.emulated.card import (
    CARD_BYTES,
    LIBRARY,
    MAX_CLOCKS,
    MIG_OFF,
    PAGE_BYTES,
    RING,
    CardError,
    Cards,
    Record,
    load_library,
)
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError

MAX_CARDS: Final = 64
LOWEST_LIMIT: Final = 0.25
"""Share of the power limit that is the lowest to be set: 100 of 400 W on an A100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the cards behave besides their tables.

    The readings of power default to an A100's: renewed every 100 ms, each the mean over the last
    25 ms (arXiv:2312.02741). The energy counter's tick is ours, as seen on data-centre cards.
    """

    lock_call_s: float = 0.0
    """How long a lock or unlock call lasts."""
    lock_lag_s: float = 0.0
    """From such a call to the changed clock."""
    power_period_s: float = 0.1
    power_window_s: float = 0.025
    counter_period_s: float = 0.1
    grid_s: float = 0.005
    """The three periods are multiples of it."""

    def __post_init__(self) -> None:
        if min(self.lock_call_s, self.lock_lag_s) < 0:
            raise VoltanaError(
                f"lock_call_s and lock_lag_s must be >= 0, got {self.lock_call_s:g}, "
                f"{self.lock_lag_s:g}"
            )
        grids = self.grids
        if min(grids) < 1 or max(grids[0] + grids[1], grids[2]) >= RING:
            raise VoltanaError(
                f"power_period_s + power_window_s and counter_period_s must be 1 to {RING - 1} "
                f"times grid_s = {self.grid_s:g}, got {grids}: take another grid_s"
            )

    @property
    def grids(self) -> tuple[int, int, int]:
        """Period and window of the power reading and tick of the counter, in points of the grid."""
        period, window, tick = (
            round(length_s / self.grid_s)
            for length_s in (self.power_period_s, self.power_window_s, self.counter_period_s)
        )
        return period, window, tick


def uuid_of(index: int) -> str:
    """What an emulated card is called, in the form of a driver's."""
    return f"GPU-e4d7a1ed-0000-4000-8000-{index:012x}"


def create_cards(
    path: Path,
    profile: Profile | str | Sequence[str],
    num_cards: int,
    library_directory: Path,
    behaviour: Behaviour | None = None,
) -> Path:
    """Write the file: cards at rest, unlocked, their energy 0 and their time beginning now.

    Args:
        path: Replaced if it is there. A folder in memory (/dev/shm) spares the disk.
        profile: Whose card it is, or its name; a list has the name of each card's.
        num_cards: As many as the instances have in all; one instance's ranks are cards in a row.
        library_directory: Where `build_library` has put the library.
        behaviour: What the profile does not say.

    Returns:
        `path`.

    Raises:
        VoltanaError: A number is out of its range, or the library is missing or does not fit.
    """
    if isinstance(profile, str | Profile):
        profiles = [load_profile(profile) if isinstance(profile, str) else profile] * num_cards
    else:
        known = {name: load_profile(name) for name in profile}
        profiles = [known[name] for name in profile]
    behaviour = behaviour or Behaviour()
    if not 1 <= num_cards <= MAX_CARDS:
        raise VoltanaError(f"emulated cards must be 1..{MAX_CARDS}, got {num_cards}")
    header = bytearray(PAGE_BYTES)
    header[12:16] = num_cards.to_bytes(4, "little")
    records = [_record(each, index, behaviour) for index, each in enumerate(profiles)]
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(bytes(header) + b"".join(r.ljust(CARD_BYTES, b"\0") for r in records))
    try:
        library = load_library(str(library_directory / LIBRARY))
    except CardError as error:
        raise VoltanaError(str(error)) from None
    if library.voltana_format(os.fsencode(fresh)):
        raise VoltanaError(f"the emulated cards' file must be one to map, {fresh} is not")
    fresh.replace(path)
    return path


def open_cards(path: Path, library_directory: Path) -> Cards:
    """Map a file that is there.

    Raises:
        VoltanaError: It is not, is damaged, or of another version.
    """
    try:
        return Cards(str(path), str(library_directory / LIBRARY))
    except CardError as error:
        raise VoltanaError(str(error)) from None


def _record(profile: Profile, index: int, behaviour: Behaviour) -> bytes:
    meta, record = profile.meta, Record()
    clocks_mhz, num_gpus = meta.clocks.supported_mhz, meta.model.tensor_parallel
    if len(clocks_mhz) > MAX_CLOCKS:
        raise VoltanaError(f"an emulated card takes {MAX_CLOCKS} clocks, got {len(clocks_mhz)}")
    fixed = record.fixed
    fixed.name, fixed.uuid = meta.gpu.name.encode()[:95], uuid_of(index).encode()
    fixed.memory_bytes = int(meta.gpu.memory_gib * 2**30)
    fixed.grid_s = behaviour.grid_s
    fixed.period_grids, fixed.window_grids, fixed.counter_grids = behaviour.grids
    limit_mw = round(meta.gpu.power_limit_w * 1e3)
    fixed.limit_mw = fixed.limit_high_mw = limit_mw
    fixed.limit_low_mw = round(limit_mw * LOWEST_LIMIT)
    truth = profile.truth()
    fixed.num_clocks = len(clocks_mhz)
    fixed.unlocked_idle_w = truth.idle_power_w(0) / num_gpus
    for place, clock_mhz in enumerate(clocks_mhz):
        fixed.clocks_mhz[place] = clock_mhz
        fixed.idle_w[place] = truth.idle_power_w(clock_mhz) / num_gpus
    record.ledger[0].limit_mw = limit_mw
    faults = record.faults
    faults.lock_call_s, faults.lock_lag_s = behaviour.lock_call_s, behaviour.lock_lag_s
    faults.frozen_s, faults.mig_mode = -1.0, MIG_OFF
    return ctypes.string_at(ctypes.addressof(record), ctypes.sizeof(record))
