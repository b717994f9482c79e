"""voltana: LLM serving on as little energy as its latency promises allow.

The names below are the library's stable interface; they are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from voltana.experiments.api import Run as Run
    from voltana.experiments.api import frontier as frontier
    from voltana.experiments.api import recommend as recommend
    from voltana.experiments.api import simulate as simulate
    from voltana.experiments.api import sweep as sweep
    from voltana.experiments.compare.policies import compare as compare
    from voltana.profiles.catalog import Profile as Profile
    from voltana.profiles.catalog import list_profiles as list_profiles
    from voltana.profiles.catalog import load_profile as load_profile
    from voltana.profiles.common.errors import VoltanaError as VoltanaError
    from voltana.sim.config import SimConfig as SimConfig
    from voltana.sim.policies.base import Controller as Controller
    from voltana.sim.policies.base import InstanceState as InstanceState
    from voltana.sim.policies.base import PolicyContext as PolicyContext
    from voltana.sim.policies.base import Router as Router
    from voltana.sim.policies.registry import register_controller as register_controller
    from voltana.sim.policies.registry import register_router as register_router
    from voltana.sim.policies.spec import parameter as parameter
    from voltana.sim.workload.generate import make_workload as make_workload
    from voltana.sim.workload.traces import open_trace as open_trace
    from voltana.sim.workload.workload import Workload as Workload

_PLACES: Final = {
    "voltana.experiments.api": ("Run", "frontier", "recommend", "simulate", "sweep"),
    "voltana.experiments.compare.policies": ("compare",),
    "voltana.profiles.catalog": ("Profile", "list_profiles", "load_profile"),
    "voltana.profiles.common.errors": ("VoltanaError",),
    "voltana.sim.config": ("SimConfig",),
    "voltana.sim.policies.base": ("Controller", "InstanceState", "PolicyContext", "Router"),
    "voltana.sim.policies.registry": ("register_controller", "register_router"),
    "voltana.sim.policies.spec": ("parameter",),
    "voltana.sim.workload.generate": ("make_workload",),
    "voltana.sim.workload.traces": ("open_trace",),
    "voltana.sim.workload.workload": ("Workload",),
}
_PLACE_OF: Final = {name: place for place, names in _PLACES.items() for name in names}
__all__ = sorted(_PLACE_OF)


if not TYPE_CHECKING:  # for a type checker a name that is not above is none

    def __getattr__(name: str) -> object:
        if name not in _PLACE_OF:
            raise AttributeError(f"module 'voltana' has no attribute {name!r}")
        value = getattr(importlib.import_module(_PLACE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
