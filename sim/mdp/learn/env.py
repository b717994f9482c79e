"""A `gymnasium` environment over the simulator: one step routes one request.

observation: `voltana.sim.mdp.observation`, without unit. Shape (4·decode instances + 2,).
action: decode instance · number of levels + clock level of that instance, which holds from its
next iteration until it is set again; without levels the configured controller keeps the clocks.
reward: -(energy in J + penalty in J a late token · late tokens) since the arrival before, in J;
see `voltana.sim.mdp.learn.arrivals`. Over an episode that drains the rewards add up to the run's
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.mdp.learn.arrivals import ArrivalSimulation
from voltana.sim.mdp.observation import LIMIT, Float32Array, RateMeter, observe, size
from voltana.sim.workload.workload import Workload


class RoutingEnv(gymnasium.Env[Float32Array, int]):
    """Routing decode instances, and setting their clocks if levels are given.

    Args:
        config: Fleet, promises and controllers; its router is not used.
        profile: The truth about times and power.
        make_workload: The requests of an episode, from a seed.
        penalty_j: Joules that a late token is taken to cost, >= 0.
        levels_mhz: Clocks the action chooses from, ascending; none: routing only.
        counts_prefill: Whether the reward has prefill instances' energy and late first tokens.
            The action hardly changes them; without them there is less noise to learn from.
        drains: Whether the last step lasts until every request has ended (`terminated`), or the
            episode is cut at the last arrival (`truncated`), as fits an endless stream.
        window_s: Memory of the observed arrival rate.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        make_workload: Callable[[int], Workload],
        *,
        penalty_j: float = 1.0,
        levels_mhz: Sequence[int] = (),
        counts_prefill: bool = True,
        drains: bool = True,
        window_s: float = 30.0,
    ) -> None:
        if not penalty_j >= 0:
            raise VoltanaError(f"penalty_j must be >= 0, got {penalty_j}")
        self._config = config
        self._profile = profile
        self._make_workload = make_workload
        self._penalty_j = penalty_j
        self._levels_mhz = tuple(levels_mhz)
        self._counts_prefill = counts_prefill
        self._drains = drains
        self._window_s = window_s
        self.simulation: ArrivalSimulation | None = None
        """The episode's run; its record is there once it has drained."""
        self.observation_space = spaces.Box(
            0.0, LIMIT, shape=(size(config.num_decode),), dtype=np.float32
        )
        count = config.num_decode * max(1, len(levels_mhz))
        self.action_space: Any = spaces.Discrete(count)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32Array, dict[str, Any]]:
        """Begin an episode; the seed draws its workload, and those of the episodes after it."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        self.simulation = ArrivalSimulation(
            self._config,
            self._profile,
            self._make_workload(drawn),
            levels_mhz=self._levels_mhz,
            drains=self._drains,
        )
        self._meter = RateMeter(self._window_s)
        return self._observe(self.simulation), {"workload_seed": drawn}

    def step(self, action: int) -> tuple[Float32Array, float, bool, bool, dict[str, Any]]:
        """Route the request that has arrived, and go on to the next arrival."""
        if self.simulation is None:
            raise VoltanaError("the environment needs reset before the first step")
        run = self.simulation
        levels = max(1, len(self._levels_mhz))
        instance, level = divmod(int(action), levels)
        clock_mhz = self._levels_mhz[level] if self._levels_mhz else None
        cost = run.accept(instance, clock_mhz)
        if self._counts_prefill:
            reward_j = -(cost.energy_j + self._penalty_j * cost.late_tokens)
        else:
            reward_j = -(cost.decode_energy_j + self._penalty_j * cost.late_gaps)
        info = {
            "energy_j": cost.energy_j,
            "decode_energy_j": cost.decode_energy_j,
            "late_tokens": cost.late_tokens,
            "elapsed_s": cost.elapsed_s,
        }
        terminated, truncated = run.is_over and self._drains, run.is_over and not self._drains
        return self._observe(run), reward_j, terminated, truncated, info

    def _observe(self, run: ArrivalSimulation) -> Float32Array:
        request = run.request
        rate_rps = self._meter.arrive(request.arrival_s)
        return observe(request, run.decode, rate_rps, run.top_mhz)
