"""The routing MDP of a decode fleet, built from a profile.

One instance is a continuous-time Markov chain over `StateGrid`. With n requests, K tokens of KV
cache and an iteration time of T seconds (the predictor's, at the clock in force):

- a token a request an iteration: the KV cache grows at n/T tokens/s;
- output lengths are taken as geometric with mean L (without memory): a request ends at n/(L·T)
  per second, and takes K/n tokens, a mean request's context, with it;
- at the end of an iteration, plus the actuation delay, the clock moves to the level that the
  instance's controller asks for (rules `ecofreq`, `ecomin`), or to whichever level is best
  (rule `free`, where the clock is part of the action);
- an idle instance goes to its lowest level after a mean of `idle_wait_s`.

Requests arrive as a Poisson stream; each is an action: the instance that takes it, with the mean
prompt's tokens. Cost runs at P(f, n, K) watts, or the idle power, plus `penalty_j` for every
token that comes later than the ITL promise, and `penalty_j`·L for a request that a full instance
turns away. A step of the node spacing with the probability that keeps the mean stands for a step
of one request (or token) inside a wider bucket; buckets of width 1 make it exact, wider ones add
variance (a bucket w wide has w times the noise of its events).

Prefill and its TTFT are outside: the choice of a decode instance does not touch them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from profiles.errors import VoltanaError
from sim.policies.base import DECODE, PowerModel, Predictor
from sim.policies.mdp.grid import StateGrid

FloatArray = npt.NDArray[np.float64]
ClockRule = Literal["ecofreq", "ecomin", "free"]
CLOCK_RULES: Final = ("ecofreq", "ecomin", "free")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParameters:
    """What the model needs beyond the profile."""

    slo_itl_s: float
    input_tokens: float
    """Mean prompt, tokens."""
    output_tokens: float
    """Mean output L, tokens."""
    penalty_j: float = 1.0
    """Joules that a token beyond the ITL promise is taken to cost."""
    clock_rule: ClockRule = "ecofreq"
    actuation_s: float = 0.003
    idle_wait_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("slo_itl_s", "input_tokens", "output_tokens", "idle_wait_s"):
            if not getattr(self, name) > 0:
                raise VoltanaError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("penalty_j", "actuation_s"):
            if not getattr(self, name) >= 0:
                raise VoltanaError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.clock_rule not in CLOCK_RULES:
            raise VoltanaError(
                f"clock rule must be one of {', '.join(CLOCK_RULES)}, got {self.clock_rule!r}"
            )


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
    """Rates of the moves that nobody decides, rows summing to 0. Shape (S, S), 1/s."""
    arrival: sp.csr_array
    """Where an accepted request leads, rows summing to 1. Shape (S, S)."""
    blocked_j: FloatArray
    """Cost of a request sent here, 0 unless the instance is full. Shape (S,)."""
    clock_rate: FloatArray
    """Rate at which a free clock may be chosen, 1/s; 0 under the other rules. Shape (S,)."""

    @property
    def exit_rate(self) -> float:
        """Largest rate of leaving a state, arrivals aside, 1/s."""
        return float((self.clock_rate - self.generator.diagonal()).max())


def build_instance(
    grid: StateGrid, parameters: ModelParameters, predictor: Predictor, power: PowerModel
) -> InstanceModel:
    """Build the chain of one decode instance.

    Args:
        grid: Buckets and levels; a KV bucket is to be wider than the mean prompt.
        parameters: Promise, lengths and penalty.
        predictor: Iteration times, s.
        power: Power of the instance, W.

    Raises:
        VoltanaError: A KV bucket is narrower than the mean prompt.
    """
    kv_gap = np.diff(grid.kv_nodes_tokens)
    if len(kv_gap) and kv_gap.min() < parameters.input_tokens:
        raise VoltanaError(
            f"a KV bucket must be wider than the mean prompt, got {kv_gap.min():g} tokens for"
            f" prompts of {parameters.input_tokens:g}: take fewer buckets"
        )
    time_s, power_w, late = _tables(grid, parameters, predictor, power)
    tokens_per_s = grid.batch_nodes_requests[:, None, None] / time_s
    cost_w = power_w + parameters.penalty_j * late * tokens_per_s
    clock_rate = 1.0 / (time_s + parameters.actuation_s)
    clock_rate[0] = 1.0 / parameters.idle_wait_s
    is_free = parameters.clock_rule == "free"
    target = None if is_free else _clock_targets(grid, parameters, time_s, power_w)
    full_j = np.zeros(grid.shape)
    full_j[-1] = parameters.penalty_j * parameters.output_tokens
    return InstanceModel(
        grid=grid,
        parameters=parameters,
        cost_w=cost_w.ravel(),
        energy_w=power_w.ravel(),
        generator=_generator(grid, parameters, time_s, clock_rate, target),
        arrival=_arrival(grid, parameters),
        blocked_j=full_j.ravel(),
        clock_rate=clock_rate.ravel() if is_free else np.zeros(grid.num_states),
    )


def _tables(
    grid: StateGrid, parameters: ModelParameters, predictor: Predictor, power: PowerModel
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean iteration time (s, endless where empty), power (W), share of late iterations.

    Each has shape grid.shape.
    """
    time_s, power_w, late = (np.zeros(grid.shape) for _ in range(3))
    time_s[0] = np.inf
    edges = grid.batch_edges_requests
    for level, clock_mhz in enumerate(grid.levels_mhz):
        power_w[0, :, level] = power.idle_power_w(clock_mhz)
        for batch in range(1, grid.num_batch):
            sizes = range(edges[batch], edges[batch + 1])
            for kv, node in enumerate(grid.kv_nodes_tokens):
                # a request holds one token at least
                points = [(clock_mhz, n, max(round(node), n)) for n in sizes]
                times = np.array([predictor.predict_s(DECODE, *point) for point in points])
                time_s[batch, kv, level] = times.mean()
                power_w[batch, kv, level] = np.mean([power.power_w(DECODE, *p) for p in points])
                late[batch, kv, level] = (times > parameters.slo_itl_s).mean()
    return time_s, power_w, late


