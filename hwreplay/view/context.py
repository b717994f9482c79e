"""Policies for a real fleet: the objects of the simulator, made from the same configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import numpy as np

from voltana.hwreplay.view.colocated import ColocatedTracker
from voltana.hwreplay.view.mirror import PrefixMirror, cache_tokens
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import (
    COLOCATED,
    DECODE,
    PREFILL,
    Cluster,
    Controller,
    Phase,
    PolicyContext,
    PowerModel,
    Predictor,
    Router,
)
from voltana.sim.policies.parts.prediction import (
    OF_INSTANCES,
    Models,
    ScaledPredictor,
    SkewedPower,
)
from voltana.sim.policies.registry import make_controller, make_router

T = TypeVar("T", bound=InstanceTracker)
STREAMS: Final = {"router": 1, "prefill": 2, "decode": 3, "colocated": 6}
"""Spawn keys of the policies' random streams, as in `voltana.sim.engine.fleet`."""


def decides_before(config: SimConfig, phase: Phase) -> bool:
    """Whether a phase's controllers see the batch about to run, and not the one that has ended."""
    if phase == COLOCATED:  # in simulation too they are asked about the iteration to come
        return True
    return (config.prefill_metrics if phase == PREFILL else config.decode_metrics) == "before"


def check_notices(config: SimConfig, phase: Phase, name: str, *, has_socket: bool) -> None:
    """Refuse decisions on a batch about to run where nobody announces it.

    Args:
        config: Says when each phase decides.
        phase: Of the instance.
        name: Of the instance, for the message.
        has_socket: Whether its engine announces batches.

    Raises:
        VoltanaError: The configuration asks for them and there is no socket for the notices.
    """
    if decides_before(config, phase) and not has_socket:
        if phase == COLOCATED:
            raise VoltanaError(
                "a colocated server must announce its batches, as its controller decides on that "
                f"before it runs, {name} has no batch socket: name it in [fleet] batch_sockets"
            )
        raise VoltanaError(
            f'{phase}_metrics = "before" needs an engine that announces its batches, {name} has no '
            f'batch socket: name it in [fleet] batch_sockets, or set {phase}_metrics = "after" '
            "for simulation and replay"
        )


