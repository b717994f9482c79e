"""The configuration of one simulated run: one flat, typed, checked record.

Every key can be set in a TOML file, on the command line (`--set key=value`) and in a sweep's grid;
an unknown key is an error. The resolved record is written beside every result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from voltana.profiles.common.binding import choices, converted
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.places import SERVING, listed_profiles, serving_settings
from voltana.sim.config_rules import (
    require_one_fleet,
    require_plain,
    require_ranges,
    require_scalable,
)
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

DEFAULT_PROFILE = "a100-80g-sxm/llama-3.1-8b"


def _key(default: Any, description: str) -> Any:  # noqa: ANN401 (dataclasses.field is untyped too)
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """One run: hardware, workload, fleet, policies, promises and engine model. See each `help`."""

    profile: str = _key(DEFAULT_PROFILE, "profile name or directory")
    profile_draw: int | None = _key(
        None, "number of a draw from the profile's stated errors; none = the profile as it stands"
    )
    workload: str = _key(
        "sharegpt", "length distribution of generated requests, or a file of lengths"
    )
    trace: str | None = _key(None, "trace file or named trace, in place of a generated workload")
    rate_rps: float = _key(30.0, "mean arrival rate of a generated workload, requests/s")
    duration_s: float | None = _key(
        None, "length of the workload; none = 120 s generated, or the whole trace"
    )
    trace_start_s: float | None = _key(None, "skip this much of a trace; none = start at its first")
    trace_unit: Literal["s", "ms", "us", "ns"] | None = _key(
        None,
        "unit of a trace's arrival numbers (s, ms, us, ns), counted from its first request;"
        " none = as the format says, from 0",
    )
    trace_drop_failed: bool | None = _key(
        None, "true leaves out a trace's requests without output, as BurstGPT logs failed calls"
    )
    trace_sample_frac: float | None = _key(
        None, "keep this part of a trace's requests, drawn by the seed; none = all"
    )
    seed: int = _key(13, "seed of arrivals, lengths and policies")
    arrivals: str = _key(
        "poisson",
        "arrival process: poisson, gamma:cv=2, diurnal:swing=0.6, step:ratio=2,at=0.5,"
        " ramp:ratio=2, curve:NAME or curve:FILE.csv, with ,from=SECONDS",
    )
    time_scale: float = _key(1.0, "divides arrival times: 2 plays a workload twice as fast")
    num_prefill: int = _key(2, "prefill instances")
    num_decode: int = _key(2, "decode instances")
    active_prefill: int | None = _key(
        None, "only the first so many get requests, the others rest; none = all"
    )
    active_decode: int | None = _key(None, "the same of decode instances")
    num_colocated: int | None = _key(
        None,
        "instances that do both phases at one clock, in place of those of each; none = the phases"
        " are apart",
    )
    active_colocated: int | None = _key(None, "as active_prefill, of colocated instances")
    colocated_order: Literal["sglang", "sglang-mixed", "vllm"] | None = _key(
        None,
        "what an iteration of a colocated instance does: prompts before decoding (sglang, the"
        " default), a chunk of prompts beside decoding (sglang-mixed), the same with decoding"
        " first (vllm)",
    )
    mixed_overlap_frac: float | None = _key(
        None,
        "part of the shorter part of a mixed iteration that the longer one hides; none = as the"
        " profile's mixed.csv has it, without one 0, the sum of parts",
    )
    colocated_cache: bool | None = _key(
        None, "true: what KV memory colocated instances have free keeps prompts and answers"
    )
    prefill_profiles: str | None = _key(
        None,
        "a profile for each prefill instance, joined by +, as h100-sxm/llama-3.1-8b*2+NAME; none ="
        " profile for all",
    )
    decode_profiles: str | None = _key(None, "the same of decode instances")
    controller: str = _key("ecofreq", "frequency controller of both phases")
    prefill_controller: str | None = _key(None, "overrides controller in prefill")
    decode_controller: str | None = _key(None, "overrides controller in decode")
    router: str = _key("ecoroute", "router")
    scaler: str | None = _key(
        None, "who sends instances away and wakes them; none = all serve all the time"
    )
    budget_w: float | None = _key(
        None, "what the whole fleet may draw, hosts aside, kept by a ceiling on clocks; none = any"
    )
    slo_ttft_s: float = _key(0.6, "promise: time to first token")
    slo_itl_s: float = _key(0.06, "promise: time between tokens")
    aim_ratio: float | None = _key(
        None,
        "policies are told the promises times this, runs are judged by the true ones; none = 1",
    )
    engine: Literal["coalesced", "reference"] = _key(
        "coalesced",
        "coalesced jumps over runs of iterations, reference plays each one in SimPy: same results",
    )
    actuation_latency_s: float = _key(0.003, "from a clock decision to the changed clock")
    clock_stall_s: float = _key(
        0.0, "how long a busy GPU stands still at a clock change; an instance's GPUs one by one"
    )
    power_cap_w: float | None = _key(
        None, "power limit of a GPU, whose own controller then lowers the clock; none = none"
    )
    power_cap_time_s: float = _key(0.1, "time constant of that controller; 0: at once")
    temperature: str | None = _key(
        None, "cards whose power grows as they warm up, as air:leakage=0.004; none = the tables'"
    )
    host_power_w: float | None = _key(
        None,
        "what an instance's share of its host draws (CPU, memory, network), always; none = only"
        " GPUs are counted",
    )
    noise_scale: float = _key(
        1.0, "multiplies the profile's spread of iteration times; 0: no noise"
    )
    sag_depth: float = _key(
        0.0, "in a sag iterations take 1 + this times as long; 0: there are none"
    )
    sag_duration_s: float = _key(5.0, "mean length of a sag (exponential)")
    sag_interval_s: float = _key(60.0, "mean time from a sag to the next (exponential)")
    predictor: Literal["ecopred", "table"] = _key(
        "ecopred", "latency model of the policies: ecopred (fitted), or table (the simulated truth)"
    )
    predictor_scale: float = _key(1.0, "multiplies predicted times: a deliberately wrong model")
    predictor_power_scale: float = _key(
        1.0, "multiplies the power above idle that policies believe in"
    )
    predictor_power_clock_error: float = _key(
        0.0, "policies believe in that power times (f/top clock) to this"
    )
    first_token: Literal["decode", "prefill"] = _key(
        "decode",
        "who makes the first token: decode (TTFT ends with the first decode step, as the"
        " reference counts it) or prefill (TTFT ends when decode takes the request up; always so of"
        " colocated instances)",
    )
    serving_latency_s: float = _key(
        0.0, "from a request's arrival to the instances: HTTP and the router, both ways"
    )
    prefill_starts: Literal["arrival", "decode_boundary"] = _key(
        "arrival",
        "when a request may join a prefill batch: at its arrival, or once its decode instance has"
        " ended the iteration that runs then, as SGLang's reserves the KV cache at its boundaries",
    )
    handshake_latency_s: float = _key(
        0.0, "from that boundary to the prefill queue; only with prefill_starts=decode_boundary"
    )
    prefill_metrics: Literal["before", "after"] = _key(
        "before", "controllers see the prefill batch about to run, or the last one that ended"
    )
    decode_metrics: Literal["before", "after"] = _key(
        "after", "controllers see the last decode iteration that ended, or the one about to run"
    )
    kv_transfer_bytes_per_s: float | None = _key(None, "KV transfer bandwidth; none = instant")
    kv_transfer_latency_s: float = _key(0.0, "fixed part of a KV transfer")
    kv_transfers: Literal[
        "at_once", "in_turn", "shared_by_prefill", "shared_by_decode", "shared_by_fleet"
    ] = _key(
        "at_once",
        "transfers run side by side, in_turn on each prefill instance's link, or divide the"
        " bandwidth of a link: one a prefill or decode instance, or one in all",
    )
    max_prefill_tokens: int | None = _key(
        None,
        "token budget of a prefill batch, of colocated instances of an iteration (the chunk size);"
        " none = profile's",
    )
    max_prefill_requests: int = _key(512, "requests in a prefill batch (reference: 512)")
    max_running_requests: int | None = _key(None, "decode batch limit; none = profile's")
    kv_capacity_tokens: int | None = _key(None, "KV tokens of a decode instance; none = profile's")
    prefix_cache_tokens: int | None = _key(
        None,
        "KV tokens of a prefill instance, which its batch and a cache of prefixes share; none or 0"
        " = no cache, and no limit in prefill",
    )
    decode_cache: bool | None = _key(
        None,
        "true: what KV memory decode instances have free keeps prompts and answers, which are not"
        " sent again; only with prefill_starts=decode_boundary",
    )
    kv_reserve_tokens: int = _key(
        512, "KV tokens kept free per running request at admission (SGLang's default)"
    )
    kv_retract_tokens: int = _key(
        1, "KV tokens per remaining request that a retraction frees (SGLang 0.5.23: 1, 0.4.7: 20)"
    )
    extrapolate: bool = _key(False, "allow iteration times outside the profiled grid")
    length_oracle: bool = _key(False, "let policies see true output lengths")
    metrics: Literal["exact", "sketch"] = _key(
        "exact",
        "exact keeps every request; sketch keeps counts, and quantiles within 0.2 %, in bounded"
        " memory",
    )
    run_limit_s: float | None = _key(None, "stop the run at this time, requests in flight or not")
    timeline_interval_s: float | None = _key(
        None, "sample queue, batch, clock and power this often"
    )
    timeline_max_samples: int = _key(
        4096, "bound on timeline samples; the interval doubles past it"
    )
    record_iterations: bool = _key(False, "keep one row per iteration (memory grows with the run)")

    def __post_init__(self) -> None:
        require_ranges(self)
        require_one_fleet(self)
        _ = self.mixed_profiles
        require_scalable(self)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise VoltanaError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def require_plain(self, what: str, *, knows: Collection[str] = ()) -> None:
        """Refuse what only a simulation knows, where `what` has no rule for it.

        Args:
            what: Who refuses.
            knows: Keys that it has a rule for.

        Raises:
            VoltanaError: There is some.
        """
        require_plain(self, what, knows)

    @property
    def counts(self) -> dict[Phase, int]:
        """Instances of each kind that the fleet has."""
        if self.num_colocated is not None:
            return {COLOCATED: self.num_colocated}
        return {PREFILL: self.num_prefill, DECODE: self.num_decode}

    @property
    def mixed_profiles(self) -> dict[Phase, list[str]]:
        """By phase the profile of each instance, for phases that have their own."""
        told: dict[Phase, tuple[str | None, int]] = {
            PREFILL: (self.prefill_profiles, self.num_prefill),
            DECODE: (self.decode_profiles, self.num_decode),
        }
        return {
            phase: listed_profiles(text, f"{phase}_profiles", count)
            for phase, (text, count) in told.items()
            if text is not None
        }

    @property
    def caches(self) -> list[str]:
        """Keys of the caches of prefixes that are on."""
        keys = "prefix_cache_tokens", "colocated_cache", "decode_cache"
        return [key for key in keys if getattr(self, key)]

    @property
    def is_scaled(self) -> bool:
        """Whether instances may leave service, or share a power budget."""
        return self.scaler is not None or self.budget_w is not None

    @property
    def prefill_controller_spec(self) -> str:
        """The controller that prefill instances run."""
        return self.prefill_controller or self.controller

    @property
    def decode_controller_spec(self) -> str:
        """The controller that decode instances run."""
        return self.decode_controller or self.controller

    @property
    def aimed_ttft_s(self) -> float:
        """The time to first token that policies are told to keep: the promise times `aim_ratio`."""
        return self.slo_ttft_s * (self.aim_ratio or 1.0)

    @property
    def aimed_itl_s(self) -> float:
        """The time between tokens that policies are told to keep: the promise times `aim_ratio`."""
        return self.slo_itl_s * (self.aim_ratio or 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Every key that has a value, in declaration order."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def content_hash(self) -> str:
        """Name of this configuration: first 16 hex digits of a SHA-256 over its sorted JSON."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_CHOICES = {
    key: words for key, hint in typing.get_type_hints(SimConfig).items() if (words := choices(hint))
}
KEYS: dict[str, str] = {f.name: f.metadata["help"] for f in dataclasses.fields(SimConfig)}
"""Every key with its help text."""


def make_config(values: Mapping[str, Any], *, where: str = "configuration") -> SimConfig:
    """Build a configuration from plain values, converting text to each key's type.

    A profile that knows its engine's serving overheads and limits (`serving.toml`) gives the
    defaults of those keys; a value that is given wins. With `num_colocated` no instance is of one
    phase unless that is given.

    Raises:
        VoltanaError: An unknown key (with the nearest one) or a value of the wrong type or range.
    """
    given = converted(SimConfig, values, where, takes_text=True)
    profile = given.get("profile", DEFAULT_PROFILE)
    serving = serving_settings(profile)
    known = converted(SimConfig, serving, f"{SERVING} of {profile}", takes_text=True)
    if given.get("num_colocated") is not None:
        known |= {"num_prefill": 0, "num_decode": 0}
    return SimConfig(**(known | given))


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Split `key=value` texts of the command line."""
    pairs: dict[str, str] = {}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise VoltanaError(f"--set takes key=value, got {text!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, or say in one line why it can't be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VoltanaError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
