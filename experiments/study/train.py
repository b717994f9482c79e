"""Training routing policies: from a fleet and a load to a policy file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from voltana.experiments.progress import progress_bar
from voltana.experiments.runs import cached_profile, workload_of
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.mdp.clock_rule import ControllerClock
from voltana.sim.mdp.factored import group_sizes, lower_bound_w, solve_by_policies, solve_groups
from voltana.sim.mdp.grid import StateGrid, batch_edges, kv_nodes
from voltana.sim.mdp.learn.qlearn import (
    Learner,
    QSettings,
    load_checkpoint,
    q_learn,
    save_checkpoint,
)
from voltana.sim.mdp.learn.simulator_task import SimulatorTask
from voltana.sim.mdp.model import FREE, InstanceModel, ModelParameters, bucket_loads, build_instance
from voltana.sim.mdp.model import mean_context_tokens as mean_context
from voltana.sim.mdp.policy_file import PolicyFile
from voltana.sim.policies.base import DECODE, PolicyContext
from voltana.sim.workload.lengths import draw_lengths

Solver = Literal["vi", "pi", "factored", "q", "sb3"]
SOLVERS: Final = ("vi", "pi", "factored", "q", "sb3")
Algorithm = Literal["ppo", "dqn"]
ALGORITHMS: Final = ("ppo", "dqn")
Arrays = dict[str, npt.NDArray[Any]]
Result = dict[str, Any]
LENGTHS: Final = 100_000
"""Requests from which mean lengths are taken, where they are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What to train for, and how."""

    config: SimConfig
    """Fleet, promises, controllers and lengths; its rate and router are not used."""
    rates_rps: tuple[float, ...]
    """Ascending; learners take one."""
    solver: Solver = "factored"
    penalty_j: float = 0.1
    """Of a late token: about what a token's energy is (ours)."""
    clock_rule: str = "ecofreq"
    """The decode controller that the model asks, or `free`."""
    clock_state: bool = False
    """Whether the clock level is a state of its own, or follows the other states at once."""
    width_requests: int = 4
    """Batch buckets beyond the smallest ones."""
    max_requests: int = 320
    kv_buckets: int = 2
    group_size: int = 2
    episodes: int = 40
    episode_s: float = 200.0
    steps: int = 100_000
    algorithm: Algorithm = "ppo"
    seed: int = 1

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise VoltanaError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.algorithm not in ALGORITHMS:
            raise VoltanaError(f"algorithm must be ppo or dqn, got {self.algorithm!r}")
        rates = self.rates_rps
        if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
            raise VoltanaError(f"rates must be > 0 and different, got {rates}")
        if self.solver in ("q", "sb3") and len(rates) > 1:
            raise VoltanaError(
                f"{self.solver} learns at one rate, got {len(rates)}: train a file each"
            )
        for name in ("width_requests", "max_requests", "kv_buckets", "group_size"):
            if getattr(self, name) < 1:
                raise VoltanaError(f"{name} must be >= 1, got {getattr(self, name)}")


def train(plan: TrainingPlan, out: Path) -> PolicyFile:
    """Solve or learn, and write the policy file.

    Args:
        plan: What to train.
        out: The file; a learner keeps its checkpoint beside it until it is done.
    """
    if out.exists():
        raise VoltanaError(f"{out} exists: remove it, or choose another --out")
    profile = cached_profile(plan.config.profile)
    instance = build_model(plan, profile)
    if plan.solver in ("vi", "pi", "factored"):
        arrays, result = _solve(plan, instance)
    elif plan.solver == "q":
        arrays, result = _learn_q(plan, profile, instance.grid, out)
    else:
        arrays, result = _learn_deep(plan, profile)
    grid = instance.grid
    if plan.solver == "q":  # a table over batch sizes alone
        grid = dataclasses.replace(
            grid, kv_nodes_tokens=grid.kv_nodes_tokens[:1], levels_mhz=grid.levels_mhz[-1:]
        )
    policy = PolicyFile(
        kind="network" if plan.solver == "sb3" else "table",
        solver=plan.solver,
        profile=profile.name,
        profile_hash=profile.content_hash,
        num_instances=plan.config.num_decode,
        rates_rps=plan.rates_rps,
        grid=grid,
        parameters=_parameters(plan, instance),
        seeds=(plan.seed,) if plan.solver in ("q", "sb3") else (),
        provenance=_provenance(),
        result=result,
        arrays=arrays,
    )
    policy.save(out)
    return policy


