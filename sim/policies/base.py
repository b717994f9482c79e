"""What a policy sees and what it may decide: the one interface of simulator and hardware.

A driver (the simulator's fleet, or the replay harness) owns one `InstanceState` per serving
instance, keeps its fields true, and hands it to the policies. A policy reads, decides and returns;
it never reads a clock, sleeps, does I/O or touches the driver. Randomness comes in as a seeded
generator. A controller may remember what it saw (an integrator, a window): one object serves one
instance for one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from profiles.errors import VoltanaError

Phase = Literal["prefill", "decode"]
PREFILL: Final = "prefill"
DECODE: Final = "decode"

ATTAINMENT_TARGET: Final = 0.99
"""Share of requests and gaps that has to be within the promise (NOMENCLATURE.md)."""
UNLOCKED_MHZ: Final = 0
"""Decision "release the lock": the driver boosts to its top clock when busy and sinks when idle."""


class Predictor(Protocol):
    """Predicts how long one iteration takes. Implemented by EcoPred and by the table itself."""

    def predict_s(
        self, phase: Phase, frequency_mhz: int, batch_size: int, tokens: int
    ) -> float: ...


@runtime_checkable
class LinePredictor(Predictor, Protocol):
    """A predictor that is a line in tokens at a fixed clock and batch size."""

    def predict_line(
        self, phase: Phase, frequency_mhz: int, batch_size: int
    ) -> tuple[float, float]:
        """Constant in s and slope in s/token."""
        ...


class PowerModel(Protocol):
    """Board power of one instance (all its GPUs together) in one iteration, and at rest."""

    def power_w(self, phase: Phase, frequency_mhz: int, batch_size: int, tokens: int) -> float: ...

    def idle_power_w(self, frequency_mhz: int) -> float: ...


class Truth(Protocol):
    """What the hardware really does, known to a simulation only: `profiles.step_model`."""

    def time_and_power(
        self, phase: Phase, frequency_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        """Duration (s) and power (W) of one iteration."""
        ...

    def idle_power_w(self, frequency_mhz: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request in an instance's queue."""

    request_id: int
    arrival_s: float
    input_tokens: int
    """Tokens still to be prefilled (prefill), or of context to be loaded (decode)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A request in the running batch."""

    request_id: int
    arrival_s: float
    input_tokens: int
    generated_tokens: int
    output_tokens: int | None
    """The length it will reach: known to an oracle driver only, None where it is not."""
    first_token_s: float | None


def _none_waiting() -> Sequence[WaitingRequest]:
    return ()


def _none_running() -> Sequence[RunningRequest]:
    return ()


def _always_true() -> None:
    """Of a driver that keeps every field true at all times."""


@dataclass(slots=True, kw_only=True)
class InstanceState:
    """Live state of one instance, as its engine's metrics and its router's own count show it.

    `last_*` describe one iteration. In decode it is the iteration that has just ended (its record
    leaves the engine after the launch of the batch, so a decision acts on a later iteration). In
    prefill it is the batch about to run (its record is sent before the batch), whose duration is
    not known yet: `last_duration_s` then is that of the batch before it.
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
    """Batch of the iteration that lasted `last_duration_s`, whichever batch `last_*` describe."""
    ended_tokens: int = 0
    ended_queue_delay_s: float = 0.0
    """Prefill: `last_queue_delay_s` of the batch that lasted `last_duration_s`. Decode: 0."""
    last_queue_delay_s: float = 0.0
    """Prefill: longest time from arrival to scheduling within the batch. Decode: 0."""
    num_running: int = 0
    """Requests in the batch; at a decision, in the one about to run. `kv_tokens` likewise."""
    effective_batch_size: float = 0.0
    """Prefill: equal prompts with the attention work of the batch (NOMENCLATURE.md); 0: unknown."""
    num_waiting: int = 0
    """Requests queued at this instance, not in its batch."""
    waiting_tokens: int = 0
    """Prompt (or context) tokens of the queued requests."""
    open_requests: int = 0
    """Requests the router has assigned here that are not finished; those of a decode instance
    count from arrival, while they are still in prefill."""
    kv_tokens: int = 0
    """KV-cache tokens in use on this instance."""
    kv_capacity_tokens: int = 0
    energy_j: float = 0.0
    """Energy counter of the instance's GPUs, from 0 at the start of the run."""
    is_healthy: bool = True
    refresh: Callable[[], None] = field(default=_always_true, repr=False)
    """Brings every field up to date; only routers that look at less than the load need it."""
    list_waiting: Callable[[], Sequence[WaitingRequest]] = field(default=_none_waiting, repr=False)
    """Costs time in proportion to the queue: call it only if the rule needs it."""
    list_running: Callable[[], Sequence[RunningRequest]] = field(default=_none_running, repr=False)

    def clock_or_top_mhz(self, top_mhz: int) -> int:
        """The clock in force; without a lock the top one, which a busy card boosts to."""
        return self.clock_mhz or top_mhz

    @property
    def kv_load_tokens(self) -> int:
        """KV tokens in use or spoken for by the queue: what EcoRoute calls the load."""
        return self.kv_tokens + self.waiting_tokens


