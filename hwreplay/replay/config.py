"""What a replay is told, in one TOML file: `[simulate]`, `[fleet]`, `[router]` and `[replay]`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hwreplay.context import check_notices
from hwreplay.engines.launch import Engine
from hwreplay.router.config import WorkerConfig, read_limits, read_workers
from profiles.catalog import load_profile
from profiles.errors import VoltanaError, nearest
from sim.config import SimConfig, make_config, read_toml
from sim.policies.base import DECODE, PREFILL, Phase

START_KEYS: Final = ("engine", "python", "model", "arguments")
"""Of [fleet], for servers that are started here."""
FLEET_KEYS: Final = (*START_KEYS, "prefill", "decode", "batch_sockets")
PARALLEL_DATA: Final = ("--dp-size", "--data-parallel-size", "--dp")
REPLAY_KEYS: Final = (
    *("actuator", "gpus", "power_w", "vocabulary", "drain_s", "rest_s"),
    *("emulate", "dilation"),
)
NUMBERS: Final = ("power_w", "drain_s", "rest_s", "dilation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """One replay."""

    sim: SimConfig
    workers: tuple[WorkerConfig, ...] = ()
    """Servers that run already; empty when they are started here."""
    engine: Engine | None = None
    """Start its servers, as many as `sim` says: on the cards in `gpus`, else on the CPU."""
    batch_sockets: Mapping[str, Path] = field(default_factory=dict)
    """Where a running server's plug-in announces batches, e.g. {"prefill-0": /run/p0.batch}."""
    router_limits: Mapping[str, Any] = field(default_factory=dict)
    actuator: Path | None = None
    """Socket of `voltana actuator`; none records decisions and touches nothing."""
    gpus: Mapping[Phase, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Cards of each instance, e.g. {"prefill": ((0,),), "decode": ((1,),)}."""
    power_w: float | None = None
    """Stated power of each instance, on a machine without cards that count."""
    emulate: str | None = None
    """Profile of the emulated cards in `gpus`: energy is modelled by it and never called measured.
    Where the servers are started here, so are the cards, and a helper that sets their clocks."""
    dilation: float = 1.0
    """How many times slower all clocks of an emulated run go."""
    vocabulary: tuple[int, int] = (3, 512)
    drain_s: float = 60.0
    rest_s: float = 1.5
    """Silence before and after the measured part."""

    def __post_init__(self) -> None:
        if (self.engine is None) == (not self.workers):
            raise VoltanaError(
                "[fleet] must name either servers to start (engine, or python and model) or "
                "running ones (prefill and decode)"
            )
        if (self.power_w is None) == (not self.gpus):
            raise VoltanaError(
                "[replay] must have either gpus (the cards of each instance) or power_w (a stated "
                "power, W, where no card counts energy)"
            )
        if self.power_w is not None and not self.power_w > 0:
            raise VoltanaError(f"power_w must be > 0, got {self.power_w}")
        if self.dilation != 1 and self.emulate is None:
            raise VoltanaError(
                f"[replay] dilation must be 1 on real cards, got {self.dilation:g}: name the"
                " profile to emulate, or leave it out"
            )
        if self.actuator is not None and not self.gpus:
            raise VoltanaError(
                f"[replay] actuator must have gpus to set, got {self.actuator} with power_w: name "
                "the cards, e.g. gpus = {prefill = [[0]], decode = [[1]]}, or leave actuator out"
            )
        for worker in self.workers:
            self._check_worker(worker)
        if self.gpus:
            self._check_gpus()

    @property
    def power_kind(self) -> str:
        """Where energy comes from: measured, emulated or stated."""
        if self.emulate is not None:
            return "emulated"
        return "measured" if self.power_w is None else "stated"

    def _check_worker(self, worker: WorkerConfig) -> None:
        if worker.metrics is None:
            raise VoltanaError(
                f"{worker.name} must publish forward-pass metrics and name them, e.g. "
                f'metrics = "ipc:///tmp/{worker.name}.0": start SGLang with '
                "--enable-forward-pass-metrics --forward-pass-metrics-ipc-name "
                f"ipc:///tmp/{worker.name}"
            )
        has_socket = worker.name in self.batch_sockets
        check_notices(self.sim, worker.phase, worker.name, has_socket=has_socket)

    def _check_gpus(self) -> None:
        counts: dict[Phase, int] = {PREFILL: self.sim.num_prefill, DECODE: self.sim.num_decode}
        for phase, count in counts.items():
            cards = self.gpus.get(phase, ())
            if len(cards) != count or not all(cards):
                raise VoltanaError(
                    f"gpus.{phase} must list the cards of {count} instances, at least one each, "
                    f"got {[list(c) for c in cards]} ([replay])"
                )
        named = [card for phase in counts for cards in self.gpus[phase] for card in cards]
        if twice := sorted({card for card in named if named.count(card) > 1}):
            raise VoltanaError(
                f"gpus must name each card once, got {twice} for several servers ([replay]): its "
                "clock would have two masters and its energy count twice"
            )

    @property
    def stated_power_w(self) -> float:
        """Power of each instance, where it is stated.

        Raises:
            VoltanaError: It is measured here.
        """
        if self.power_w is None:
            raise VoltanaError("a fitted profile needs power_w: measure power with voltana profile")
        return self.power_w

    def vocab_size(self) -> int | None:
        """Number of token ids of the model: of servers started here, or what [router] states.

        None where neither says. An id that a model does not have ends an SGLang server.

        Raises:
            VoltanaError: The model to start cannot be read, or `vocabulary` goes beyond it.
        """
        stated = self.router_limits.get("vocab_size")
        sizes = [] if stated is None else [int(stated)]
        if self.engine is not None:
            self.engine.check()
            sizes.append(self.engine.vocab_size())
        found = min(sizes, default=None)
        if found is not None and self.vocabulary[1] > found:
            raise VoltanaError(
                f"[replay] vocabulary must lie within the model's {found} token ids, got "
                f"{list(self.vocabulary)}: ids that it does not have end a server"
            )
        return found

    def gpus_of(self, phase: Phase, instance_id: int) -> tuple[int, ...]:
        """Cards of one instance; none where power is stated."""
        return self.gpus[phase][instance_id] if self.gpus else ()


def read_replay_config(path: Path) -> ReplayConfig:
    """Read a replay's TOML file; relative paths in it start at the present folder.

    Raises:
        VoltanaError: The file cannot be read, or a key or value is wrong.
    """
    data, where = read_toml(path), str(path)
    for table in data:
        if table not in ("simulate", "fleet", "router", "replay"):
            raise VoltanaError(
                f"unknown table [{table}] ({where})"
                f"{nearest(table, ('simulate', 'fleet', 'router', 'replay'))}"
            )
    fleet, own = data.get("fleet", {}), data.get("replay", {})
    _check_keys(fleet, FLEET_KEYS, "[fleet]", where)
    _check_keys(own, REPLAY_KEYS, "[replay]", where)
    simulate = dict(data.get("simulate", {}))
    workers: tuple[WorkerConfig, ...] = ()
    engine = _engine(fleet, where)
    if engine is None:
        workers = read_workers(fleet, where)
        simulate["num_prefill"] = sum(w.phase == PREFILL for w in workers)
        simulate["num_decode"] = sum(w.phase == DECODE for w in workers)
    sim = make_config(simulate, where=where)
    gpus = _gpus(own.get("gpus", {}), where)
    emulate = own.get("emulate")
    if emulate is not None and not gpus and "power_w" not in own:
        gpus = emulated_gpus(str(emulate), sim)
    return ReplayConfig(
        sim=sim,
        workers=workers,
        engine=engine,
        batch_sockets={k: Path(v) for k, v in fleet.get("batch_sockets", {}).items()},
        router_limits=read_limits(data.get("router", {}), where),
        actuator=_path(own, "actuator"),
        gpus=gpus,
        emulate=None if emulate is None else str(emulate),
        vocabulary=_vocabulary(own.get("vocabulary", (3, 512)), where),
        **{k: _number(own, k, where) for k in NUMBERS if k in own},
    )


def emulated_gpus(profile: str, sim: SimConfig) -> dict[Phase, tuple[tuple[int, ...], ...]]:
    """The emulated cards of each instance: in a row, prefill first, as many as the profile's."""
    width = load_profile(profile).meta.model.tensor_parallel
    firsts: dict[Phase, range] = {
        PREFILL: range(sim.num_prefill),
        DECODE: range(sim.num_prefill, sim.num_prefill + sim.num_decode),
    }
    return {
        phase: tuple(tuple(range(i * width, (i + 1) * width)) for i in places)
        for phase, places in firsts.items()
    }


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], name: str, where: str) -> None:
    for key in table:
        if key not in known:
            raise VoltanaError(f"unknown key {key!r} of {name} ({where}){nearest(key, known)}")