def build_model(plan: TrainingPlan, profile: Profile) -> InstanceModel:
    """The chain of one decode instance under the plan's lengths and promises."""
    config = plan.config
    inputs, outputs = _lengths(config)
    context_tokens = mean_context(inputs, outputs)
    context = policy_context(config, profile)
    is_free = plan.clock_rule == FREE
    is_tied = not plan.clock_state and not is_free
    grid = StateGrid(
        batch_edges_requests=batch_edges(plan.max_requests, plan.width_requests),
        kv_nodes_tokens=kv_nodes(float(inputs.mean()), context_tokens, plan.kv_buckets),
        levels_mhz=context.default_levels_mhz if is_free else context.clocks_mhz[-1:],
    )
    if plan.clock_state and not is_free:
        reachable = ControllerClock(plan.clock_rule, context).reachable_mhz(bucket_loads(grid))
        grid = dataclasses.replace(grid, levels_mhz=reachable)
    parameters = ModelParameters(
        slo_itl_s=config.slo_itl_s,
        input_tokens=float(inputs.mean()),
        output_tokens=float(outputs.mean()),
        context_tokens=context_tokens,
        penalty_j=plan.penalty_j,
        turned_away_j=plan.penalty_j * float(outputs.mean()) * plan.max_requests,
        clock_rule=plan.clock_rule,
        is_tied=is_tied,
        actuation_s=config.actuation_latency_s,
    )
    return build_instance(grid, parameters, context)


def policy_context(config: SimConfig, profile: Profile) -> PolicyContext:
    """What a decode controller of the fleet may know, without the fleet."""
    clocks = profile.meta.clocks
    return PolicyContext(
        predictor=profile.predictor(),
        power=profile.truth(extrapolate=True),
        clocks_mhz=clocks.supported_mhz,
        default_levels_mhz=clocks.default_levels_mhz,
        slo_ttft_s=config.aimed_ttft_s,
        slo_itl_s=config.aimed_itl_s,
        first_token=config.first_token,
        profile_hash=profile.content_hash,
        kv_capacity_tokens=config.kv_capacity_tokens or profile.meta.engine.kv_capacity_tokens,
        rng=np.random.default_rng(config.seed),
        phase=DECODE,
        actuation_s=config.actuation_latency_s,
        num_prefill=config.num_prefill,
        num_decode=config.num_decode,
    )


def _lengths(config: SimConfig) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    if config.trace is not None:
        workload = workload_of(config)
        return workload.input_tokens, workload.output_tokens
    return draw_lengths(config.workload, LENGTHS, np.random.default_rng(1))


def _solve(plan: TrainingPlan, instance: InstanceModel) -> tuple[Arrays, Result]:
    count = plan.config.num_decode
    size = min(plan.group_size, count) if plan.solver == "factored" else count
    policies, bounds = [], []
    for rate_rps in plan.rates_rps:
        with progress_bar(f"{plan.solver} at {rate_rps:g} requests/s") as bar:
            policies.append(
                solve_by_policies(instance, rate_rps, count)
                if plan.solver == "pi"
                else solve_groups(instance, rate_rps, count, group_size=size, progress=bar.at)
            )
        is_free = plan.clock_rule == FREE
        bounds.append(None if is_free else lower_bound_w(instance, rate_rps, count))
    arrays: Arrays = {
        f"delta_{k}": np.stack([p.delta_j[k] for p in policies]).astype(np.float32)
        for k in range(len(group_sizes(count, size)))
    }
    return arrays, {
        "cost_w": [p.split_cost_w for p in policies],
        "gap_w": [p.gap_w for p in policies],
        "lower_bound_w": bounds,
        "shares_rps": [p.shares_rps for p in policies],
        "is_exact": size >= count,
    }


