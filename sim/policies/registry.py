"""Policies by name: what `voltana list` shows and what a configuration may name.

Any other name is one that this program registered (`register_controller`, `register_router`), or a
module of yours that python can import; it holds `CONTROLLER = Entry(…)` or `ROUTER = Entry(…)`, as
`experiments/examples/own_policy.py` does.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Final, Generic, Literal, TypeVar, cast, get_type_hints

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.sim.mdp.router import MdpRouter
from voltana.sim.policies.answers import describe, rehearse
from voltana.sim.policies.base import COLOCATED, Controller, PolicyContext, Router
from voltana.sim.policies.controllers import (
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
from voltana.sim.policies.reconstructed import greenllm, kairos, miad, rapid
from voltana.sim.policies.routers import consolidate, ecoroute, mixed, packing, prefix, simple
from voltana.sim.policies.routers.kairos import KairosRouter
from voltana.sim.policies.scalers import dualscale as placement
from voltana.sim.policies.scalers import load, roles
from voltana.sim.policies.scalers.base import Scaler, ScalerContext
from voltana.sim.policies.spec import (
    ParameterInfo,
    bind_parameters,
    describe_parameters,
    parse_spec,
)

P = TypeVar("P", Controller, Router, Scaler)
_SOURCE: Final = "Source: "
Constants = Literal["published", "partly", "invented", "ours"]
CONSTANTS: Final[Mapping[Constants, str]] = {
    "published": "the source's, or the rule has none",
    "partly": "some of those that decide are ours, the source does not give them",
    "invented": "ours, the source does not give them: no measure of the source",
    "ours": "rule and constants are ours",
}
"""Where a policy's constants come from. Policies with invented ones are in
`voltana.sim.policies.reconstructed`, and in no headline table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[P]):
    """One policy: how to make it, and its rule in one line."""

    make: Callable[[Any, Any], P]
    """From its parameters and a `PolicyContext`; of a scaler a `ScalerContext`."""
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


def _shipped(make: type[P], constants: Constants = "ours") -> Entry[P]:
    """The entry of a shipped policy; its `__init__` says which parameters it takes."""
    parameters = get_type_hints(make.__init__)["parameters"]
    return Entry(make=make, parameters=parameters, constants=constants)


CONTROLLERS: Final[Mapping[str, Entry[Controller]]] = {
    "static": _shipped(fixed.Static, "published"),
    "boost": _shipped(fixed.Boost, "published"),
    "base": _shipped(fixed.Base, "published"),
    "ecofreq": _shipped(ecofreq.EcoFreq, "published"),
    "ecomin": _shipped(ecomin.EcoMin),
    "pid": _shipped(pid.Pid),
    "miad": _shipped(miad.Miad, "invented"),
    "window": _shipped(profiled.Window, "partly"),
    "powercap": _shipped(profiled.PowerCap, "partly"),
    "dualscale-mpc": _shipped(dualscale.DualScale, "partly"),
    "greenllm": _shipped(greenllm.GreenLlm, "invented"),
    "kairos": _shipped(kairos.Kairos, "invented"),
    "throttllm": _shipped(throttllm.Throttllm, "partly"),
    "agft": _shipped(agft.Agft, "partly"),
    "polca": _shipped(polca.Polca, "partly"),
    "rapid": _shipped(rapid.Rapid, "invented"),
    "oracle": _shipped(oracle.Oracle),
}
ROUTERS: Final[Mapping[str, Entry[Router]]] = {
    "random": _shipped(simple.RandomRouter, "published"),
    "round-robin": _shipped(simple.RoundRobin, "published"),
    "least-requests": _shipped(simple.LeastRequests, "published"),
    "two-choices": _shipped(simple.TwoChoices, "published"),
    "least-kv": _shipped(simple.LeastKv, "published"),
    "prefix-affinity": _shipped(prefix.PrefixAffinity, "partly"),
    "cache-aware": _shipped(prefix.CacheAware, "published"),
    "prefix-energy": _shipped(prefix.PrefixEnergy),
    "ecoroute": _shipped(ecoroute.EcoRoute, "published"),
    "ecoroute-tile": _shipped(ecoroute.EcoRouteTile, "published"),
    "slo-pack": _shipped(packing.SloPack, "partly"),
    "consolidate": _shipped(consolidate.Consolidate),
    "latency-headroom": _shipped(packing.LatencyHeadroom, "published"),
    "min-delta-energy": _shipped(packing.MinDeltaEnergy, "published"),
    "least-added-power": _shipped(packing.LeastAddedPower),
    "least-time": _shipped(mixed.LeastTime),
    "least-energy": _shipped(mixed.LeastEnergy),
    "kairos": _shipped(KairosRouter, "published"),
    "length-split": _shipped(greenllm.LengthSplit, "invented"),
    "mdp": _shipped(MdpRouter),
}
SCALERS: Final[Mapping[str, Entry[Scaler]]] = {
    "all-awake": _shipped(load.AllAwake, "published"),
    "scale-to-load": _shipped(load.ScaleToLoad),
    "dualscale": _shipped(placement.DualScale, "partly"),
    "dynamo": _shipped(load.Dynamo, "partly"),
    "throttllm": _shipped(load.Throttllm, "partly"),
    "rapid-roles": _shipped(roles.RapidRoles, "partly"),
}


_REGISTERED: Final[dict[str, dict[str, Entry[Any]]]] = {
    "controller": {},
    "router": {},
    "scaler": {},
}