def _engine(fleet: Mapping[str, Any], where: str) -> Engine | None:
    """The servers to start; None where running ones are named."""
    if not any(key in fleet for key in START_KEYS):
        return None
    arguments = fleet.get("arguments", "")
    if not isinstance(arguments, str):
        raise VoltanaError(
            f'[fleet] arguments must be one text, got {arguments!r} ({where}): e.g. "--dtype half"'
        )
    python, model = _path(fleet, "python"), _path(fleet, "model")
    if (folder := _path(fleet, "engine")) is not None:
        own = Engine.in_folder(folder)
        python, model = python or own.python, model or own.model
    if python is None or model is None:
        raise VoltanaError(
            f"[fleet] must name both python and model, or engine, which has both ({where})"
        )
    words = tuple(shlex.split(arguments))
    for word in words:
        if word.split("=")[0] in PARALLEL_DATA:
            raise VoltanaError(
                f"[fleet] arguments must not have {word} ({where}): only one rank of a server is "
                "watched; start more servers instead"
            )
    return Engine(python=python, model=model, arguments=words)


def _path(table: Mapping[str, Any], key: str) -> Path | None:
    return Path(str(table[key])) if key in table else None


def _number(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise VoltanaError(f"{key} must be a number, got {value!r} ({where})")
    return float(value)


def _vocabulary(value: object, where: str) -> tuple[int, int]:
    match value:
        case [int() as low, int() as high] if 0 <= low < high:
            return low, high
    raise VoltanaError(f"vocabulary must be two rising token ids, got {value!r} ({where})")


def _gpus(value: object, where: str) -> dict[Phase, tuple[tuple[int, ...], ...]]:
    found: dict[Phase, tuple[tuple[int, ...], ...]] = {}
    phases: tuple[Phase, Phase] = (PREFILL, DECODE)
    try:
        assert isinstance(value, dict)
        for phase in phases:
            if phase in value:
                found[phase] = tuple(tuple(int(g) for g in cards) for cards in value[phase])
    except (AssertionError, TypeError, ValueError):
        raise VoltanaError(
            f"gpus must be e.g. {{prefill = [[0]], decode = [[1]]}}, got {value!r} ({where})"
        ) from None
    return found
