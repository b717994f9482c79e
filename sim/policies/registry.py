"""Policies by name: what `voltana list` shows and what a configuration may name.

Any other name is a module of yours that python can import; it holds `CONTROLLER = Entry(…)` or
`ROUTER = Entry(…)`, as `experiments/own_policy.py` does.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar, cast

from profiles.errors import VoltanaError, nearest
from sim.mdp.router import MdpParameters, MdpRouter
from sim.policies.answers import describe, rehearse
from sim.policies.base import Controller, PolicyContext, Router
from sim.policies.controllers import (
    agft,
    dualscale,
    ecofreq,
    ecomin,
    fixed,
    oracle,
    pid,
    polca,
    profiled,
    throttllm,
)
from sim.policies.reconstructed import greenllm, kairos, miad, rapid
from sim.policies.routers import consolidate, ecoroute, packing, simple
from sim.policies.routers.kairos import KairosRouter, KairosRouterParameters
from sim.policies.spec import (
    ParameterInfo,
    bind_parameters,
    describe_parameters,
    parse_spec,
)

P = TypeVar("P", Controller, Router)
_SOURCE: Final = "Source: "
Constants = Literal["published", "partly", "invented", "ours"]
CONSTANTS: Final[Mapping[Constants, str]] = {
    "published": "the source's, or the rule has none",
    "partly": "some of those that decide are ours, the source does not give them",
    "invented": "ours, the source does not give them: no measure of the source",
    "ours": "rule and constants are ours",
}
"""Where a policy's constants come from. A rival with invented ones shows what its idea does with
them here, and stands in no headline table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[P]):
    """One policy: how to make it, and its rule in one line."""

    make: Callable[[Any, PolicyContext], P]
    parameters: type[object]
    constants: Constants = "ours"
    """One of `CONSTANTS`; a rule is published wherever this is not "ours"."""

    @property
    def rule(self) -> str:
        """First line of the class's docstring."""
        return (self.make.__doc__ or "").strip().splitlines()[0]

    @property
    def description(self) -> str:
        """The class's docstring without its source."""
        return inspect.cleandoc(self.make.__doc__ or "").partition(_SOURCE)[0].strip()

    @property
    def source(self) -> str:
        """Where the rule comes from, and what in it is ours: of the class, else of its module."""
        module = sys.modules[self.make.__module__]
        for text in (self.make.__doc__, module.__doc__):
            found = inspect.cleandoc(text or "").partition(_SOURCE)[2]
            if found:
                return " ".join(found.partition("\n\n")[0].split())
        return ""

    @property
    def parameter_infos(self) -> tuple[ParameterInfo, ...]:
        """Parameters with default, unit and meaning."""
        return describe_parameters(self.parameters)


CONTROLLERS: Final[Mapping[str, Entry[Controller]]] = {
    "static": Entry(make=fixed.Static, parameters=fixed.StaticParameters, constants="published"),
    "boost": Entry(make=fixed.Boost, parameters=fixed.NoParameters, constants="published"),
    "ecofreq": Entry(
        make=ecofreq.EcoFreq, parameters=ecofreq.EcoFreqParameters, constants="published"
    ),
    "ecomin": Entry(make=ecomin.EcoMin, parameters=ecomin.EcoMinParameters),
    "pid": Entry(make=pid.Pid, parameters=pid.PidParameters),
    "miad": Entry(make=miad.Miad, parameters=miad.MiadParameters, constants="invented"),
    "window": Entry(make=profiled.Window, parameters=profiled.WindowParameters, constants="partly"),
    "powercap": Entry(
        make=profiled.PowerCap, parameters=profiled.PowerCapParameters, constants="partly"
    ),
    "dualscale-mpc": Entry(
        make=dualscale.DualScale, parameters=dualscale.DualScaleParameters, constants="partly"
    ),
    "greenllm": Entry(
        make=greenllm.GreenLlm, parameters=greenllm.GreenLlmParameters, constants="invented"
    ),
    "kairos": Entry(make=kairos.Kairos, parameters=kairos.KairosParameters, constants="invented"),
    "throttllm": Entry(
        make=throttllm.Throttllm, parameters=throttllm.ThrottllmParameters, constants="partly"
    ),
    "agft": Entry(make=agft.Agft, parameters=agft.AgftParameters, constants="partly"),
    "polca": Entry(make=polca.Polca, parameters=polca.PolcaParameters, constants="partly"),
    "rapid": Entry(make=rapid.Rapid, parameters=rapid.RapidParameters, constants="invented"),
    "oracle": Entry(make=oracle.Oracle, parameters=oracle.OracleParameters),
}
ROUTERS: Final[Mapping[str, Entry[Router]]] = {
    "random": Entry(make=simple.RandomRouter, parameters=fixed.NoParameters, constants="published"),
    "round-robin": Entry(
        make=simple.RoundRobin, parameters=fixed.NoParameters, constants="published"
    ),
    "least-requests": Entry(
        make=simple.LeastRequests, parameters=fixed.NoParameters, constants="published"
    ),
    "two-choices": Entry(
        make=simple.TwoChoices, parameters=fixed.NoParameters, constants="published"
    ),
    "least-kv": Entry(make=simple.LeastKv, parameters=fixed.NoParameters, constants="published"),
    "ecoroute": Entry(
        make=ecoroute.EcoRoute, parameters=ecoroute.EcoRouteParameters, constants="published"
    ),
    "ecoroute-tile": Entry(
        make=ecoroute.EcoRouteTile,
        parameters=ecoroute.EcoRouteTileParameters,
        constants="published",
    ),
    "slo-pack": Entry(
        make=packing.SloPack, parameters=packing.SloPackParameters, constants="partly"
    ),
    "consolidate": Entry(
        make=consolidate.Consolidate, parameters=consolidate.ConsolidateParameters
    ),
    "latency-headroom": Entry(
        make=packing.LatencyHeadroom,
        parameters=packing.LatencyHeadroomParameters,
        constants="published",
    ),
    "min-delta-energy": Entry(
        make=packing.MinDeltaEnergy,
        parameters=packing.MinDeltaEnergyParameters,
        constants="published",
    ),
    "least-added-power": Entry(
        make=packing.LeastAddedPower, parameters=packing.LeastAddedPowerParameters
    ),
    "kairos": Entry(make=KairosRouter, parameters=KairosRouterParameters, constants="published"),
    "length-split": Entry(
        make=greenllm.LengthSplit, parameters=greenllm.LengthSplitParameters, constants="invented"
    ),
    "mdp": Entry(make=MdpRouter, parameters=MdpParameters),
}


