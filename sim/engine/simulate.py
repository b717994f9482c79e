"""The one entry: a configuration, a profile and a workload in, a record out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import replacing
from voltana.sim.config import SimConfig
from voltana.sim.config_rules import require_prompts
from voltana.sim.engine.agenda import Agenda, HeapAgenda
from voltana.sim.engine.fleet import Fleet
from voltana.sim.engine.logs.exact import ExactLog, RunLog
from voltana.sim.engine.logs.sketched import RowSpill, SketchLog
from voltana.sim.engine.reuse.sessions import Sessions
from voltana.sim.engine.scaling.fleet import ScaledFleet
from voltana.sim.engine.simpy_agenda import SimpyAgenda
from voltana.sim.memory import MOST_WAITING, max_requests, watch_backlog
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload

CLOCKLESS: Final = ("static", "boost", "base")
"""Controllers that a profile of one clock serves as well as one of many."""


def simulate(
    config: SimConfig,
    profile: Profile,
    workload: Workload | Iterable[Workload],
    *,
    spill: Path | None = None,
    others: Mapping[str, Profile] | None = None,
) -> RunRecord:
    """Run one configuration; the same arguments give the same record but for `wall_s`.

    Args:
        config: What to run, `workload` and `profile` names aside.
        profile: The truth about times and power.
        workload: The requests; a stream of parts in order of arrival needs metrics="sketch".
        spill: With metrics="sketch": a parquet file that takes one row a request.
        others: Profiles of a mixed fleet by name; those that are missing are loaded.

    Raises:
        VoltanaError: The workload is empty, or needs another `metrics`, a stream brings more
            requests than the fleet serves and memory holds, or an iteration fell outside the
            profiled grid (and `extrapolate` is off).
    """
    if isinstance(workload, Workload) and not len(workload):
        raise VoltanaError(f"workload {workload.name!r} has no requests: nothing to simulate")
    if config.metrics == "sketch":
        if spill is None:
            return _run_sketch(config, profile, workload, None, others)
        with replacing(spill) as partial, RowSpill(partial) as rows:
            return _run_sketch(config, profile, workload, rows, others)
    if not isinstance(workload, Workload) or spill is not None:
        raise VoltanaError("a streamed workload and spilled rows need metrics=sketch, got exact")
    return _fleet(config, profile, workload, ExactLog(workload), others).run()


def _run_sketch(
    config: SimConfig,
    profile: Profile,
    workload: Workload | Iterable[Workload],
    rows: RowSpill | None,
    others: Mapping[str, Profile] | None,
) -> RunRecord:
    log = SketchLog(slo_ttft_s=config.slo_ttft_s, slo_itl_s=config.slo_itl_s, spill=rows)
    if not isinstance(workload, Workload):
        most = (config.num_colocated or config.num_decode) * MOST_WAITING
        allowed = min(max_requests(), most)
        workload = watch_backlog(iter(workload), lambda: log.unresolved, allowed)
    return _fleet(config, profile, workload, log, others).run()


def _fleet(
    config: SimConfig,
    profile: Profile,
    workload: Workload | Iterable[Workload],
    log: RunLog,
    others: Mapping[str, Profile] | None,
) -> Fleet:
    names = {name for of_phase in config.mixed_profiles.values() for name in of_phase}
    others = {name: (others or {}).get(name) or load_profile(name) for name in names}
    for each in (profile, *others.values()):
        _require_clocks(config, each)
    whole = workload if isinstance(workload, Workload) else None
    require_prompts(config, whole)
    if whole is not None and (config.caches or whole.turns is not None):
        log = Sessions(whole, log)
    parts = (workload,) if isinstance(workload, Workload) else workload
    agenda: Agenda = SimpyAgenda() if config.engine == "reference" else HeapAgenda()
    if config.is_scaled:
        return ScaledFleet(config, profile, parts, log, agenda=agenda, others=others)
    return Fleet(config, profile, parts, log, agenda=agenda, others=others)


def _require_clocks(config: SimConfig, profile: Profile) -> None:
    """Refuse a policy that chooses clocks on a profile that was imported without them.

    A profile measured at one clock is another thing: its card has no other, and says so.
    """
    if len(profile.clocks_mhz) > 1 or "clock_dependence" not in profile.meta.provenance:
        return
    for spec in (config.prefill_controller_spec, config.decode_controller_spec):
        if spec.partition(":")[0] not in CLOCKLESS:
            raise VoltanaError(
                f"controller {spec!r} must choose among clocks, and profile {profile.name!r} has "
                f"{profile.clocks_mhz[0]} MHz alone: import it with --power-from and "
                "--clock-shape, or take static"
            )
