"""The fleet: a request's way from its arrival through routing, prefill and transfer to decode.

`Fleet` knows what follows what; an agenda keeps the time (`voltana.sim.engine.agenda`), and
instances do the work (`voltana.sim.engine.prefill`, `voltana.sim.engine.decode`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count

import numpy as np

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.engine.agenda import Agenda, HeapAgenda
from voltana.sim.engine.decode import DecodeInstance
from voltana.sim.engine.instance import Instance, iteration_table
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.logs.timeline import Timeline
from voltana.sim.engine.machine import Machines
from voltana.sim.engine.physics.air import air_of
from voltana.sim.engine.physics.capped import CappedTrack
from voltana.sim.engine.physics.mixed import MixedTrack
from voltana.sim.engine.physics.noise import IterationNoise
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.physics.transfers import Transfers
from voltana.sim.engine.physics.warmth import Warmth
from voltana.sim.engine.prefill import PrefillInstance
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.colocated import colocated_kind
from voltana.sim.engine.reuse.decode import decode_kind
from voltana.sim.engine.reuse.prefill import SPARE_TOKENS, CachingPrefillInstance
from voltana.sim.engine.reuse.sessions import Sessions
from voltana.sim.policies.answers import ControllerAnswers, route
from voltana.sim.policies.base import (
    COLOCATED,
    DECODE,
    Cluster,
    Controller,
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
    Router,
)
from voltana.sim.policies.parts.prediction import OF_INSTANCES
from voltana.sim.policies.registry import make_controller, make_router
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload

_STREAMS = {"router": 1, "prefill": 2, "decode": 3, "colocated": 6}
"""Spawn keys of the policies' random streams; others are in sim.workload and sim.engine.noise."""