def _learn_q(
    plan: TrainingPlan, profile: Profile, grid: StateGrid, out: Path
) -> tuple[Arrays, Result]:
    task = SimulatorTask(plan.config, profile, _episodes(plan), grid, penalty_j=plan.penalty_j)
    settings = QSettings(episodes=plan.episodes, seed=plan.seed)
    purpose = f"{profile.content_hash} {dataclasses.replace(plan, config=_rated(plan))!r}"
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = load_checkpoint(checkpoint, settings, purpose)
    what = f"Q-learning at {plan.rates_rps[0]:g} requests/s, episodes"
    with progress_bar(what, kept=checkpoint) as bar:

        def keep(learner: Learner) -> bool:
            save_checkpoint(checkpoint, learner, settings, purpose)
            bar.at(learner.episodes, settings.episodes)
            return True

        learner = q_learn(task, settings, start, after_episode=keep)
    checkpoint.unlink(missing_ok=True)
    delta_j = task.delta_j(learner.weights_j)[None]
    seen = {"cost_w": [learner.cost_w], "steps": learner.steps, "episodes": learner.episodes}
    return {"delta_0": delta_j.astype(np.float32)}, seen


def _learn_deep(plan: TrainingPlan, profile: Profile) -> tuple[Arrays, Result]:
    try:
        from voltana.sim.mdp.learn.deep import DeepSettings, export, fit
        from voltana.sim.mdp.learn.env import RoutingEnv
    except ImportError as error:
        raise VoltanaError(
            f"the sb3 solver needs {error.name}: install the extra, pip install 'voltana[rl]'"
        ) from None
    env = RoutingEnv(
        plan.config,
        profile,
        _episodes(plan),
        penalty_j=plan.penalty_j,
        counts_prefill=False,
        drains=False,
    )
    settings = DeepSettings(algorithm=plan.algorithm, steps=plan.steps, seed=plan.seed)
    with progress_bar(f"{plan.algorithm} at {plan.rates_rps[0]:g} requests/s, steps") as bar:
        model = fit(env, settings, progress=lambda s: bar.at(min(s, plan.steps), plan.steps))
    return dict(export(model, plan.algorithm)), {"steps": plan.steps}


def _episodes(plan: TrainingPlan) -> Callable[[int], Any]:
    rated = _rated(plan)
    return lambda seed: workload_of(dataclasses.replace(rated, seed=seed))


def _rated(plan: TrainingPlan) -> SimConfig:
    """The plan's configuration at its rate; a trace keeps its own arrivals."""
    if plan.config.trace is not None:
        return plan.config
    return dataclasses.replace(plan.config, rate_rps=plan.rates_rps[0], duration_s=plan.episode_s)


def _parameters(plan: TrainingPlan, instance: InstanceModel) -> dict[str, Any]:
    own = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    skipped = ("config", "rates_rps", "solver", "seed")
    return (
        {name: value for name, value in own.items() if name not in skipped}
        | dataclasses.asdict(instance.parameters)
        | {"workload": plan.config.trace or plan.config.workload}
    )


def _provenance() -> dict[str, str]:
    return {
        "version": importlib.metadata.version("voltana"),
        "numpy": np.__version__,
        "command": " ".join(["voltana", *sys.argv[1:]]),
        "made_utc": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }


def as_dict(policy: PolicyFile, out: Path) -> dict[str, Any]:
    """What was found, for JSON; lists of `result` have an entry a rate."""
    return {
        "solver": policy.solver,
        "num_decode": policy.num_instances,
        "profile": policy.profile,
        "rates_rps": [float(rate_rps) for rate_rps in policy.rates_rps],
        "result": dict(policy.result),
        "files": [str(out)],
    }


def describe(policy: PolicyFile, out: Path) -> str:
    """What was found, for people."""
    lines = [f"{out}: {policy.solver}, {policy.num_instances} decode instances, {policy.profile}"]
    result = policy.result
    for k, rate_rps in enumerate(policy.rates_rps):
        parts = [f"{rate_rps:g} requests/s"]
        if "lower_bound_w" in result:
            word = "cost" if result["is_exact"] else "cost at most"
            parts.append(f"{word} {result['cost_w'][k]:.1f} J/s (± {result['gap_w'][k]:.2g})")
            bound = result["lower_bound_w"][k]
            parts.append("no bound" if bound is None else f"no routing below {bound:.1f} J/s")
            parts.append("shares " + "+".join(f"{s:.3g}" for s in result["shares_rps"][k]))
        elif "cost_w" in result:
            parts.append(f"cost seen {result['cost_w'][k]:.1f} J/s in {result['steps']} steps")
        else:
            parts.append(f"{result['steps']} steps")
        lines.append("  " + ", ".join(parts))
    return "\n".join(lines)
