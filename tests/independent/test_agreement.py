"""Two simulators, one answer: `voltana simulate` against the program in this folder.

The second one was written from docs/simulator.md, docs/profiles.md and NOMENCLATURE.md, reads the
profile's files itself and keeps a time stamp of every token. Where the two disagree, one of them
or the documents are wrong.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.independent.colocated import Colocated
from tests.independent.colocated_cache import Keeping
from tests.independent.fleet import Fleet, Job, Noise, Router
from tests.independent.hardware import Hardware
from tests.independent.policies import Controller, EcoFreq, EcoRoute, RoundRobin, Static
from tests.independent.report import Numbers, report
from tests.independent.staff import RoundRobinOfServing, Staff
from tests.sim.engine.sessions import random_sessions
from voltana.experiments.runs import cached_profile, workload_of
from voltana.profiles.catalog import DATA
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.workload.workload import Workload

REL = 1e-9
"""Sums over some 10^4 iterations, added in another order, differ by 2e-12 at most (as measured); a
rule that differs in one iteration moves some mean or energy of these runs by 1e-6 or more."""

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
    "3C, sleep, chunks beside decoding, EcoFreq, noise": {
        **VARYING, "controller": "ecofreq", "noise_scale": 1.0, "idle_s": 0.4, "rate_rps": 10,
        "plans": "aps+aaa+saa+asa+axa+aas", "period_s": 3.93, "num_colocated": 3, "duration_s": 25,
        "profile": "a100-80g-sxm-awake/llama-3.1-8b", "colocated_order": "sglang-mixed",
        "max_prefill_tokens": 512,
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

NOISE_KEYS = {"prefill": 4, "decode": 5, "colocated": 7}
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


@cache
def hardware_of(profile: str) -> Hardware:
    return Hardware(DATA / profile)


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


def requests_of(settings: Settings) -> Workload:
    if settings.get("workload") in (SESSIONS, TURNS):
        is_closed = settings["workload"] == TURNS
        if "colocated_cache" not in settings:
            return random_sessions(3, count=150, mean_gap_s=0.03, longest=300, is_closed=is_closed)
        return random_sessions(
            3, count=120, mean_gap_s=0.02, longest=100, is_closed=is_closed, has_answers=True
        )
    made = workload_of(make_config(spelled(settings)))
    if settings.get("workload") != LONG:
        return made
    rng = np.random.default_rng(5)
    prompts = made.input_tokens.copy()
    at = rng.choice(len(prompts), 10, replace=False)
    prompts[at] = rng.integers(9_000, 60_000, 10)
    return Workload(
        arrival_s=made.arrival_s, input_tokens=prompts, output_tokens=made.output_tokens
    )


def noise_of(settings: Settings, phase: str, number: int, spreads: dict[str, float]) -> Noise:
    """Lognormal numbers of mean 1, one an iteration, and sags from time 0 on: the two streams of
    docs/simulator.md."""
    streams = np.random.SeedSequence(settings["seed"], spawn_key=(NOISE_KEYS[phase], number))
    dice, waits = (np.random.default_rng(stream) for stream in streams.spawn(2))
    depth, sags = settings["sag_depth"], False
    means_s = {False: settings["sag_interval_s"], True: settings["sag_duration_s"]}
    change_s = waits.exponential(means_s[sags]) if depth else math.inf

    def factor(start_s: float, has_prompts: bool = False) -> float:
        nonlocal sags, change_s
        own_phase = "decode" if phase == "colocated" else phase
        scaled = spreads.get("prefill" if has_prompts else own_phase, 0.0) * settings["noise_scale"]
        variance = math.log(1.0 + scaled * scaled)
        while change_s <= start_s:
            sags = not sags
            change_s += waits.exponential(means_s[sags])
        own = math.exp(math.sqrt(variance) * dice.standard_normal() - 0.5 * variance)
        return own * (1.0 + depth if sags else 1.0)

    return factor


def played_again(settings: Settings, requests: Workload) -> Numbers:
    """The second program."""
    keys = make_config(spelled(settings)).as_dict()
    hardware = hardware_of(keys["profile"])
    promises = {"prefill": keys["slo_ttft_s"], "decode": keys["slo_itl_s"]}

    def controller(phase: str) -> Controller:
        if settings["controller"] == "static":
            return Static(settings["clock"])
        return EcoFreq(hardware, phase, hardware.levels_mhz, promises, settings["idle_s"])

    router: Router = (
        EcoRoute(hardware, keys["slo_itl_s"], keys["seed"])
        if settings["router"] == "ecoroute"
        else RoundRobin()
    )
    if "plans" in settings:
        router = RoundRobinOfServing()

    def noise(phase: str, number: int) -> Noise:
        return noise_of(keys, phase, number, hardware.spread)

    def colocated(fleet: Fleet, number: int) -> Colocated:
        kind = Keeping if keys.get("colocated_cache") else Colocated
        return kind(fleet, controller("colocated"), noise("colocated", number))

    has_both = "num_colocated" in keys
    fleet = Fleet(keys, hardware, router, controller, noise, colocated if has_both else None)
    if "temperature" in keys:
        told = keys["temperature"].removeprefix("air:").split(",")
        for server in (*fleet.prefill, *fleet.decode):
            server.card.air = {k: float(v) for k, v in (word.split("=") for word in told)}
    if "plans" in settings:
        plans = settings["plans"].split("+")
        fleet.staff = Staff(fleet, plans, settings["period_s"], DATA / keys["profile"])
        if "switching" in settings:
            idle_w = hardware.idle_w(max(hardware.clocks_mhz))
            fleet.staff.pair(settings["switching"], settings["switch_s"], idle_w)
    columns = requests.arrival_s, requests.input_tokens, requests.output_tokens
    jobs = [Job(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    if requests.prompts is not None:
        for row, job in enumerate(jobs):
            prompt = requests.prompts.prompt(row)
            starts = [0, *prompt.ends[:-1]]
            parts = zip(prompt.names, starts, prompt.ends, strict=True)
            job.tokens = [(name, k) for name, start, end in parts for k in range(end - start)]
            answers = requests.prompts.answers
            name = ("nobody's", row) if answers is None else int(answers[row])
            job.said = [*job.tokens, *((name, k) for k in range(job.wanted))]
    if requests.turns is not None:
        rows = zip(jobs, requests.turns.previous, requests.turns.think_s, strict=True)
        for job, previous, think_s in rows:
            if previous >= 0:
                jobs[previous].next_turn = (float(think_s), job)
    fleet.play(jobs)
    return report(fleet, jobs)


def flat(summary: dict[str, Any]) -> Numbers:
    """voltana's summary with the second program's keys."""
    numbers: Numbers = {}
    for key, value in summary.items():
        if key == "clock_residency":
            for phase, shares in value.items():
                numbers |= {f"{phase} at {clock}": share for clock, share in shares.items()}
        elif isinstance(value, dict):
            numbers |= {f"{key} {level}": number for level, number in value.items()}
        else:
            numbers[key] = value
    return numbers


@pytest.mark.parametrize("name", CASES)
def test_both_programs_agree_on_every_number(name: str) -> None:
    settings = settings_of(CASES[name])
    requests = requests_of(settings)
    config = make_config(spelled(settings))
    ours = flat(summarise(simulate(config, cached_profile(config.profile), requests)))
    theirs = played_again(settings, requests)
    shown = set(ours) - {"wall_s", "requests_failed", "requests_in_flight"}
    assert set(theirs) == shown
    key, least = SHOWN.get(name, ("iterations", 1))
    assert theirs[key] >= least
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=REL)


def test_both_programs_agree_on_measured_mixed_iterations(tmp_path: Path) -> None:
    """Rows at random between less than the longer part and more than the sum, some left out, on a
    profile with awake power: whatever a table says, both read it alike."""
    source = DATA / "a100-80g-sxm-awake/llama-3.1-8b"
    folder = tmp_path / "profile"
    shutil.copytree(source, folder)
    rng = np.random.default_rng(3)
    rows = [
        (f, c, b, b * context, k, rng.uniform(0.005, 0.3), rng.uniform(150, 420))
        for f in (1005, 1200, 1410)
        for c in (24, 300, 2000)
        for b in (1, 12, 60)
        for context in (40, 700)
        for k in range(2)
        if rng.random() < 0.8
    ]
    key = ["frequency_mhz", "chunk_tokens", "batch_size", "tokens"]
    columns = [*key, "trial", "time_s", "power_w"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "mixed.csv", index=False)
    stated = "".join(
        f'\n[provenance.{name}]\nstatus = "modelled"\nsource = "dice"\n'
        for name in ("mixed_time", "mixed_power")
    )
    (folder / "profile.toml").write_text((folder / "profile.toml").read_text() + stated)
    settings = settings_of({
        **VARYING, "rate_rps": 6, "duration_s": 6, "profile": str(folder), "num_colocated": 2,
        "colocated_order": "sglang-mixed", "controller": "ecofreq", "max_prefill_tokens": 512,
    })  # fmt: skip
    requests = requests_of(settings)
    config = make_config(spelled(settings))
    ours = flat(summarise(simulate(config, cached_profile(config.profile), requests)))
    theirs = played_again(settings, requests)
    assert theirs["clock_changes"] > 20
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=REL)
    plain = simulate(
        replace(config, mixed_overlap_frac=0.0), cached_profile(config.profile), requests
    )
    assert flat(summarise(plain))["energy_j"] != pytest.approx(ours["energy_j"], rel=1e-3)