def register_controller(
    name: str, make: type[Controller], parameters: type[object] | None = None
) -> None:
    """Give a controller of your own a name in this program and the processes that it starts.

    A name may be registered again, as in a notebook's cell that runs twice; a shipped one may not.

    Args:
        name: As a configuration names it; words joined by dashes.
        make: The class; its `__init__` takes its parameters and a `PolicyContext`.
        parameters: Their frozen dataclass; by default as that `__init__` declares it.

    Raises:
        VoltanaError: The name is taken or is none, or the class or its parameters are none.
    """
    _register(name, make, parameters, "controller", CONTROLLERS, Controller)


def register_router(name: str, make: type[Router], parameters: type[object] | None = None) -> None:
    """Give a router of your own a name; see `register_controller`.

    Args:
        name: As a configuration names it.
        make: The class.
        parameters: Frozen dataclass of its parameters; by default as `__init__` declares it.

    Raises:
        VoltanaError: As of `register_controller`.
    """
    _register(name, make, parameters, "router", ROUTERS, Router)


def registered(kind: str) -> Mapping[str, Entry[Any]]:
    """What this program registered, of kind "controller" or "router"."""
    return _REGISTERED[kind]


def _register(
    name: str, make: object, parameters: type[object] | None, kind: str,
    known: Mapping[str, Entry[Any]], base: type[object],
) -> None:  # fmt: skip
    if name in known:
        raise VoltanaError(f"{kind} {name!r} is a shipped one: take another name")
    if not name.replace("-", "_").isidentifier():
        raise VoltanaError(f"a policy's name must be words joined by dashes, got {name!r}")
    if not (isinstance(make, type) and issubclass(make, base)):
        raise VoltanaError(
            f"{kind} {name!r} must be a class derived from voltana.{base.__name__}, got {make!r}"
        )
    found = parameters or _declared(make)
    if not is_dataclass(found):
        raise VoltanaError(
            f"{kind} {name!r} must say its parameters, a frozen dataclass: annotate them in "
            f"__init__(self, parameters, context), or give them to register_{kind}"
        )
    _REGISTERED[kind][name] = Entry(make=make, parameters=found)


def _declared(make: type[object]) -> type[object] | None:
    """The parameters that a class declares, if it does; names in it may be of no use here."""
    try:
        found: type[object] | None = get_type_hints(make.__init__).get("parameters")
    except NameError:
        return None
    return found


_KNOWN: Final[Mapping[str, Mapping[str, Entry[Any]]]] = {
    "controller": CONTROLLERS, "router": ROUTERS, "scaler": SCALERS,
}  # fmt: skip


def make_controller(spec: str, context: PolicyContext) -> Controller:
    """Make one instance's controller from `name:key=value,…`.

    Raises:
        VoltanaError: Unknown name or parameter (with the nearest), a bad value, or an instance that
            does both phases under a rule for one.
    """
    make, _ = _maker(spec, CONTROLLERS, "controller", Controller)
    made = make(context)
    if context.phase == COLOCATED and not made.colocates:
        able = ", ".join(n for n, e in CONTROLLERS.items() if getattr(e.make, "colocates", False))
        raise VoltanaError(
            f"controller {spec!r} has no rule for an instance that does both phases: take one of "
            f"{able}, or fleets with the phases apart"
        )
    return made


def make_router(spec: str, context: PolicyContext) -> Router:
    """Make the fleet's router from `name:key=value,…`. Raises as `make_controller` does."""
    make, is_own = _maker(spec, ROUTERS, "router", Router)
    if is_own and max(context.num_prefill, context.num_decode) > 1:
        rehearse(make, context)
    return make(context)


def make_scaler(spec: str, context: ScalerContext) -> Scaler:
    """Make the fleet's scaler from `name:key=value,…`. Raises as `make_controller` does."""
    make, _ = _maker(spec, SCALERS, "scaler", Scaler)
    return make(context)


def check_policies(controller: str, router: str) -> None:
    """Check that both policies exist and accept their parameters, without making them.

    Raises:
        VoltanaError: As `make_controller` and `make_router` do.
    """
    _bound(controller, CONTROLLERS, "controller")
    _bound(router, ROUTERS, "router")


def is_module_name(name: str) -> bool:
    """Whether an unknown policy's name may name a module of the user's own.

    A module of the standard library is not one: `random` is a router.
    """
    parts = name.split(".")
    return all(p.isidentifier() for p in parts) and parts[0] not in sys.stdlib_module_names


def _maker(
    text: str, known: Mapping[str, Entry[P]], kind: str, base: type[object]
) -> tuple[Callable[[Any], P], bool]:
    """A function that makes the policy, and whether the policy is in a user's own module."""
    entry, parameters = _bound(text, known, kind)

    def make(context: Any) -> P:  # noqa: ANN401 (a policy's or a scaler's)
        try:
            made: object = entry.make(parameters, context)
        except VoltanaError:
            raise
        except Exception as error:
            raise VoltanaError(f"cannot make {kind} {text!r}: {describe(error)}") from error
        if not isinstance(made, base):
            raise VoltanaError(
                f"{kind} {text!r} must be a {base.__module__}.{base.__name__}, got a "
                f"{type(made).__name__}: derive your class from it"
            )
        return cast("P", made)

    return make, entry not in known.values()


def find_entry(name: str, kind: str) -> Entry[Any]:
    """A policy by its name: shipped, registered, or in a module of the user's.

    Args:
        name: Without parameters.
        kind: "controller", "router" or "scaler".

    Raises:
        VoltanaError: There is none (the nearest is suggested), or the module holds none.
    """
    known = _KNOWN[kind]
    return known.get(name) or _REGISTERED[kind].get(name) or _own(name, known, kind)


def _bound(text: str, known: Mapping[str, Entry[P]], kind: str) -> tuple[Entry[P], object]:
    """A policy's entry and its parameters."""
    spec = parse_spec(text)
    entry: Entry[P] = find_entry(spec.name, kind)
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
