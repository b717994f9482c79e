"""The key under which a run's result is kept: configuration, profile, data and program together.

A changed table, trace, policy or simulator gives another key, so that a kept result is never that
of another program. All shipped policies count, as one imports from another; of a user's own, the
module that the configuration names or, of a registered one, the class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from voltana import sim
from voltana.experiments import runs
from voltana.experiments.runs import cached_profile
from voltana.profiles import step_model
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.registry import (
    CONTROLLERS,
    ROUTERS,
    SCALERS,
    Entry,
    is_module_name,
    registered,
)
from voltana.sim.policies.spec import parse_spec
from voltana.sim.workload.arrivals.shapes import curve_of

_SHARED: Final = (
    "*.py",
    "engine/**/*.py",
    "workload/**/*.py",
    "workload/data/*",
    "policies/**/*.py",
    "mdp/*.py",
)
_OF_BOUND: Final = tuple(
    Path(__file__).parents[1] / "bound" / name for name in ("lower.py", "surface.py")
)
POLICY_KEYS: Final = (
    "controller", "prefill_controller", "decode_controller", "router", "active_prefill",
    "active_decode", "active_colocated", "aim_ratio", "predictor", "predictor_scale",
    "predictor_power_scale", "predictor_power_clock_error", "scaler",
)  # fmt: skip
"""Of a configuration: what a policy is and what it believes."""


def run_key(config: SimConfig) -> str:
    """First 16 hex digits of a SHA-256 over what determines the result.

    A configuration that cannot run (it names a profile that is not there, say) has a key too.
    """
    program, profile, trace = _world(config)
    parts = [config.content_hash(), program, profile]
    for spec in (config.prefill_controller_spec, config.decode_controller_spec):
        parts += _of_policy(spec, CONTROLLERS, "controller")
    parts += _of_policy(config.router, ROUTERS, "router")
    if config.scaler is not None:
        parts += _of_policy(config.scaler, SCALERS, "scaler")
    return _short("\n".join([*parts, *trace]))


def bound_key(config: SimConfig, attainment: float) -> str:
    """Like `run_key`, of a lower bound: it knows no policy, and has a program of its own."""
    program, profile, trace = _world(config)
    own = [_content(path) for path in _OF_BOUND]
    plain = {k: v for k, v in config.as_dict().items() if k not in POLICY_KEYS}
    text = json.dumps([plain, attainment], sort_keys=True)
    return _short("\n".join([text, program, profile, *trace, *own]))


def _world(config: SimConfig) -> tuple[str, str, list[str]]:
    """What every policy meets: the program, the profile, and the files that requests are of."""
    names = [config.profile, *(n for of in config.mixed_profiles.values() for n in of)]
    try:
        profile = "\n".join(cached_profile(name).content_hash for name in names)
    except VoltanaError as error:
        profile = str(error)
    told = config.workload if config.trace is None else config.trace, curve_of(config.arrivals)
    files = [Path(name) for name in told if name is not None]
    return _program(), profile, [_content(path) for path in files if path.is_file()]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_policy(text: str, known: Mapping[str, Entry[Any]], kind: str) -> Iterator[str]:
    """Hashes of a user's own policy, and of the files that any policy's parameters name."""
    spec = parse_spec(text)
    entry = registered(kind).get(spec.name)
    source = None if spec.name in known or entry is not None else _own_module(spec.name)
    if entry is not None:
        yield _class_source(spec.name, entry)
    if source is not None:
        yield _content(Path(source))
    yield from (_content(Path(v)) for v in spec.arguments.values() if Path(v).is_file())


def _class_source(name: str, entry: Entry[Any]) -> str:
    """What a registered policy is: the file of its class or, of a notebook's, its functions."""
    made: Any = entry.make
    file = getattr(sys.modules.get(made.__module__), "__file__", None)
    if file is not None:
        return _content(Path(file))
    fields = dataclasses.fields(entry.parameters)  # type: ignore[arg-type]
    parts = [f"{f.name}={f.default!r}" for f in fields]
    try:
        parts += [
            inspect.getsource(each)
            for part in made.__mro__
            if part.__module__ == made.__module__
            for each in vars(part).values()
            if inspect.isfunction(each)
        ]
    except OSError:
        raise VoltanaError(
            f"policy {name!r} must have a source that can be read, as its results are kept by it: "
            "define it in a file or a notebook"
        ) from None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _own_module(name: str) -> str | None:
    """The file of a user's policy, given by its module's name."""
    try:
        found = importlib.util.find_spec(name) if is_module_name(name) else None
    except ImportError:
        return None
    return found.origin if found else None


@lru_cache(maxsize=1)
def _program() -> str:
    return "".join(_content(path) for path in program_files())


def program_files() -> list[Path]:
    """Every shipped file that may change a result."""
    tables = Path(step_model.__file__).parent, ("*.py", "common/*.py", "optional/*.py")
    folders = (Path(sim.__file__).parent, _SHARED), tables
    paths = [p for folder, patterns in folders for each in patterns for p in folder.glob(each)]
    return sorted([*paths, Path(runs.__file__)])


def _content(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, changed_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
