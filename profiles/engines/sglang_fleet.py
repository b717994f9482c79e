"""Where the profiler's SGLang servers come from: started here, or running already."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from profiles.engines.reaper import Reaper
from profiles.engines.sglang_client import Endpoint, Servers
from profiles.engines.sglang_server import (
    CPU_ARGUMENTS,
    CPU_DECODE_ARGUMENTS,
    CPU_ENVIRONMENT,
    HOST,
    PAIR_ARGUMENTS,
    end,
    free_port,
    metrics_arguments,
    spawn,
    wait_ready,
)
from profiles.errors import VoltanaError

CPU_KV_TOKENS: Final = "65536"
"""Far more than a point needs: the reserve for each request shall not keep a batch small."""
GPU_ARGUMENTS: Final = ("--chunked-prefill-size", "16384")
"""As many tokens as the longest prompt of the grid: the engine's own chunk of 2,048 to 8,192 would
split it into several passes."""
UNIFIED: Final = "unified"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedServer:
    """A server process of this run."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    endpoint: Endpoint
    shared_memory: set[Path] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """What to start."""

    python: Path
    """Of the environment that SGLang is installed in."""
    model: str
    """Folder or name, as SGLang takes it."""
    logs: Path
    is_cpu: bool
    is_pair: bool
    """Prefill and decode apart, KV transferred, as the replay harness serves; else one server."""
    num_gpus: int = 1
    """Cards that the model is split over (tensor parallelism)."""
    arguments: str = ""
    """Further arguments for every server."""
    start_s: float = 600.0


@contextmanager
def start_servers(plan: LaunchPlan) -> Iterator[Servers]:
    """Start servers, wait until they are ready, and end them on exit; on SIGKILL a reaper does.

    Raises:
        VoltanaError: No such Python, or a server ended or was too late.
    """
    if shutil.which(str(plan.python)) is None:
        raise VoltanaError(
            f"--server-python must be a Python with SGLang, got {plan.python}: on a CPU run "
            "`make engine`, with a GPU `pip install sglang`"
        )
    plan.logs.mkdir(parents=True, exist_ok=True)
    sockets = Path(tempfile.mkdtemp(prefix="voltana-"))  # a socket's path must be short
    started: list[StartedServer] = []
    with Reaper() as reaper:
        try:
            for role in ("prefill", "decode") if plan.is_pair else (UNIFIED,):
                started.append(_start(plan, role, sockets))
                reaper.guard(started[-1].process.pid)
            wait_ready(started, plan.start_s)
            for server in started:
                reaper.guard(server.process.pid, server.shared_memory)
            yield Servers(prefill=started[0].endpoint, decode=started[-1].endpoint)
        finally:
            end(started)
            for server in started:
                reaper.release(server.process.pid)
            shutil.rmtree(sockets, ignore_errors=True)


@contextmanager
def attach(path: Path) -> Iterator[Servers]:
    """Servers that run already, from a TOML file; they are left running.

    The file has `[[fleet.prefill]]` and `[[fleet.decode]]` as for `voltana replay` (the first of
    each is taken), or one `[[fleet.unified]]`; each with `url` and `metrics` (its ZMQ address), a
    prefill server with `bootstrap_port`.

    Raises:
        VoltanaError: The file cannot be read or lacks something.
    """
    try:
        fleet = tomllib.loads(path.read_text(encoding="utf-8")).get("fleet", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    if UNIFIED in fleet:
        found = _endpoint(fleet, UNIFIED, path)
        yield Servers(prefill=found, decode=found)
    else:
        prefill, decode = (_endpoint(fleet, role, path) for role in ("prefill", "decode"))
        if prefill.bootstrap_port is None:
            raise VoltanaError(f"[[fleet.prefill]] must name its bootstrap_port ({path})")
        yield Servers(prefill=prefill, decode=decode)


def _endpoint(fleet: dict[str, Any], role: str, path: Path) -> Endpoint:
    entries = fleet.get(role)
    first = entries[0] if isinstance(entries, list) and entries else None
    if not isinstance(first, dict) or not {"url", "metrics"} <= first.keys():
        raise VoltanaError(
            f"[[fleet.{role}]] must be there and name url and metrics ({path}): "
            'e.g. url = "http://127.0.0.1:30000", metrics = "ipc:///tmp/decode.0"'
        )
    port = first.get("bootstrap_port")
    return Endpoint(
        url=str(first["url"]).rstrip("/"),
        metrics=str(first["metrics"]),
        bootstrap_port=None if port is None else int(port),
    )


def _start(plan: LaunchPlan, role: str, sockets: Path) -> StartedServer:
    port = free_port()
    published, metrics = metrics_arguments(role, sockets)
    arguments = ["--model-path", plan.model, "--port", str(port), *published]
    arguments += ["--disable-radix-cache", "--skip-tokenizer-init", "--host", HOST]
    if plan.is_cpu:
        arguments += [*CPU_ARGUMENTS, "--max-total-tokens", CPU_KV_TOKENS]
    else:
        arguments += [*GPU_ARGUMENTS, "--tp-size", str(plan.num_gpus)]
    bootstrap_port = free_port() if role == "prefill" else None
    if role != UNIFIED:
        arguments += ["--disaggregation-mode", role, *PAIR_ARGUMENTS]
    if bootstrap_port is not None:
        arguments += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    elif role != UNIFIED and plan.is_cpu:
        arguments += CPU_DECODE_ARGUMENTS
    arguments += shlex.split(plan.arguments)
    log = plan.logs / f"{role}.log"
    environment = os.environ | (CPU_ENVIRONMENT if plan.is_cpu else {"SGLANG_HOST_IP": HOST})
    command = (str(plan.python), "-m", "sglang.launch_server", *arguments)
    return StartedServer(
        port=port,
        process=spawn(command, environment, log),
        log=log,
        endpoint=Endpoint(
            url=f"http://{HOST}:{port}", metrics=metrics, bootstrap_port=bootstrap_port
        ),
    )
