"""What an agent counts of its instance: iterations, tokens, predictions, joules saved."""

from __future__ import annotations

from voltana.profiles.catalog import Profile
from voltana.sim.policies.base import (
    COLOCATED,
    DECODE,
    PREFILL,
    UNLOCKED_MHZ,
    InstanceState,
    Phase,
    Predictor,
    Truth,
)


def saved_j(
    truth: Truth, state: InstanceState, clock_mhz: int, *, ran_at_mhz: int, top_mhz: int
) -> float:
    """Joules that a clock saves against the top one over the iteration that has ended.

    The same batch at both clocks, by the profile's times and powers, scaled to the time that was
    observed. The slower clock computes for longer; the card at the top clock rests for that time,
    so that both do the same work in the same time:

        t_top·P_top + (t - t_top)·P_idle - t·P

    That batches grow where iterations are slower is left out, which makes the estimate low.

    Args:
        truth: The profile's times and powers.
        state: Its `ended_*` and `last_duration_s` are of that iteration.
        clock_mhz: Whose saving is asked for; 0 is the top clock, which saves nothing.
        ran_at_mhz: In force in that iteration; another one in shadow mode.
        top_mhz: The card's highest.
    """
    batch, tokens = state.ended_batch_size, state.ended_tokens
    if clock_mhz in (UNLOCKED_MHZ, top_mhz) or not batch or not tokens:
        return 0.0
    ran_s, _ = truth.time_and_power(state.phase, ran_at_mhz or top_mhz, batch, tokens)
    top_s, top_w = truth.time_and_power(state.phase, top_mhz, batch, tokens)
    time_s, power_w = truth.time_and_power(state.phase, clock_mhz, batch, tokens)
    rest_j = (time_s - top_s) * truth.idle_power_w(UNLOCKED_MHZ)
    return (top_s * top_w + rest_j - time_s * power_w) * state.last_duration_s / ran_s


class Account:
    """Sums since the agent's start."""

    def __init__(self, profile: Profile, predictor: Predictor) -> None:
        """Start at 0.

        Args:
            profile: Its tables say what a clock saves.
            predictor: What the policy believes of time.
        """
        self._truth = profile.truth(extrapolate=True)
        self._predictor = predictor
        self._top_mhz = profile.meta.clocks.supported_mhz[-1]
        self.iterations = 0
        self.output_tokens = 0
        """Made by decode iterations: one a request."""
        self.observed_s = 0.0
        self.predicted_s = 0.0
        """The iterations' durations, seen and predicted."""
        self.saved_j = 0.0

    def _phase(self, state: InstanceState) -> Phase:
        """Whose promise and tables an iteration's `ended_*` go by."""
        return DECODE if state.phase == COLOCATED else state.phase

    def headroom(self, state: InstanceState, promise_s: float) -> float:
        """What the promise leaves of an iteration of the present batch at the top clock.

        Args:
            state: Of the instance.
            promise_s: For an iteration.
        """
        batch, tokens = state.ended_batch_size, state.ended_tokens
        if not state.is_busy or not batch or not tokens:
            return 1.0
        return (
            1.0
            - self._predictor.predict_s(self._phase(state), self._top_mhz, batch, tokens)
            / promise_s
        )

    def add_both(self, state: InstanceState, chunk: tuple[int, int]) -> None:
        """Count an iteration of a colocated instance. What its clock saves is not estimated.

        Args:
            state: Its `ended_*` are what was decoded.
            chunk: Prompts beside it, and their new tokens.
        """
        self.iterations += 1
        self.output_tokens += state.ended_batch_size
        self.observed_s += state.last_duration_s
        decode = state.ended_batch_size, state.ended_tokens
        parts: dict[Phase, tuple[int, int]] = {PREFILL: chunk, DECODE: decode}
        for phase, (batch, tokens) in parts.items():
            if batch and tokens:
                self.predicted_s += self._predictor.predict_s(phase, state.clock_mhz, batch, tokens)

    def add(self, state: InstanceState, wish_mhz: int, *, acts: bool) -> None:
        """Count the iteration that has ended.

        Args:
            state: Of the instance.
            wish_mhz: What the policy wants.
            acts: Whether it is given that; if not, the saving is of what it wants.
        """
        batch, tokens = state.ended_batch_size, state.ended_tokens
        if not batch or not tokens:
            return
        self.iterations += 1
        if state.phase == DECODE:
            self.output_tokens += batch
        self.observed_s += state.last_duration_s
        self.predicted_s += self._predictor.predict_s(state.phase, state.clock_mhz, batch, tokens)
        self.saved_j += saved_j(
            self._truth,
            state,
            state.clock_mhz if acts else wish_mhz,
            ran_at_mhz=state.clock_mhz,
            top_mhz=self._top_mhz,
        )
