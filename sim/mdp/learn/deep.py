"""Deep reinforcement learning with stable-baselines3 (extra `rl`), exported to plain matrices.

The reward handed to the learner is relative, (g·t - cost)/scale for a step of t seconds, with g the
cost per second and scale the cost per step of an episode of random routing: what any routing pays
is taken out, and an action whose cost comes later is judged over a horizon of 1/(1 - discount)
arrivals. What serves is a multilayer perceptron with rectifiers, evaluated in NumPy: no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.learn.env import RoutingEnv

Algorithm = Literal["dqn", "ppo"]
Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSettings:
    """How to learn. The defaults are ours."""

    algorithm: Algorithm = "ppo"
    steps: int = 100_000
    """Arrivals to learn from."""
    seed: int = 1
    hidden: int = 64
    """Units of each of the two hidden layers."""
    discount: float = 0.99
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        for name in ("steps", "hidden"):
            if getattr(self, name) < 1:
                raise VoltanaError(f"{name} must be >= 1, got {getattr(self, name)}")


def fit(
    env: RoutingEnv, settings: DeepSettings, *, progress: Callable[[int], None] = lambda steps: None
) -> Any:  # noqa: ANN401 (untyped library)
    """Train a model of stable-baselines3; `export` makes a policy of it.

    Args:
        env: Routing only, cut at the last arrival (`drains=False`).
        settings: How to learn.
        progress: Called with the steps done.

    Raises:
        VoltanaError: stable-baselines3 is not installed.
    """
    try:
        import stable_baselines3 as sb3
        import torch
    except ImportError as error:
        raise VoltanaError(
            f"the sb3 solver needs {error.name}: install the extra, pip install 'voltana[rl]'"
        ) from None

    def report(local: dict[str, Any], _: dict[str, Any]) -> bool:
        progress(local["self"].num_timesteps)
        return True

    relative = _Relative(env, *_random_cost(env, settings.seed))
    net = [settings.hidden, settings.hidden]
    common: dict[str, Any] = {
        "seed": settings.seed, "gamma": settings.discount, "device": "cpu",
        "learning_rate": settings.learning_rate,
    }  # fmt: skip
    kwargs: dict[str, Any] = {"activation_fn": torch.nn.ReLU}
    model: Any
    if settings.algorithm == "ppo":
        kwargs["net_arch"] = {"pi": net, "vf": net}
        rollout = min(2048, settings.steps)
        common |= {"n_steps": rollout, "batch_size": min(256, rollout)}
        model = sb3.PPO("MlpPolicy", relative, policy_kwargs=kwargs, **common)
    else:
        kwargs["net_arch"] = net
        common["learning_starts"] = min(2_000, settings.steps // 4)
        model = sb3.DQN("MlpPolicy", relative, policy_kwargs=kwargs, **common)
    model.learn(settings.steps, callback=report)
    return model


def export(model: Any, algorithm: Algorithm) -> Arrays:  # noqa: ANN401 (untyped library)
    """The acting network's layers, as `voltana.sim.mdp.policy_file` has them."""
    policy = model.policy
    modules = (
        [*policy.mlp_extractor.policy_net, policy.action_net]
        if algorithm == "ppo"
        else [*policy.q_net.q_net]
    )
    arrays: Arrays = {}
    layers = [m for m in modules if hasattr(m, "weight")]
    for number, layer in enumerate(layers):
        arrays[f"weight_{number}"] = layer.weight.detach().numpy().copy()
        arrays[f"bias_{number}"] = layer.bias.detach().numpy().copy()
    return arrays


def _random_cost(env: RoutingEnv, seed: int) -> tuple[float, float]:
    """Cost per second and per step of one episode of random routing, J/s and J."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    cost_j = elapsed_s = 0.0
    steps, ended = 0, False
    while not ended:
        _, reward_j, terminated, truncated, info = env.step(int(rng.integers(env.action_space.n)))
        cost_j -= reward_j
        elapsed_s += info["elapsed_s"]
        steps += 1
        ended = terminated or truncated
    return cost_j / max(elapsed_s, 1e-9), max(cost_j / steps, 1e-9)


class _Relative(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The environment with the relative reward of the module."""

    def __init__(self, env: RoutingEnv, cost_w: float, scale_j: float) -> None:
        super().__init__(env)
        self._cost_w, self._scale_j = cost_w, scale_j

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        seen, reward_j, terminated, truncated, info = self.env.step(action)
        relative = (float(reward_j) + self._cost_w * info["elapsed_s"]) / self._scale_j
        return seen, relative, terminated, truncated, info
