"""The routing MDP of a decode fleet, built from a profile.

One instance is a continuous-time Markov chain over `StateGrid`. With n requests of k tokens of KV
cache each and an iteration time of T seconds (the predictor's, at the clock in force):

- output lengths are taken as geometric with mean L (without memory): requests end at n/(L·T) per
  second, each with the mean context, so that k stays;
- k falls towards the mean prompt I with an arrival, by (k - I)/(n + 1), and grows at a/T, where
  a = (C - I)/L makes its mean the workload's mean context C of a running request (a = 1 would be
  a token an iteration, and C = I + L, as if lengths had no memory there either);
- at the end of an iteration, plus the actuation delay, the clock moves to the level that the
  instance's controller asks for, the controller itself being asked (`voltana.sim.mdp.clock_rule`),
  or to whichever level is best (rule `free`, where the clock is part of the action); or, `is_tied`,
  it is where the controller settles at once, which saves the level and changes little, as a change
  takes one iteration of some hundreds;
- an idle instance goes to the clock that its controller parks it at, after the wait that this has
  as a mean; under `free` to any, at the mean rate 1/`idle_wait_s`.

Requests arrive as a Poisson stream; each is an action: the instance that takes it.
Cost runs at P(f, n, n·k) watts, or the idle power, plus `penalty_j` for every
token that comes later than the ITL promise, and `turned_away_j` for a request that a full instance
turns away. A step of the node spacing with the probability that keeps the mean stands for a step
of one request (or token) inside a wider bucket; buckets of width 1 make it exact, wider ones add
variance (a bucket w wide has w times the noise of its events).

Prefill and its TTFT are outside: the choice of a decode instance does not touch them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.clock_rule import ControllerClock
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.policies.base import DECODE, PolicyContext

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FREE: Final = "free"
"""The clock rule that chooses clocks with the routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParameters:
    """What the model needs beyond the profile."""

    slo_itl_s: float
    input_tokens: float
    """Mean prompt, tokens."""
    output_tokens: float
    """Mean output L, tokens."""
    context_tokens: float
    """Mean KV tokens of a running request: `mean_context_tokens` of the workload."""
    penalty_j: float = 1.0
    """Joules that a token beyond the ITL promise is taken to cost."""
    turned_away_j: float | None = None
    """Cost of a request sent to a full instance. None: `penalty_j`·L, as if all tokens were late.
    A real instance accepts the request and then is late for its whole batch, which costs about
    `penalty_j`·L·batch. If the price is lower, a full instance attracts requests that would make
    another instance late."""
    clock_rule: str = "ecofreq"
    """The instances' controller as on the command line, or `free`."""
    is_tied: bool = False
    """True: in every state the clock is the one at which the controller settles, at once, and the
    grid has a single level that stands for it. False: the clock is part of the state and takes time
    to change."""
    actuation_s: float = 0.003
    idle_wait_s: float = 5.0
    """Under `free`: mean time between two choices of an idle instance's clock."""

    def __post_init__(self) -> None:
        for name in ("slo_itl_s", "input_tokens", "output_tokens", "context_tokens", "idle_wait_s"):
            if not getattr(self, name) > 0:
                raise VoltanaError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.context_tokens <= self.input_tokens:
            raise VoltanaError(
                f"context_tokens must exceed the mean prompt, {self.input_tokens:g},"
                f" got {self.context_tokens:g}"
            )
        for name in ("penalty_j", "actuation_s"):
            if not getattr(self, name) >= 0:
                raise VoltanaError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.is_tied and self.clock_rule == FREE:
            raise VoltanaError("clocks that are tied to the state cannot be free")

    @property
    def full_j(self) -> float:
        """Cost of a request that a full instance turns away."""
        given = self.turned_away_j
        return self.penalty_j * self.output_tokens if given is None else given


