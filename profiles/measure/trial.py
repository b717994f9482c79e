"""Measuring one operating point, and the idle card, by repeated phase-shifted windows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import THERMAL, Gpu
from voltana.profiles.engines.base import Engine, Point, PreparedPoint, Window
from voltana.profiles.measure.power import PowerMeter, Reading, SampleGapError, has_energy_counter

NVML_PERIOD_S: Final = 0.1
"""Power readings are published every 100 ms; trials start at different phases of it."""
TICK_POLL_S: Final = 0.002
MAX_TICK_S: Final = 0.5
"""Longest wait for the energy counter to move; after it the trial goes on all the same."""
COOLING_POLL_S: Final = 0.5
GAPS: Final = "power-without-pauses"
"""Flag: the stretches at the point were too short to be metered alone; power is that of the window,
its pauses taken out at the idle power."""
NOT_MEASURED: Final = "power-not-measured"
"""Flag: the same, but the pauses were too long for that, or the idle power is not known: an
estimate."""
SHORT: Final = "power-of-a-short-window"
"""Flag: the window itself lasted few ticks of the energy counter."""
MAX_PAUSES: Final = 0.02
"""Share of a window that pauses may take before they are taken out of its power."""
MIN_BUSY: Final = 0.5
"""Share of a window that must be work for its power to count as measured: an error of the idle
power weighs in the result by the pauses' share over the work's, at most once then. Ours."""
CLOCK_OFF: Final = "clock-off"
"""Flag: under load the clock was not the one locked; the trial stands under the lock all the same,
as whoever locks that clock gets what was measured here."""
CLOCK_TOLERANCE_MHZ: Final = 15
THROTTLED: Final = "throttle-"
"""What a flag for throttling begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long and how often to measure. The defaults keep NVML's error under 5 %."""

    window_s: float = 2.0
    min_iterations: int = 32
    num_trials: int = 3
    warm_up_s: float = 1.0
    """Clocks and allocators need time, not iterations; both minima are kept."""
    warm_up_iterations: int = 5
    settle_s: float = 3.0
    """Rest before idle power is measured: a card falls back to it in seconds."""
    num_retries: int = 2
    """Of a trial that ran into thermal throttling, each after cooling."""
    power_rest_s: float = 3.0
    """Rest before the one retry of a trial that ran into the power limit: no cooling helps there,
    and a point that needs more than the limit stays at it."""
    cool_by_c: float = 10.0
    """A card has cooled when it is this much below the temperature at which it throttled."""
    cooling_limit_s: float = 120.0
    """Longest wait for that."""

    @property
    def point_s(self) -> float:
        """Time that one point takes at least: warm-up, and trials that start phase-shifted."""
        return self.warm_up_s + self.num_trials * (self.window_s + NVML_PERIOD_S)

    def __post_init__(self) -> None:
        for name in (
            *("warm_up_s", "warm_up_iterations", "settle_s"),
            *("num_retries", "power_rest_s", "cool_by_c", "cooling_limit_s"),
        ):
            if getattr(self, name) < 0:
                raise VoltanaError(f"{name} must be >= 0, got {getattr(self, name)} (Protocol)")
        if self.window_s <= 0 or min(self.min_iterations, self.num_trials) < 1:
            raise VoltanaError(
                f"window_s must be > 0, min_iterations and num_trials >= 1, got {self.window_s}, "
                f"{self.min_iterations}, {self.num_trials}: see --window, --iterations, --trials"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured window of a point."""

    tokens: float
    time_s: float
    """Median iteration time."""
    spread_s: float
    """Half the distance between the quartiles of the iteration times."""
    power_w: float
    energy_source: str
    temperature_c: float
    clock_mhz: int
    """Median reading while the point ran."""
    num_iterations: int
    flags: tuple[str, ...]

    @property
    def is_throttled(self) -> bool:
        """Whether heat or power held the clock down."""
        return any(flag.startswith(THROTTLED) for flag in self.flags)


def measure_point(
    engine: Engine,
    gpus: Sequence[Gpu],
    point: Point,
    protocol: Protocol,
    *,
    locked_mhz: int = 0,
    deadline_s: float = math.inf,
    pause_w: float | None = None,
    on_dropped: Callable[[str], object] = lambda _: None,
) -> list[Trial]:
    """Prepare the point, warm up, and measure `num_trials` phase-shifted windows.

    A throttled window is run again: after cooling if it was heat, once after a short rest if it was
    the power limit. Where that does not help it is kept, flagged, and no further one is run again.

    Args:
        engine: Holds the point.
        gpus: The cards it runs on.
        point: What to measure.
        protocol: How.
        locked_mhz: Clock the cards are locked at; 0 if none. A trial off it is flagged.
        deadline_s: When to stop resting and retrying, monotonic clock.
        pause_w: Power of the cards in pauses, to be taken out of them; None: not known.
        on_dropped: Told why, of a trial that could not be metered and is left out.

    Raises:
        SampleGapError: No trial could be metered.
    """
    trials: list[Trial] = []
    gap: SampleGapError | None = None
    may_retry = True
    with engine.open(point) as workload:
        workload.run(min_duration_s=protocol.warm_up_s, min_iterations=protocol.warm_up_iterations)
        for number in range(protocol.num_trials):

            def again(number: int = number) -> Trial:
                return _off_lock(run_trial(workload, gpus, protocol, number, pause_w), locked_mhz)

            try:
                trial = again()
                if trial.is_throttled and may_retry:
                    trial = _retried(trial, again, gpus, protocol, deadline_s)
                    may_retry = not trial.is_throttled
            except SampleGapError as error:
                gap = error
                on_dropped(str(error))
            else:
                trials.append(trial)
    if gap is not None and not trials:
        raise gap
    return trials


def _off_lock(trial: Trial, locked_mhz: int) -> Trial:
    """Flagged if it ran off the locked clock, which is read back before the work, not under it."""
    if not locked_mhz or abs(trial.clock_mhz - locked_mhz) <= CLOCK_TOLERANCE_MHZ:
        return trial
    return replace(trial, flags=(*trial.flags, CLOCK_OFF))


def _retried(
    trial: Trial,
    again: Callable[[], Trial],
    gpus: Sequence[Gpu],
    protocol: Protocol,
    deadline_s: float,
) -> Trial:
    """The trial repeated after rests, until it runs free, repeating is of no use, or time is up.

    One that cannot be metered leaves the trial before it.
    """
    for _ in range(protocol.num_retries):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        is_hot = THROTTLED + THERMAL in trial.flags
        if is_hot:
            target_c = trial.temperature_c - protocol.cool_by_c
            cool_down(gpus, target_c, limit_s=min(protocol.cooling_limit_s, left_s))
        else:
            time.sleep(min(protocol.power_rest_s, left_s))
        try:
            trial = again()
        except SampleGapError:
            break
        if not trial.is_throttled or not is_hot:
            break
    return trial


def cool_down(gpus: Sequence[Gpu], target_c: float, *, limit_s: float) -> float:
    """Let the cards rest until the hottest is at `target_c` or below, or the limit has passed.

    Args:
        gpus: The cards.
        target_c: Temperature to wait for, in °C.
        limit_s: Longest wait, in s.

    Returns:
        Temperature of the hottest card at the end.
    """
    deadline_ns = time.monotonic_ns() + int(limit_s * 1e9)
    while True:
        temperature_c = max(gpu.temperature_c() for gpu in gpus)
        left_s = (deadline_ns - time.monotonic_ns()) * 1e-9
        if temperature_c <= target_c or left_s <= 0:
            return temperature_c
        time.sleep(min(COOLING_POLL_S, left_s))


def measure_idle_w(gpus: Sequence[Gpu], protocol: Protocol) -> list[float]:
    """Mean power of the cards after they have settled, one value a trial that could be metered.

    Raises:
        SampleGapError: None could.
    """
    time.sleep(protocol.settle_s)
    powers_w = []
    for number in range(protocol.num_trials):
        wait_for_tick(gpus)  # from tick to tick: a window from anywhere counts one more or fewer
        with PowerMeter(gpus) as meter:
            time.sleep(protocol.window_s)
            wait_for_tick(gpus)
        try:
            powers_w.append(meter.reading.power_w)
        except SampleGapError:
            if number + 1 == protocol.num_trials and not powers_w:
                raise
    return powers_w


def wait_for_tick(gpus: Sequence[Gpu], *, limit_s: float = MAX_TICK_S) -> bool:
    """Wait until the energy counter of the first card moves.

    Returns:
        Whether it did: not where there is no counter, or where it stands still for `limit_s`.
    """
    if not has_energy_counter(gpus):
        return False
    before_j = gpus[0].energy_j()
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if gpus[0].energy_j() != before_j:
            return True
        time.sleep(TICK_POLL_S)
    return False


def _await_phase(gpus: Sequence[Gpu], number: int, protocol: Protocol) -> None:
    """Wait for a trial's own phase of the counter: without its tick, phases fall where they may.

    They are spread evenly and half a period after a tick on average, where a window is as likely to
    count a tick too many as one too few. Right after a tick it would always be one too few.
    """
    wait_for_tick(gpus)
    time.sleep(NVML_PERIOD_S * (number + 0.5) / protocol.num_trials)


def run_trial(
    workload: PreparedPoint,
    gpus: Sequence[Gpu],
    protocol: Protocol,
    number: int,
    pause_w: float | None,
) -> Trial:
    """Hold a point for one window, and meter it.

    Args:
        workload: The point, prepared.
        gpus: Cards that run it.
        protocol: How long, how many.
        number: Of the trial, from 0: each begins at another phase of the meter's interval, unless
            the power of pauses is known.
        pause_w: Power of the pauses between iterations, in W, to be taken out; None: they count.

    Raises:
        SampleGapError: The cards could not be read often enough.
    """
    rests = pause_w is not None and has_energy_counter(gpus)
    if rests:
        # from tick to tick: all that the counter says is this work's, and rest of known power
        wait_for_tick(gpus)
    else:
        _await_phase(gpus, number, protocol)
    with PowerMeter(gpus) as meter:
        window = workload.run(
            min_duration_s=protocol.window_s, min_iterations=protocol.min_iterations
        )
        if rests:
            wait_for_tick(gpus)
    reading, is_own = meter.reading_within(window.spans_ns)
    flags = [f"{THROTTLED}{reason}" for reason in sorted(reading.throttle)]
    if not is_own and any(gpu.identity.is_power_measured for gpu in gpus):
        flags += [SHORT] if reading.duration_s < meter.shortest_span_s else []
        busy_s = sum(end - start for start, end in window.spans_ns) * 1e-9
        reading, flag = without_pauses(reading, busy_s, pause_w)
        flags += [flag] if flag else []
    return _trial(window, reading, flags)


def without_pauses(
    reading: Reading, busy_s: float, pause_w: float | None
) -> tuple[Reading, str | None]:
    """The energy and duration of the work alone, and a flag if it is not simply what was read.

    Args:
        reading: Of a window with pauses.
        busy_s: Time of the work in it.
        pause_w: Power in the pauses; None: not known.
    """
    busy_s = min(busy_s, reading.duration_s)
    pauses_s = reading.duration_s - busy_s
    if pause_w is None or busy_s <= 0:
        return reading, None if pauses_s <= MAX_PAUSES * reading.duration_s else NOT_MEASURED
    work_j = reading.energy_j - pause_w * pauses_s
    if work_j < pause_w * busy_s:  # work draws no less than rest: the counter was too coarse
        return reading, NOT_MEASURED
    flag = None if pauses_s <= MAX_PAUSES * reading.duration_s else GAPS
    if busy_s < MIN_BUSY * reading.duration_s:
        flag = NOT_MEASURED
    return replace(reading, energy_j=work_j, duration_s=busy_s), flag


def _trial(window: Window, reading: Reading, flags: Sequence[str]) -> Trial:
    ordered = sorted(window.iteration_s)
    quarter = len(ordered) // 4
    return Trial(
        tokens=window.tokens,
        time_s=statistics.median(ordered),
        spread_s=(ordered[-1 - quarter] - ordered[quarter]) / 2,
        power_w=reading.power_w,
        energy_source=reading.source,
        temperature_c=reading.highest_temperature_c,
        clock_mhz=reading.median_clock_mhz,
        num_iterations=len(ordered),
        flags=tuple(flags),
    )