def _clock_targets(
    grid: StateGrid, parameters: ModelParameters, time_s: FloatArray, power_w: FloatArray
) -> npt.NDArray[np.int64]:
    """Level that the controller asks for. Shape (num_batch, num_kv); 0 where the batch is empty."""
    fits = time_s <= parameters.slo_itl_s
    top = grid.num_levels - 1
    if parameters.clock_rule == "ecofreq":
        wanted = np.argmax(fits, axis=2)
    else:
        wanted = np.argmin(np.where(fits, power_w * time_s, np.inf), axis=2)
    wanted = np.where(fits.any(axis=2), wanted, top)
    wanted[0] = 0
    return np.asarray(wanted, dtype=np.int64)


def _generator(
    grid: StateGrid,
    parameters: ModelParameters,
    time_s: FloatArray,
    clock_rate: FloatArray,
    target: npt.NDArray[np.int64] | None,
) -> sp.csr_array:
    number = np.arange(grid.num_states).reshape(grid.shape)
    n, kv = grid.batch_nodes_requests, grid.kv_nodes_tokens
    busy_s = time_s[1:]
    moves: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]] = []
    ends = n[1:, None, None] / (parameters.output_tokens * busy_s) / np.diff(n)[:, None, None]
    fewer = number[:-1].copy()
    fewer[0] = number[0, :1]  # the last request takes all KV tokens with it
    moves.append((number[1:], fewer, ends))
    if grid.num_kv > 1:
        gap = np.diff(kv)[None, :, None]
        grows = n[1:, None, None] / busy_s[:, :-1] / gap
        moves.append((number[1:, :-1], number[1:, 1:], grows))
        leaves = kv[None, 1:, None] / (parameters.output_tokens * busy_s[:, 1:]) / gap
        moves.append((number[1:, 1:], number[1:, :-1], leaves))
    if target is not None:
        reached = np.take_along_axis(number, target[:, :, None], axis=2)
        moves.append((number, np.broadcast_to(reached, grid.shape), clock_rate))
    return _from_moves(grid.num_states, moves)


def _from_moves(
    size: int, moves: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]]
) -> sp.csr_array:
    origin = np.concatenate([a.ravel() for a, _, _ in moves])
    end = np.concatenate([b.ravel() for _, b, _ in moves])
    rate = np.concatenate([r.ravel() for _, _, r in moves])
    rate = np.where(origin == end, 0.0, rate)
    rates = sp.coo_array((rate, (origin, end)), shape=(size, size)).tocsr()
    return sp.csr_array(rates - sp.diags_array(np.asarray(rates.sum(axis=1)).ravel()))


def _arrival(grid: StateGrid, parameters: ModelParameters) -> sp.csr_array:
    """Batch and KV bucket move up independently, each with the probability that keeps its mean."""
    steps_n = _climb(grid.batch_nodes_requests, 1.0)
    steps_kv = _climb(grid.kv_nodes_tokens, parameters.input_tokens)
    both = sp.kron(sp.kron(steps_n, steps_kv), sp.eye_array(grid.num_levels))
    moves = sp.lil_array(both)
    for state in range(grid.num_states - grid.num_kv * grid.num_levels, grid.num_states):
        moves[state, :] = 0.0  # full: turned away, nothing changes
        moves[state, state] = 1.0
    return sp.csr_array(moves)


def _climb(nodes: FloatArray, amount: float) -> sp.csr_array:
    up = np.append(amount / np.diff(nodes), 0.0)
    return sp.csr_array(np.diag(1.0 - up) + np.diag(up[:-1], k=1))
