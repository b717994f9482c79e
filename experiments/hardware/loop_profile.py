"""The profiler's own circle: on an emulated card it must find the tables behind the card."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from voltana.hwreplay.emulated.fleet import LIBRARY, emulated_arguments
from voltana.hwreplay.emulated.machine import Machine, run_machine
from voltana.hwreplay.emulated.plan import Plan
from voltana.hwreplay.emulated.state import open_cards
from voltana.hwreplay.engines.plan import Installation
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.tables import MIXED_POINT
from voltana.sim.config import make_config
from voltana.sim.policies.base import COLOCATED

CLOCKS_MHZ: Final = (1005, 1410)
LIMITS: Final = {"time": 0.02, "mixed": 0.03, "power": 0.03, "idle": 0.03}
"""A chunk's pass stands alone among steps: the moment at which its record is heard is in its time,
which in a run of like passes cancels."""
MAX_BATCH, MAX_TOKENS = 4, 2048
HELD: Final = "held-from"
DOUBTED: Final = "held-from|power-not-measured|power-of-a-short-window"
OVERLAP_FRAC: Final = 0.5
"""Of chunks beside decoding on the card; its profile has none measured."""
BUDGET: Final = "60s"
"""Emulated seconds of points, half of them at each clock."""


def measure(engine: Path, name: str, out: Path) -> list[dict[str, Any]]:
    """Profile one emulated card with the real profiler and engine; a row a table and clock.

    Args:
        engine: What `make engine` fills.
        name: The card's profile.
        out: Takes the measured one.

    Raises:
        VoltanaError: The profiler failed, or left the clock locked.
    """
    directory = Path(tempfile.mkdtemp(prefix="voltana-"))
    machine = Machine(
        profile=name,
        counts={COLOCATED: 1},
        directory=directory,
        library=engine / LIBRARY,
    )
    try:
        with run_machine(machine):
            _run_profiler(machine, engine, out)
            with open_cards(machine.state, machine.library) as cards:
                look = cards[0].look()
        if look.locked_mhz or look.wanted_mhz or not look.num_locks:
            raise VoltanaError(
                f"the profiler must lock clocks and give them back: {look.num_locks} locks, "
                f"{look.num_resets} resets, {look.locked_mhz} MHz at its end"
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return compare_tables(load_profile(out), load_profile(name))


def _run_profiler(machine: Machine, engine: Path, out: Path) -> None:
    made = Installation.in_folder(engine)
    sim = make_config({"profile": machine.profile, "max_running_requests": MAX_BATCH})
    plan = Plan(
        profile=machine.profile,
        phase="decode",
        instance_id=0,
        cards=(0,),
        state=str(machine.state),
        passes=str(machine.directory / "colocated-0.passes"),
        max_requests=64,
        overlap_frac=OVERLAP_FRAC,
    )
    arguments = emulated_arguments(sim, machine.profile)
    options = {
        "engine": "sglang",
        "device": "cpu",
        "gpu": "0",
        "model": str(made.model),
        "server-python": str(made.python),
        "server-args": " ".join((*arguments, "--max-total-tokens", "65536")),
        "frequencies": ",".join(map(str, CLOCKS_MHZ)),
        "phases": "prefill,decode,mixed",
        "budget": BUDGET,
        "window": "1.2",
        "iterations": "4",
        "warm-up": "0.2",
        "settle": "1",
        "trials": "1",
        "max-batch": str(MAX_BATCH),
        "max-tokens": str(MAX_TOKENS),
        "out": str(out),
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    log = out.with_suffix(".log")
    with log.open("wb") as taken:
        done = subprocess.run(
            [sys.executable, "-m", "voltana.experiments.cli", "profile", *words, "--allow-shared"],
            env=os.environ | plan.environment() | LONG,
            stdout=taken,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise VoltanaError(f"the profiler must succeed: {said[-1] if said else done.returncode}")


LONG: Final = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


def compare_tables(found: Profile, truth: Profile) -> list[dict[str, Any]]:
    """Errors of a measured profile at its own points: time and power of each phase, idle power.

    Left out is what the profiler itself calls not measured: the value that a row is held at to its
    end, and power of windows that were too short for the counter.
    """
    model = truth.truth(extrapolate=True)
    rows = []
    for phase in ("prefill", "decode"):
        table = found.prefill if phase == "prefill" else found.decode
        flags = table["flags"].fillna("").astype(str)
        for place, (what, doubt) in enumerate((("time", HELD), ("power", DOUBTED))):
            kept = table[~flags.str.contains(doubt)]
            for mhz in CLOCKS_MHZ:
                points = kept[kept["frequency_mhz"] == mhz]
                known = np.array([
                    model.time_and_power(phase, mhz, b, t)[place]
                    for b, t in zip(points["batch_size"], points["tokens"], strict=True)
                ])  # fmt: skip
                column = points["time_s" if what == "time" else "power_w"]
                rows.append(_errors(f"{phase} {what}", what, mhz, column / known - 1))
    if found.mixed is not None:
        rows += _mixed_errors(found.mixed, truth)
    for clock, points in found.idle.groupby("frequency_mhz"):
        mhz = int(str(clock))
        errors = points["power_w"] / model.idle_power_w(mhz) - 1
        rows.append(_errors("idle power", "idle", mhz, errors))
    return rows


def _mixed_errors(table: pd.DataFrame, truth: Profile) -> list[dict[str, Any]]:
    """Of chunks beside decoding, whose power the meter cannot tell from the steps' between them."""
    step = truth.mixed_step(extrapolate=True, overlap_frac=OVERLAP_FRAC)
    points = table[list(MIXED_POINT)]
    known = [
        step.time_and_power(int(mhz), (1.0, int(chunk)), (int(batch), int(tokens)))[0]
        for mhz, chunk, batch, tokens in points.itertuples(index=False)
    ]
    errors = table["time_s"] / known - 1
    return [
        _errors("mixed time", "mixed", mhz, errors[table["frequency_mhz"] == mhz])
        for mhz in CLOCKS_MHZ
    ]


def _errors(table: str, what: str, clock_mhz: int, errors: pd.Series[float]) -> dict[str, Any]:
    if errors.empty:  # what was not measured has not been found again
        errors = pd.Series([float("nan")])
    median = float(errors.median())
    return {
        "table": table,
        "clock_mhz": clock_mhz,
        "points": int(errors.notna().sum()),
        "median": median,
        "worst": max(errors.tolist(), key=abs),
        "limit": LIMITS[what],
        "passes": abs(median) <= LIMITS[what],
    }
