"""What the keys of a configuration may be, beside their types: ranges, and which go together."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from voltana.profiles.common.errors import VoltanaError

if TYPE_CHECKING:
    from voltana.sim.config import SimConfig
    from voltana.sim.workload.workload import Workload

_SIMULATED = (
    "num_colocated", "scaler", "budget_w", "prefill_profiles", "decode_profiles", "power_cap_w",
    "temperature",
)  # fmt: skip
_NOT_SCALED = (
    "temperature",
    "active_prefill", "active_decode", "active_colocated",
)  # fmt: skip
_OF_PHASES = (
    "power_cap_w",
    "prefill_profiles", "decode_profiles",
    "num_prefill", "num_decode", "prefill_controller", "decode_controller", "prefix_cache_tokens",
    "decode_cache",
)  # fmt: skip
_POSITIVE = (
    "profile_draw",
    "rate_rps", "duration_s", "time_scale", "trace_sample_frac", "num_colocated", "active_prefill",
    "active_decode", "active_colocated", "slo_ttft_s", "slo_itl_s", "aim_ratio",
    "predictor_scale", "predictor_power_scale", "sag_duration_s", "sag_interval_s",
    "kv_transfer_bytes_per_s", "max_prefill_tokens", "max_prefill_requests",
    "max_running_requests", "kv_capacity_tokens", "kv_retract_tokens", "run_limit_s",
    "timeline_interval_s", "timeline_max_samples", "budget_w", "power_cap_w",
)  # fmt: skip
_NOT_NEGATIVE = (
    "trace_start_s", "seed", "actuation_latency_s", "kv_transfer_latency_s", "kv_reserve_tokens",
    "clock_stall_s", "noise_scale", "serving_latency_s", "handshake_latency_s", "sag_depth",
    "prefix_cache_tokens", "host_power_w", "power_cap_time_s", "num_prefill", "num_decode",
    "mixed_overlap_frac",
)  # fmt: skip


def require_ranges(config: SimConfig) -> None:
    """Numbers within their ranges.

    Raises:
        VoltanaError: One is not; the message names it.
    """
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise VoltanaError(f"{name} must be > 0 and finite, got {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise VoltanaError(f"{name} must be >= 0 and finite, got {value}")
    if not math.isfinite(config.predictor_power_clock_error):
        value = config.predictor_power_clock_error
        raise VoltanaError(f"predictor_power_clock_error must be finite, got {value}")
    for phase in ("prefill", "decode", "colocated"):
        active, there = getattr(config, f"active_{phase}"), getattr(config, f"num_{phase}") or 0
        if active is not None and active > there:
            raise VoltanaError(f"active_{phase} must be <= num_{phase}, {there}, got {active}")
    if config.mixed_overlap_frac is not None and config.mixed_overlap_frac > 1.0:
        raise VoltanaError(f"mixed_overlap_frac must be <= 1, got {config.mixed_overlap_frac}")


def require_one_fleet(config: SimConfig) -> None:
    """A fleet is of colocated instances, or of both other kinds.

    Raises:
        VoltanaError: Two keys do not go together.
    """
    if config.num_colocated is None:
        for key in ("num_prefill", "num_decode"):
            if getattr(config, key) < 1:
                raise VoltanaError(f"{key} must be > 0 and finite, got {getattr(config, key)}")
        for key in ("colocated_order", "mixed_overlap_frac", "colocated_cache"):
            if getattr(config, key) is not None:
                raise VoltanaError(
                    f"{key} is of colocated instances, got {key}={getattr(config, key)} without "
                    "any: set num_colocated"
                )
        if config.decode_cache and config.prefill_starts != "decode_boundary":
            raise VoltanaError(
                "decode_cache needs decode to take memory before prefill begins, got "
                f"prefill_starts={config.prefill_starts}: set prefill_starts=decode_boundary"
            )
        return
    if config.colocated_cache and config.colocated_order == "vllm":
        raise VoltanaError(
            "colocated_cache must go with SGLang's orders, sglang or sglang-mixed, got "
            "colocated_order=vllm: change one"
        )
    for key in _OF_PHASES:
        if getattr(config, key):
            raise VoltanaError(
                f"{key} is of a fleet with its phases apart, got {key}={getattr(config, key)} "
                f"beside num_colocated={config.num_colocated}: leave one out"
            )


def require_plain(config: SimConfig, what: str, knows: Collection[str]) -> None:
    """As of `SimConfig.require_plain`."""
    for key in _SIMULATED:
        if key not in knows and (got := getattr(config, key)) is not None:
            apart = "" if "num_colocated" in knows else "with their phases apart, "
            raise VoltanaError(
                f"{what} is of fleets {apart}all serving, on like cards: leave out {key}, got {got}"
            )


def require_prompts(config: SimConfig, workload: Workload | None) -> None:
    """A cache needs to know what prompts share; a stream (None) does not say.

    Raises:
        VoltanaError: There is one, and nobody says.
    """
    cache = next(iter(config.caches), None)
    if cache and (workload is None or workload.prompts is None):
        raise VoltanaError(
            f"{cache}={getattr(config, cache)} needs to know what prompts share: take a workload "
            "of sessions (chat, agent) or a trace with hash_ids, and no stream"
        )


def require_scalable(config: SimConfig) -> None:
    """What comes and goes is plain.

    Raises:
        VoltanaError: It is not; the message names the key.
    """
    for name in _NOT_SCALED:
        if config.is_scaled and getattr(config, name):
            raise VoltanaError(
                f"{name} is not for a fleet that scales, got {name}={getattr(config, name)} "
                f"beside scaler={config.scaler}, budget_w={config.budget_w}: leave it out"
            )
