"""The key under which a run's result is kept: configuration, profile, data and program together.

A changed table, trace, policy or simulator gives another key, so that a kept result is never that
of another program. All shipped policies count, as one imports from another; of a user's own, the
module that the configuration names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
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
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, Entry, is_module_name
from voltana.sim.policies.spec import parse_spec

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
    "predictor_power_scale", "predictor_power_clock_error",
)  # fmt: skip
"""Of a configuration: what a policy is and what it believes."""


def run_key(config: SimConfig) -> str:
    """First 16 hex digits of a SHA-256 over what determines the result.

    A configuration that cannot run (it names a profile that is not there, say) has a key too.
    """
    program, profile, trace = _world(config)
    parts = [config.content_hash(), program, profile]
    for spec in (config.prefill_controller_spec, config.decode_controller_spec):
        parts += map(_content, _policy_files(spec, CONTROLLERS))
    parts += map(_content, _policy_files(config.router, ROUTERS))
    return _short("\n".join([*parts, *trace]))


def bound_key(config: SimConfig, attainment: float) -> str:
    """Like `run_key`, of a lower bound: it knows no policy, and has a program of its own."""
    program, profile, trace = _world(config)
    own = [_content(path) for path in _OF_BOUND]
    plain = {k: v for k, v in config.as_dict().items() if k not in POLICY_KEYS}
    text = json.dumps([plain, attainment], sort_keys=True)
    return _short("\n".join([text, program, profile, *trace, *own]))


def _world(config: SimConfig) -> tuple[str, str, list[str]]:
    """What every policy meets: the program, the profile, and the trace if there is one."""
    try:
        profile = cached_profile(config.profile).content_hash
    except VoltanaError as error:
        profile = str(error)
    requests = Path(config.workload if config.trace is None else config.trace)
    return _program(), profile, [_content(requests)] if requests.is_file() else []


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _policy_files(text: str, known: Mapping[str, Entry[Any]]) -> Iterator[Path]:
    """The source of a user's own policy, and the files that any policy's parameters name."""
    spec = parse_spec(text)
    source = None if spec.name in known else _own_module(spec.name)
    if source is not None:
        yield Path(source)
    yield from (Path(value) for value in spec.arguments.values() if Path(value).is_file())


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
    tables = Path(step_model.__file__).parent, ("*.py", "common/*.py")
    folders = (Path(sim.__file__).parent, _SHARED), tables
    paths = [p for folder, patterns in folders for each in patterns for p in folder.glob(each)]
    return sorted([*paths, Path(runs.__file__)])


def _content(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, changed_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
