"""What stands around a replay's load: router, agents and recorders, started, watched and ended."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tomli_w

from voltana.hwreplay.agent.agent import AgentConfig, await_agents, start_agents
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.replay.config import ReplayConfig
from voltana.hwreplay.replay.recording import ITERATIONS, record_iterations
from voltana.hwreplay.router.config import WorkerConfig, phases_of
from voltana.hwreplay.view.context import PolicySource, own_config
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_bytes, write_text
from voltana.profiles.device.cards import open_gpus
from voltana.profiles.device.gpu import Gpu
from voltana.sim.policies.base import UNLOCKED_MHZ, Phase
from voltana.sim.results import read_json

END_S: Final = 10.0
WATCH_S: Final = 0.2
"""Between two looks at the agents."""


@dataclass(slots=True, kw_only=True)
class Run:
    """What the parts of one replay share."""

    config: ReplayConfig
    directory: Path
    sockets: Path
    clock: RunClock
    workers: tuple[WorkerConfig, ...]
    batch_sockets: dict[str, Path]
    vocab_size: int | None
    """Of the model; None: not known."""
    has_fleet_view: bool
    """Whether a controller looks at the whole fleet: all agents are one process then."""
    servers: list[Server] = field(default_factory=list)
    """Those that were started here."""
    faults: list[str] = field(default_factory=list)
    """What makes the run incomplete though it went on."""

    @property
    def events(self) -> str:
        """ZMQ address of the router's events."""
        return f"ipc://{self.sockets}/events"

    @property
    def reports(self) -> str:
        """ZMQ address of the agents' reports."""
        return f"ipc://{self.sockets}/reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRouter:
    """The router's process."""

    url: str
    process: asyncio.subprocess.Process

    def begin_anew(self) -> None:
        """Let its policy be as it was at first, its random numbers too."""
        self.process.send_signal(signal.SIGHUP)


@asynccontextmanager
async def router(run: Run) -> AsyncIterator[StartedRouter]:
    """The router as a process of its own.

    Raises:
        VoltanaError: It ended instead; the last line of its log.
    """
    path = write_router_file(run, port=0)
    log = run.directory / "router.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "voltana.hwreplay.router", str(path),
            stdout=subprocess.PIPE, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        if not url:
            said = log.read_text(errors="replace").strip().splitlines()
            raise VoltanaError(said[-1] if said else f"the router ended: see {log}")
        yield StartedRouter(url=url, process=process)
    finally:
        await end_process(process)


def write_router_file(run: Run, **limits: object) -> Path:
    """Write the router's configuration; `limits` win over those of the run's [router]."""
    keys = ("url", "bootstrap_host", "bootstrap_port", "metrics")
    tables: dict[str, list[dict[str, Any]]] = {phase: [] for phase in phases_of(run.workers)}
    for worker in run.workers:
        values = {key: getattr(worker, key) for key in keys}
        tables[worker.phase].append({k: v for k, v in values.items() if v is not None})
    own = {"events": run.events, "reports": run.reports, "start_ns": run.clock.start_ns}
    sizes = {} if run.vocab_size is None else {"vocab_size": run.vocab_size}
    whole = {
        "simulate": run.config.sim.as_dict(),
        "fleet": tables,
        "router": dict(run.config.router_limits) | sizes | own | limits,
    }
    path = run.directory / "router.toml"
    write_text(tomli_w.dumps(whole), path)
    return path


