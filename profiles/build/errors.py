"""How far the numbers of the A100 profiles may be off: `[errors]` of their profile.toml."""

from __future__ import annotations

from typing import Final

from voltana.profiles.schema import ErrorsMeta

ERRORS: Final = ErrorsMeta(
    prefill_time=0.15, decode_time=0.1, prefill_clock_time=0.25, decode_clock_time=0.25,
    prefill_power=0.1, decode_power=0.1, prefill_clock_power=0.1, decode_clock_power=0.1,
    idle_power=0.2,
)  # fmt: skip
"""Time and power at the top clock: the sources' own spread (see the provenance). Clocks: a measured
sweep of another 7B model on an A100 has 14 % less time at 705 MHz and batch 64, which is a third of
what the clock adds there, 7 % at small batches, and 7 % more power (2^0.1). Idle: 63 W against
readings up to 80 W."""
