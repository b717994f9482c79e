"""Routing by a policy that was solved or learned from the routing MDP (`voltana train mdp`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiles.errors import VoltanaError
from sim.policies.base import InstanceState, PolicyContext, RequestView, Router
from sim.policies.mdp.observation import RateMeter, observe
from sim.policies.mdp.policy_file import PolicyFile, load_policy
from sim.policies.routers.simple import least
from sim.policies.spec import parameter

States = Sequence[InstanceState]


@dataclass(frozen=True, slots=True, kw_only=True)
class MdpParameters:
    """Parameters of `mdp`."""

    policy: str = parameter("", "policy file, written by voltana train mdp; required")
    window_s: float = parameter(
        30.0, "memory of the arrival rate, by which the file's nearest rate is used", low=0.1
    )


class Decider(ABC):
    """One kind of policy."""

    @abstractmethod
    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        """Position of the decode instance."""


class MdpRouter(Router):
    """The decode instance that a policy of the routing MDP chooses, from a trained policy file.

    The MDP: state (batch bucket, KV bucket, clock level) of every decode instance; an action a
    request, its instance; cost = energy (J) + penalty · tokens later than the ITL promise. The
    file holds its exact solution (joint), an index that each instance computes from its own state
    (factored, or learned by Q-learning), or a network. It serves the profile it was made for.
    Prefill: fewest open requests. Once instances are missing, a joint policy or a network cannot
    be read any more, and the fewest open requests win.
    """

    __slots__ = ("_decider", "_meter", "_num_instances")

    def __init__(self, parameters: MdpParameters, context: PolicyContext) -> None:
        if not parameters.policy:
            raise VoltanaError(
                "mdp needs a trained policy, mdp:policy=FILE: make one with voltana train mdp"
            )
        policy = load_policy(Path(parameters.policy), profile_hash=context.profile_hash)
        if not _any_size(policy) and policy.num_instances != context.num_decode:
            raise VoltanaError(
                f"{parameters.policy} was trained for {policy.num_instances} decode instances,"
                f" this fleet has {context.num_decode}: train it again with that number"
            )
        self._num_instances = None if policy.kind == "index" else policy.num_instances
        self._decider = make_decider(policy, context)
        self._meter = RateMeter(parameters.window_s)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        rate_rps = self._meter.arrive(request.arrival_s)
        if self._num_instances not in (None, len(decode)):
            chosen = least(decode, lambda s: s.open_requests)
        else:
            chosen = self._decider.choose(request, decode, rate_rps)
        return least(prefill, lambda s: s.open_requests), chosen


def make_decider(policy: PolicyFile, context: PolicyContext) -> Decider:
    """The rule of a policy file."""
    if policy.kind == "joint":
        return JointTable(policy)
    if policy.kind == "index":
        return IndexTable(policy)
    return Network(policy, context)


class JointTable(Decider):
    """Looks the joint state up. Of several best instances the one with the fewest requests."""

    def __init__(self, policy: PolicyFile) -> None:
        self._grid = policy.grid
        self._rates = policy.rates_rps
        self._choices = policy.arrays["choices"]

    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        states = tuple(self._grid.locate_instance(s) for s in decode)
        mask = int(self._choices[(nearest_rate(self._rates, rate_rps), *states)])
        best = [i for i in range(len(decode)) if mask >> i & 1] or range(len(decode))
        return min(best, key=lambda i: decode[i].open_requests)


class IndexTable(Decider):
    """The least marginal cost, interpolated linearly in the batch size between buckets."""

    def __init__(self, policy: PolicyFile) -> None:
        grid = policy.grid
        self._grid = grid
        self._rates = policy.rates_rps
        self._nodes: list[float] = grid.batch_nodes_requests.tolist()
        self._stride = grid.num_states // grid.num_batch
        self._index: list[list[list[float]]] = policy.arrays["index_j"].astype(float).tolist()

    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        roles = self._index[nearest_rate(self._rates, rate_rps)]

        def cost(position: int) -> tuple[float, int]:
            state = decode[position]
            role = roles[state.instance_id if len(roles) > 1 else 0]
            return self._at(role, state), state.open_requests

        return min(range(len(decode)), key=cost)

    def _at(self, index_j: list[float], state: InstanceState) -> float:
        other = self._grid.locate_instance(state) % self._stride
        nodes, requests = self._nodes, state.open_requests
        low = bisect_right(nodes, requests) - 1
        if low + 1 >= len(nodes) or low == 0:  # beyond the table; or empty, which is exact
            return index_j[low * self._stride + other]
        weight = (requests - nodes[low]) / (nodes[low + 1] - nodes[low])
        before = index_j[low * self._stride + other]
        return before + weight * (index_j[(low + 1) * self._stride + other] - before)


class Network(Decider):
    """A trained network's action of greatest value; see `sim.policies.mdp.observation`."""

    def __init__(self, policy: PolicyFile, context: PolicyContext) -> None:
        count = sum(name.startswith("weight_") for name in policy.arrays)
        self._layers = [(policy.arrays[f"weight_{k}"], policy.arrays[f"bias_{k}"])
                        for k in range(count)]  # fmt: skip
        self._top_mhz = context.clocks_mhz[-1]

    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        values = observe(request, decode, rate_rps, self._top_mhz)
        for number, (weight, bias) in enumerate(self._layers):
            values = weight @ values + bias
            if number + 1 < len(self._layers):
                values = np.maximum(values, 0.0)
        return int(np.argmax(values))


def nearest_rate(rates_rps: Sequence[float], rate_rps: float) -> int:
    """Position of the rate that is nearest by ratio."""
    if len(rates_rps) == 1:
        return 0
    rate = max(rate_rps, 1e-9)
    return min(range(len(rates_rps)), key=lambda i: max(rate / rates_rps[i], rates_rps[i] / rate))


def _any_size(policy: PolicyFile) -> bool:
    return policy.kind == "index" and policy.arrays["index_j"].shape[1] == 1
