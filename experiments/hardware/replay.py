"""From a replay's file to a finished run directory, with progress."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Final

import tomli_w

from voltana.experiments.progress import progress_bar
from voltana.experiments.runs import cached_profile, workload_of
from voltana.hwreplay.emulated import dilation
from voltana.hwreplay.emulated.fleet import library_of
from voltana.hwreplay.replay.assembly import REQUESTS, read_iterations
from voltana.hwreplay.replay.config import ReplayConfig, read_replay_config
from voltana.hwreplay.replay.fit import fit_surface, steps_of, write_fitted_profile
from voltana.hwreplay.replay.load import read_rows
from voltana.hwreplay.replay.probe import Overhead, fit_overhead, plan_probe
from voltana.hwreplay.replay.replay import finish, replay
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.common.folders import claim
from voltana.sim.config import SimConfig, read_toml
from voltana.sim.config_rules import require_prompts
from voltana.sim.engine.simulate import simulate
from voltana.sim.policies.base import DECODE, PREFILL, Phase
from voltana.sim.results import refuse_existing, write_json, write_run

OVERHEAD: Final = "overhead.json"
KEYS: Final = "simulate.toml"
AGAIN: Final = "replay.toml"
PHASES: Final[tuple[Phase, Phase]] = (PREFILL, DECODE)


def enter_time(path: Path) -> None:
    """Begin this command again in slower time, if its file asks for that and it is not yet in it.

    Raises:
        VoltanaError: A wrong configuration, or running servers that live in another time.
    """
    config = read_replay_config(path)
    if config.dilation == dilation.present():
        return
    if config.engine is None:
        raise VoltanaError(
            f"[replay] dilation must be that of the running servers, {dilation.present():g} here,"
            f" got {config.dilation:g}: start them with this command ([fleet] engine)"
        )
    dilation.enter(
        config.dilation, library_of(config.engine), ["-m", "voltana.experiments.cli", *sys.argv[1:]]
    )


def run_replay(
    path: Path, out: Path, *, only_finish: bool = False
) -> tuple[ReplayConfig, dict[str, Any]]:
    """Replay the configuration in a file, write the run directory, return config and summary.

    Args:
        path: TOML file, see `voltana.hwreplay.replay.config`.
        out: Run directory; may hold no run.
        only_finish: Send nothing: write the results of what an earlier replay left there.

    Raises:
        VoltanaError: A wrong configuration, or a part of the fleet that does not start.
    """
    config = read_replay_config(path)
    refuse_existing(out)
    claim(out, "run")
    workload = workload_of(config.sim)
    require_prompts(config.sim, workload)
    if only_finish:
        return config, write_run(finish(config, workload, out), out)
    with progress_bar("replay", len(workload)) as bar:
        record = replay(config, workload, out, lambda stage, ended: bar.advance(ended, stage))
    return config, write_run(record, out)


def run_probe(path: Path, out: Path, *, fits_profile: bool = False) -> tuple[Overhead, SimConfig]:
    """Measure what serving adds on a replay's fleet, and the configuration that accounts for it.

    Args:
        path: TOML file of the replay.
        out: Takes the probe's files, `overhead.json`, and the configuration with
            `kv_transfer_latency_s` as measured: `simulate.toml` and `replay.toml`.
        fits_profile: Take iteration times from the probe too, as a profile in OUT/profile.

    Returns:
        The overhead, and that configuration. How much of the time decode computes is simulated.

    Raises:
        VoltanaError: As `run_replay` does.
    """
    config = read_replay_config(path)
    if config.sim.num_colocated is not None:
        raise VoltanaError(
            f"a probe tells what a hand-over costs, colocated servers have none ({path}): leave "
            "--probe out and state serving_latency_s"
        )
    claim(out, "probe")
    plan = plan_probe()
    with progress_bar("replay", len(plan.workload)) as bar:
        record = replay(config, plan.workload, out, lambda stage, ended: bar.advance(ended, stage))
    if not record.settings["is_complete"]:
        raise VoltanaError(
            f"a probe must be complete, {record.settings['incomplete_reason']}: run it again with "
            f"another --out than {out}"
        )
    sim = config.sim
    if fits_profile:
        rows = read_iterations(out)
        surfaces = [fit_surface(steps_of(rows, phase), phase) for phase in PHASES]
        base = cached_profile(sim.profile).meta
        write_fitted_profile(out / "profile", surfaces, base, sim, config.stated_power_w)
        sim = dataclasses.replace(sim, profile=str(out / "profile"), extrapolate=True)
    profile = cached_profile(sim.profile)
    overhead = fit_overhead(read_rows(out / REQUESTS), plan, sim, profile)
    made = dataclasses.replace(sim, kv_transfer_latency_s=round(overhead.busy_s, 6))
    expected_s = overhead.expected_s(_decode_busy_frac(made))
    made = dataclasses.replace(made, kv_transfer_latency_s=round(expected_s, 6))
    write_json(dataclasses.asdict(overhead) | {"expected_s": expected_s}, out / OVERHEAD)
    write_text(tomli_w.dumps(made.as_dict()), out / KEYS)
    again = read_toml(path) | {"simulate": made.as_dict()}
    write_text(tomli_w.dumps(again), out / AGAIN)
    return overhead, made


def _decode_busy_frac(config: SimConfig) -> float:
    record = simulate(config, cached_profile(config.profile), workload_of(config))
    decode = [i for i in record.instances if i.phase == DECODE]
    total_s = sum(i.busy_s + i.idle_s for i in decode)
    return sum(i.busy_s for i in decode) / total_s if total_s else 0.0
