"""Closes the loop on emulated cards: the real SGLang against the simulator and its profile.

    python -m voltana.experiments.hardware.loop        (`make loop`, after `make engine`)

Three circles. The profiler on an emulated card must find the tables that the card runs from. Each
policy, simulated and replayed, must agree. Its savings must, too. The verdict is the exit status.
Time is dilated: two cores play four A100s slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from voltana.experiments.hardware import loop_probe, loop_profile, loop_verdict
from voltana.experiments.hardware.loop_probe import HostTimes
from voltana.experiments.hardware.loop_verdict import BASELINE
from voltana.experiments.runs import cached_profile, workload_of
from voltana.hwreplay.emulated import dilation
from voltana.hwreplay.emulated.fleet import AGENT_S, LIBRARY, emulated_arguments
from voltana.hwreplay.emulated.machine import Machine, run_machine
from voltana.hwreplay.emulated.state import Behaviour, open_cards
from voltana.hwreplay.engines.launch import run_fleet
from voltana.hwreplay.engines.plan import Installation
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.replay.config import ReplayConfig
from voltana.hwreplay.replay.replay import replay
from voltana.hwreplay.router.config import BOOTSTRAP_PORT, WorkerConfig
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.common.folders import claim
from voltana.profiles.common.signals import stops_as_interrupts
from voltana.sim.config import SimConfig, make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.policies.base import DECODE, PREFILL, Phase
from voltana.sim.results import refuse_existing, write_json, write_run
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.traces import read_trace
from voltana.sim.workload.workload import Workload

PROFILE: Final = "a100-80g-sxm/llama-3.1-8b"
DILATION: Final = 5.0
PROFILE_DILATION: Final = 2.5
"""One small server is easier to keep up with."""
REST_S: Final = 0.35
START_S: Final = 900.0
POLICIES: Final[Mapping[str, Mapping[str, str]]] = {
    "static-max": {"controller": "static", "router": "round-robin"},
    "static-1005": {"controller": "static:f=1005", "router": "round-robin"},
    "ecofreq + ecoroute": {"controller": "ecofreq", "router": "ecoroute"},
    "pid": {"controller": "pid", "router": "round-robin"},
    "ecomin + consolidate": {"controller": "ecomin:hold=0", "router": "consolidate"},
}
"""EcoMin's waiting for prompts (`hold`) exists in simulation only; its cap on the batch, which the
engine does not know either, lies far above these loads."""
AZURE: Final = Path(__file__).with_name("azure-conv-2023.csv")
"""Seconds of Azure's conversation trace of 2023 (CC-BY-4.0, Patel et al., Splitwise, ISCA 2024)."""
RATE_RPS: Final = 22.0
AZURE_FACTOR: Final = 2.2
SECONDS: Final = 7.0
"""Of arrivals: as many requests as slower time has room for. Medians of few differ by chance."""
LONGEST_TOKENS: Final = 32
"""Answers are cut there: so a short run holds many requests, and none keeps it open for nothing."""
MEASURED: Final = {
    "first_token": "prefill",
    "prefill_starts": "decode_boundary",
    "record_iterations": True,
    "kv_transfers": "in_turn",
    "noise_scale": 0.0,
    "extrapolate": True,
    "max_prefill_tokens": 16384,
    "max_running_requests": 256,
    "kv_capacity_tokens": 457600,
}
"""Of every cell: how SGLang counts, what the servers are started with. No noise on either side: an
error is the simulator's and not the dice's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A fleet and the requests that it gets."""

    name: str
    num_prefill: int
    num_decode: int
    trace: Path
    slo_ttft_s: float
    slo_itl_s: float


def fields(out: Path, *, is_short: bool) -> list[Field]:
    """1P1D on ShareGPT-like requests, and unless it is a short loop 2P2D on a slice of Azure."""
    path = out / "sharegpt.csv"
    made = make_workload("sharegpt", rate_rps=RATE_RPS, duration_s=SECONDS, seed=13)
    _cut(made).write(path)
    azure = out / "azure.csv"
    _cut(read_trace(AZURE)).scaled(AZURE_FACTOR).sliced(0.0, SECONDS).write(azure)
    small = Field(
        name="1P1D, ShareGPT",
        num_prefill=1,
        num_decode=1,
        trace=path,
        slo_ttft_s=0.3,
        slo_itl_s=0.03,
    )
    large = replace(
        small,
        name="2P2D, Azure",
        num_prefill=2,
        num_decode=2,
        trace=azure,
        slo_ttft_s=1.0,
    )
    return [small] if is_short else [small, large]