def mean_context_tokens(input_tokens: IntArray, output_tokens: IntArray) -> float:
    """Mean KV tokens of a request that is running at a random instant.

    A request is seen in proportion to its output length, half of which it has written on average:
    E[I·O]/E[O] + E[O²]/(2·E[O]).

    Example:
        >>> mean_context_tokens(np.array([100, 100]), np.array([10, 30]))
        112.5
    """
    output = output_tokens.astype(np.float64)
    total = float(output.sum())
    return float((input_tokens * output + output * output / 2.0).sum() / total)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceModel:
    """One decode instance as a controlled chain of S = grid.num_states states."""

    grid: StateGrid
    parameters: ModelParameters
    cost_w: FloatArray
    """Energy and penalties per second, J/s. Shape (S,)."""
    energy_w: FloatArray
    """The energy alone, J/s. Shape (S,)."""
    generator: sp.csr_array
    """Rates of all moves but arrivals and free clocks; rows sum to 0. Shape (S, S), 1/s."""
    arrival: sp.csr_array
    """Probability of each next state when a request is accepted; rows sum to 1. Shape (S, S)."""
    blocked_j: FloatArray
    """Cost of a request sent here, 0 unless the instance is full. Shape (S,)."""
    clock_rate: FloatArray
    """Rate at which a free clock may be chosen, 1/s; 0 under the other rules. Shape (S,)."""

    @property
    def exit_rate(self) -> float:
        """Largest rate of leaving a state, arrivals aside, 1/s."""
        return float((self.clock_rate - self.generator.diagonal()).max())


def build_instance(
    grid: StateGrid, parameters: ModelParameters, context: PolicyContext
) -> InstanceModel:
    """Build the chain of one decode instance.

    Args:
        grid: Buckets and levels.
        parameters: Promise, lengths and penalty.
        context: Iteration times (s) and power (W) as policies believe them, and what the clock
            rule's controller may know.

    Raises:
        VoltanaError: Tied clocks with a grid of several levels, or no such controller.
    """
    is_free = parameters.clock_rule == FREE
    rule = None if is_free else ControllerClock(parameters.clock_rule, context)
    if not parameters.is_tied:
        clocks = [_held(clock) for clock in grid.levels_mhz]
    elif len(grid.levels_mhz) > 1 or rule is None:
        raise VoltanaError(f"tied clocks need a grid of one level, got {grid.levels_mhz}")
    else:
        clocks = [rule.settled_mhz]
    time_s, power_w, late = _tables(grid, clocks, parameters.slo_itl_s, context)
    tokens_per_s = grid.batch_nodes_requests[:, None, None] / time_s
    cost_w = power_w + parameters.penalty_j * late * tokens_per_s
    clock_rate = 1.0 / (time_s + parameters.actuation_s)
    plan = None if rule is None else rule.idle_plan
    idle_wait_s = parameters.idle_wait_s if is_free or plan is None else plan.after_s
    clock_rate[0] = 1.0 / max(idle_wait_s, _SHORTEST_WAIT_S)
    moves_to = None if rule is None or parameters.is_tied else _clock_targets(grid, rule)
    full_j = np.zeros(grid.shape)
    full_j[-1] = parameters.full_j
    return InstanceModel(
        grid=grid,
        parameters=parameters,
        cost_w=cost_w.ravel(),
        energy_w=power_w.ravel(),
        generator=_generator(grid, parameters, time_s, clock_rate, moves_to),
        arrival=_arrival(grid, parameters),
        blocked_j=full_j.ravel(),
        clock_rate=clock_rate.ravel() if is_free else np.zeros(grid.num_states),
    )


_SHORTEST_WAIT_S: Final = 1e-3
"""The model needs a finite rate even for a controller that parks an idle instance at once."""
ClockOf = Callable[[int, int], int]
"""Clock in MHz of a batch of so many requests and tokens."""


def _held(clock_mhz: int) -> ClockOf:
    return lambda requests, tokens: clock_mhz


