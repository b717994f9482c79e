"""Where the points of a sweep are run: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import importlib
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Final, Protocol

from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.metrics import summarise
from voltana.sim.policies.registry import registered

EXECUTORS: Final = ("processes", "ray")
RAY_ADDRESS: Final = "RAY_ADDRESS"
_CONNECT_S: Final = 10.0
_RETRIES: Final = 5
"""How often Ray runs a point again whose worker or node is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a point ended: one of the three."""

    summary: dict[str, Any] | None = None
    error: str | None = None
    is_lost: bool = False
    """Its process died, perhaps not by its own fault."""


class Executor(Protocol):
    """Runs configurations side by side."""

    @property
    def capacity(self) -> int:
        """Points to hand over at a time: enough to keep every worker busy."""
        ...

    def submit(self, key: str, config: SimConfig) -> None:
        """Start a point."""

    def wait(self) -> list[tuple[str, Outcome]]:
        """The points that have ended since, at least one; there must be some that run."""
        ...


def run_point(config: SimConfig) -> Outcome:
    """Run one point here. Whatever goes wrong in it is its outcome, and no other point's."""
    try:
        return Outcome(summary=summarise(run(config)))
    except VoltanaError as error:
        return Outcome(error=str(error))
    except Exception as error:  # noqa: BLE001 (a policy is anybody's code)
        return Outcome(error=_in_one_line(error))


class SerialExecutor:
    """In this process, one after the other."""

    capacity = 1

    def __init__(self) -> None:
        self._ended: list[tuple[str, Outcome]] = []

    def submit(self, key: str, config: SimConfig) -> None:
        self._ended.append((key, run_point(config)))

    def wait(self) -> list[tuple[str, Outcome]]:
        ended, self._ended = self._ended, []
        return ended


class ProcessExecutor:
    """Processes of this machine. When one dies all that run are lost, and new ones are started."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self.capacity = 2 * jobs
        self._pool = make_pool(jobs)
        self._keys: dict[Future[Outcome], str] = {}

    def submit(self, key: str, config: SimConfig) -> None:
        try:
            future = self._pool.submit(run_point, config)
        except BrokenProcessPool:
            self._pool = make_pool(self._jobs)
            future = self._pool.submit(run_point, config)
        self._keys[future] = key

    def wait(self) -> list[tuple[str, Outcome]]:
        done, _ = wait(self._keys, return_when=FIRST_COMPLETED)
        return [(self._keys.pop(future), _outcome(future)) for future in done]

    def close(self) -> None:
        """End the processes; what runs is given up."""
        self._pool.shutdown(cancel_futures=True)


class RayExecutor:
    """The Ray cluster that `RAY_ADDRESS` names. A lost worker's or node's points run again."""

    def __init__(self) -> None:
        try:
            self._ray = importlib.import_module("ray")
        except ImportError:
            raise VoltanaError("engine ray needs Ray: pip install 'voltana[ray]'") from None
        address = os.environ.get(RAY_ADDRESS)
        if not address:
            raise VoltanaError(
                f"engine ray needs a cluster: set {RAY_ADDRESS} to its address (host:port), "
                "or to auto on a machine of the cluster"
            )
        self._is_mine = not self._ray.is_initialized()
        if self._is_mine:
            self._connect(address)
        self._remote = self._ray.remote(max_retries=_RETRIES)(run_point)
        self._keys: dict[Any, str] = {}

    def _connect(self, address: str) -> None:
        _require_listener(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = str(error).strip().splitlines()[0]
            raise VoltanaError(f"no Ray cluster at {RAY_ADDRESS}={address}: {text}") from None

    @property
    def capacity(self) -> int:
        """Two points for every CPU that the cluster has at present."""
        return 2 * max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, key: str, config: SimConfig) -> None:
        self._keys[self._remote.remote(config)] = key

    def wait(self) -> list[tuple[str, Outcome]]:
        done, _ = self._ray.wait(list(self._keys), num_returns=1)
        return [(self._keys.pop(handle), self._outcome(handle)) for handle in done]

    def close(self) -> None:
        """Leave the cluster, unless somebody else came first; what runs is cancelled."""
        for handle in self._keys:
            self._ray.cancel(handle, force=True)
        if self._is_mine:
            self._ray.shutdown()

    def _outcome(self, handle: object) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:  # not even its result could be sent
            return Outcome(error=_in_one_line(error.cause))
        except self._ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[0]
            return Outcome(error=f"lost on the cluster {_RETRIES + 1} times: {text}")
        return outcome


def check_executor(name: str) -> None:
    """Raise VoltanaError if there is no executor of that name."""
    if name not in EXECUTORS:
        raise VoltanaError(f"engine must be one of {', '.join(EXECUTORS)}, got {name!r}")


@contextmanager
def open_executor(name: str, jobs: int) -> Iterator[Executor]:
    """Open the executor with this name; `processes` gets `jobs` of them.

    Raises:
        VoltanaError: There is no such executor, or no cluster for it.
    """
    check_executor(name)
    if name == "processes" and jobs == 1:
        yield SerialExecutor()
        return
    executor: ProcessExecutor | RayExecutor
    executor = ProcessExecutor(jobs) if name == "processes" else RayExecutor()
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def staying_connected(name: str) -> Iterator[None]:
    """Hold on to a cluster, whose workers stay warm, over several executors of that name.

    Raises:
        VoltanaError: As of `open_executor`.
    """
    if name != "ray":
        yield
        return
    with open_executor(name, 1):
        yield


def _require_listener(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a name of Ray's own, such as auto
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise VoltanaError(f"no Ray cluster at {RAY_ADDRESS}={address}: {error}") from None


def make_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that know what this one has registered: forked, where it has."""
    has_own = any(registered(kind) for kind in ("controller", "router"))
    # an interrupt ends a worker at once and without a traceback
    return ProcessPoolExecutor(
        jobs, mp_context=get_context("fork") if has_own else None,
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(is_lost=True)
    except Exception as error:  # noqa: BLE001 (the point or its result did not pickle)
        return Outcome(error=_in_one_line(error))


def _in_one_line(error: BaseException) -> str:
    """Type and text of an error that no rule of ours words."""
    return " ".join(f"{type(error).__name__}: {error}".split())