async def end_process(process: asyncio.subprocess.Process, limit_s: float = END_S) -> None:
    """Ask a process to end, and kill it where it does not within `limit_s`."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(limit_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def observes_fleet(config: ReplayConfig, profile: Profile | None = None) -> bool:
    """Whether a controller of the configuration looks at other instances than its own.

    Every policy is made once for it, the router too: before any server is started.

    Args:
        config: What is to run.
        profile: The configuration's, where it is loaded already: models made of it are kept.

    Raises:
        VoltanaError: A policy cannot be made, there is no such profile, or cards are unlike.
    """
    profile = profile or load_profile(config.sim.profile)
    PolicySource(config=config.sim, profile=profile).make_router()  # it may look at all
    source = PolicySource(config=config.sim, profile=profile)
    for phase in config.sim.counts:
        source.make_controller(phase, 0)
    if source.cluster.is_observed and config.sim.mixed_profiles:
        raise VoltanaError(
            "a controller that sees the whole fleet is replayed on like cards, got "
            f"{' and '.join(f'{phase}_profiles' for phase in config.sim.mixed_profiles)}: take "
            "another controller, or leave them out"
        )
    return source.cluster.is_observed


@asynccontextmanager
async def agents(run: Run) -> AsyncIterator[None]:
    """The agents, ready before this goes on, watched meanwhile and ended after.

    One process an instance; one for all where a controller looks at the whole fleet.
    """
    groups = agent_groups(run)
    with _agent_processes(run, groups) as started:
        watch = asyncio.create_task(_watch(run, started))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


def agent_groups(run: Run) -> list[list[AgentConfig]]:
    """The agents of a run by process."""
    configs = [_agent_config(run, worker) for worker in run.workers]
    return [configs] if run.has_fleet_view else [[config] for config in configs]


Started = list[tuple[list[AgentConfig], subprocess.Popen[bytes]]]


@contextmanager
def _agent_processes(run: Run, groups: Sequence[list[AgentConfig]]) -> Iterator[Started]:
    started: Started = []
    try:
        for group in groups:
            started.append((group, start_agents(group, run.directory)))
        for group, process in started:
            await_agents(process, group, run.directory)
        yield started
    finally:
        for _, process in started:
            process.terminate()
        for _, process in started:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _watch(run: Run, started: Started) -> None:
    """Write down which agents end before they are asked to."""
    living = list(started)
    while living:
        for group, process in list(living):
            if process.poll() is not None:
                living.remove((group, process))
                for config in group:
                    _note_end(run, config, process.returncode)
        await asyncio.sleep(WATCH_S)


def _note_end(run: Run, config: AgentConfig, code: int) -> None:
    at_s = run.clock.now_s()
    fault = f"{config.name} ended with {code} at {at_s:.1f} s, its clock was unlocked from then on"
    run.faults.append(fault)
    sys.stderr.write(f"voltana: {fault}: the run counts as incomplete\n")
    path = run.directory / f"{config.name}.clocks.jsonl"
    whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    line = f'{{"at_s": {at_s}, "clock_mhz": {UNLOCKED_MHZ}}}\n'
    write_bytes(whole[0] + whole[1] + line.encode(), path)


def _agent_config(run: Run, worker: WorkerConfig) -> AgentConfig:
    assert worker.metrics is not None
    config = run.config
    socket = run.batch_sockets.get(worker.name)
    return AgentConfig(
        phase=worker.phase,
        instance_id=worker.instance_id,
        start_ns=run.clock.start_ns,
        settings=own_config(config.sim, worker.phase, worker.instance_id).as_dict(),
        metrics_address=worker.metrics,
        event_address=run.events,
        report_address=run.reports,
        batch_socket=None if socket is None else str(socket),
        actuator_socket=None if config.actuator is None else str(config.actuator),
        gpus=config.gpus_of(worker.phase, worker.instance_id),
        power_w=config.power_w,
    )


Recorders = dict[str, "asyncio.Task[None]"]
"""By instance, what writes its iterations down."""


@asynccontextmanager
async def iterations(run: Run) -> AsyncIterator[Recorders]:
    """Each engine's iterations, appended to one file."""
    with (run.directory / ITERATIONS).open("ab", buffering=0) as out:
        tasks = {
            worker.name: asyncio.create_task(record_iterations(worker, run.clock, out))
            for worker in run.workers
        }
        try:
            yield tasks
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)


def check_recorders(recorders: Recorders) -> None:
    """Refuse to go on without a record of every engine.

    Raises:
        VoltanaError: A recorder has ended; it does so by an error alone.
    """
    for name, task in recorders.items():
        if task.done() and not task.cancelled():
            error = task.exception()
            raise VoltanaError(
                f"the iterations of {name} must be recorded to the end of a run, recording them "
                f"failed ({type(error).__name__}: {error}): mend that and replay again"
            )


def gpus_of(run: Run) -> dict[tuple[Phase, int], list[Gpu]]:
    """The cards of each instance; a stated power stands for those that are not there."""
    keys = [(w.phase, w.instance_id) for w in run.workers]
    return {key: open_gpus(run.config.gpus_of(*key), run.config.power_w) for key in keys}


def agent_reports(run: Run) -> dict[str, Any]:
    """What each agent left at its end, by instance."""
    paths = ((w.name, run.directory / f"agent-{w.name}.report.json") for w in run.workers)
    return {name: read_json(path) for name, path in paths if path.exists()}