States = Sequence[InstanceState]
"""The instances of one phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePlan:
    """What to do with an instance that has run out of work: after a wait, lock this clock."""

    after_s: float
    clock_mhz: int


class Controller(ABC):
    """Sets one instance's clock. Called by the driver; see the module docstring for purity."""

    acts_at_once: ClassVar[bool] = False
    """Of an oracle: a simulator applies its decisions without the actuation latency."""

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

        The premise: call k = 1, 2, … sees the queue as it is in `state`, `last_batch_size` =
        batch_size and `last_tokens` = tokens + k·batch_size; nothing is promised of the rest. 0,
        the default, asks to be called every iteration and is right for every controller that
        looks at time, latency or energy.
        """
        return 0

    def learnt(self) -> Mapping[str, float]:
        """What it has found out about its instance, for the report of a run."""
        return {}


@dataclass(slots=True)
class RequestView:
    """A request as the router sees it on arrival."""

    request_id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int | None
    """None unless the driver offers a length oracle."""


class Router(ABC):
    """Picks a prefill and a decode instance for each request, once, at its arrival."""

    looks_at: ClassVar[Literal["counts", "clocks", "load"]] = "load"
    """What the rule reads of the states: `open_requests`, which is always true; the clocks too; or
    anything. The driver brings no more than that up to date; `InstanceState.refresh` does the
    rest for a rule that needs the load only at times."""

    @abstractmethod
    def route(
        self,
        request: RequestView,
        prefill: States,
        decode: States,
    ) -> tuple[int, int]:
        """Indices into `prefill` and `decode` of the chosen pair.

        The drivers pass healthy instances only, never none; an index is a position in the
        sequence, which differs from `instance_id` once an instance has been taken out.
        """


T = TypeVar("T")


class Cluster:
    """The whole fleet, for policies that share a budget: every instance's live state.

    The driver fills `prefill` and `decode` before the first decision. A policy that reads them
    must have asked for the cluster with `PolicyContext.observe_cluster`, so that the driver knows
    that every state has to be true at every decision.
    """

    __slots__ = ("_shared", "decode", "is_observed", "prefill")

    def __init__(self) -> None:
        self.prefill: Sequence[InstanceState] = ()
        self.decode: Sequence[InstanceState] = ()
        self.is_observed = False
        self._shared: dict[str, object] = {}

    def share(self, name: str, make: Callable[[], T]) -> T:
        """The run's one object of that name, made by the first who asks: a common plan."""
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
    """Where a request's TTFT ends: with its first decode iteration, or when decode takes it up."""
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
    """None where the driver cannot show one instance the others."""

    @property
    def slo_s(self) -> float:
        """The promise of this phase: ITL in decode, TTFT in prefill."""
        return self.slo_itl_s if self.phase == DECODE else self.slo_ttft_s

    @property
    def prefill_budget_s(self) -> float:
        """What the TTFT promise leaves for queueing and prefill: TTFT - 2·ITL, or TTFT - ITL.

        A prompt that is prefilled arrives in decode in the middle of an iteration, which may take
        the ITL promise until it ends; its own first iteration, which makes the first token, may
        take as long again. With `first_token` = "prefill" TTFT ends before that. The one definition
        of the part of TTFT that a prefill controller may use up; a KV transfer that takes time is
        not in it. Not positive where the promises contradict each other.
        """
        num_iterations = 2 if self.first_token == "decode" else 1
        return self.slo_ttft_s - num_iterations * self.slo_itl_s

    @property
    def budget_s(self) -> float:
        """What an iteration may take: the ITL promise, or `prefill_budget_s` with its queueing."""
        return self.slo_itl_s if self.phase == DECODE else self.prefill_budget_s

    def share(self, name: str, make: Callable[[], T]) -> T:
        """One object of that name for the whole run; the caller's own where there is no cluster.

        For what many policies would otherwise work out alike; it must not depend on who asks.
        """
        return self.cluster.share(name, make) if self.cluster is not None else make()

    def observe_cluster(self, policy: str) -> Cluster:
        """The cluster, for a policy that needs it.

        Raises:
            VoltanaError: The driver shows each controller its own instance only.
        """
        if self.cluster is None:
            raise VoltanaError(f"{policy} sees the whole fleet, which this driver does not show")
        self.cluster.is_observed = True
        return self.cluster
