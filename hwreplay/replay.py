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
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w
import uvloop

from hwreplay.agent import AgentConfig, await_agent, start_agent
from hwreplay.assembly import REQUESTS, Window, assemble
from hwreplay.clock import RunClock
from hwreplay.launch import run_fleet
from hwreplay.load import LoadConfig, LoadGenerator, LoadReport
from hwreplay.recording import ENERGY, ITERATIONS, EnergyRecorder, record_iterations
from hwreplay.replay_config import ReplayConfig
from hwreplay.router.config import BOOTSTRAP_PORT, WorkerConfig
from profiles.device.constant import ConstantPowerGpu
from profiles.device.gpu import Gpu
from profiles.errors import VoltanaError
from profiles.signals import stops_as_interrupts
from sim.policies.base import DECODE, PREFILL, Phase
from sim.records import RunRecord
from sim.results import read_json, write_json
from sim.workload.workload import Workload

STATE: Final = "replay.json"
SIMULATE: Final = "simulate.toml"
"""The same configuration for `voltana simulate --config`."""
WARM_UP_TOKENS: Final = ((16, 8), (64, 8), (256, 8), (32, 32))
"""(input, output) of the requests that are sent before the run counts."""
END_S: Final = 10.0
Progress = Callable[[str, int], None]
"""Told a stage, and how many requests have ended."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """What the parts of one replay share."""

    config: ReplayConfig
    directory: Path
    sockets: Path
    clock: RunClock
    workers: tuple[WorkerConfig, ...]
    batch_sockets: dict[str, Path]


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
    (directory / SIMULATE).write_text(twin, encoding="utf-8")
    started_ns = time.monotonic_ns()
    with stops_as_interrupts(), _fleet(config, directory, progress) as run:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_play(run, workload, progress))
        except KeyboardInterrupt:
            progress("interrupted: keeping what has ended", 0)
        finally:
            gc.unfreeze()
    wall_s = (time.monotonic_ns() - started_ns) * 1e-9
    state = read_json(directory / STATE)
    write_json(state | {"wall_s": wall_s, "agents": _agent_reports(run)}, directory / STATE)
    return finish(config, workload, directory)


def finish(config: ReplayConfig, workload: Workload, directory: Path) -> RunRecord:
    """The record of a replay that has ended, in whatever way, from its folder.

    Raises:
        VoltanaError: No replay there, one that never began, or one of another workload.
    """
    state = read_json(directory / STATE)
    if state["workload_hash"] != workload.content_hash:
        raise VoltanaError(f"{directory} replayed another workload: name its configuration")
    if state.get("start_s") is None:
        raise VoltanaError(f"the replay in {directory} ended before its first request")
    load = state.get("load", {})
    window = Window(
        start_s=state["start_s"],
        is_complete=load.get("is_complete", False),
        wall_s=state.get("wall_s", 0.0),
    )
    extra = {
        "is_power_measured": state["is_power_measured"],
        "is_complete": window.is_complete,
    }
    if not window.is_complete:
        extra["incomplete_reason"] = "it was interrupted"
    return assemble(directory, workload, config.sim, window, extra)


@contextmanager
def _fleet(config: ReplayConfig, directory: Path, progress: Progress) -> Iterator[_Run]:
    """The servers, started here or there already, and a short folder for sockets."""
    with ExitStack() as stack:
        sockets = Path(tempfile.mkdtemp(prefix="voltana-"))
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        workers, batches = config.workers, dict(config.batch_sockets)
        if config.engine is not None:
            progress("starting the servers", 0)
            servers = stack.enter_context(
                run_fleet(
                    config.engine,
                    directory,
                    num_prefill=config.sim.num_prefill,
                    num_decode=config.sim.num_decode,
                    sockets=sockets,
                )
            )
            workers = tuple(
                WorkerConfig(
                    phase=server.phase,
                    instance_id=server.instance_id,
                    url=server.url,
                    metrics=server.metrics,
                    bootstrap_port=server.bootstrap_port or BOOTSTRAP_PORT,
                )
                for server in servers
            )
            batches = {
                w.name: s.batch_socket
                for w, s in zip(workers, servers, strict=True)
                if s.batch_socket is not None
            }
        yield _Run(
            config=config,
            directory=directory,
            sockets=sockets,
            clock=RunClock(),
            workers=workers,
            batch_sockets=batches,
        )


async def _play(run: _Run, workload: Workload, progress: Progress) -> None:
    """Start router and agents, warm up, send the workload, and write down how it went."""
    state: dict[str, Any] = {
        "workload": workload.name,
        "workload_hash": workload.content_hash,
        "requests": len(workload),
        "start_ns": run.clock.start_ns,
        "command": sys.argv,
    }
    async with AsyncExitStack() as stack:
        progress("starting router and agents", 0)
        url = await stack.enter_async_context(_router(run))
        stack.enter_context(_agents(run))
        await stack.enter_async_context(_iterations(run))
        energy = EnergyRecorder(_gpus(run), run.clock, run.directory / ENERGY)
        stack.callback(energy.close)
        state["is_power_measured"] = energy.is_measured
        progress("warming up", 0)
        await _warm_up(run, url)
        gc.collect()
        gc.freeze()  # a collection that walks every library's objects would send requests late
        start_ns = time.monotonic_ns()
        state["start_s"] = (start_ns - run.clock.start_ns) * 1e-9
        write_json(state, run.directory / STATE)
        generator = LoadGenerator(
            workload,
            _load_config(run, url, start_ns),
            RunClock(start_ns=start_ns),
            run.directory / REQUESTS,
        )
        try:
            await generator.run(lambda: progress("replaying", 1))
        finally:
            write_json(state | {"load": generator.report.as_dict()}, run.directory / STATE)
        await asyncio.sleep(run.config.rest_s)  # the last records and readings are on their way


def _load_config(run: _Run, url: str, salt: int) -> LoadConfig:
    config = run.config
    return LoadConfig(
        url=url,
        seed=config.sim.seed,
        salt=salt,
        vocabulary=config.vocabulary,
        drain_s=config.drain_s,
    )


async def _warm_up(run: _Run, url: str) -> None:
    """Every pair serves a few requests, so that no measured one is a server's first."""
    pairs = max(run.config.sim.num_prefill, run.config.sim.num_decode)
    shapes = np.array(WARM_UP_TOKENS * pairs, dtype=np.int64)
    work = Workload(
        arrival_s=np.zeros(len(shapes)), input_tokens=shapes[:, 0], output_tokens=shapes[:, 1]
    )
    path = run.directory / "warm-up.jsonl"
    report: LoadReport = await LoadGenerator(
        work, _load_config(run, url, run.clock.start_ns), RunClock(), path
    ).run()
    if report.counts["completed"] != len(work):
        why = ", ".join(report.reasons) or "no reason given"
        raise VoltanaError(f"the warm-up must succeed before a replay, it did not: {why}")
    await asyncio.sleep(run.config.rest_s)