def make_controller(spec: str, context: PolicyContext) -> Controller:
    """Make one instance's controller from `name:key=value,…`.

    Raises:
        VoltanaError: Unknown name or parameter (with the nearest), or a bad value.
    """
    make, _ = _maker(spec, CONTROLLERS, "controller", Controller)
    return make(context)


def make_router(spec: str, context: PolicyContext) -> Router:
    """Make the fleet's router from `name:key=value,…`. Raises as `make_controller` does."""
    make, is_own = _maker(spec, ROUTERS, "router", Router)
    if is_own and max(context.num_prefill, context.num_decode) > 1:
        rehearse(make, context)
    return make(context)


def check_policies(controller: str, router: str) -> None:
    """Whether both exist and take their parameters, without making them.

    Raises:
        VoltanaError: As `make_controller` and `make_router` do.
    """
    _bound(controller, CONTROLLERS, "controller")
    _bound(router, ROUTERS, "router")


def is_module_name(name: str) -> bool:
    """Whether an unknown policy's name may be a module of the user's own.

    Modules of the standard library are not: `random` names a router.
    """
    parts = name.split(".")
    return all(p.isidentifier() for p in parts) and parts[0] not in sys.stdlib_module_names


def _maker(
    text: str, known: Mapping[str, Entry[P]], kind: str, base: type[object]
) -> tuple[Callable[[PolicyContext], P], bool]:
    """What makes the policy, and whether it is a module of the user's own."""
    entry, parameters = _bound(text, known, kind)

    def make(context: PolicyContext) -> P:
        try:
            made: object = entry.make(parameters, context)
        except VoltanaError:
            raise
        except Exception as error:
            raise VoltanaError(f"cannot make {kind} {text!r}: {describe(error)}") from error
        if not isinstance(made, base):
            raise VoltanaError(
                f"{kind} {text!r} must be a sim.policies.base.{base.__name__}, got a "
                f"{type(made).__name__}: derive your class from it"
            )
        return cast("P", made)

    return make, entry not in known.values()


def _bound(text: str, known: Mapping[str, Entry[P]], kind: str) -> tuple[Entry[P], object]:
    """A policy's entry and its parameters."""
    spec = parse_spec(text)
    entry = known.get(spec.name) or _own(spec.name, known, kind)
    try:
        return entry, bind_parameters(spec, entry.parameters)
    except VoltanaError:
        raise
    except Exception as error:
        raise VoltanaError(
            f"parameters of {kind} {spec.name!r} must be a dataclass of numbers, words or lists of "
            f"them: {describe(error)}"
        ) from error


def _own(name: str, known: Mapping[str, Entry[P]], kind: str) -> Entry[Any]:
    """The entry of a user's module."""
    unknown = f"unknown {kind} {name!r}{nearest(name, known)}"
    if not is_module_name(name):
        raise VoltanaError(unknown)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_absent = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        if is_absent and "." not in name:  # a slip of the pen, or a module that is not on the path
            raise VoltanaError(
                f"{unknown} (a module of yours: set PYTHONPATH to its folder)"
            ) from None
        if not is_absent:
            raise VoltanaError(f"cannot import {kind} {name!r}: {describe(error)}") from error
        raise VoltanaError(
            f"cannot import {kind} {name!r}: no module {error.name!r}; set PYTHONPATH to its folder"
        ) from None
    except Exception as error:
        raise VoltanaError(f"cannot import {kind} {name!r}: {describe(error)}") from error
    entry = getattr(module, kind.upper(), None)
    if not isinstance(entry, Entry):
        raise VoltanaError(
            f"module {name!r} holds no {kind}: it needs {kind.upper()} = Entry(make=…, "
            f"parameters=…), or name a {kind} that there is{nearest(name, known)}"
        )
    return entry
