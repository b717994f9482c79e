"""Routing by a policy that was solved or learned from the routing MDP (`voltana train mdp`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.observation import RateMeter, observe
from voltana.sim.mdp.policy_file import PolicyFile, group_members, load_policy
from voltana.sim.policies.base import PolicyContext, RequestView, Router, States
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


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
        """Position of the decode instance.

        Args:
            request: The request that has just arrived.
            decode: All decode instances that the policy was made for.
            rate_rps: Recent arrival rate, requests/s.
        """


class MdpRouter(Router):
    """The decode instance that a policy of the routing MDP chooses, from a trained policy file.

    The MDP: state (batch bucket, KV bucket, clock level) of every decode instance; an action a
    request, its instance; cost = energy (J) + penalty · tokens later than the ITL promise. The
    file holds the long-run cost of each choice, exact for two instances, by pairs for more, or
    learned; or a network. It serves the profile and the number of instances it was made for.
    Prefill: fewest open requests. While an instance is missing the policy cannot be read, and
    the fewest open requests win.

    Source: ours; solvers and learners are textbook (Puterman, Markov Decision Processes, 1994;
    Sutton and Barto, Reinforcement Learning, 2018).
    """

    __slots__ = ("_decider", "_meter", "_num_instances")

    def __init__(self, parameters: MdpParameters, context: PolicyContext) -> None:
        if not parameters.policy:
            raise VoltanaError(
                "mdp needs a trained policy, mdp:policy=FILE: make one with voltana train mdp"
            )
        policy = load_policy(Path(parameters.policy), profile_hash=context.profile_hash)
        if policy.num_instances != context.num_decode:
            raise VoltanaError(
                f"{parameters.policy} was trained for {policy.num_instances} decode instances,"
                f" this fleet has {context.num_decode}: train it again with that number"
            )
        self._num_instances = policy.num_instances
        self._decider = make_decider(policy, context)
        self._meter = RateMeter(parameters.window_s)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        rate_rps = self._meter.arrive(request.arrival_s)
        if self._num_instances != len(decode):
            chosen = least(decode, lambda s: s.open_requests)
        else:
            chosen = self._decider.choose(request, decode, rate_rps)
        return least(prefill, lambda s: s.open_requests), chosen


def make_decider(policy: PolicyFile, context: PolicyContext) -> Decider:
    """The rule of a policy file."""
    return Table(policy) if policy.kind == "table" else Network(policy, context)


class Table(Decider):
    """The least long-run cost, interpolated linearly in the batch sizes between buckets.

    Costs that differ by less than a billionth are equal; of equals the fewest requests win.
    """

    def __init__(self, policy: PolicyFile) -> None:
        self._grid = policy.grid
        self._rates = policy.rates_rps
        self._groups = [
            (members, policy.arrays[f"delta_{k}"])
            for k, members in enumerate(group_members(policy.arrays))
        ]

    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        at = nearest_rate(self._rates, rate_rps)
        blends = [self._grid.blend_instance(state) for state in decode]
        costs: list[float] = []
        for members, delta_j in self._groups:
            costs += _interpolate(delta_j[at], [blends[i] for i in members])
        limit = min(costs) + 1e-9 * (1.0 + abs(min(costs)))
        best = [i for i, cost in enumerate(costs) if cost <= limit]
        return min(best, key=lambda i: decode[i].open_requests)


class Network(Decider):
    """A trained network's action of greatest value; see `voltana.sim.mdp.observation`."""

    def __init__(self, policy: PolicyFile, context: PolicyContext) -> None:
        self._arrays = policy.arrays
        self._top_mhz = context.clocks_mhz[-1]

    def choose(self, request: RequestView, decode: States, rate_rps: float) -> int:
        return int(
            np.argmax(forward(self._arrays, observe(request, decode, rate_rps, self._top_mhz)))
        )


def forward(arrays: Mapping[str, npt.NDArray[Any]], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Output of a policy file's network, rectified between its layers."""
    count = len(arrays) // 2
    for k in range(count):
        values = arrays[f"weight_{k}"] @ values + arrays[f"bias_{k}"]
        if k + 1 < count:
            values = np.maximum(values, 0.0)
    return values


def nearest_rate(rates_rps: Sequence[float], rate_rps: float) -> int:
    """Position of the rate that is nearest by ratio."""
    if len(rates_rps) == 1:
        return 0
    rate = max(rate_rps, 1e-9)
    return min(range(len(rates_rps)), key=lambda i: max(rate / rates_rps[i], rates_rps[i] / rate))


def _interpolate(
    delta_j: npt.NDArray[Any], blends: Sequence[tuple[int, int, float]]
) -> list[float]:
    """Multilinear between the states below and above of each member. Shape (members,)."""
    total = np.zeros(delta_j.shape[-1])
    for corner in product((False, True), repeat=len(blends)):
        weight = 1.0
        for is_above, blend in zip(corner, blends, strict=True):
            weight *= blend[2] if is_above else 1.0 - blend[2]
        if weight > 0.0:
            states = tuple(b[1] if up else b[0] for up, b in zip(corner, blends, strict=True))
            total += weight * delta_j[states]
    return list(total.tolist())
