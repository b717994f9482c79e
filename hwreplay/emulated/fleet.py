"""A replay on emulated cards: what is made for it beforehand, and whether the machine kept up."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from voltana.hwreplay.emulated.card import CARDS
from voltana.hwreplay.emulated.machine import Machine, run_machine
from voltana.hwreplay.emulated.overruns import count_overruns
from voltana.hwreplay.emulated.state import Behaviour
from voltana.profiles.catalog import load_profile
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

if TYPE_CHECKING:
    from voltana.hwreplay.engines.plan import Installation
    from voltana.hwreplay.replay.config import ReplayConfig
    from voltana.hwreplay.replay.parts import Run

LIBRARY: Final = "emulated"
"""In the engine's folder: the compiled libraries."""
AGENT_S: Final = 0.001
"""From the engine's record to the clock's call, agent and actuator together; the rest of the
simulated latency is the card's own."""
CONTEXT: Final = ("--context-length", "131072")


def library_of(engine: Installation) -> Path:
    """Where the compiled libraries of an engine's folder lie."""
    return engine.python.absolute().parent.parent.parent / LIBRARY


def emulated_arguments(sim: SimConfig, profile: str, phase: Phase | None = None) -> tuple[str, ...]:
    """What a server over an emulated card is started with: the simulated limits.

    Overlapping the scheduler with a pass needs a device that computes by itself; over a CPU it
    would hand each token out an iteration late.

    Args:
        sim: Has the limits, and says which caches are on.
        profile: Has those that it leaves out.
        phase: Of the server, for its cache; None: it has none.
    """
    engine = load_profile(profile).meta.engine
    budget = sim.max_prefill_tokens or engine.max_prefill_tokens
    memory = sim.kv_capacity_tokens or engine.kv_capacity_tokens
    if phase == PREFILL and sim.prefix_cache_tokens:
        memory = sim.prefix_cache_tokens
    limits = {
        "--max-running-requests": sim.max_running_requests or engine.max_running_requests,
        "--max-total-tokens": memory,
        "--chunked-prefill-size": budget,
        "--max-prefill-tokens": budget,
    }
    words = [word for pair in limits.items() for word in map(str, pair)]
    return (*words, *CONTEXT, "--disable-overlap-schedule", *_cache_arguments(sim, phase))


def _cache_arguments(sim: SimConfig, phase: Phase | None) -> tuple[str, ...]:
    if phase == DECODE and sim.decode_cache:
        return ("--disaggregation-decode-enable-radix-cache",)
    has_cache = {PREFILL: sim.prefix_cache_tokens, COLOCATED: sim.colocated_cache}
    return () if phase is not None and has_cache.get(phase) else ("--disable-radix-cache",)


@contextmanager
def emulated(config: ReplayConfig, directory: Path) -> Iterator[ReplayConfig]:
    """Make the cards of a replay that starts its servers, and the actuator that sets their clocks.

    Yields:
        The configuration with servers that stand on them, and the actuator's socket.
    """
    assert config.engine is not None
    assert config.emulate is not None
    sim = config.sim
    most = sim.max_running_requests
    machine = Machine(
        profile=config.emulate,
        counts=sim.counts,
        directory=directory,
        library=library_of(config.engine),
        seed=sim.seed,
        noise_scale=sim.noise_scale,
        overlap_frac=sim.mixed_overlap_frac,
        own=sim.mixed_profiles,
    )
    limits = (load_profile(n).meta.engine.max_running_requests for n in {*machine.profiles})
    machine = dataclasses.replace(machine, max_requests=most or max(limits))
    engine = dataclasses.replace(
        config.engine,
        arguments_of=lambda plan: emulated_arguments(
            sim, machine.profile_of(plan.phase, plan.instance_id), plan.phase
        ),
        environment_of=machine.environment_of,
    )
    lag_s = max(config.sim.actuation_latency_s - AGENT_S, 0.0)
    with run_machine(machine, Behaviour(lock_lag_s=lag_s)) as socket:
        yield dataclasses.replace(config, engine=engine, actuator=socket)


def note_overruns(run: Run, start_ns: int) -> dict[str, Any]:
    """Count the passes of a run that lasted too long; too many make it incomplete.

    Args:
        run: Its faults take a line if the machine did not keep up.
        start_ns: CLOCK_MONOTONIC at the start of its measured part.
    """
    folder = Path(os.environ[CARDS]).parent
    paths = [folder / f"{worker.name}.passes" for worker in run.workers]
    found = count_overruns(paths, start_ns * 1e-9, time.monotonic())
    if found.fault is not None:
        run.faults.append(found.fault)
    return found.as_dict()
