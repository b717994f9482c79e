"""One kind of instance: its profile as the truth, and as policies believe it."""

from __future__ import annotations

from collections.abc import Mapping

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import Phase
from voltana.sim.policies.parts.prediction import Models, ScaledPredictor, SkewedPower


class Machine:
    """Tables, limits and beliefs of a profile under one configuration.

    Args:
        config: What is set of limits, and how far beliefs are off.
        profile: The truth about times and power.
    """

    def __init__(self, config: SimConfig, profile: Profile) -> None:
        self.profile = profile
        self.meta = profile.meta
        self.truth = profile.truth(extrapolate=config.extrapolate)
        # a policy may wonder about batches that never run: its tables must not refuse them
        self.truth_beyond = profile.truth(extrapolate=True)
        self.mixed = profile.mixed_step(
            extrapolate=config.extrapolate, overlap_frac=config.mixed_overlap_frac
        )
        self.spread = profile.spread()
        power = SkewedPower.wrap(
            (profile.believed or profile).truth(extrapolate=True),
            scale=config.predictor_power_scale,
            clock_error=config.predictor_power_clock_error,
            top_mhz=profile.clocks_mhz[-1],
        )
        predictor = ScaledPredictor.wrap(
            profile.predictor() if config.predictor == "ecopred" else self.truth_beyond,
            config.predictor_scale,
        )
        self.models = Models(predictor=predictor, power=power, clocks_mhz=profile.clocks_mhz)
        """What policies believe."""
        engine = profile.meta.engine
        self.kv_capacity_tokens = config.kv_capacity_tokens or engine.kv_capacity_tokens
        self.max_prefill_tokens = config.max_prefill_tokens or engine.max_prefill_tokens
        self.max_running = config.max_running_requests or engine.max_running_requests


class Machines:
    """The machine of every instance of a fleet.

    Args:
        config: What to run.
        profile: Of every instance that has none of its own.
        others: Further profiles, by the names that the configuration has for them.

    Raises:
        VoltanaError: Instances serve different models.
    """

    def __init__(
        self, config: SimConfig, profile: Profile, others: Mapping[str, Profile] | None
    ) -> None:
        self.usual = Machine(config, profile)
        known = {name: Machine(config, p) for name, p in (others or {}).items()}
        self._own: dict[Phase, list[Machine]] = {
            phase: [known[name] for name in names] for phase, names in config.mixed_profiles.items()
        }
        self.is_mixed = bool(self._own)
        of_all = {m.meta.model.kv_bytes_per_token for ms in self._own.values() for m in ms}
        of_all.add(profile.meta.model.kv_bytes_per_token)
        if len(of_all) > 1:
            raise VoltanaError(
                "all instances of a fleet must serve one model, got profiles whose KV caches take "
                f"{' and '.join(map(str, sorted(of_all)))} bytes a token"
            )

    def of(self, phase: Phase, index: int) -> Machine:
        """That of one instance."""
        own = self._own.get(phase)
        return own[index] if own else self.usual

    def models(self) -> dict[tuple[Phase, int], Models]:
        """What policies believe of each instance that has a profile of its own."""
        return {
            (phase, i): machine.models
            for phase, machines in self._own.items()
            for i, machine in enumerate(machines)
        }
