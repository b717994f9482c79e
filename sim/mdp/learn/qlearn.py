"""Q-learning of the routing MDP: tabular, or linear in features, without any library.

The cost is an average per second, so that Q is relative: an action that cost c joules and led,
after t seconds, to a state whose best action has the value m, moves

    Q(s, a) towards c - g·t + m,

where g, the cost per second, is the ratio of what greedy actions have cost to how long they took,
older ones forgotten. Q(s, a) is the sum of the weights of the action's features; a table is the
case of one feature each. Actions are greedy but for a share that is drawn and falls linearly.

Source: Das, Gosavi, Mahadevan, Marchalleck, Solving semi-Markov decision problems using average
reward reinforcement learning (SMART), Management Science 45 (1999). With linear features it need
not converge: judge the result by what it costs, as `voltana train mdp` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import replacing

FloatArray = npt.NDArray[np.float64]
Features = tuple[Sequence[int], Sequence[float]]
"""Numbers of the features that are not zero, and their values."""


class Task(Protocol):
    """A process to learn from: it asks for one action after another."""

    num_features: int

    def reset(self, seed: int) -> None:
        """Begin an episode; the seed draws everything in it."""

    def actions(self) -> Sequence[Features]:
        """The features of every action that is possible now; empty when the episode is over."""

    def act(self, action: int) -> tuple[float, float]:
        """Take the action; returns its cost in J and the seconds until the next choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QSettings:
    """How to learn. The defaults are ours."""

    episodes: int = 40
    seed: int = 1
    learning_rate: float = 0.1
    """Learning rate of the first step; it falls as 1/(1 + steps/learning_steps)."""
    learning_steps: float = 50_000.0
    exploration: float = 0.2
    """Share of drawn actions in the first episode; falls linearly to 0 after the last."""
    memory_s: float = 2_000.0
    """Time constant of forgetting in the cost per second."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise VoltanaError(f"episodes must be >= 1, got {self.episodes}")
        for name in ("learning_rate", "learning_steps", "memory_s"):
            if not getattr(self, name) > 0:
                raise VoltanaError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.exploration <= 1:
            raise VoltanaError(f"exploration must be in [0, 1], got {self.exploration}")


@dataclass(slots=True, kw_only=True)
class Learner:
    """What has been learned after a number of whole episodes."""

    weights_j: FloatArray
    """Shape (features,)."""
    cost_j: float = 0.0
    """Cost of greedy actions, older ones forgotten; over `time_s` it is the cost per second."""
    time_s: float = 0.0
    steps: int = 0
    episodes: int = 0

    @property
    def cost_w(self) -> float:
        """The cost per second that was seen lately, J/s, exploration left out."""
        return self.cost_j / self.time_s if self.time_s > 0 else 0.0


def q_learn(
    task: Task,
    settings: QSettings,
    start: Learner | None = None,
    *,
    after_episode: Callable[[Learner], bool] = lambda learner: True,
) -> Learner:
    """Learn for the settings' episodes, or those that are left.

    Episode k depends on the learner before it, the seed and k alone: to stop after an episode
    and go on from a checkpoint gives the same weights as not to stop.

    Args:
        task: The process.
        settings: How to learn.
        start: Where to go on, or weights to begin with; zeros if None.
        after_episode: Called after each; False stops.
    """
    learner = start or Learner(weights_j=np.zeros(task.num_features))
    if len(learner.weights_j) != task.num_features:
        raise VoltanaError(
            f"the weights to start from are {len(learner.weights_j)}, not {task.num_features}"
        )
    while learner.episodes < settings.episodes:
        _episode(task, settings, learner)
        if not after_episode(learner):
            break
    return learner


def _episode(task: Task, settings: QSettings, learner: Learner) -> None:
    drawn = np.random.SeedSequence(settings.seed, spawn_key=(learner.episodes,))
    rng = np.random.default_rng(drawn)
    share = settings.exploration * (1.0 - learner.episodes / settings.episodes)
    weights: list[float] = learner.weights_j.tolist()
    task.reset(int(rng.integers(2**31)))
    actions = task.actions()
    values = _values(weights, actions)
    while actions:
        greedy = values.index(min(values))
        chosen = int(rng.integers(len(actions))) if rng.random() < share else greedy
        cost_j, elapsed_s = task.act(chosen)
        if chosen == greedy:
            _count(learner, cost_j, elapsed_s, settings.memory_s)
        numbers, amounts = actions[chosen]
        actions = task.actions()
        if actions:
            values_after = _values(weights, actions)
            error_j = cost_j - learner.cost_w * elapsed_s + min(values_after) - values[chosen]
            rate = settings.learning_rate / (1.0 + learner.steps / settings.learning_steps)
            step_j = rate * error_j / sum(x * x for x in amounts)
            for number, amount in zip(numbers, amounts, strict=True):
                weights[number] += step_j * amount
            values = _values(weights, actions)
        learner.steps += 1
    learner.weights_j = np.array(weights)
    learner.episodes += 1


def _values(weights: list[float], actions: Sequence[Features]) -> list[float]:
    return [sum(weights[k] * x for k, x in zip(*a, strict=True)) for a in actions]


def _count(learner: Learner, cost_j: float, elapsed_s: float, memory_s: float) -> None:
    keep = max(0.0, 1.0 - elapsed_s / memory_s)
    learner.cost_j = keep * learner.cost_j + cost_j
    learner.time_s = keep * learner.time_s + elapsed_s


def save_checkpoint(path: Path, learner: Learner, settings: QSettings, purpose: str) -> None:
    """Write a learner to a file, whole or not at all.

    Args:
        path: The file.
        learner: Where learning stands.
        settings: How it learns; a checkpoint of other settings is not gone on from.
        purpose: What it learns; a checkpoint of another purpose is not gone on from either.
    """
    meta = {
        "settings": asdict(settings), "purpose": purpose, "cost_j": learner.cost_j,
        "time_s": learner.time_s, "steps": learner.steps, "episodes": learner.episodes,
    }  # fmt: skip
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, weights_j=learner.weights_j, meta=np.array(json.dumps(meta)))


def load_checkpoint(path: Path, settings: QSettings, purpose: str) -> Learner | None:
    """The learner of a checkpoint; None if there is none of these settings and this purpose.

    Args:
        path: The file.
        settings: How to learn.
        purpose: What to learn.
    """
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        meta = json.loads(str(stored["meta"]))
        weights_j = stored["weights_j"]
    if meta.pop("settings") != asdict(settings) or meta.pop("purpose") != purpose:
        return None
    return Learner(weights_j=weights_j, **meta)
