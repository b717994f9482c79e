"""Plays a simulated configuration on a real fleet: servers, router, agents, load, one record.

    load generator ──> router ──> prefill and decode servers
                         │ events        │ forward-pass metrics, batch notices
                         └──> agents <───┘ ──> actuator

Everything is written down as it happens; `assemble` makes the record from the files, so that a run
that was cut off is worth what it had reached.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w
import uvloop

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.emulated.fleet import emulated, note_overruns
from voltana.hwreplay.emulated.plan import ANSWER_ID
from voltana.hwreplay.engines.launch import run_fleet
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.replay.assembly import REQUESTS, Window, assemble
from voltana.hwreplay.replay.config import ReplayConfig
from voltana.hwreplay.replay.load import LoadConfig, LoadGenerator, LoadReport
from voltana.hwreplay.replay.parts import (
    Recorders,
    Run,
    StartedRouter,
    agent_reports,
    agents,
    check_recorders,
    gpus_of,
    iterations,
    observes_fleet,
    router,
)
from voltana.hwreplay.replay.recording import ENERGY, EnergyRecorder
from voltana.hwreplay.router.config import BOOTSTRAP_PORT, WorkerConfig
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.common.signals import stops_as_interrupts
from voltana.sim.records import RunRecord
from voltana.sim.results import read_json, write_json
from voltana.sim.workload.workload import Workload

STATE: Final = "replay.json"
SIMULATE: Final = "simulate.toml"
"""The same configuration for `voltana simulate --config`."""
WARM_UP_TOKENS: Final = ((16, 8), (64, 8), (256, 8), (32, 32))
WARM_UP_TRIES: Final = 3
AGAIN_S: Final = 5.0
"""A transfer that fails bars a decode server for some seconds: PAIR_ENVIRONMENT."""
"""(input, output) of the requests that are sent before the run counts."""
Progress = Callable[[str, int], None]
"""Told a stage, and how many requests have ended."""


def replay(
    config: ReplayConfig, workload: Workload, directory: Path, progress: Progress
) -> RunRecord:
    """Replay a workload and return the record; a signal to stop keeps what has ended.

    Args:
        config: The configuration and the fleet.
        workload: What `voltana simulate` plays for the same configuration.
        directory: Takes every file; may hold no other replay.
        progress: Told how it goes.

    Raises:
        VoltanaError: A server, the router or an agent cannot be started, or energy is incomplete.
    """
    if not len(workload):
        raise VoltanaError(f"workload {workload.name!r} has no requests: nothing to replay")
    if (directory / REQUESTS).exists():
        raise VoltanaError(f"{directory} holds a replay already: name another, or finish that one")
    directory.mkdir(parents=True, exist_ok=True)
    twin = tomli_w.dumps(config.sim.as_dict())
    write_text(twin, directory / SIMULATE)
    started_ns = time.monotonic_ns()
    with stops_as_interrupts(), fleet(config, directory, progress) as run:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_play(run, workload, progress))
        except KeyboardInterrupt:
            progress("interrupted: keeping what has ended", 0)
        finally:
            gc.unfreeze()
    wall_s = (time.monotonic_ns() - started_ns) * 1e-9
    state = read_json(directory / STATE)
    write_json(state | {"wall_s": wall_s, "agents": agent_reports(run)}, directory / STATE)
    return finish(config, workload, directory)


def finish(config: ReplayConfig, workload: Workload, directory: Path) -> RunRecord:
    """The record of a replay that has ended, in whatever way, from its folder.

    Args:
        config: As it was replayed.
        workload: As it was replayed.
        directory: What the replay wrote.

    Raises:
        VoltanaError: No replay there, one that never began, or one of another workload.
    """
    state = read_json(directory / STATE)
    if state["workload_hash"] != workload.content_hash:
        raise VoltanaError(f"{directory} replayed another workload: name its configuration")
    if state.get("start_s") is None:
        raise VoltanaError(f"the replay in {directory} ended before its first request")
    load, faults = state.get("load", {}), state.get("faults", [])
    window = Window(
        start_s=state["start_s"],
        is_complete=load.get("is_complete", False),
        wall_s=state.get("wall_s", 0.0),
    )
    extra = {
        "is_power_measured": state["is_power_measured"],
        "power": state["power"],
        "dilation": config.dilation,
        "is_complete": window.is_complete and not faults,
    }
    if not extra["is_complete"]:
        extra["incomplete_reason"] = "; ".join(faults) or "it was interrupted"
    return assemble(directory, workload, config.sim, window, extra)


@contextmanager
def fleet(config: ReplayConfig, directory: Path, progress: Progress) -> Iterator[Run]:
    """The servers, started here or there already, and a short folder for sockets.

    Args:
        config: What to start, or what is there.
        directory: Takes the servers' logs.
        progress: Told how it goes.

    Raises:
        VoltanaError: No such policy or profile, or a server ended or was too late.
    """
    # what is wrong is told before a server starts
    has_fleet_view, vocab_size = observes_fleet(config), config.vocab_size()
    with ExitStack() as stack:
        sockets = Path(tempfile.mkdtemp(prefix="voltana-"))
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        workers, batches = config.workers, dict(config.batch_sockets)
        servers: list[Server] = []
        if config.engine is not None and config.emulate is not None:
            config = stack.enter_context(emulated(config, sockets))
        if config.engine is not None:
            progress("starting the servers", 0)
            servers = stack.enter_context(
                run_fleet(
                    config.engine,
                    directory,
                    config.sim.counts,
                    gpus=None if config.emulate is not None else config.gpus,
                    sockets=sockets,
                )
            )
            workers = tuple(
                WorkerConfig(
                    phase=server.plan.phase,
                    instance_id=server.plan.instance_id,
                    url=server.plan.url,
                    metrics=server.plan.metrics,
                    bootstrap_port=server.plan.bootstrap_port or BOOTSTRAP_PORT,
                )
                for server in servers
            )
            batches = {
                s.plan.name: s.plan.batch_socket for s in servers if s.plan.batch_socket is not None
            }
        yield Run(
            config=config,
            directory=directory,
            sockets=sockets,
            clock=RunClock(),
            workers=workers,
            batch_sockets=batches,
            vocab_size=vocab_size,
            has_fleet_view=has_fleet_view,
            servers=servers,
        )


async def _play(run: Run, workload: Workload, progress: Progress) -> None:
    """Start router and agents, warm up, send the workload, and write down how it went."""
    config_kind = run.config.power_kind
    state: dict[str, Any] = {
        "workload": workload.name,
        "workload_hash": workload.content_hash,
        "requests": len(workload),
        "start_ns": run.clock.start_ns,
        "command": sys.argv,
    }
    async with AsyncExitStack() as stack:
        progress("starting router and agents", 0)
        started = await stack.enter_async_context(router(run))
        await stack.enter_async_context(agents(run))
        recorders = await stack.enter_async_context(iterations(run))
        energy = EnergyRecorder(gpus_of(run), run.clock, run.directory / ENERGY)
        stack.callback(energy.close)
        state["is_power_measured"] = energy.is_measured and config_kind != "emulated"
        state["power"] = config_kind
        progress("warming up", 0)
        await _warm_up(run, started)
        check_recorders(recorders)
        if run.faults:
            raise VoltanaError(f"every agent must outlive the warm-up: {'; '.join(run.faults)}")
        gc.collect()
        gc.freeze()  # a collection that walks every library's objects would send requests late
        start_ns = time.monotonic_ns()
        state["start_s"] = (start_ns - run.clock.start_ns) * 1e-9
        write_json(state, run.directory / STATE)
        generator = LoadGenerator(
            workload,
            _load_config(run, started.url, start_ns),
            RunClock(start_ns=start_ns),
            run.directory / REQUESTS,
        )
        try:
            await send_all(generator, recorders, lambda: progress("replaying", 1))
            await asyncio.sleep(run.config.rest_s)  # the last records and readings are on their way
        finally:
            if run.config.emulate is not None:
                state["overruns"] = note_overruns(run, start_ns)
            ended = {"load": generator.report.as_dict(), "faults": run.faults}
            write_json(state | ended, run.directory / STATE)


async def send_all(
    generator: LoadGenerator, recorders: Recorders, on_end: Callable[[], None]
) -> None:
    """Send the whole workload, as long as every engine is recorded.

    Args:
        generator: Sends it.
        recorders: Tasks that record iterations, by instance.
        on_end: Called at the end of each request.

    Raises:
        VoltanaError: A recorder has ended.
    """
    load = asyncio.create_task(generator.run(on_end))
    try:
        await asyncio.wait({load, *recorders.values()}, return_when=asyncio.FIRST_COMPLETED)
        check_recorders(recorders)
        await load
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)


def _load_config(run: Run, url: str, salt: int) -> LoadConfig:
    config = run.config
    return LoadConfig(
        url=url,
        seed=config.sim.seed,
        salt=salt,
        answer_id=ANSWER_ID if config.sim.caches else None,
        vocabulary=config.vocabulary,
        drain_s=config.drain_s,
    )


async def _warm_up(run: Run, started: StartedRouter) -> None:
    """Every pair serves a few requests, so that no measured one is a server's first; caches forget.

    The router's policy then begins anew: it would have rolled dice that the simulated one has not.
    """
    pairs = max(run.config.sim.counts.values())
    shapes = np.array(WARM_UP_TOKENS * pairs, dtype=np.int64)
    work = Workload(
        arrival_s=np.zeros(len(shapes)), input_tokens=shapes[:, 0], output_tokens=shapes[:, 1]
    )
    path = run.directory / "warm-up.jsonl"
    config = _load_config(run, started.url, run.clock.start_ns)
    for tries in range(1, WARM_UP_TRIES + 1):
        report: LoadReport = await LoadGenerator(work, config, RunClock(), path).run()
        if report.counts["completed"] == len(work):
            break
        if tries == WARM_UP_TRIES:
            why = ", ".join(report.reasons) or "no reason given"
            raise VoltanaError(f"the warm-up must succeed before a replay, it did not: {why}")
        await asyncio.sleep(AGAIN_S)
    if run.config.sim.caches:
        for server in run.servers:
            await asyncio.to_thread(server.empty_cache)
    started.begin_anew()
    await asyncio.sleep(run.config.rest_s)
