"""What a replay is told, in one TOML file: `[simulate]`, `[fleet]`, `[router]` and `[replay]`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from voltana.hwreplay.emulated.machine import emulated_gpus
from voltana.hwreplay.engines.plan import MIXED_ARGUMENT, Installation
from voltana.hwreplay.router.config import WorkerConfig, counts_of, read_limits, read_workers
from voltana.hwreplay.view.context import check_notices
from voltana.profiles.common.binding import EXAMPLE, bind, check_names, convert, table
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config, read_toml
from voltana.sim.policies.base import Phase

START_KEYS: Final = ("engine", "python", "model", "arguments")
"""Of [fleet], for servers that are started here."""
FLEET_KEYS: Final = (*START_KEYS, "prefill", "decode", "colocated", "batch_sockets")
PARALLEL_DATA: Final = ("--dp-size", "--data-parallel-size", "--dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """One replay."""

    sim: SimConfig
    section: str = "replay"
    """The table that its own keys are written in, for errors; a service's is [serve]."""
    workers: tuple[WorkerConfig, ...] = ()
    """Servers that run already; empty when they are started here."""
    engine: Installation | None = None
    """Start its servers, as many as `sim` says: on the cards in `gpus`, else on the CPU."""
    batch_sockets: Mapping[str, Path] = field(default_factory=dict)
    """Where a running server's plug-in announces batches, e.g. {"prefill-0": /run/p0.batch}."""
    router_limits: Mapping[str, Any] = field(default_factory=dict)
    actuator: Path | None = None
    """Socket of `voltana actuator`; none records decisions and touches nothing."""
    gpus: Mapping[Phase, tuple[tuple[int, ...], ...]] = field(
        default_factory=dict, metadata={EXAMPLE: "e.g. {prefill = [[0]], decode = [[1]]}"}
    )
    """Cards of each instance, e.g. {"prefill": ((0,),), "decode": ((1,),)}."""
    power_w: float | None = None
    """Stated power of each instance, on a machine without cards that count."""
    emulate: str | None = None
    """Profile of the emulated cards in `gpus`: energy is modelled by it and never called measured.
    Where the servers are started here, so are the cards, and an actuator that sets their clocks."""
    dilation: float = 1.0
    """How many times slower all clocks of an emulated run go."""
    vocabulary: tuple[int, int] = field(
        default=(3, 512), metadata={EXAMPLE: "two rising token ids"}
    )
    drain_s: float = 60.0
    rest_s: float = 1.5
    """Silence before and after the measured part."""

    def __post_init__(self) -> None:
        if (self.engine is None) == (not self.workers):
            raise VoltanaError(
                "[fleet] must name either servers to start (engine, or python and model) or "
                "running ones (prefill and decode, or colocated)"
            )
        if (self.power_w is not None and self.gpus) or self._lacks_energy():
            raise VoltanaError(
                f"[{self.section}] must have either gpus (the cards of each instance) or power_w "
                "(a stated power, W, where no card counts energy)"
            )
        if not 0 <= self.vocabulary[0] < self.vocabulary[1]:
            ids = list(self.vocabulary)
            raise VoltanaError(
                f"vocabulary must be two rising token ids, got {ids} ([{self.section}])"
            )
        if self.power_w is not None and not self.power_w > 0:
            raise VoltanaError(f"power_w must be > 0, got {self.power_w}")
        if self.dilation != 1 and self.emulate is None:
            raise VoltanaError(
                f"[{self.section}] dilation must be 1 on real cards, got {self.dilation:g}: name "
                "the profile to emulate, or leave it out"
            )
        if self.actuator is not None and not self.gpus:
            raise VoltanaError(
                f"[{self.section}] actuator must have gpus to set, got {self.actuator} without: "
                "name the cards, e.g. gpus = {prefill = [[0]], decode = [[1]]}, or leave it out"
            )
        for worker in self.workers:
            self._check_worker(worker)
        if self.gpus:
            self._check_gpus()

    def _lacks_energy(self) -> bool:
        """Whether a run would have no energy; a service may do without."""
        return self.section == "replay" and self.power_w is None and not self.gpus

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
        counts = self.sim.counts
        for phase, count in counts.items():
            cards = self.gpus.get(phase, ())
            if len(cards) != count or not all(cards):
                raise VoltanaError(
                    f"gpus.{phase} must list the cards of {count} instances, at least one each, "
                    f"got {[list(c) for c in cards]} ([{self.section}])"
                )
        named = [card for phase in counts for cards in self.gpus[phase] for card in cards]
        if twice := sorted({card for card in named if named.count(card) > 1}):
            raise VoltanaError(
                f"gpus must name each card once, got {twice} for several servers "
                f"([{self.section}]): its clock would have two masters and its energy count twice"
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
    check_names(data, ("simulate", "fleet", "router", "replay"), "table", where)
    return make_fleet_config(data, table(data, "replay", where), where)


def make_fleet_config(
    data: Mapping[str, Any], own: Mapping[str, Any], where: str, *, section: str = "replay"
) -> ReplayConfig:
    """What a replay or a service runs on, from the tables of a file.

    Args:
        data: The file: [simulate], [fleet] and [router] are read.
        own: Keys of `ReplayConfig` from the table `section`.
        where: The file's name, for errors.
        section: As in `ReplayConfig`.

    Raises:
        VoltanaError: A key or value is wrong.
    """
    fleet = table(data, "fleet", where)
    check_names(fleet, FLEET_KEYS, "key", where, " of [fleet]")
    simulate = dict(table(data, "simulate", where))
    workers: tuple[WorkerConfig, ...] = ()
    engine = _engine(fleet, where)
    if engine is None:
        workers = read_workers(fleet, where)
        simulate |= counts_of(workers)
    sockets = table(fleet, "batch_sockets", where)
    sim = make_config(simulate, where=where)
    is_replay = section == "replay"
    is_emulated = is_replay and "emulate" in own and engine is not None
    unlike = ("prefill_profiles", "decode_profiles") if is_emulated else ()
    what = "a replay" if is_replay else "a service"
    sim.require_plain(what, knows=("num_colocated", *unlike))
    if is_replay and sim.caches and not is_emulated:
        raise VoltanaError(
            f"{sim.caches[0]} is replayed on emulated cards alone, whose answers are known before, "
            f"by servers that are started with such a cache ({where}): set [replay] emulate and "
            "[fleet] engine, or leave it out"
        )
    if sim.colocated_order == "vllm":
        raise VoltanaError(
            f"colocated_order must be one that SGLang has, got vllm ({where}): name sglang or "
            "sglang-mixed"
        )
    if engine is not None and sim.colocated_order == "sglang-mixed":
        engine = replace(engine, arguments=(MIXED_ARGUMENT, *engine.arguments))
    if "emulate" in own and not {"gpus", "power_w"} & own.keys():
        profile = convert(own["emulate"], str, "emulate", where)
        own = {**own, "gpus": emulated_gpus(profile, sim.counts, sim.mixed_profiles)}
    fixed = {
        "sim": sim,
        "section": section,
        "workers": workers,
        "engine": engine,
        "batch_sockets": {k: convert(v, Path, k, where) for k, v in sockets.items()},
        "router_limits": read_limits(table(data, "router", where), where),
    }
    return bind(ReplayConfig, own, where, section=f" of [{section}]", fixed=fixed)


def _engine(fleet: Mapping[str, Any], where: str) -> Installation | None:
    """The servers to start; None where running ones are named."""
    if not any(key in fleet for key in START_KEYS):
        return None
    arguments = fleet.get("arguments", "")
    if not isinstance(arguments, str):
        raise VoltanaError(
            f'[fleet] arguments must be one text, got {arguments!r} ({where}): e.g. "--dtype half"'
        )
    python, model, folder = (
        convert(fleet.get(key), Path | None, key, where) for key in ("python", "model", "engine")
    )
    if folder is not None:
        own = Installation.in_folder(folder)
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
    return Installation(python=python, model=model, arguments=words)
