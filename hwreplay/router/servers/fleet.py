"""The router's view of its fleet: which servers answer, what they have to do, whom to choose."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import aiohttp

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.energy.bills import Bills
from voltana.hwreplay.messages.agent_reports import ReportFeed
from voltana.hwreplay.messages.events import SNAPSHOT_S, Event, EventKind, EventPublisher
from voltana.hwreplay.messages.metrics_feed import MetricsFeed
from voltana.hwreplay.router.body import Body
from voltana.hwreplay.router.config import RouterConfig
from voltana.hwreplay.router.prometheus import RouterMetrics
from voltana.hwreplay.router.servers.attempt import AttemptError, NoWorkerError, Worker
from voltana.hwreplay.router.servers.health import LATE, REFUSED, ask_health
from voltana.hwreplay.router.servers.upstream import Upstream
from voltana.hwreplay.router.servers.vocabulary import ask_vocab_size
from voltana.hwreplay.view.context import PolicySource
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import MetricsError
from voltana.sim.policies.answers import route
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, InstanceState, Phase, RequestView

LOG: Final = logging.getLogger("voltana.router")
FAILURES_TO_LEAVE: Final = 2
"""Failed checks in a row that take a server out; a refused connection does so at once."""
SUCCESSES_TO_RETURN: Final = 2
RESTART_S: Final = 1.0
FALLBACK: Final = "round-robin"
"""Who routes where the policy fails."""

Pair = tuple[Worker, Worker]


class RouterFleet:
    """Chooses pairs and keeps every instance's state true. A server that does both is a pair."""

    def __init__(
        self, config: RouterConfig, source: PolicySource, metrics: RouterMetrics, clock: RunClock
    ) -> None:
        """Make the policy and the trackers; `start` opens the sockets.

        Args:
            config: Of the router.
            source: Makes routers and trackers.
            metrics: Counts what happens.
            clock: The run's.
        """
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self.bills = Bills(source, clock) if config.bills else None
        make = (self.bills or source).make_tracker
        self.workers: dict[Phase, list[Worker]] = {
            phase: [
                Worker(
                    w,
                    make(phase, w.instance_id),
                    Upstream(w.url, config.connect_s),
                    source.make_mirror(phase, w.instance_id),
                )
                for w in config.of(phase)
            ]
            for phase in config.phases
        }
        self.adopt(source)
        self._publisher = EventPublisher(config.events) if config.events else None
        self._reports: ReportFeed | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.died: dict[str, int] = {}
        """How often each background job died and was started again."""
        self._next_id = 0
        for worker in self.all_workers():
            self._show_health(worker)

    def adopt(self, source: PolicySource) -> None:
        """Route by this configuration's policy from now on."""
        self.policy = source.make_router()
        self._fallback = source.make_router(FALLBACK)
        self._has_routing_failed = False
        first, last = ([w.tracker.state for w in self.workers[p]] for p in self._config.ends)
        source.cluster.prefill, source.cluster.decode = first, last

    def all_workers(self) -> Iterable[Worker]:
        """Prefill first."""
        return [worker for workers in self.workers.values() for worker in workers]

    @property
    def vocab_size(self) -> int | None:
        """Token ids lie below, by the configuration and by every server; None if nobody tells."""
        told = [self._config.vocab_size, *(w.vocab_size for w in self.all_workers())]
        return min((size for size in told if size is not None), default=None)

    async def start(self, session: aiohttp.ClientSession) -> None:
        """Ask the servers for their vocabulary, then begin to watch them."""
        self._session = session
        await asyncio.gather(*(self._ask_vocabulary(w) for w in self.all_workers()))
        jobs: dict[str, Callable[[], Awaitable[None]]] = {}
        for worker in self.all_workers():
            jobs[f"health of {worker.name}"] = partial(self._check_health, worker)
            if worker.config.metrics:
                jobs[f"metrics of {worker.name}"] = partial(self._follow, worker)
        jobs["silence"] = self._watch_silence
        if self._publisher is not None:
            jobs["events"] = self._repeat_open
        if self._config.reports is not None:
            self._reports = ReportFeed(self._config.reports)
            jobs["reports"] = partial(self._take_reports, self._reports)
        self._tasks = [asyncio.create_task(self._keep(name, job)) for name, job in jobs.items()]

    async def stop(self) -> None:
        """End every watch."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in (self._publisher, self._reports):
            if part is not None:
                part.close()
        for worker in self.all_workers():
            worker.upstream.close()

    async def _keep(self, name: str, job: Callable[[], Awaitable[None]]) -> None:
        """Start a job again when it dies: a router that watches no more still looks healthy."""
        while True:
            try:
                await job()
            except Exception:
                LOG.exception("%s: the job died and is started again", name)
            self.died[name] = self.died.get(name, 0) + 1
            await asyncio.sleep(RESTART_S)

    def new_id(self) -> int:
        """A number for a request that names none."""
        self._next_id += 1
        return self._next_id - 1

    def choose(self, request_id: int, arrival_s: float, body: Body, excluded: set[Worker]) -> Pair:
        """Ask the policy for a pair and book the request there.

        Args:
            request_id: Of the request.
            arrival_s: On the run's clock.
            body: Tells its lengths in tokens.
            excluded: Servers that it has failed on.

        Raises:
            NoWorkerError: A phase has no healthy server left to try.
        """
        prefill, decode = (self._candidates(phase, excluded) for phase in self._config.ends)
        now_s = self._clock.now_s()
        oracle = body.max_new_tokens if self._config.sim.length_oracle and body.is_exact else None
        prompt = body.prompt() if self.policy.reads_prompts else None
        view = RequestView(request_id, arrival_s, body.input_tokens, oracle, prompt)
        first, second = self._route(
            view,
            [w.tracker.observe(now_s) for w in prefill],
            [w.tracker.observe(now_s) for w in decode],
        )
        has_both = decode[second].config.phase == COLOCATED
        pair = decode[second] if has_both else prefill[first], decode[second]
        for worker in set(pair):
            worker.tracker.on_assigned(request_id, arrival_s, body.input_tokens, oracle)
            worker.mirror.expect(request_id, prompt)
            self._publish("assigned", worker, request_id, arrival_s, body.input_tokens, oracle)
        return pair

    def _route(
        self,
        view: RequestView,
        prefill: Sequence[InstanceState],
        decode: Sequence[InstanceState],
    ) -> tuple[int, int]:
        """The policy's positions; round-robin's where it fails, which is counted."""
        try:
            return route(self.policy, view, prefill, decode)
        except VoltanaError as error:
            self._metrics.routing_errors.inc()
            if not self._has_routing_failed:  # once: a broken policy fails at every request
                self._has_routing_failed = True
                LOG.warning("%s; requests that it fails on go round-robin", error)
            return self._fallback.route(view, prefill, decode)

    def prefilled(self, pair: Pair, request_id: int) -> None:
        """The prefill server has answered."""
        now_s = self._clock.now_s()
        for worker in set(pair):
            worker.tracker.on_prefilled(request_id)
            worker.mirror.keep(request_id)
            self._publish("prefilled", worker, request_id, now_s)

    def first_token(self, worker: Worker, request_id: int, at_s: float) -> None:
        """The decode server's stream has begun.

        Args:
            worker: The decode server.
            request_id: Of the request.
            at_s: On the run's clock.
        """
        worker.tracker.on_first_token(request_id, at_s)
        self._publish("first_token", worker, request_id, at_s)

    def release(self, pair: Pair, request_id: int) -> None:
        """The request has left its pair, however it ended."""
        now_s = self._clock.now_s()
        for worker in pair:
            worker.mirror.forget(request_id)
            if request_id in worker.tracker:
                worker.tracker.on_finished(request_id)
                self._publish("finished", worker, request_id, now_s)

    def take_out(self, worker: Worker, reason: str) -> None:
        """A server does not answer: no more requests for it, and those on it are lost."""
        worker.successes = 0
        worker.vocab_size = None  # it may come back with another model
        worker.mirror.clear()
        if worker.is_healthy:
            worker.is_healthy = False
            LOG.warning("%s is out: %s", worker.name, reason)
            self._show_health(worker)
        for attempt in list(worker.attempts):
            message = f"{worker.name} is out: {reason}"
            attempt.fail(AttemptError("server_lost", message, worker))

    async def lost(self, asked: Collection[Worker]) -> list[str]:
        """Names of these servers that do not answer now: what they were asked may be the reason."""
        are_gone = await asyncio.gather(*(self._is_gone(worker) for worker in asked))
        return sorted(w.name for w, is_gone in zip(asked, are_gone, strict=True) if is_gone)

    async def _is_gone(self, worker: Worker) -> bool:
        return not worker.is_healthy or await self._ask_health(worker) is not None

    def _bring_back(self, worker: Worker) -> None:
        worker.is_healthy = True
        worker.is_suspect = False
        LOG.warning("%s is back", worker.name)
        self._show_health(worker)

    def _show_health(self, worker: Worker) -> None:
        worker.tracker.on_health(is_healthy=worker.is_healthy)
        self._metrics.healthy.labels(*self._labels(worker)).set(worker.is_healthy)

    def refresh_gauges(self) -> None:
        """Copy the states to /metrics."""
        for worker in self.all_workers():
            labels, state = self._labels(worker), worker.tracker.state
            self._metrics.open.labels(*labels).set(state.open_requests)
            self._metrics.kv_tokens.labels(*labels).set(state.kv_tokens)
            self._metrics.instances.clock_mhz.labels(*labels).set(state.clock_mhz)

    def _candidates(self, phase: Phase, excluded: set[Worker]) -> list[Worker]:
        """Healthy servers; a suspect, or one that this request failed on, only if no other is."""
        healthy = [w for w in self.workers[phase] if w.is_healthy]
        if not healthy:
            raise NoWorkerError(
                f"no {phase} server answers: all {len(self.workers[phase])} are out"
            )
        untried = [w for w in healthy if w not in excluded] or healthy
        return [w for w in untried if not w.is_suspect] or untried

    def _publish(
        self,
        kind: EventKind,
        worker: Worker,
        request_id: int,
        at_s: float,
        input_tokens: int = 0,
        output_tokens: int | None = None,
    ) -> None:
        if self._publisher is not None:
            phase, instance_id = worker.config.phase, worker.config.instance_id
            self._publisher.publish(
                Event(kind, phase, instance_id, at_s, request_id, input_tokens, output_tokens)
            )

    @staticmethod
    def _labels(worker: Worker) -> tuple[str, str]:
        return worker.config.phase, str(worker.config.instance_id)

    async def _check_health(self, worker: Worker) -> None:
        while True:
            asked_s = self._clock.now_s()
            problem = await self._ask_health(worker)
            if problem is not None and problem.startswith(LATE) and worker.heard_s > asked_s:
                problem = None
            if problem is None:
                await self._on_answer(worker)
            else:
                worker.failures += 1
                worker.successes = 0
                if worker.failures >= FAILURES_TO_LEAVE or problem.startswith(REFUSED):
                    self.take_out(worker, problem)
            worker.check_now.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(worker.check_now.wait(), self._config.health_period_s)

    async def _on_answer(self, worker: Worker) -> None:
        worker.failures = 0
        worker.successes += 1
        await self._ask_vocabulary(worker)
        if not worker.is_healthy and worker.successes >= SUCCESSES_TO_RETURN:
            self._bring_back(worker)

    async def _ask_vocabulary(self, worker: Worker) -> None:
        """Once; a server that does not tell is asked again at its next check."""
        if worker.vocab_size is None and self._config.vocab_size is None:
            timeout = aiohttp.ClientTimeout(total=self._config.health_timeout_s)
            worker.vocab_size = await ask_vocab_size(self._session, worker.config.url, timeout)

    async def _ask_health(self, worker: Worker) -> str | None:
        """What is wrong with a server; None if it answers."""
        url = worker.config.url.rstrip("/") + self._config.health_path
        timeout = aiohttp.ClientTimeout(total=self._config.health_timeout_s)
        return await ask_health(self._session, url, timeout)

    async def _watch_silence(self) -> None:
        """End streams that stand still; offer silent servers last."""
        while True:
            await asyncio.sleep(min(self._config.health_period_s, self._config.stall_s / 4))
            now_s = self._clock.now_s()
            for worker in self.all_workers():
                self._end_stalled(worker, now_s)
                self._suspect(worker, now_s)

    def _end_stalled(self, worker: Worker, now_s: float) -> None:
        limit_s = self._config.stall_s
        for attempt in list(worker.attempts):
            since_s = attempt.silent_since_s
            streams = worker.config.phase != PREFILL
            if streams and since_s is not None and now_s - since_s > limit_s:
                text = f"{worker.name} has sent nothing for {limit_s:g} s in the middle of a stream"
                attempt.fail(AttemptError("stalled", text, worker, is_final=True))

    def _suspect(self, worker: Worker, now_s: float) -> None:
        """Silence of a server that has something to compute. SGLang says nothing while it waits.

        Of a decode server that is a stream that has begun; a request in prefill, or whose KV is on
        its way, is none. Of a prefill server it is any request: one that waits for room in decode
        may be suspected wrongly, and loses nothing by it but new requests.
        """
        since_s = self._waits_since_s(worker)
        last = worker.tracker.last_record
        heard_s = max(worker.heard_s, last.received_s if last is not None else 0.0)
        is_suspect = since_s is not None and now_s - max(since_s, heard_s) > self._config.stale_s
        if is_suspect != worker.is_suspect:
            worker.is_suspect = is_suspect
            text = "is silent, new requests go elsewhere" if is_suspect else "is heard again"
            LOG.warning("%s %s", worker.name, text)
        self._metrics.suspect.labels(*self._labels(worker)).set(is_suspect)

    @staticmethod
    def _waits_since_s(worker: Worker) -> float | None:
        """Since when something waits to be computed here; None if nothing does."""
        prompts = worker.tracker.state.list_waiting() if worker.config.phase != DECODE else ()
        streams = worker.attempts if worker.config.phase != PREFILL else ()
        since = [*(p.arrival_s for p in prompts), *(a.silent_since_s for a in streams)]
        return min((at_s for at_s in since if at_s is not None), default=None)

    async def _follow(self, worker: Worker) -> None:
        assert worker.config.metrics is not None
        async with MetricsFeed(worker.config.metrics, self._clock) as feed:
            while True:
                try:
                    worker.tracker.on_iteration(await feed.receive())
                except MetricsError as error:
                    LOG.warning("%s: %s", worker.name, error)

    async def _repeat_open(self) -> None:
        assert self._publisher is not None
        while True:
            await asyncio.sleep(SNAPSHOT_S)
            now_s = self._clock.now_s()
            for worker in self.all_workers():
                config = worker.config
                ids = tuple(worker.tracker.open_ids())
                self._publisher.publish(
                    Event("open", config.phase, config.instance_id, now_s, open_ids=ids)
                )

    async def _take_reports(self, feed: ReportFeed) -> None:
        while True:
            with suppress(VoltanaError):  # a stray message is no reason to stop
                report = await feed.receive()
                if 0 <= report.instance_id < len(self.workers[report.phase]):
                    worker = self.workers[report.phase][report.instance_id]
                    worker.tracker.on_clock(report.clock_mhz)
                    if report.energy_j is not None:
                        worker.tracker.on_energy(report.energy_j)
                    self._metrics.instances.take(report)
                    if self.bills is not None:
                        self.bills.on_report(report)
