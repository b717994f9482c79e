"""How long one forward pass lasts on an emulated card, and what it draws: the profile's word.

Runs inside the engine, in place of the model. A pass lasts as profiles count it: in prefill by
itself; where it decodes, and on a colocated card always, from boundary to boundary: what the
scheduler did between two passes that follow one another is part of the second. A clock that changes
meanwhile splits the pass as it does in the simulator: what is left goes on at the new clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from voltana.profiles.catalog import Profile
from voltana.profiles.optional.mixed import MixedStep

SLICE_S: Final = 1e-3
"""Time between two looks at the clock."""
SPIN_S: Final = 100e-6
"""Before the end of a pass: from here on it spins, as a sleeping process wakes up late."""
BLOCK: Final = 1024
STREAMS: Final = {"prefill": 4, "decode": 5, "colocated": 7}
"""Spawn keys of the noise, as in the simulator: the k-th pass has the k-th iteration's draw."""


class View(Protocol):
    """A card at one instant."""

    @property
    def now_s(self) -> float: ...

    @property
    def clock_mhz(self) -> int:
        """SM clock in force."""

    @property
    def next_change_s(self) -> float:
        """When it changes next by what is known now."""

    @property
    def power_w(self) -> float: ...


class Card(Protocol):
    """What a pass needs of a card; `voltana.hwreplay.emulated.card` has it."""

    def look(self) -> View: ...

    def begin_pass(self, power_w: float, duration_s: float) -> None:
        """From now on it draws so much, for so long at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one forward pass computes."""

    decode: tuple[int, int] = (0, 0)
    """Requests that get a token, and their context in all."""
    chunk: tuple[float, int] = (0.0, 0)
    """Number of equal prompts with the same attention, and their new tokens."""

    @property
    def phase(self) -> str:
        """Whose spread of times it has."""
        return "prefill" if self.chunk[1] else "decode"

    @property
    def batch_size(self) -> float:
        """Of that phase."""
        return self.chunk[0] if self.chunk[1] else self.decode[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass that has ended."""

    begin_s: float
    """Its boundary, on CLOCK_MONOTONIC."""
    due_s: float
    """When it should have ended."""
    end_s: float
    clock_mhz: int
    """In force at its end."""
    work: Work


class Noise:
    """Multipliers of iteration times: lognormal with mean 1, of the profile's relative spread.

    Example:
        >>> from voltana.profiles.catalog import load_profile
        >>> noise = Noise(load_profile("a100-80g-sxm/llama-3.1-8b"), "decode", 0, seed=13, scale=0)
        >>> noise.next("decode", 1410, 8)
        1.0
    """

    def __init__(
        self, profile: Profile, phase: str, instance_id: int, *, seed: int, scale: float
    ) -> None:
        """Begin the stream of one instance.

        Args:
            profile: States the spread.
            phase: What the instance does: "prefill", "decode" or "colocated".
            instance_id: Of the instance: each has a stream of its own.
            seed: Of the run.
            scale: Multiplies the spread; 0: no noise.
        """
        seeds = np.random.SeedSequence(seed, spawn_key=(STREAMS[phase], instance_id))
        self._generator = np.random.default_rng(seeds.spawn(2)[0])
        self._spread = profile.spread()
        self._scale = scale
        self._block: list[float] = []

    def next(self, phase: str, clock_mhz: int, batch_size: float) -> float:
        """The multiplier of the next pass.

        Args:
            phase: "prefill" or "decode": whose spread.
            clock_mhz: SM clock.
            batch_size: Requests of that phase.
        """
        if self._scale == 0:
            return 1.0
        if not self._block:
            self._block = self._generator.standard_normal(BLOCK).tolist()[::-1]
        relative = self._spread.relative(phase, clock_mhz, batch_size) * self._scale
        variance = math.log1p(relative * relative)
        return math.exp(math.sqrt(variance) * self._block.pop() - 0.5 * variance)


class Silicon:
    """The cards of one instance, as they compute in the process of one rank."""

    def __init__(
        self,
        step: MixedStep,
        cards: Sequence[Card],
        *,
        rank: int = 0,
        noise: Noise | None = None,
        is_colocated: bool = False,
    ) -> None:
        """Nothing runs yet.

        Args:
            step: Time and power of the instance, all its cards together.
            cards: The instance's, by rank; a pass lasts as long as on the slowest of them.
            rank: Whose energy is booked here.
            noise: Of iteration times; none: exactly the table's.
            is_colocated: Whether it does both phases.
        """
        self._step = step
        self._cards = cards
        self._own = cards[rank]
        self._noise = noise
        self._ended_s: float | None = None
        self._had_steps = False
        """Whether the pass that has ended decoded."""
        self._is_colocated = is_colocated

    def rest(self) -> None:
        """The engine has nothing to compute: the next pass begins when it begins."""
        self._ended_s = None

    def run(self, work: Work) -> Pass:
        """Let one pass go by."""
        now_s, decodes = time.monotonic(), work.decode[0] > 0
        follows = self._is_colocated or (decodes and self._had_steps)
        ended_s = self._ended_s if follows else None
        begin_s = now_s if ended_s is None else ended_s
        clock, change_s = self._clock()
        time_s, power_w = self._step.time_and_power(clock, work.chunk, work.decode)
        noise = self._noise
        factor = 1.0 if noise is None else noise.next(work.phase, clock, work.batch_size)
        end_s = begin_s + time_s * factor
        self._draw(power_w, end_s - now_s, gap_s=now_s - begin_s)
        while now_s < end_s:
            now_s = _sleep_towards(min(end_s, now_s + min(change_s, SLICE_S)), end_s)
            found, change_s = self._clock()
            if found != clock and now_s < end_s:
                left = (end_s - now_s) / (time_s * factor)
                clock = found
                time_s, power_w = self._step.time_and_power(clock, work.chunk, work.decode)
                end_s = now_s + left * time_s * factor
                self._draw(power_w, end_s - now_s)
        self._ended_s, self._had_steps = now_s, decodes
        return Pass(
            begin_s=begin_s,
            due_s=end_s,
            end_s=now_s,
            clock_mhz=clock,
            work=work,
        )

    def _clock(self) -> tuple[int, float]:
        """Clock of the slowest card, and seconds to the next change that is known."""
        looks = [card.look() for card in self._cards]
        return (
            min(look.clock_mhz for look in looks),
            min(look.next_change_s - look.now_s for look in looks),
        )

    def _draw(self, power_w: float, left_s: float, *, gap_s: float = 0.0) -> None:
        """Draw a pass's power from now on, and make up for `gap_s` of it that were booked idle."""
        if left_s <= 0:
            return
        own_w = power_w / len(self._cards)
        if gap_s:
            own_w += (own_w - self._own.look().power_w) * gap_s / left_s
        self._own.begin_pass(own_w, left_s)


def effective_batch(chunks: Sequence[int], prefixes: Sequence[int]) -> float:
    """Number of equal prompts with the attention work of a prefill batch, T² / Σ c·(c + 2p).

    Args:
        chunks: New tokens of each request.
        prefixes: Tokens of its prompt that were done before.

    Example:
        >>> effective_batch([100, 100], [0, 0])
        2.0
    """
    total = sum(chunks)
    return total * total / sum(c * (c + 2 * p) for c, p in zip(chunks, prefixes, strict=True))


def _sleep_towards(until_s: float, end_s: float) -> float:
    """Sleep until then, or spin if that is the end and it is near; returns the time."""
    now_s = time.monotonic()
    ahead_s = SPIN_S if until_s == end_s else 0.0
    if until_s - now_s > ahead_s:
        time.sleep(until_s - now_s - ahead_s)
        return time.monotonic()
    while now_s < until_s:
        now_s = time.monotonic()
    return now_s
