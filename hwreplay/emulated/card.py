"""One emulated card, through the compiled library: what an engine's plug-in and a fault call.

This file needs the standard library alone and imports nothing of voltana, so that it can be used
inside the engine's own environment.

Time is seconds of CLOCK_MONOTONIC since the file was made, as this process has them. Under time
dilation (`dilation.py`) they are emulated seconds for every process of the run alike, and so are
joules and averaging periods: a pass of 200 W that lasts 0.1 s at dilation 4 is under way for 0.4 s
of a wall clock and takes 20 J. A file made under another dilation is refused.

The library books exactly: at every moment a card draws the power of the pass under way, otherwise
the idle power of the clock in force. A lock takes effect after its lag, also in the middle of a
rest. A pass ends by itself when its duration is over, so an engine that is killed leaves a card
at rest; a pass that lasts longer than asked on the host is at rest for what it overruns.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CARDS: Final = "VOLTANA_EMULATED_CARDS"
"""Environment variable: the mapped file."""
LIBRARY: Final = "libnvidia-ml.so.1"
MAX_CLOCKS: Final = 256
MAX_PENDING: Final = 16
MAX_PROCESSES: Final = 16
RING: Final = 256
PAGE_BYTES: Final = 4096
CARD_BYTES: Final = 16384
MIG_OFF: Final = 1


class CardError(Exception):
    """The file or the library is not what it must be; one line."""


class _Header(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint32),
        ("num_cards", ctypes.c_uint32),
        ("record_bytes", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class _Static(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 96),
        ("uuid", ctypes.c_char * 96),
        ("memory_bytes", ctypes.c_uint64),
        ("dilation", ctypes.c_char * 96),
        ("epoch_ns", ctypes.c_int64),
        ("grid_s", ctypes.c_double),
        ("period_grids", ctypes.c_uint32),
        ("window_grids", ctypes.c_uint32),
        ("counter_grids", ctypes.c_uint32),
        ("limit_mw", ctypes.c_uint32),
        ("limit_low_mw", ctypes.c_uint32),
        ("limit_high_mw", ctypes.c_uint32),
        ("num_clocks", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("unlocked_idle_w", ctypes.c_double),
        ("clocks_mhz", ctypes.c_uint32 * MAX_CLOCKS),
        ("idle_w", ctypes.c_double * MAX_CLOCKS),
    )


class _Change(ctypes.Structure):
    _fields_ = (
        ("at_s", ctypes.c_double),
        ("clock_mhz", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class _Ledger(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("at_s", "energy_j", "busy_s", "pass_w")),
        *((name, ctypes.c_double) for name in ("pass_end_s", "sag_from_s", "sag_until_s")),
        *((name, ctypes.c_uint32) for name in ("sag_mhz", "lost", "clock_mhz", "wanted_mhz")),
        *((name, ctypes.c_uint32) for name in ("limit_mw", "num_pending")),
        ("pending", _Change * MAX_PENDING),
        *((name, ctypes.c_uint64) for name in ("num_passes", "num_locks")),
        *((name, ctypes.c_uint64) for name in ("num_resets", "num_limits")),
    )


class Faults(ctypes.Structure):
    """Words of a record that may be set at any time; `card.h` says what each does."""

    lock_call_s: float
    lock_lag_s: float
    frozen_s: float
    lock_error: int
    energy_mode: int
    mig_mode: int
    throttle_bits: int
    temperature_c: int
    stuck_mhz: int
    foreign_pid: int
    num_energy_reads: int

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lock_call_s", "lock_lag_s", "frozen_s")),
        *((name, ctypes.c_uint32) for name in ("lock_error", "energy_mode", "mig_mode")),
        *((name, ctypes.c_uint32) for name in ("throttle_bits", "temperature_c", "stuck_mhz")),
        ("processes", ctypes.c_uint32 * MAX_PROCESSES),
        ("foreign_pid", ctypes.c_uint32),
        ("num_energy_reads", ctypes.c_uint32),
    )


class Record(ctypes.Structure):
    """`Record` of card.h; all but `faults` is the library's to write."""

    _fields_ = (
        ("checksum", ctypes.c_uint64),
        ("fixed", _Static),
        ("mutex", ctypes.c_uint64 * 5),
        ("active", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("ledger", _Ledger * 2),
        ("ring_j", ctypes.c_double * RING),
        ("faults", Faults),
    )


class _Look(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("now_s", "energy_j", "busy_s", "power_w")),
        ("next_change_s", ctypes.c_double),
        *((name, ctypes.c_uint32) for name in ("clock_mhz", "locked_mhz", "wanted_mhz")),
        *((name, ctypes.c_uint32) for name in ("lost", "limit_mw", "padding")),
        *((name, ctypes.c_uint64) for name in ("num_passes", "num_locks")),
        *((name, ctypes.c_uint64) for name in ("num_resets", "num_limits")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A card at one instant."""

    now_s: float
    """Seconds since the file was made."""
    energy_j: float
    """Exact up to now; NVML's counter shows the same at its last tick."""
    busy_s: float
    power_w: float
    """Now, not averaged."""
    next_change_s: float
    """When the clock changes next by what is known now (a lock under way, the end of a sag)."""
    clock_mhz: int
    """In force; never 0."""
    locked_mhz: int
    """Lock in force; 0: none."""
    wanted_mhz: int
    """Lock asked for last; differs from `locked_mhz` while it is under way."""
    is_lost: bool
    power_limit_w: float
    num_passes: int
    num_locks: int
    num_resets: int
    num_limits: int


class Card:
    """One card of a `Cards`. Safe to use from several processes and threads at once."""

    def __init__(self, library: ctypes.CDLL, address: int, index: int) -> None:
        self.library = library
        self.address = address
        self.index = index
        self.record = Record.from_address(address)

    @property
    def name(self) -> str:
        return str(self.record.fixed.name.decode())

    @property
    def uuid(self) -> str:
        return str(self.record.fixed.uuid.decode())

    @property
    def faults(self) -> Faults:
        """To be set: `card.faults.lock_error = 4`."""
        return self.record.faults  # type: ignore[no-any-return]

    def now_s(self) -> float:
        return self.look().now_s

    def effective_clock_mhz(self) -> int:
        """SM clock in force now, lag and sag counted; never 0."""
        return self.look().clock_mhz

    def look(self) -> Look:
        """Book up to now and say how the card stands."""
        found = _Look()
        self.library.voltana_look(self.address, ctypes.byref(found))
        return Look(
            **{name: getattr(found, name) for name in _PLAIN},
            is_lost=bool(found.lost),
            power_limit_w=found.limit_mw / 1e3,
        )

    def begin_pass(self, power_w: float, duration_s: float) -> None:
        """From now on the card draws `power_w`, for `duration_s` at most.

        Called within a pass it replaces power and end from now on: for a clock that has changed.
        """
        self.library.voltana_begin_pass(self.address, power_w, duration_s)

    def end_pass(self) -> None:
        """At rest from now on; not needed after a pass that has had its duration."""
        self.library.voltana_end_pass(self.address)

    def add_process(self, pid: int | None = None) -> None:
        """Put a process (this one) on the card's list, where one that has ended stood."""
        pid = os.getpid() if pid is None else pid
        places = self.faults.processes
        if pid in places:
            return
        for place, other in enumerate(places):
            if not other or not Path(f"/proc/{other}").exists():
                places[place] = pid
                return
        raise CardError(f"a card takes {MAX_PROCESSES} processes, {self.uuid} has as many")

    def set_power_limit(self, limit_w: float) -> None:
        """As NVML's call does."""
        self.library.voltana_limit(self.address, round(limit_w * 1e3))

    def sag(self, clock_mhz: int, duration_s: float) -> None:
        """For so long the clock is `clock_mhz` at most, as under a power limit; 0 ends it."""
        self.library.voltana_sag(self.address, clock_mhz, duration_s)

    def lose(self) -> None:
        """Off the bus: NVML answers GPU_IS_LOST, the card draws nothing."""
        self.library.voltana_set_lost(self.address, 1)

    def find_again(self) -> None:
        """Back after a reset: no lock has outlived it."""
        self.library.voltana_set_lost(self.address, 0)


_PLAIN: Final = (
    *("now_s", "energy_j", "busy_s", "power_w", "next_change_s"),
    *("clock_mhz", "locked_mhz", "wanted_mhz"),
    *("num_passes", "num_locks", "num_resets", "num_limits"),
)


class Cards:
    """All cards of a file. Close it, or use it in a with statement."""

    def __init__(self, path: str | None = None, library: str = LIBRARY) -> None:
        """Map the file.

        Args:
            path: The file; None: the one that VOLTANA_EMULATED_CARDS names.
            library: The compiled library; by default it is searched for as a driver's is.

        Raises:
            CardError: No library, or no such file, one that is damaged or of another version.
        """
        path = os.environ.get(CARDS) if path is None else path
        if path is None:
            raise CardError(
                f"the environment must name the emulated cards' file, no {CARDS} is set"
            )
        self._library = load_library(library)
        why = ctypes.create_string_buffer(256)
        self._header = self._library.voltana_map(os.fsencode(path), why, len(why))
        if not self._header:
            raise CardError(why.value.decode(errors="replace"))
        num_cards = _Header.from_address(self._header).num_cards
        self._cards = [
            Card(self._library, self._library.voltana_record(self._header, index), index)
            for index in range(num_cards)
        ]

    def __len__(self) -> int:
        return len(self._cards)

    def __getitem__(self, index: int) -> Card:
        return self._cards[index]

    def __iter__(self) -> Iterator[Card]:
        return iter(self._cards)

    def __enter__(self) -> Cards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap; the cards must not be used after it."""
        self._cards = []
        if self._header:
            self._library.voltana_unmap(self._header)
            self._header = None


def load_library(library: str = LIBRARY) -> ctypes.CDLL:
    """The compiled library with its functions' types.

    Raises:
        CardError: It is not there, is a real driver's, or does not fit this file.
    """
    try:
        loaded = ctypes.CDLL(library)
        record_bytes = loaded.voltana_record_bytes()
    except (OSError, AttributeError) as error:
        raise CardError(
            f"{library} must be the emulated card's, it is not ({error}): run `make engine` and "
            "put its folder into LD_LIBRARY_PATH"
        ) from None
    if record_bytes != ctypes.sizeof(Record):
        raise CardError(
            f"{library} must fit card.py, it has {record_bytes} bytes a card instead of "
            f"{ctypes.sizeof(Record)}: build it again (make engine)"
        )
    pointer, double, number = ctypes.c_void_p, ctypes.c_double, ctypes.c_uint
    for name, result, arguments in (
        ("voltana_map", pointer, (ctypes.c_char_p, ctypes.c_char_p, number)),
        ("voltana_unmap", None, (pointer,)),
        ("voltana_format", ctypes.c_int, (ctypes.c_char_p,)),
        ("voltana_record", pointer, (pointer, number)),
        ("voltana_look", None, (pointer, ctypes.POINTER(_Look))),
        ("voltana_begin_pass", None, (pointer, double, double)),
        ("voltana_end_pass", None, (pointer,)),
        ("voltana_sag", None, (pointer, number, double)),
        ("voltana_set_lost", None, (pointer, number)),
        ("voltana_lock", ctypes.c_int, (pointer, number)),
        ("voltana_limit", ctypes.c_int, (pointer, number)),
        ("voltana_reading_w", double, (pointer,)),
        ("voltana_counter_j", double, (pointer,)),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