def _tables(
    grid: StateGrid, clocks: list[ClockOf], slo_itl_s: float, context: PolicyContext
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean iteration time (s, endless where empty), power (W), share of late iterations.

    Each has shape (batch buckets, KV buckets, clocks).
    """
    shape = (*grid.shape[:2], len(clocks))
    time_s, power_w, late = (np.zeros(shape) for _ in range(3))
    time_s[0] = np.inf
    edges, predict_s = grid.batch_edges_requests, context.predictor.predict_s
    for level, clock_of in enumerate(clocks):
        power_w[0, :, level] = context.power.idle_power_w(clock_of(0, 0))
        for batch in range(1, grid.num_batch):
            sizes = range(edges[batch], edges[batch + 1])
            for kv, node in enumerate(grid.kv_nodes_tokens):
                loads = [(n, round(n * node)) for n in sizes]
                points = [(clock_of(*load), *load) for load in loads]
                times = np.array([predict_s(DECODE, *point) for point in points])
                time_s[batch, kv, level] = times.mean()
                power_w[batch, kv, level] = np.mean(
                    [context.power.power_w(DECODE, *point) for point in points]
                )
                late[batch, kv, level] = (times > slo_itl_s).mean()
    return time_s, power_w, late


def bucket_loads(grid: StateGrid) -> list[tuple[int, int]]:
    """Requests and tokens in the middle of each bucket that is not empty, in the grid's order."""
    return [
        (round(n), round(round(n) * node))
        for n in grid.batch_nodes_requests[1:]
        for node in grid.kv_nodes_tokens
    ]


def _clock_targets(grid: StateGrid, rule: ControllerClock) -> IntArray:
    """Level that the controller asks for in each state. Shape (batch, KV, levels).

    A clock that is no level of the grid counts as the nearest one.
    """
    levels = grid.levels_mhz
    plan = rule.idle_plan
    target = np.zeros(grid.shape, dtype=np.int64)
    target[0] = np.arange(len(levels)) if plan is None else grid.level_of(plan.clock_mhz)
    for (batch, kv), load in zip(np.ndindex(*grid.shape[:2]), _all_loads(grid), strict=True):
        if batch > 0:
            target[batch, kv] = [grid.level_of(rule.next_mhz(*load, f)) for f in levels]
    return target


def _all_loads(grid: StateGrid) -> list[tuple[int, int]]:
    return [(0, 0)] * len(grid.kv_nodes_tokens) + bucket_loads(grid)


def _generator(
    grid: StateGrid,
    parameters: ModelParameters,
    time_s: FloatArray,
    clock_rate: FloatArray,
    target: IntArray | None,
) -> sp.csr_array:
    number = np.arange(grid.num_states).reshape(grid.shape)
    n, busy_s = grid.batch_nodes_requests, time_s[1:]
    moves: list[tuple[IntArray, IntArray, FloatArray]] = []
    ends = n[1:, None, None] / (parameters.output_tokens * busy_s) / np.diff(n)[:, None, None]
    fewer = number[:-1].copy()
    fewer[0] = number[0, :1]  # an empty instance has no context
    moves.append((number[1:], fewer, ends))
    gap = np.diff(grid.kv_nodes_tokens)[None, :, None]
    ageing = (parameters.context_tokens - parameters.input_tokens) / parameters.output_tokens
    moves.append((number[1:, :-1], number[1:, 1:], ageing / busy_s[:, :-1] / gap))
    if target is not None:
        moves.append((number, np.take_along_axis(number, target, axis=2), clock_rate))
    return _from_moves(grid.num_states, moves)


def _from_moves(size: int, moves: list[tuple[IntArray, IntArray, FloatArray]]) -> sp.csr_array:
    rates = _collect(size, [(a, b, np.where(a == b, 0.0, rate)) for a, b, rate in moves])
    return sp.csr_array(rates - sp.diags_array(np.asarray(rates.sum(axis=1)).ravel()))


def _arrival(grid: StateGrid, parameters: ModelParameters) -> sp.csr_array:
    """Batch bucket up and KV bucket down, each with the probability that keeps its mean."""
    number = np.arange(grid.num_states).reshape(grid.shape)
    n, kv = grid.batch_nodes_requests, np.asarray(grid.kv_nodes_tokens)
    up = np.append(1.0 / np.diff(n), 0.0)[:, None, None] + np.zeros(grid.shape)
    fall = (kv - parameters.input_tokens) / (n[:, None] + 1.0)
    gap = np.append(np.inf, np.diff(kv))
    down = np.clip(fall / gap, 0.0, 1.0)[:, :, None] + np.zeros(grid.shape)
    down[0] = down[-1] = 0.0  # no context yet; turned away
    more = np.concatenate([number[1:], number[-1:]])
    lower = np.concatenate([number[:, :1], number[:, :-1]], axis=1)
    more_lower = np.concatenate([more[:, :1], more[:, :-1]], axis=1)
    return _collect(
        grid.num_states,
        [
            (number, number, (1.0 - up) * (1.0 - down)),
            (number, more, up * (1.0 - down)),
            (number, lower, (1.0 - up) * down),
            (number, more_lower, up * down),
        ],
    )


def _collect(size: int, moves: list[tuple[IntArray, IntArray, FloatArray]]) -> sp.csr_array:
    origin, end = (np.concatenate([m[k].ravel() for m in moves]) for k in (0, 1))
    value = np.concatenate([m[2].ravel() for m in moves])
    made = sp.coo_array((value, (origin, end)), shape=(size, size)).tocsr()
    made.eliminate_zeros()
    return sp.csr_array(made)