@dataclass(slots=True, kw_only=True)
class PolicySource:
    """Makes a configuration's router, controllers and trackers; one object for one run."""

    config: SimConfig
    profile: Profile
    cluster: Cluster = field(default_factory=Cluster)

    def of(self, phase: Phase, instance_id: int) -> PolicySource:
        """What one instance of a fleet of unlike cards is known by: its own profile."""
        if not self.config.mixed_profiles:
            return self
        own = own_config(self.config, phase, instance_id)
        profile = self.cluster.share(f"profile {own.profile}", lambda: load_profile(own.profile))
        return replace(self, config=own, profile=profile)

    @property
    def kv_capacity_tokens(self) -> int:
        """KV cache of one instance."""
        return self.config.kv_capacity_tokens or self.profile.meta.engine.kv_capacity_tokens

    def make_router(self, spec: str | None = None) -> Router:
        """The fleet's router, or another one for the same fleet."""
        self.cluster.share(OF_INSTANCES, self._models_of_instances)
        context = self.of(DECODE, 0)._context(DECODE, 0, "router")
        return make_router(spec or self.config.router, context)

    def make_controller(self, phase: Phase, instance_id: int) -> Controller:
        """One instance's controller."""
        config = self.config
        spec = config.prefill_controller_spec if phase == PREFILL else config.decode_controller_spec
        own = self.of(phase, instance_id)
        return make_controller(spec, own._context(phase, instance_id, phase))

    def make_tracker(self, phase: Phase, instance_id: int) -> InstanceTracker:
        """One instance's live state."""
        kind = ColocatedTracker if phase == COLOCATED else InstanceTracker
        return self.of(phase, instance_id).track_by(kind, phase, instance_id)

    def make_mirror(self, phase: Phase, instance_id: int) -> PrefixMirror:
        """What a router knows of an instance's cache."""
        capacity_tokens = self.of(phase, instance_id).kv_capacity_tokens
        return PrefixMirror(cache_tokens(self.config, phase, capacity_tokens))

    def track_by(self, kind: type[T], phase: Phase, instance_id: int) -> T:
        """The same by a class of one's own.

        Args:
            kind: Begins as `InstanceTracker` does.
            phase: Of the instance.
            instance_id: Of the instance.
        """
        config, engine = self.config, self.profile.meta.engine
        return kind(
            phase,
            instance_id,
            kv_capacity_tokens=self.kv_capacity_tokens,
            max_prefill_tokens=config.max_prefill_tokens or engine.max_prefill_tokens,
            max_running_requests=config.max_running_requests or engine.max_running_requests,
            kv_reserve_tokens=config.kv_reserve_tokens,
            length_oracle=config.length_oracle,
        )

    def _context(self, phase: Phase, instance_id: int, stream: str) -> PolicyContext:
        config = self.config
        clocks = self.profile.meta.clocks
        seeds = np.random.SeedSequence(config.seed, spawn_key=(STREAMS[stream], instance_id))
        return PolicyContext(
            predictor=self.predictor(),
            power=self.power(),
            clocks_mhz=clocks.supported_mhz,
            default_levels_mhz=clocks.default_levels_mhz,
            slo_ttft_s=config.aimed_ttft_s,
            slo_itl_s=config.aimed_itl_s,
            first_token=config.first_token if config.num_colocated is None else "prefill",
            profile_hash=self.profile.content_hash,
            kv_capacity_tokens=self.kv_capacity_tokens,
            rng=np.random.default_rng(seeds),
            instance_id=instance_id,
            phase=phase,
            actuation_s=config.actuation_latency_s,
            num_prefill=config.num_colocated or config.num_prefill,
            num_decode=config.num_colocated or config.num_decode,
            cluster=self.cluster,
        )

    def promise_s(self, phase: Phase) -> float:
        """What a sample of a phase may take: a token gap, or a prompt to the end of its prefill.

        By the true promises, whatever policies are told to aim at (`aim_ratio`).
        """
        config = self.config
        told = self._context(phase, 0, phase)
        return replace(told, slo_ttft_s=config.slo_ttft_s, slo_itl_s=config.slo_itl_s).budget_s

    def predictor(self) -> Predictor:
        """What the configuration's policies believe of time."""
        profile, config = self.profile, self.config
        # a policy may wonder about batches that never run: its tables must not refuse them
        base = (
            profile.predictor()
            if config.predictor == "ecopred"
            else profile.truth(extrapolate=True)
        )
        return ScaledPredictor.wrap(base, config.predictor_scale)

    def power(self) -> PowerModel:
        """What they believe of power."""
        config = self.config
        return SkewedPower.wrap(
            self.profile.truth(extrapolate=True),
            scale=config.predictor_power_scale,
            clock_error=config.predictor_power_clock_error,
            top_mhz=self.profile.clocks_mhz[-1],
        )

    def _models_of_instances(self) -> dict[tuple[Phase, int], Models]:
        found: dict[tuple[Phase, int], Models] = {}
        for phase, names in self.config.mixed_profiles.items():
            for index in range(len(names)):
                own = self.of(phase, index)
                found[phase, index] = Models(
                    predictor=own.predictor(), power=own.power(), clocks_mhz=own.profile.clocks_mhz
                )
        return found


def own_config(config: SimConfig, phase: Phase, instance_id: int) -> SimConfig:
    """The configuration as one instance's agent knows it: all are of its own profile.

    Args:
        config: Of the fleet, whose cards may differ.
        phase: Of the instance.
        instance_id: Of the instance.
    """
    own = config.mixed_profiles.get(phase)
    name = config.profile if own is None else own[instance_id]
    return replace(config, profile=name, prefill_profiles=None, decode_profiles=None)
