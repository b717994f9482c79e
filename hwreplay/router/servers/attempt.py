"""One server, one request on one pair, and how that can end."""

from __future__ import annotations

import asyncio
from types import TracebackType

from voltana.hwreplay.router.config import WorkerConfig
from voltana.hwreplay.router.servers.upstream import Upstream
from voltana.hwreplay.view.mirror import PrefixMirror
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.common.errors import VoltanaError


class NoWorkerError(VoltanaError):
    """No healthy pair to send a request to."""


class AttemptError(VoltanaError):
    """An attempt has come to nothing; another pair may do, unless a server was lost with it."""

    def __init__(
        self, reason: str, message: str, worker: Worker | None, *, is_final: bool = False
    ) -> None:
        """Say what went wrong.

        Args:
            reason: A word for counting.
            message: For the client.
            worker: The server to avoid, if it is known.
            is_final: Another pair is not to be asked.
        """
        super().__init__(message)
        self.reason = reason
        self.worker = worker
        self.is_final = is_final


class Attempt:
    """One request on one pair, run by the task that enters it; others can end it from outside."""

    __slots__ = ("_error", "_is_running", "_task", "asked", "silent_since_s")

    def __init__(self) -> None:
        """The current task is to run it."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._error: BaseException | None = None
        self._is_running = False
        self.asked: set[Worker] = set()
        """Servers that the request has been sent to."""
        self.silent_since_s: float | None = None
        """Since when it waits for the next piece of a stream; None while it does not."""

    def __enter__(self) -> None:
        self._is_running = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Our cancellation becomes the error it stands for; the client's stays what it is."""
        self._is_running = False
        if self._error is not None and not self._task.uncancel() and kind is asyncio.CancelledError:
            raise self._error from None

    def fail(self, error: BaseException) -> None:
        """It ends with this error where it waits now, unless it has ended."""
        if self._error is None and self._is_running:
            self._error = error
            self._task.cancel()


class Worker:
    """One server and what runs on it."""

    def __init__(
        self,
        config: WorkerConfig,
        tracker: InstanceTracker,
        upstream: Upstream,
        mirror: PrefixMirror,
    ) -> None:
        """Nothing runs there yet.

        Args:
            config: Where it is.
            tracker: Of its state, whose `count_cached` is the mirror's from now on.
            upstream: Connections to it.
            mirror: Of its cache.
        """
        self.config = config
        self.tracker = tracker
        self.upstream = upstream
        self.mirror = mirror
        tracker.state.count_cached = mirror.count
        self.attempts: set[Attempt] = set()
        self.is_healthy = True
        self.is_suspect = False
        """It should compute and shows no sign of it: new requests go elsewhere where they can."""
        self.vocab_size: int | None = None
        """Of the model that it has loaded, where it tells."""
        self.failures = 0
        self.successes = 0
        self.heard_s = 0.0
        """When it last sent anything: a server that streams is alive, its checks late or not."""
        self.check_now = asyncio.Event()
        """Set when a connection broke: do not wait for the next turn."""

    @property
    def name(self) -> str:
        return self.config.name
