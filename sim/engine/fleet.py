"""The fleet: arrivals, routing, prefill, KV transfer, decode; one SimPy environment a run."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
import simpy

from profiles.catalog import Profile
from profiles.errors import VoltanaError
from sim.config import SimConfig
from sim.engine.decode import DecodeInstance
from sim.engine.instance import Instance
from sim.engine.prefill import PrefillInstance
from sim.engine.request import RunLog, SimRequest
from sim.engine.timeline import Timeline
from sim.policies.base import Cluster, InstanceState, Phase, PolicyContext, RequestView
from sim.policies.prediction import ScaledPredictor
from sim.policies.registry import make_controller, make_router
from sim.records import IterationTable, RunRecord
from sim.workload.workload import Workload

_STREAMS = {"router": 1, "prefill": 2, "decode": 3}
"""Spawn keys of the policies' random streams; the workload's own streams are in sim.workload."""


class Fleet:
    """One run of one configuration over one workload."""

    def __init__(self, config: SimConfig, profile: Profile, workload: Workload) -> None:
        self._config = config
        self._profile = profile
        self._workload = workload
        self._truth = profile.truth(extrapolate=config.extrapolate)
        self._predictor = ScaledPredictor.wrap(
            profile.predictor() if config.predictor == "ecopred" else self._truth,
            config.predictor_scale,
        )
        self.env = simpy.Environment()
        self._log = RunLog(self.env, workload)
        engine = profile.meta.engine
        self._kv_capacity = config.kv_capacity_tokens or engine.kv_capacity_tokens
        self._max_prefill_tokens = config.max_prefill_tokens or engine.max_prefill_tokens
        self._max_running = config.max_running_requests or engine.max_running_requests
        self._cluster = Cluster()
        self._router = make_router(config.router, self._context("decode", 0, "router"))
        self.prefill = [self._make_prefill(i) for i in range(config.num_prefill)]
        self.decode = [self._make_decode(i) for i in range(config.num_decode)]
        self._prefill_states = [p.state for p in self.prefill]
        self._decode_states = [d.state for d in self.decode]
        self._cluster.prefill, self._cluster.decode = self._prefill_states, self._decode_states
        self._timeline = Timeline.start(config, self.env, self.instances)

    @property
    def instances(self) -> list[Instance]:
        """Prefill instances first, then decode."""
        return [*self.prefill, *self.decode]

    def run(self) -> RunRecord:
        """Play the workload to its end, or to the configured limit.

        Raises:
            VoltanaError: An iteration fell outside the profiled grid (and `extrapolate` is off).
        """
        started_ns = time.monotonic_ns()
        env = self.env
        for instance in self.instances:
            env.process(instance.process())
        env.process(self._arrivals())
        until: simpy.Event = self._log.all_resolved
        if self._config.run_limit_s is not None:
            until = until | env.timeout(self._config.run_limit_s)
        env.run(until=until)
        for instance in self.instances:
            instance.settle(env.now)
        return self._record(env.now, (time.monotonic_ns() - started_ns) * 1e-9)

    def _arrivals(self) -> Generator[simpy.Event, None, None]:
        env, workload = self.env, self._workload
        rows = zip(
            workload.arrival_s.tolist(),
            workload.input_tokens.tolist(),
            workload.output_tokens.tolist(),
            strict=True,
        )
        for request_id, (arrival_s, input_tokens, output_tokens) in enumerate(rows):
            delay_s = arrival_s - env.now
            if delay_s > 0:
                yield env.timeout(delay_s)
            self._arrive(SimRequest(request_id, arrival_s, input_tokens, output_tokens))

    def _arrive(self, request: SimRequest) -> None:
        if request.input_tokens + request.output_tokens > self._kv_capacity:
            self._log.reject(request.request_id)
            return
        now_s = self.env.now
        for instance in self.prefill:
            instance.sync(now_s)
        for decoder in self.decode:
            decoder.sync(now_s)
        view = RequestView(
            request.request_id,
            request.arrival_s,
            request.input_tokens,
            request.output_tokens if self._config.length_oracle else None,
        )
        prefill_id, decode_id = self._router.route(view, self._prefill_states, self._decode_states)
        request.decode_id = decode_id
        self._log.prefill_id[request.request_id] = prefill_id
        self._log.decode_id[request.request_id] = decode_id
        self._prefill_states[prefill_id].open_requests += 1
        self._decode_states[decode_id].open_requests += 1
        self.prefill[prefill_id].submit(request)

    def _hand_over(self, request: SimRequest) -> None:
        """Prefill is done: move the KV cache, at once or over the configured link."""
        config = self._config
        delay_s = config.kv_transfer_latency_s
        if config.kv_transfer_bytes_per_s is not None:
            kv_bytes = request.input_tokens * self._profile.meta.model.kv_bytes_per_token
            delay_s += kv_bytes / config.kv_transfer_bytes_per_s
        if delay_s > 0:
            self.env.timeout(delay_s).callbacks.append(lambda _: self._deliver(request))
        else:
            self._deliver(request)

    def _deliver(self, request: SimRequest) -> None:
        if self._config.first_token == "prefill" and request.output_tokens == 1:
            self._log.first_token_s[request.request_id] = self.env.now
            self._decode_states[request.decode_id].open_requests -= 1
            self._log.finish(request.request_id, self.env.now)
        else:
            self.decode[request.decode_id].submit(request)

    def _state(self, phase: Phase, index: int) -> InstanceState:
        return InstanceState(instance_id=index, phase=phase, kv_capacity_tokens=self._kv_capacity)

    def _make_prefill(self, index: int) -> PrefillInstance:
        controller = make_controller(
            self._config.prefill_controller_spec, self._context("prefill", index, "prefill")
        )
        return PrefillInstance(
            self.env,
            self._config,
            self._log,
            self._state("prefill", index),
            controller,
            self._truth,
            max_tokens=self._max_prefill_tokens,
            hand_over=self._hand_over,
        )

    def _make_decode(self, index: int) -> DecodeInstance:
        controller = make_controller(
            self._config.decode_controller_spec, self._context("decode", index, "decode")
        )
        return DecodeInstance(
            self.env,
            self._config,
            self._log,
            self._state("decode", index),
            controller,
            self._truth,
            max_running=self._max_running,
        )

    def _context(self, phase: Phase, index: int, stream: str) -> PolicyContext:
        seeds = np.random.SeedSequence(self._config.seed, spawn_key=(_STREAMS[stream], index))
        clocks = self._profile.meta.clocks
        return PolicyContext(
            predictor=self._predictor,
            power=self._truth,
            clocks_mhz=clocks.supported_mhz,
            default_levels_mhz=clocks.default_levels_mhz,
            slo_ttft_s=self._config.slo_ttft_s,
            slo_itl_s=self._config.slo_itl_s,
            profile_hash=self._profile.content_hash,
            kv_capacity_tokens=self._kv_capacity,
            rng=np.random.default_rng(seeds),
            instance_id=index,
            phase=phase,
            actuation_s=self._config.actuation_latency_s,
            num_prefill=self._config.num_prefill,
            num_decode=self._config.num_decode,
            cluster=self._cluster,
        )

    def _record(self, makespan_s: float, wall_s: float) -> RunRecord:
        log = self._log
        return RunRecord(
            requests=log.table(),
            itl_s=np.array(log.gap_s),
            itl_weight=np.array(log.gap_weight, dtype=np.int64),
            instances=[i.record() for i in self.instances],
            makespan_s=makespan_s,
            slo_ttft_s=self._config.slo_ttft_s,
            slo_itl_s=self._config.slo_itl_s,
            wall_s=wall_s,
            settings=self._config.as_dict(),
            iterations=_iteration_table(self.instances),
            timeline=self._timeline.columns() if self._timeline else None,
        )


def _iteration_table(instances: list[Instance]) -> IterationTable | None:
    rows = [row for i in instances for row in i.iteration_rows or ()]
    if not rows:
        return None
    rows.sort(key=lambda row: row[2])
    columns = list(zip(*rows, strict=True))
    ids, batch, tokens, clocks = (np.array(columns[k], dtype=np.int64) for k in (1, 4, 5, 6))
    return IterationTable(
        phase=np.array(columns[0]),
        instance_id=ids,
        start_s=np.array(columns[2]),
        duration_s=np.array(columns[3]),
        batch_size=batch,
        tokens=tokens,
        clock_mhz=clocks,
        energy_j=np.array(columns[7]),
    )


def simulate(config: SimConfig, profile: Profile, workload: Workload) -> RunRecord:
    """Run one configuration; the same arguments give the same record but for `wall_s`."""
    if not len(workload):
        raise VoltanaError(f"workload {workload.name!r} has no requests: nothing to simulate")
    return Fleet(config, profile, workload).run()
