"""The configurations that both simulators play, and what each of them has to show."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]
VARYING: Settings = {
    "rate_rps": 34, "arrivals": "gamma:cv=4", "slo_itl_s": 0.022, "slo_ttft_s": 0.25,
}  # fmt: skip
LONG = "ten prompts longer than a prefill batch, in ordinary ones"
SESSIONS = "sessions whose turns come when they like"
TURNS = "sessions whose turns wait for answers"
AIR = "air:leakage=0.006,resistance_c_per_w=0.12,time=7,ambient=25,table=55"
CACHE = {"prefix_cache_tokens": 3_000}
COLOCATED_KV = {"num_colocated": 2, "kv_capacity_tokens": 16_000, "kv_reserve_tokens": 0}
COLOCATED_CACHE = {"num_colocated": 2, "colocated_cache": True, "kv_capacity_tokens": 1_000,
                   "kv_reserve_tokens": 20}  # fmt: skip
DECODE_CACHE = {"decode_cache": True, "prefill_starts": "decode_boundary",
                "kv_capacity_tokens": 1_000, "kv_reserve_tokens": 20}  # fmt: skip
SMALL_KV = {"kv_capacity_tokens": 40_000, "kv_reserve_tokens": 12}

CASES: dict[str, Settings] = {
    "light": {"rate_rps": 8},
    "near saturation": {"rate_rps": 56, "duration_s": 30},
    "beyond saturation": {"rate_rps": 90, "duration_s": 12, "num_prefill": 1},
    "1P1D": {"rate_rps": 18, "num_prefill": 1, "num_decode": 1},
    "4P2D": {"rate_rps": 40, "num_prefill": 4},
    "1P3D, low clocks": {"rate_rps": 14, "num_prefill": 1, "num_decode": 3, "clock": 825},
    "clock between rows of the table": {"rate_rps": 30, "clock": 1170},
    "bursts": {"rate_rps": 30, "arrivals": "gamma:cv=4"},
    "awake power": {"rate_rps": 40, "profile": "a100-80g-sxm-awake/llama-3.1-8b"},
    "two cards an instance": {"rate_rps": 8, "profile": "a100-80g-sxm/qwen3-32b-tp2"},
    "small KV cache": {"rate_rps": 30, **SMALL_KV},
    "small KV cache, no reserve": {"rate_rps": 40, **SMALL_KV, "kv_reserve_tokens": 0},
    "small KV cache, 20 tokens freed a request": {
        "rate_rps": 40, **SMALL_KV, "kv_reserve_tokens": 0, "kv_retract_tokens": 20,
    },
    "small KV cache, much reserve": {"rate_rps": 30, "kv_capacity_tokens": 60_000},
    "some fit no cache": {"rate_rps": 20, "kv_capacity_tokens": 2_000, "kv_reserve_tokens": 20},
    "few running at once": {"rate_rps": 30, "max_running_requests": 40},
    "first token of prefill": {"rate_rps": 30, "first_token": "prefill"},
    "first token of prefill, small KV cache": {
        "rate_rps": 40, "first_token": "prefill", **SMALL_KV,
    },
    "KV over a link": {
        "rate_rps": 30, "kv_transfer_bytes_per_s": 2e9, "kv_transfer_latency_s": 0.004,
    },
    "KV in turn over a link": {
        "rate_rps": 35, "kv_transfer_bytes_per_s": 4e9, "kv_transfer_latency_s": 0.002,
        "kv_transfers": "in_turn",
    },
    "KV over each prefill instance's shared link": {
        "rate_rps": 35, "kv_transfer_bytes_per_s": 4e9, "kv_transfer_latency_s": 0.002,
        "kv_transfers": "shared_by_prefill",
    },
    "KV over each decode instance's shared link": {
        "rate_rps": 35, "kv_transfer_bytes_per_s": 3e9, "kv_transfers": "shared_by_decode",
        "first_token": "prefill", "num_decode": 3,
    },
    "KV over one shared link, sleep": {
        "rate_rps": 8, "kv_transfer_bytes_per_s": 2e9, "kv_transfers": "shared_by_fleet",
        "plans": "asaa+saas+aasa+aaaa", "period_s": 4.71, "duration_s": 30,
    },
    "temperature": {"rate_rps": 20, "temperature": AIR},
    "temperature, two cards an instance": {
        "rate_rps": 8, "profile": "a100-80g-sxm/qwen3-32b-tp2", "temperature": AIR,
    },
    "temperature, awake power, EcoFreq, noise, stalls": {
        **VARYING, "controller": "ecofreq", "noise_scale": 1.0, "clock_stall_s": 0.01,
        "profile": "a100-80g-sxm-awake/llama-3.1-8b", "temperature": AIR, "rate_rps": 10,
        "idle_s": 0.4,
    },
    "temperature, 2C": {"rate_rps": 14, "num_colocated": 2, "temperature": AIR},
    "prefill waits for decode's boundary": {"rate_rps": 40, "prefill_starts": "decode_boundary"},
    "the same, EcoFreq and latency of serving": {
        **VARYING, "controller": "ecofreq", "prefill_starts": "decode_boundary",
        "serving_latency_s": 0.007, "handshake_latency_s": 0.003, "num_decode": 1,
        "num_prefill": 1, "rate_rps": 10,
    },
    "small prefill batches": {"rate_rps": 25, "max_prefill_tokens": 1_024},
    "few prompts a batch": {"rate_rps": 30, "max_prefill_requests": 3},
    "code completion": {"rate_rps": 12, "workload": "azure-code"},
    "long prompts": {"rate_rps": 12, "workload": LONG},
    "EcoFreq": {**VARYING, "controller": "ecofreq"},
    "EcoFreq, slow actuation": {
        **VARYING, "controller": "ecofreq", "actuation_latency_s": 0.05,
    },
    "EcoFreq, idle between": {
        "rate_rps": 1, "controller": "ecofreq", "idle_s": 0.4, "num_decode": 3, "duration_s": 60,
    },
    "EcoFreq, small KV cache": {"rate_rps": 36, "controller": "ecofreq", **SMALL_KV},
    "EcoFreq, long prompts": {"rate_rps": 10, "controller": "ecofreq", "workload": LONG},
    "EcoRoute": {"rate_rps": 60, "controller": "ecofreq", "router": "ecoroute"},
    "EcoRoute, 2P4D": {
        "rate_rps": 90, "controller": "ecofreq", "router": "ecoroute", "num_decode": 4,
        "duration_s": 25, "slo_itl_s": 0.05,
    },
    "noise": {"rate_rps": 40, "noise_scale": 1.0},
    "much noise, small KV cache": {"rate_rps": 40, "noise_scale": 5.0, **SMALL_KV},
    "noise, EcoFreq": {**VARYING, "controller": "ecofreq", "noise_scale": 1.0},
    "noise, EcoRoute": {
        "rate_rps": 60, "controller": "ecofreq", "router": "ecoroute", "noise_scale": 2.0,
    },
    "sags": {
        "rate_rps": 40, "noise_scale": 1.0, "sag_depth": 0.5, "sag_interval_s": 4.0,
        "sag_duration_s": 1.0,
    },
    "hosts": {"rate_rps": 8, "host_power_w": 150.0, "num_prefill": 3},
    "stalls": {**VARYING, "controller": "ecofreq", "clock_stall_s": 0.03},
    "stalls of two cards": {
        "rate_rps": 8, "profile": "a100-80g-sxm/qwen3-32b-tp2", "controller": "ecofreq",
        "clock_stall_s": 0.02, "actuation_latency_s": 0.0, "slo_itl_s": 0.03,
    },
    "cache of prefixes": {"workload": SESSIONS, **CACHE},
    "cache of prefixes, KV over a link": {
        "workload": SESSIONS, **CACHE, "kv_transfer_latency_s": 0.05, "max_prefill_tokens": 700,
        "first_token": "prefill",
    },
    "turns that wait, cache of prefixes, EcoFreq": {
        "workload": TURNS, **CACHE, "controller": "ecofreq", "slo_ttft_s": 0.1, "noise_scale": 1.0,
    },
    "turns that wait, no cache": {"workload": TURNS, "num_prefill": 1},
    "EcoRoute, small KV cache": {
        "rate_rps": 50, "controller": "ecofreq", "router": "ecoroute", **SMALL_KV,
    },
    "4C": {"rate_rps": 30, "num_colocated": 4},
    "2C, small KV cache, hosts": {
        "rate_rps": 20, **COLOCATED_KV, "host_power_w": 100.0, "serving_latency_s": 0.004,
    },
    "2C, mixed, small KV cache, noise": {
        "rate_rps": 20, **COLOCATED_KV, "colocated_order": "sglang-mixed", "noise_scale": 2.0,
        "max_prefill_tokens": 256,
    },
    "2C, vLLM, small KV cache, overlap": {
        "rate_rps": 20, **COLOCATED_KV, "colocated_order": "vllm", "mixed_overlap_frac": 0.7,
        "kv_retract_tokens": 20,
    },
    "2C, EcoFreq": {
        **VARYING, "rate_rps": 14, "controller": "ecofreq", "num_colocated": 2,
        "clock_stall_s": 0.01,
    },
    "2C, vLLM, EcoFreq, sags": {
        **VARYING, "rate_rps": 14, "controller": "ecofreq", "num_colocated": 2,
        "colocated_order": "vllm", "max_prefill_tokens": 512, "noise_scale": 1.0,
        "sag_depth": 0.5, "sag_interval_s": 4.0, "sag_duration_s": 1.0,
    },
    "1C, mixed, long prompts, first tokens late": {
        "rate_rps": 4, "num_colocated": 1, "workload": LONG, "colocated_order": "sglang-mixed",
        "max_running_requests": 40,
    },
    "3C, turns that wait": {"workload": TURNS, "num_colocated": 3},
    "2C, cache of prefixes": {"workload": SESSIONS, **COLOCATED_CACHE},
    "2C, mixed, cache of prefixes, no reserve, noise": {
        "workload": SESSIONS, **COLOCATED_CACHE, "colocated_order": "sglang-mixed",
        "max_prefill_tokens": 90, "kv_capacity_tokens": 600, "kv_reserve_tokens": 0,
        "kv_retract_tokens": 7,
        "noise_scale": 1.0,
    },
    "2C, turns that wait, cache of prefixes, EcoFreq": {
        "workload": TURNS, **COLOCATED_CACHE, "controller": "ecofreq", "kv_capacity_tokens": 2_000,
        "slo_ttft_s": 0.1, "slo_itl_s": 0.02,
    },
    "decode's cache of prefixes": {"workload": SESSIONS, **DECODE_CACHE},
    "decode's cache of prefixes, KV over a link, first token of prefill": {
        "workload": SESSIONS, **DECODE_CACHE, "kv_transfer_bytes_per_s": 2e8,
        "kv_transfer_latency_s": 0.01, "first_token": "prefill", "serving_latency_s": 0.003,
        "handshake_latency_s": 0.002, "kv_transfers": "shared_by_decode",
    },
    "decode's cache of prefixes, no reserve, noise": {
        "workload": SESSIONS, **DECODE_CACHE, "kv_capacity_tokens": 600, "kv_reserve_tokens": 0,
        "kv_retract_tokens": 7, "noise_scale": 1.0, "num_decode": 1, "max_running_requests": 3,
    },
    "decode's and prefill's caches, turns that wait, EcoFreq": {
        "workload": TURNS, **DECODE_CACHE, **CACHE, "controller": "ecofreq", "slo_ttft_s": 0.1,
        "slo_itl_s": 0.02, "kv_transfer_bytes_per_s": 2e8, "kv_transfers": "in_turn",
    },
    "sleep": {
        "rate_rps": 10, "plans": "asas+apas+aaaa+pasa+aaaa+aaxa", "period_s": 4.37,
        "duration_s": 35,
    },
    "sleep, awake power, EcoFreq, noise": {
        **VARYING, "controller": "ecofreq", "noise_scale": 1.0, "idle_s": 0.4, "rate_rps": 16,
        "plans": "apsaas+aaaaaa+saaasa+asaaaa+aaaasa", "period_s": 3.93, "num_prefill": 3,
        "num_decode": 3, "profile": "a100-80g-sxm-awake/llama-3.1-8b", "duration_s": 30,
    },
    "sleep, KV over a link, prefill waits for decode's boundary": {
        "rate_rps": 8, "plans": "asaa+saas+aasa+aaaa", "period_s": 4.71, "duration_s": 30,
        "kv_transfer_latency_s": 0.4, "prefill_starts": "decode_boundary", "host_power_w": 99.0,
    },
    "cards that switch": {
        "rate_rps": 10, "num_prefill": 3, "num_decode": 3, "duration_s": 45,
        "plans": "allaaa+aalala+aaaall+aalala+allaaa", "period_s": 9.37, "switching": 2,
        "switch_s": 1.3, "noise_scale": 1.0,
    },
    "cards that switch, EcoFreq, KV over a shared link": {
        **VARYING, "controller": "ecofreq", "rate_rps": 12, "num_prefill": 2, "num_decode": 3,
        "plans": "aaaal+aaaal+aaaal+alaaa", "period_s": 8.11, "switching": 1, "switch_s": 2.2,
        "kv_transfer_bytes_per_s": 1e9, "kv_transfers": "shared_by_prefill", "duration_s": 30,
    },
}  # fmt: skip

SHOWN = {
    "small KV cache": ("retractions", 15),
    "small KV cache, no reserve": ("retractions", 300),
    "some fit no cache": ("requests_rejected", 5),
    "first token of prefill, small KV cache": ("retractions", 20),
    "EcoFreq": ("clock_changes", 30),
    "EcoFreq, slow actuation": ("clock_changes", 30),
    "EcoFreq, small KV cache": ("retractions", 20),
    "EcoRoute, 2P4D": ("clock_changes", 30),
    "EcoRoute, small KV cache": ("retractions", 50),
    "cache of prefixes": ("evicted_tokens", 5_000),
    "cache of prefixes, KV over a link": ("cached_tokens", 20_000),
    "turns that wait, cache of prefixes, EcoFreq": ("cached_tokens", 20_000),
    "2C, small KV cache, hosts": ("retractions", 20),
    "2C, mixed, small KV cache, noise": ("retractions", 20),
    "2C, vLLM, small KV cache, overlap": ("retractions", 20),
    "2C, EcoFreq": ("clock_changes", 30),
    "2C, cache of prefixes": ("evicted_tokens", 3_000),
    "2C, mixed, cache of prefixes, no reserve, noise": ("retractions", 10),
    "2C, turns that wait, cache of prefixes, EcoFreq": ("cached_tokens", 20_000),
    "decode's cache of prefixes": ("evicted_tokens", 10_000),
    "decode's cache of prefixes, KV over a link, first token of prefill": (
        "unsent_tokens",
        10_000,
    ),
    "decode's cache of prefixes, no reserve, noise": ("retractions", 2),
    "decode's and prefill's caches, turns that wait, EcoFreq": ("cached_tokens", 10_000),
    "2C, vLLM, EcoFreq, sags": ("clock_changes", 30),
    "sleep": ("wake_ups", 2),
    "sleep, awake power, EcoFreq, noise": ("wake_ups", 3),
    "sleep, KV over a link, prefill waits for decode's boundary": ("wake_ups", 2),
    "cards that switch": ("wake_ups", 2),
    "cards that switch, EcoFreq, KV over a shared link": ("wake_ups", 1),
    "stalls": ("clock_changes", 30),
    "stalls of two cards": ("clock_changes", 10),
}
"""Cases that would be idle words without so much of what they are about."""


def settings_of(case: Settings) -> Settings:
    """A case with the parameters of its policies filled in and, apart, in voltana's spelling."""
    filled: Settings = {
        "controller": "static", "router": "round-robin", "duration_s": 20, "clock": 1410,
        "idle_s": 5.0, "slo_itl_s": 0.045, "slo_ttft_s": 0.5, "noise_scale": 0.0, **case,
    }  # fmt: skip
    return filled


def spelled(settings: Settings) -> Settings:
    """As voltana is told."""
    ours = ("clock", "idle_s", "plans", "period_s", "switching", "switch_s")
    keys = {k: v for k, v in settings.items() if k not in ours}
    if "plans" in settings:
        table = f"plans={settings['plans']},period={settings['period_s']}"
        if "switching" in settings:
            table += f",switching={settings['switching']},switch={settings['switch_s']}"
        keys["scaler"] = f"tests.sim.engine.scaling_table:{table}"
    is_static = settings["controller"] == "static"
    told = f"static:f={settings['clock']}" if is_static else f"ecofreq:idle={settings['idle_s']}"
    if settings.get("workload") in (LONG, SESSIONS, TURNS):
        keys.pop("workload")
    return keys | {"controller": told}