def _cut(work: Workload) -> Workload:
    return replace(work, output_tokens=np.minimum(work.output_tokens, LONGEST_TOKENS))


def config_of(field: Field, policy: str, host: HostTimes) -> SimConfig:
    """One cell's configuration, simulated and replayed.

    Args:
        field: Fleet, load and promises.
        policy: A name of `POLICIES`.
        host: What the host adds.
    """
    made = make_config(
        MEASURED
        | dict(POLICIES[policy])
        | {
            "profile": PROFILE,
            "trace": str(field.trace),
            "num_prefill": field.num_prefill,
            "num_decode": field.num_decode,
            "slo_ttft_s": field.slo_ttft_s,
            "slo_itl_s": field.slo_itl_s,
        }
    )
    return host.on(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Servers on emulated cards, and the actuator that sets their clocks."""

    machine: Machine
    servers: Sequence[Server]
    actuator: Path

    def config(self, sim: SimConfig) -> ReplayConfig:
        """A replay on the first of them, as many as the configuration has."""
        counts: dict[Phase, int] = {PREFILL: sim.num_prefill, DECODE: sim.num_decode}
        plans = [server.plan for server in self.servers]
        mine = [s for s in plans if s.instance_id < counts[s.phase]]
        cards = self.machine.gpus()
        return ReplayConfig(
            sim=sim,
            workers=tuple(
                WorkerConfig(
                    phase=s.phase,
                    instance_id=s.instance_id,
                    url=s.url,
                    metrics=s.metrics,
                    bootstrap_port=s.bootstrap_port or BOOTSTRAP_PORT,
                )
                for s in mine
            ),
            batch_sockets={
                f"{s.phase}-{s.instance_id}": s.batch_socket
                for s in mine
                if s.batch_socket is not None
            },
            actuator=self.actuator,
            gpus={phase: cards[phase][:count] for phase, count in counts.items()},
            emulate=self.machine.profile,
            dilation=dilation.present(),
            rest_s=REST_S,
        )


@contextmanager
def open_fleet(engine: Path, logs: Path, *, num_prefill: int, num_decode: int) -> Iterator[Fleet]:
    """Start servers of an engine's folder on emulated cards; all is ended on exit.

    Args:
        engine: What `make engine` fills.
        logs: Takes the servers' logs.
        num_prefill: Prefill servers.
        num_decode: Decode servers.
    """
    sim = make_config(MEASURED | {"profile": PROFILE})
    directory = Path(tempfile.mkdtemp(prefix="voltana-"))
    counts: dict[Phase, int] = {PREFILL: num_prefill, DECODE: num_decode}
    machine = Machine(
        profile=PROFILE,
        counts=counts,
        directory=directory,
        library=engine / LIBRARY,
    )
    made = replace(
        Installation.in_folder(engine),
        arguments=emulated_arguments(sim, PROFILE),
        environment_of=machine.environment_of,
    )
    lag_s = sim.actuation_latency_s - AGENT_S
    try:
        with (
            run_machine(machine, Behaviour(lock_lag_s=lag_s)) as socket,
            run_fleet(
                made,
                logs,
                counts,
                sockets=directory,
                start_s=START_S,
            ) as servers,
        ):
            yield Fleet(machine=machine, servers=servers, actuator=socket)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure_host(fleet: Fleet, field: Field, out: Path) -> HostTimes:
    """What the host adds on a field's fleet, see `voltana.experiments.hardware.loop_probe`.

    Args:
        fleet: Servers that run.
        field: Fleet, load and promises.
        out: Takes the folder of the probe.
    """
    config = config_of(field, BASELINE, HostTimes())
    folder = out / loop_verdict.slug(f"{field.name} probe")
    return loop_probe.measure(
        config,
        lambda work: replay(fleet.config(config), work, folder, _silent),
        loop_probe.plan(workload_of(config)),
    )


def play(fleet: Fleet, field: Field, policy: str, host: HostTimes, out: Path) -> dict[str, Any]:
    """Simulate and replay one cell, keep both runs, and return how they compare.

    Args:
        fleet: Servers that run.
        field: Fleet, load and promises.
        policy: A name of `POLICIES`.
        host: What the host adds, for the simulation.
        out: Takes the folder of the cell.
    """
    config = config_of(field, policy, host)
    work = workload_of(config)
    simulated = [
        host.delivered(simulate(config, cached_profile(PROFILE), each))
        for each in (work, *loop_probe.jittered(work))
    ]
    folder = out / loop_verdict.slug(f"{field.name} {policy}")
    for name in ("simulated", "replayed"):
        claim(folder / name, "run")
    write_run(simulated[0], folder / "simulated")
    observed = replay(fleet.config(config), work, folder / "replayed", _silent)
    write_run(observed, folder / "replayed")
    found = loop_verdict.compare(field.name, policy, simulated[1:], observed, folder / "replayed")
    found |= {"cards": _cards(fleet, config)}
    if any(card["locked_mhz"] or card["wanted_mhz"] for card in found["cards"]):
        found["failed"].append("a clock was left locked")
    write_json(found, folder / "cell.json")
    sys.stderr.write(loop_verdict.line(found) + "\n")
    return found


def _cards(fleet: Fleet, config: SimConfig) -> list[dict[str, Any]]:
    """How the cards of a cell stand after it."""
    counts: dict[Phase, int] = {PREFILL: config.num_prefill, DECODE: config.num_decode}
    gpus = fleet.machine.gpus()
    mine = [card for phase, count in counts.items() for one in gpus[phase][:count] for card in one]
    with open_cards(fleet.machine.state, fleet.machine.library) as cards:
        looks = [cards[index].look() for index in mine]
    return [
        {key: getattr(look, key) for key in ("num_locks", "num_resets", "locked_mhz", "wanted_mhz")}
        for look in looks
    ]


def play_all(engine: Path, out: Path, *, is_short: bool, only: Sequence[str]) -> None:
    """The second and third circle, in a process whose time is dilated; leaves `cells.json`.

    Args:
        engine: What `make engine` fills.
        out: Folder of all cells.
        is_short: One instance a phase and fewer requests.
        only: Names of `POLICIES`; empty for all.
    """
    size = 1 if is_short else 2
    times: dict[str, dict[str, float]] = {}
    with open_fleet(engine, out, num_prefill=size, num_decode=size) as fleet:
        cells = []
        for field in fields(out, is_short=is_short):
            host = measure_host(fleet, field, out)
            times[field.name] = asdict(host)
            cells += [play(fleet, field, policy, host, out) for policy in (only or POLICIES)]
    found = {"cells": cells, "host_times": times, "dilation": dilation.present()}
    write_json(found, out / "cells.json")


def _silent(stage: str, ended: int) -> None:
    return


def main(arguments: Sequence[str]) -> int:
    """Run the loop; 0: everything within its limit, 1: not, 2: it could not be run."""
    parser = argparse.ArgumentParser(prog="make loop", description=__doc__)
    parser.add_argument("--engine", type=Path, default=Path(".engine"))
    parser.add_argument("--out", type=Path, default=Path("results/loop"))
    parser.add_argument("--dilation", type=float, default=DILATION)
    parser.add_argument("--short", action="store_true", help="1P1D alone, no profile")
    parser.add_argument("--only", nargs="*", default=[], help="policies")
    parser.add_argument("--inside", choices=("cells", "profile"), help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    try:
        engine = told.engine.resolve()
        with stops_as_interrupts():  # servers, cards and the actuator end with it
            if told.inside == "cells":
                play_all(engine, told.out, is_short=told.short, only=told.only)
                return 0
            if told.inside == "profile":
                tables = loop_profile.measure(engine, PROFILE, told.out / "profile")
                write_json(tables, told.out / "tables.json")
                return 0
            return _outside(told, engine)
    except VoltanaError as error:
        sys.stderr.write(f"voltana loop: {error}\n")
        return 2


def _outside(told: argparse.Namespace, engine: Path) -> int:
    refuse_existing(told.out)
    Installation.in_folder(engine).check()
    told.out.mkdir(parents=True, exist_ok=True)
    for step in ("cells",) if told.short else ("cells", "profile"):
        factor = told.dilation if step == "cells" else PROFILE_DILATION
        variables = dilation.environment(factor, dilation.build(engine / LIBRARY))
        command = [sys.executable, "-m", "voltana.experiments.hardware.loop", *sys.argv[1:]]
        done = subprocess.run([*command, "--inside", step], env=os.environ | variables, check=False)
        if done.returncode:
            return done.returncode
    found = json.loads((told.out / "cells.json").read_text())
    tables = [] if told.short else json.loads((told.out / "tables.json").read_text())
    passes, text = loop_verdict.report(found, tables)
    write_text(text, told.out / "report.md")
    sys.stdout.write(text)
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
