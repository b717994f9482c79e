"""What a policy sees and what it may decide: the one interface of simulator and hardware.

A driver (the simulator's fleet, or the replay harness) owns one `InstanceState` per serving
instance, keeps its fields true, and hands it to the policies. A policy reads, decides and returns;
it never reads a clock, sleeps, does I/O or touches the driver. Randomness comes in as a seeded
generator. A controller may remember what it saw: one object serves one instance for one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.requests import Prompt
from voltana.sim.policies.requests import RequestView as RequestView
from voltana.sim.policies.requests import RunningRequest as RunningRequest
from voltana.sim.policies.requests import WaitingRequest as WaitingRequest

Phase = Literal["prefill", "decode", "colocated"]
"""What an instance does; models and tables know the first two only."""
PREFILL: Final = "prefill"
DECODE: Final = "decode"
COLOCATED: Final = "colocated"
PowerState = Literal[
    "awake", "draining", "falling", "waking", "parked", "asleep", "stopped", "lent"
]
"""In service; ending what it has; on the way out, or back; out of service; in its other role."""
AWAKE: Final = "awake"
ATTAINMENT_TARGET: Final = 0.99
"""Share of requests and gaps that has to be within the promise (NOMENCLATURE.md)."""
UNLOCKED_MHZ: Final = 0
"""Decision "release the lock": the driver boosts to its top clock when busy and sinks when idle."""


class Predictor(Protocol):
    """Predicts how long one iteration takes: the fitted EcoPred, or the profile's table itself."""

    def predict_s(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        """Predicted duration of one iteration in s.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock; 0 is unlocked, which runs at the top clock.
            batch_size: Requests.
            tokens: New tokens (prefill) or context tokens (decode) of the whole batch.
        """


@runtime_checkable
class LinePredictor(Predictor, Protocol):
    """A predictor whose time is a straight line in tokens at a fixed clock and batch size."""

    def predict_line(self, phase: Phase, clock_mhz: int, batch_size: int) -> tuple[float, float]:
        """The line of one clock and batch size.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock; 0 is unlocked, which runs at the top clock.
            batch_size: Requests.

        Returns:
            Constant in s and slope in s/token.
        """


class PowerModel(Protocol):
    """Board power of one instance (all its GPUs together) in one iteration, and at rest."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        """Power in W during one iteration; arguments as of `Predictor.predict_s`."""
        ...

    def idle_power_w(self, clock_mhz: int) -> float: ...


class Truth(Protocol):
    """What the hardware really does, known to a simulation only: `voltana.profiles.step_model`."""

    def time_and_power(
        self, phase: Phase, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        """Duration and power of one iteration.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock; 0 is unlocked, which runs at the top clock.
            batch_size: Requests; in prefill the effective number of equal prompts.
            tokens: New tokens (prefill) or context tokens (decode) of the whole batch.

        Returns:
            Duration in s and power in W.
        """

    def idle_power_w(self, clock_mhz: int) -> float: ...


def _none_waiting() -> Sequence[WaitingRequest]:
    return ()


def _none_running() -> Sequence[RunningRequest]:
    return ()


def _nothing_cached(prompt: Prompt) -> int:
    return 0


def _always_true() -> None:
    """Does nothing: the default of a driver that keeps every field up to date by itself."""


@dataclass(slots=True, kw_only=True)
class InstanceState:
    """Live state of one instance, as its engine's metrics and its router's own count show it.

    `last_*` describe the batch of the latest record. In decode that is the iteration that has just
    ended: its record leaves the engine after the next batch was launched, so that a decision takes
    effect at a later iteration. In prefill it is the batch that is about to run: its record is sent
    before the batch, so that its duration is not known yet, and `last_duration_s` is the duration
    of the batch before it. `ended_*` always describe the batch that took `last_duration_s`.
    """

    instance_id: int
    """Index within its phase, from 0."""
    phase: Phase
    now_s: float = 0.0
    clock_mhz: int = 0
    """Clock lock in force; `UNLOCKED_MHZ` when there is none."""
    is_busy: bool = False
    last_batch_size: int = 0
    last_tokens: int = 0
    """Decode: context tokens of the batch (sum). Prefill: new tokens of the batch."""
    last_duration_s: float = 0.0
    """Zero before the first iteration has ended."""
    ended_batch_size: int = 0
    ended_tokens: int = 0
    ended_queue_delay_s: float = 0.0
    """Prefill: longest time from arrival to scheduling within that batch. Decode: 0."""
    last_queue_delay_s: float = 0.0
    """Prefill: longest time from arrival to scheduling within the batch. Decode: 0."""
    num_running: int = 0
    """Requests in the running batch; at a decision, in the one about to run. So is `kv_tokens`."""
    effective_batch_size: float = 0.0
    """Prefill: number of equal prompts with the same attention work (NOMENCLATURE.md), or 0."""
    chunk_requests: int = 0
    """Colocated: requests whose prompts the iteration about to run computes, whole or in part."""
    chunk_tokens: int = 0
    """Colocated: new tokens of these prompts; `last_batch_size` and `last_tokens` are what is
    decoded beside them, 0 where decoding stands meanwhile."""
    num_waiting: int = 0
    """Requests queued at this instance, not in its batch."""
    waiting_tokens: int = 0
    """Prompt (or context) tokens of the queued requests."""
    open_requests: int = 0
    """Requests that the router has sent here and that have not finished. A decode instance counts
    a request from its arrival on, while it is still in prefill."""
    kv_tokens: int = 0
    """KV-cache tokens in use on this instance."""
    kv_capacity_tokens: int = 0
    finished_requests: int = 0
    """Decode: requests that have got their last token here, since the start of the run."""
    finished_tokens: int = 0
    """Decode: the output tokens of these."""
    power_state: PowerState = AWAKE
    """Whether it is in service; only instances that are get new requests."""
    base_mhz: int = 0
    """Clock that a scaler has chosen for it; 0 if none has."""
    ceiling_mhz: int = 0
    """Highest clock that the fleet's power budget leaves it; 0 without a budget."""
    energy_j: float = 0.0
    """Energy counter of the instance's GPUs, from 0 at the start of the run."""
    is_healthy: bool = True
    refresh: Callable[[], None] = field(default=_always_true, repr=False)
    """Brings every field up to date. Only a router whose `looks_at` is not "load" needs it."""
    list_waiting: Callable[[], Sequence[WaitingRequest]] = field(default=_none_waiting, repr=False)
    """Takes time in proportion to the queue: call it only if the rule needs it."""
    list_running: Callable[[], Sequence[RunningRequest]] = field(default=_none_running, repr=False)
    count_cached: Callable[[Prompt], int] = field(default=_nothing_cached, repr=False)
    """Tokens of a prompt that need not be computed here (decode: sent), if it begins now."""

    def clock_or_top_mhz(self, top_mhz: int) -> int:
        """The clock in force; without a lock the top one, which a busy card boosts to."""
        return self.clock_mhz or top_mhz

    @property
    def kv_load_tokens(self) -> int:
        """KV tokens in use or spoken for by the queue: what EcoRoute calls the load."""
        return self.kv_tokens + self.waiting_tokens + self.chunk_tokens


States = Sequence[InstanceState]
"""The instances of one phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePlan:
    """What to do with an instance that has no work left: after a wait, lock this clock."""

    after_s: float
    clock_mhz: int


class Controller(ABC):
    """Sets one instance's clock. Called by the driver; see the module docstring for purity."""

    acts_at_once: ClassVar[bool] = False
    """True for an oracle: a simulator applies its decisions without the actuation latency."""
    colocates: ClassVar[bool] = False
    """Whether its rule covers an instance that does both phases with one clock."""

    @abstractmethod
    def decide(self, state: InstanceState) -> int:
        """Clock in MHz to lock from now on, one of the profile's, or `UNLOCKED_MHZ`.

        Called once an iteration, when the batch is about to run.
        """

    def initial_clock_mhz(self) -> int:
        """Clock before the first decision; the safe state (no lock) unless a policy says else."""
        return UNLOCKED_MHZ

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        """Called when the instance runs out of work. None keeps the clock."""
        return None

    def admit_up_to(self, state: InstanceState) -> int | None:
        """Decode: requests that may run at once; None leaves it to the engine.

        Asked at an iteration's start while requests wait to join; one may always run. The answer
        may change only where `decide` is asked anew (`steady_iterations`). A simulator obeys;
        SGLang fixes this number at its start (`--max-running-requests`).
        """
        return None

    def hold_s(self, state: InstanceState) -> float:
        """Prefill: for how long an instance at rest waits for more requests, 0 = begins now.

        Asked when it could begin, and again at each arrival meanwhile: the first answer sets the
        latest start, a later 0 begins at once. A simulator obeys; on hardware requests would have
        to be held before they reach the engine, which no driver does yet.
        """
        return 0.0

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        """How many further calls of `decide` are sure to return what the last one returned.

        Call k = 1, 2, … will see the same queue as `state`, `last_batch_size` = batch_size and
        `last_tokens` = tokens + k·batch_size. All other fields may differ. 0, the default, asks to
        be called every iteration; it is right for every controller that looks at time, latency or
        energy.

        Args:
            state: The instance at the last decision.
            batch_size: Requests in each iteration to come.
            tokens: Context tokens of the batch at the last decision.
        """
        return 0

    def learnt(self) -> Mapping[str, float]:
        """What it has found out about its instance, for the report of a run."""
        return {}


class Router(ABC):
    """Picks a prefill and a decode instance for each request, once, at its arrival."""

    reads_prompts: ClassVar[bool] = False
    """Whether the rule asks what prompts share: on hardware, token by token."""
    looks_at: ClassVar[Literal["counts", "clocks", "load"]] = "load"
    """Which fields the rule reads, and the driver keeps up to date: `open_requests` ("counts"), the
    clocks too ("clocks"), or any ("load"). `InstanceState.refresh` is for more at times."""

    @abstractmethod
    def route(
        self,
        request: RequestView,
        prefill: States,
        decode: States,
    ) -> tuple[int, int]:
        """Choose the prefill and the decode instance of a request.

        Args:
            request: The request that has just arrived.
            prefill: Healthy prefill instances, at least one.
            decode: Healthy decode instances, at least one. Where instances do both phases this is
                the same sequence as `prefill`, and the second position alone counts.

        Returns:
            A position in `prefill` and one in `decode`. A position is not an `instance_id`: the two
            differ once an instance has been taken out of the sequence.
        """


T = TypeVar("T")


class Cluster:
    """The whole fleet, for policies that share a budget: every instance's live state.

    The driver fills `prefill` and `decode` before the first decision. A policy that reads them
    asks for the cluster with `PolicyContext.observe_cluster`; then the driver keeps every state up
    to date at every decision.
    """

    __slots__ = ("_shared", "decode", "is_observed", "prefill")

    def __init__(self) -> None:
        self.prefill: Sequence[InstanceState] = ()
        self.decode: Sequence[InstanceState] = ()
        self.is_observed = False
        self._shared: dict[str, object] = {}

    def share(self, name: str, make: Callable[[], T]) -> T:
        """The one object of that name in this run; the first caller makes it.

        Used for plans that the controllers of a fleet have in common.
        """
        if name not in self._shared:
            self._shared[name] = make()
        return cast("T", self._shared[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may know when it is made: the models, the promises and its own seed."""

    predictor: Predictor
    power: PowerModel
    clocks_mhz: tuple[int, ...]
    """Supported clocks, ascending."""
    default_levels_mhz: tuple[int, ...]
    """The profile's short list for controllers that use few levels, ascending."""
    slo_ttft_s: float
    slo_itl_s: float
    attainment_target: float = ATTAINMENT_TARGET
    """Share of requests and gaps to keep within them: the quantile that measured ones aim at."""
    first_token: Literal["decode", "prefill"] = "decode"
    """When a request's TTFT ends: after its first decode iteration, or when it enters decode."""
    profile_hash: str
    kv_capacity_tokens: int
    rng: np.random.Generator
    instance_id: int = 0
    phase: Phase = "decode"
    """For a controller: which instance it serves. A router ignores both."""
    actuation_s: float = 0.0
    """Expected time from a decision to the clock's change."""
    num_prefill: int = 1
    num_decode: int = 1
    truth: Truth | None = None
    """For oracles; None outside a simulation."""
    cluster: Cluster | None = None
    """None if the driver cannot show one instance the others."""

    @property
    def slo_s(self) -> float:
        """The promise of this phase: TTFT in prefill, else ITL."""
        return self.slo_ttft_s if self.phase == PREFILL else self.slo_itl_s

    @property
    def prefill_budget_s(self) -> float:
        """What the TTFT promise leaves for queueing and prefill: TTFT - 2·ITL, or TTFT - ITL.

        A prefilled prompt reaches decode in the middle of an iteration, which may take the whole
        ITL promise until it ends. The prompt's own first iteration makes the first token and may
        take as long again. With `first_token` = "prefill" TTFT ends before that iteration. This is
        the one definition of the part of TTFT that a prefill controller may use. Time for the KV
        transfer is not taken off. The value is not positive if the promises contradict each other.
        """
        num_iterations = 2 if self.first_token == "decode" else 1
        return self.slo_ttft_s - num_iterations * self.slo_itl_s

    @property
    def budget_s(self) -> float:
        """Prefill: `prefill_budget_s`, which includes queueing. Else the ITL promise."""
        return self.prefill_budget_s if self.phase == PREFILL else self.slo_itl_s

    def share(self, name: str, make: Callable[[], T]) -> T:
        """One object of that name for the whole run; without a cluster, one for this caller.

        It saves many policies from computing the same thing; only on the profile may it depend.
        """
        of = self.cluster
        return make() if of is None else of.share(f"{self.profile_hash} {name}", make)

    def observe_cluster(self, policy: str) -> Cluster:
        """The cluster, for a policy that needs it.

        Raises:
            VoltanaError: The driver shows each controller its own instance only.
        """
        if self.cluster is None:
            raise VoltanaError(f"{policy} sees the whole fleet, which this driver does not show")
        self.cluster.is_observed = True
        return self.cluster
