"""The one entry: a configuration, a profile and a workload in, a record out."""

from __future__ import annotations

from profiles.catalog import Profile
from profiles.errors import VoltanaError
from sim.config import SimConfig
from sim.engine.loop import CoalescedFleet
from sim.engine.reference import SimpyFleet
from sim.records import RunRecord
from sim.workload.workload import Workload


def simulate(config: SimConfig, profile: Profile, workload: Workload) -> RunRecord:
    """Run one configuration; the same arguments give the same record but for `wall_s`.

    Raises:
        VoltanaError: The workload is empty, or an iteration fell outside the profiled grid (and
            `extrapolate` is off).
    """
    if not len(workload):
        raise VoltanaError(f"workload {workload.name!r} has no requests: nothing to simulate")
    fleet = SimpyFleet if config.engine == "reference" else CoalescedFleet
    return fleet(config, profile, workload).run()
