"""A configuration of `cases` on the second simulator: its requests, streams, servers and jobs."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from tests.independent.cases import LONG, SESSIONS, TURNS, Settings, spelled
from tests.independent.colocated import Colocated
from tests.independent.colocated_cache import Keeping
from tests.independent.fleet import Fleet, Router
from tests.independent.hardware import Hardware
from tests.independent.job import Job
from tests.independent.policies import Controller, EcoFreq, EcoRoute, RoundRobin, Static
from tests.independent.report import Numbers, report
from tests.independent.server import Noise
from tests.independent.staff import RoundRobinOfServing, Staff
from tests.sim.engine.sessions import random_sessions
from voltana.experiments.runs import workload_of
from voltana.profiles.catalog import DATA
from voltana.sim.config import make_config
from voltana.sim.workload.workload import Workload

NOISE_KEYS = {"prefill": 4, "decode": 5, "colocated": 7}


@cache
def hardware_of(profile: str) -> Hardware:
    return Hardware(DATA / profile)


def requests_of(settings: Settings) -> Workload:
    if settings.get("workload") in (SESSIONS, TURNS):
        is_closed = settings["workload"] == TURNS
        if not {"colocated_cache", "decode_cache"} & {*settings}:
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