@asynccontextmanager
async def _router(run: _Run) -> AsyncIterator[str]:
    """The router as a process of its own; gives its URL."""
    keys = ("url", "bootstrap_host", "bootstrap_port", "metrics")
    tables: dict[str, list[dict[str, Any]]] = {PREFILL: [], DECODE: []}
    for worker in run.workers:
        values = {key: getattr(worker, key) for key in keys}
        tables[worker.phase].append({k: v for k, v in values.items() if v is not None})
    limits = {
        "port": 0, "events": _events(run), "reports": _reports(run), "start_ns": run.clock.start_ns,
    }  # fmt: skip
    path = run.directory / "router.toml"
    router = dict(run.config.router_limits) | limits
    whole = {"simulate": run.config.sim.as_dict(), "fleet": tables, "router": router}
    path.write_text(tomli_w.dumps(whole), encoding="utf-8")
    log = run.directory / "router.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hwreplay.router", str(path),
            stdout=subprocess.PIPE, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        if not url:
            said = log.read_text(errors="replace").strip().splitlines()
            raise VoltanaError(said[-1] if said else f"the router ended: see {log}")
        yield url
    finally:
        await _end_process(process)


async def _end_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@contextmanager
def _agents(run: _Run) -> Iterator[None]:
    """One agent a server, ready before this goes on and ended after."""
    started: list[tuple[AgentConfig, subprocess.Popen[bytes]]] = []
    try:
        for worker in run.workers:
            agent = _agent_config(run, worker)
            started.append((agent, start_agent(agent, run.directory)))
        for agent, process in started:
            await_agent(process, agent, run.directory)
        yield
    finally:
        for _, process in started:
            process.terminate()
        for _, process in started:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _agent_config(run: _Run, worker: WorkerConfig) -> AgentConfig:
    assert worker.metrics is not None
    config = run.config
    gpus = config.gpus_of(worker.phase, worker.instance_id)
    socket = run.batch_sockets.get(worker.name)
    return AgentConfig(
        phase=worker.phase,
        instance_id=worker.instance_id,
        start_ns=run.clock.start_ns,
        settings=config.sim.as_dict(),
        metrics_address=worker.metrics,
        event_address=_events(run),
        report_address=_reports(run),
        batch_socket=None if socket is None else str(socket),
        actuator_socket=None if config.actuator is None else str(config.actuator),
        gpus=gpus,
        power_w=config.power_w,
    )


@asynccontextmanager
async def _iterations(run: _Run) -> AsyncIterator[None]:
    """Each engine's iterations, appended to one file."""
    with (run.directory / ITERATIONS).open("ab", buffering=0) as out:
        tasks = [
            asyncio.create_task(record_iterations(worker, run.clock, out)) for worker in run.workers
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _gpus(run: _Run) -> dict[tuple[Phase, int], list[Gpu]]:
    """The cards of each instance; a stated power stands for those that are not there."""
    if run.config.power_w is not None:
        power_w = run.config.power_w
        return {(w.phase, w.instance_id): [ConstantPowerGpu(power_w)] for w in run.workers}
    from profiles.device.nvml import NvmlGpu

    return {
        (w.phase, w.instance_id): [
            NvmlGpu(index) for index in run.config.gpus_of(w.phase, w.instance_id)
        ]
        for w in run.workers
    }


def _agent_reports(run: _Run) -> dict[str, Any]:
    paths = ((w.name, run.directory / f"agent-{w.name}.report.json") for w in run.workers)
    return {name: read_json(path) for name, path in paths if path.exists()}


def _events(run: _Run) -> str:
    return f"ipc://{run.sockets}/events"


def _reports(run: _Run) -> str:
    return f"ipc://{run.sockets}/reports"