class Fleet:
    """One run of one configuration over one workload."""

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        requests: Iterable[Workload],
        log: RunLog,
        *,
        agenda: Agenda | None = None,
        router: Router | None = None,
        decode_controller: Callable[[PolicyContext], Controller] | None = None,
        others: Mapping[str, Profile] | None = None,
    ) -> None:
        """Make all instances and policies.

        Args:
            config: What to run.
            profile: The truth about times and power.
            requests: Parts of the workload, in order of arrival.
            log: Takes what becomes of requests.
            agenda: Keeps the time; a heap unless told.
            router: In place of the configured one.
            decode_controller: Makes one in place of the configured ones.
            others: Profiles of a mixed fleet, by the names that the configuration has for them.
        """
        self._config = config
        self.agenda: Agenda = agenda or HeapAgenda()
        self._make_decode_controller = decode_controller or partial(
            make_controller, config.decode_controller_spec
        )
        self._profile = profile
        self._requests = requests
        self._log = log
        self._sessions = log if isinstance(log, Sessions) else None
        machines = Machines(config, profile, others)
        self._machine = machines.of
        # one that does not fit the smallest is rejected, wherever it would go
        self._kv_capacity = min(
            machines.of(DECODE, i).kv_capacity_tokens for i in range(max(config.num_decode, 1))
        )
        self._cache_tokens = config.prefix_cache_tokens or 0
        self._longest_prompt = (
            self._cache_tokens - SPARE_TOKENS - 1 if self._cache_tokens else 2**62
        )
        self._is_colocated = config.num_colocated is not None
        self._cluster = Cluster()
        self._cluster.share(OF_INSTANCES, machines.models)
        self._router = router or make_router(config.router, self._context("decode", 0, "router"))
        self.prefill = [self._make_prefill(i) for i in range(config.num_prefill)]
        self.decode = [self._make_decode(i, DECODE) for i in range(config.num_decode)]
        self.decode += [self._make_decode(i, COLOCATED) for i in range(config.num_colocated or 0)]
        self._prefill_states = [p.state for p in self.prefill]
        self._decode_states = [d.state for d in self.decode]
        self._routed_decode = self._decode_states[: config.active_colocated or config.active_decode]
        self._routed_prefill = self._prefill_states[: config.active_prefill] or self._routed_decode
        self._cluster.prefill, self._cluster.decode = self._prefill_states, self._decode_states
        self.instances: list[Instance] = [*self.prefill, *self.decode]
        """Prefill instances first, then decode or colocated ones."""
        for instance in self.instances:
            instance.state.refresh = self._make_refresh(instance)
            instance.step_at, instance.call_at = self.agenda.step_at, self.agenda.call_at
        if config.engine == "reference" or self._cluster.is_observed:
            for decode in self.decode:
                decode.max_iterations = 1
        self._looks_at_load = self._router.looks_at == "load"
        self._looks_at_clocks = self._router.looks_at == "clocks"
        self._length_oracle = config.length_oracle
        self._transfers = Transfers(
            config, profile.meta.model.kv_bytes_per_token, self.agenda.call_at, self._deliver
        )
        self._is_transfer_instant = self._transfers.is_instant
        self._starts_at_arrival = (
            config.prefill_starts == "arrival" and config.serving_latency_s == 0
        )
        self._finishes_in_prefill = config.first_token == "prefill"
        self._limit_s = math.inf if config.run_limit_s is None else config.run_limit_s
        self._timeline = Timeline.make(config, self.instances)

    def run(self) -> RunRecord:
        """Play the workload to its end, or to the configured limit.

        Raises:
            VoltanaError: An iteration fell outside the profiled grid (and `extrapolate` is off).
        """
        started_ns = time.monotonic_ns()
        for request in self.start():
            self.agenda.play(min(request.arrival_s, self._limit_s))
            if request.arrival_s >= self._limit_s:
                break
            self.accept(request)
        end_s = self._drain()
        return self._record(end_s, (time.monotonic_ns() - started_ns) * 1e-9)

    def start(self) -> Iterator[SimRequest]:
        """Begin a run that the caller plays, one arrival after the other, in place of `run`.

        For each of the requests returned: `advance` to its arrival, `report`, look at the states,
        `accept` it. Then `finish`. What comes out is what `run` makes of the same decisions.
        """
        for instance in self.instances:
            instance.park(0.0)
        if self._timeline is not None:
            self._sample(0.0)
        return self._arrivals()

    def advance(self, until_s: float) -> None:
        """Let everything happen that is due before `until_s`; an arrival then comes first."""
        self.agenda.play(until_s)

    def report(self, now_s: float) -> None:
        """Bring every instance's state, as a router sees it, and the log up to date."""
        for instance in self.instances:
            instance.report(now_s)

    def finish(self) -> RunRecord:
        """End a run begun with `start`, after its last arrival."""
        return self._record(self._drain(), 0.0)

    def _drain(self) -> float:
        """Play until every request has ended, or to the limit; returns when that was."""
        self.agenda.play(self._limit_s, self._log)
        return self._limit_s if self._log.unresolved else self.agenda.now_s

    def _sample(self, now_s: float) -> None:
        assert self._timeline is not None
        self.agenda.call_at(self._timeline.sample(now_s), self._sample)

    def _arrivals(self) -> Iterator[SimRequest]:
        if self._sessions is not None:
            yield from self._sessions.begin(self.agenda.call_at, self.accept)
            return
        ids = count()
        for part in self._requests:
            if part.turns is not None:
                raise VoltanaError(f"turns of {part.name} wait, which `simulate` alone can play")
            rows = zip(
                ids,
                part.arrival_s.tolist(),
                part.input_tokens.tolist(),
                part.output_tokens.tolist(),
                strict=False,
            )
            for row in rows:
                yield SimRequest(*row)

    def accept(self, request: SimRequest) -> None:
        """The request arrives: it is rejected, or the router is asked and it is on its way."""
        now_s = self.agenda.now_s = request.arrival_s
        self.agenda.num_events += 1
        self._log.arrive(request)
        output_tokens = request.output_tokens
        input_tokens = request.input_tokens
        # as `can_hold`
        if input_tokens + output_tokens > self._kv_capacity or input_tokens > self._longest_prompt:
            self._log.reject(request)
            return
        if self._looks_at_load:
            for instance in self.instances:
                instance.look(now_s)
        elif self._looks_at_clocks:
            for instance in self.instances:
                if instance.idle_change_s <= now_s:
                    instance.look(now_s)
        view = RequestView(
            request.request_id,
            request.arrival_s,
            input_tokens,
            output_tokens if self._length_oracle else None,
            request.prompt,
        )
        at_prefill, at = route(self._router, view, self._routed_prefill, self._routed_decode)
        if self._is_colocated:
            at_prefill = at
        request.prefill_id = prefill_id = self._routed_prefill[at_prefill].instance_id
        request.decode_id = decode_id = self._routed_decode[at].instance_id
        self._log.assign(request)
        self._decode_states[decode_id].open_requests += 1
        if self._is_colocated:
            submit = partial(self.decode[decode_id].submit, request)
            self._later_by(self._config.serving_latency_s, submit, now_s)
            return
        self._prefill_states[prefill_id].open_requests += 1
        if self._starts_at_arrival:
            self.prefill[prefill_id].submit(request, now_s)
        else:
            self._expect(request, now_s)

    def _later_by(self, wait_s: float, action: Callable[[float], None], now_s: float) -> None:
        if wait_s > 0:
            self.agenda.call_at(now_s + wait_s, action)
        else:
            action(now_s)

    def _expect(self, request: SimRequest, now_s: float) -> None:
        """The request is on its way, or waits for its decode instance to end an iteration."""
        prefill, config = self.prefill[request.prefill_id], self._config
        prefill.expect(request)
        start: Callable[[float], None] = partial(prefill.admit, request)
        if config.prefill_starts == "decode_boundary":
            start = partial(self._later_by, config.handshake_latency_s, start)
            start = self.decode[request.decode_id].before_prefill(request, start)
        self._later_by(config.serving_latency_s, start, now_s)

    def can_hold(self, request: SimRequest) -> bool:
        """Whether the request fits empty instances; it is rejected if not."""
        fits = request.input_tokens + request.output_tokens <= self._kv_capacity
        return fits and request.input_tokens <= self._longest_prompt

    def _make_refresh(self, instance: Instance) -> Callable[[], None]:
        return lambda: instance.look(self.agenda.now_s)

    def hand_over(self, request: SimRequest, now_s: float) -> None:
        """Prefill is done: move the KV cache, at once or over the configured link."""
        if self._is_transfer_instant:
            self._deliver(request, now_s)
        else:
            self._transfers.send(request, now_s)

    def _deliver(self, request: SimRequest, now_s: float) -> None:
        if self._cache_tokens:
            prefill = self.prefill[request.prefill_id]
            assert isinstance(prefill, CachingPrefillInstance)
            prefill.release(request, now_s)
        if self._finishes_in_prefill and request.output_tokens == 1:
            self._log.first_token(request, now_s)
            state = self._decode_states[request.decode_id]
            state.open_requests -= 1
            state.finished_requests += 1
            state.finished_tokens += request.output_tokens
            self._log.finish(request, now_s)
            self.decode[request.decode_id].leave_out(request, now_s)
        else:
            self.decode[request.decode_id].submit(request, now_s)

    def _state(self, phase: Phase, index: int) -> InstanceState:
        tokens = self._machine(phase, index).kv_capacity_tokens
        return InstanceState(instance_id=index, phase=phase, kv_capacity_tokens=tokens)

    def _make_prefill(self, index: int) -> PrefillInstance:
        controller = make_controller(
            self._config.prefill_controller_spec, self._context("prefill", index, "prefill")
        )
        answers = self._answers(controller, "prefill", index)
        make: Callable[..., PrefillInstance] = PrefillInstance
        if self._cache_tokens:
            make = partial(CachingPrefillInstance, cache_tokens=self._cache_tokens)
        return make(
            self._config,
            self._log,
            self._state("prefill", index),
            answers,
            self._track("prefill", index, answers),
            max_tokens=self._machine("prefill", index).max_prefill_tokens,
            hand_over=self.hand_over,
        )

    def _make_decode(self, index: int, phase: Phase) -> DecodeInstance:
        controller = self._make_decode_controller(self._context(phase, index, phase))
        answers = self._answers(controller, phase, index)
        make: Callable[..., DecodeInstance] = decode_kind(self._config)
        if phase == COLOCATED:
            most = self._machine(phase, index).max_prefill_tokens
            make = partial(colocated_kind(self._config), max_tokens=most)
        return make(
            self._config,
            self._log,
            self._state(phase, index),
            answers,
            self._track(phase, index, answers),
            max_running=self._machine(phase, index).max_running,
        )

    def _answers(self, controller: Controller, phase: Phase, index: int) -> ControllerAnswers:
        clocks_mhz = self._machine(phase, index).models.clocks_mhz
        return ControllerAnswers(controller, clocks_mhz, f"{phase} {index}")

    def _track(self, phase: Phase, index: int, answers: ControllerAnswers) -> GpuTrack:
        config, machine = self._config, self._machine(phase, index)
        make: Callable[..., GpuTrack] = GpuTrack
        if config.power_cap_w is not None:
            make = partial(
                CappedTrack, cap_w=config.power_cap_w * machine.meta.model.tensor_parallel,
                time_s=config.power_cap_time_s, clocks_mhz=machine.models.clocks_mhz,
            )  # fmt: skip
        if phase == COLOCATED:
            make = partial(MixedTrack, step=machine.mixed)
        track = make(
            machine.truth,
            phase,
            clock_mhz=answers.initial_clock_mhz(),
            actuation_s=0.0 if answers.controller.acts_at_once else config.actuation_latency_s,
            # one card after the other, and each iteration waits for the last of them
            stall_s=config.clock_stall_s * machine.meta.model.tensor_parallel,
            noise=IterationNoise.make(config, machine.spread, phase, index),
        )
        if (air := air_of(config)) is not None:
            track.warm(Warmth(air, machine.meta.model.tensor_parallel))
        return track

    def _context(self, phase: Phase, index: int, stream: str) -> PolicyContext:
        seeds = np.random.SeedSequence(self._config.seed, spawn_key=(_STREAMS[stream], index))
        machine = self._machine(phase, index)
        return PolicyContext(
            predictor=machine.models.predictor,
            power=machine.models.power,
            clocks_mhz=machine.models.clocks_mhz,
            default_levels_mhz=machine.meta.clocks.default_levels_mhz,
            slo_ttft_s=self._config.aimed_ttft_s,
            slo_itl_s=self._config.aimed_itl_s,
            first_token="prefill" if self._is_colocated else self._config.first_token,
            profile_hash=machine.profile.content_hash,
            kv_capacity_tokens=machine.kv_capacity_tokens,
            rng=np.random.default_rng(seeds),
            instance_id=index,
            phase=phase,
            actuation_s=self._config.actuation_latency_s,
            num_prefill=self._config.num_colocated or self._config.num_prefill,
            num_decode=self._config.num_colocated or self._config.num_decode,
            truth=machine.truth_beyond,
            cluster=self._cluster,
        )

    def _record(self, makespan_s: float, wall_s: float) -> RunRecord:
        for instance in self.instances:
            instance.close(makespan_s)
        log = self._log
        return RunRecord(
            **log.results(makespan_s),
            instances=[i.record() for i in self.instances],
            makespan_s=makespan_s,
            slo_ttft_s=self._config.slo_ttft_s,
            slo_itl_s=self._config.slo_itl_s,
            wall_s=wall_s,
            settings=self._config.as_dict(),
            iterations=iteration_table(self.instances),
            timeline=self._timeline.columns() if self._timeline else None,
        )
