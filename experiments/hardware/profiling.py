"""Measuring a GPU and an engine, from what `voltana profile` is told to a profile's folder."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from voltana import profiles
from voltana.experiments.extras import needs
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.device.cards import open_cards
from voltana.profiles.device.gpu import Gpu
from voltana.profiles.engines.base import MIXED, PHASES, Engine, Phase
from voltana.profiles.engines.llama_config import load_config, load_shape
from voltana.profiles.measure.budget import clock_s, thinned
from voltana.profiles.measure.campaign import Plan
from voltana.profiles.measure.progress import Progress, open_progress
from voltana.profiles.measure.run import measure_profile
from voltana.profiles.measure.trial import Protocol
from voltana.profiles.tables import MIXED_POINT

ENGINES = ("torch", "sglang")
DEVICES = ("cuda", "cpu")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the command line asks for, in its own words where they are yet to be read."""

    model: str
    """Name of a built-in shape, or a path."""
    out: Path
    cards: str
    """NVML indices with commas."""
    engine: str
    frequencies: str
    """MHz with commas, all, or current."""
    phases: str
    budget: str
    """A number with s, m or h."""
    device: str
    dtype: str
    power_w: float | None
    """Constant power in place of a card's."""
    max_batch_size: int
    max_tokens: int
    attach: Path | None
    """File that names servers that run already."""
    is_pair: bool
    server_python: Path
    server_args: str
    allows_shared: bool
    restored_clock_mhz: int | None
    """To be locked again at the end."""
    protocol: Protocol


def run(wish: Wish) -> Profile:
    """Measure.

    Raises:
        VoltanaError: A wrong option, or the measurement cannot be made.
    """
    _check(wish)
    check_out(wish.out)
    with open_cards(wish.cards, wish.power_w) as cards, open_progress() as progress:
        plan = Plan(
            clocks_mhz=_clocks(wish.frequencies, cards[0]),
            phases=_phases(wish.phases),
            budget_s=_seconds(wish.budget),
            max_batch_size=wish.max_batch_size,
            max_tokens=wish.max_tokens,
            protocol=wish.protocol,
        )
        if wish.frequencies == "all":
            plan = _thinned(plan, progress)
        return measure_profile(
            cards,
            _engine(wish, cards),
            plan,
            wish.out,
            progress,
            allow_shared=wish.allows_shared,
            previous_clock_mhz=_restored_clock(wish.restored_clock_mhz, cards),
        )


def _engine(wish: Wish, cards: Sequence[Gpu]) -> Engine:
    if wish.engine == "torch":
        return _torch(wish.model, wish.device, wish.dtype, len(cards))
    if wish.attach is not None:
        return _attached(wish.model, wish.attach)
    gpus = () if wish.device == "cpu" else tuple(card.identity.index for card in cards)
    return _started(wish, gpus)


def _thinned(plan: Plan, progress: Progress) -> Plan:
    """Of all clocks those that the budget holds, and a line that says so."""
    known_mhz = plan.clocks_mhz or ()
    clocks_mhz = thinned(known_mhz, plan)
    if len(clocks_mhz) < len(known_mhz):
        progress.say(
            f"--frequencies all: {len(known_mhz)} clocks of about {clock_s(plan):.0f} s each are "
            f"more than the budget of {plan.budget_s:.0f} s, {len(clocks_mhz)} evenly spaced ones "
            f"are measured: {', '.join(map(str, clocks_mhz))} MHz"
        )
    return replace(plan, clocks_mhz=clocks_mhz)


def _check(wish: Wish) -> None:
    engine, device = wish.engine, wish.device
    if engine not in ENGINES:
        raise VoltanaError(f"--engine must be known, got {engine!r}{nearest(engine, ENGINES)}")
    if device not in DEVICES:
        raise VoltanaError(
            f"--device must be cuda or cpu, got {device!r}: choose the card with --gpu"
        )
    if engine != "sglang" and (wish.is_pair or wish.attach is not None):
        option = "--pair" if wish.is_pair else "--attach"
        raise VoltanaError(f"{option} must go with --engine sglang, got --engine {engine}")
    if wish.is_pair and MIXED in _phases(wish.phases):
        raise VoltanaError(
            "--phases mixed needs one server that does both phases, got --pair: leave one out"
        )
    if wish.is_pair and device != "cpu":
        raise VoltanaError(
            "--pair must go with --device cpu, got --device cuda: two servers would share one card "
            "and its power; leave --pair out, or --attach to a pair on cards of its own"
        )


def check_out(out: Path) -> None:
    """Refuse a place inside the installed package: its journals and logs would ship with it."""
    package = Path(profiles.__file__).parent
    if out.resolve().is_relative_to(package.resolve()):
        raise VoltanaError(
            f"--out must lie outside the package {package}, got {out}: name e.g. "
            f"{Path('results/profiles') / out.name}"
        )


def _restored_clock(clock_mhz: int | None, cards: Sequence[Gpu]) -> int | None:
    known_mhz = cards[0].supported_clocks_mhz() if clock_mhz is not None else ()
    if clock_mhz is not None and clock_mhz not in known_mhz:
        raise VoltanaError(
            f"--restore-clock must be a clock the card supports ({known_mhz[0]}..{known_mhz[-1]} "
            f"MHz in its steps), got {clock_mhz}: see nvidia-smi -q -d SUPPORTED_CLOCKS"
        )
    return clock_mhz


def _attached(model: str, fleet: Path) -> Engine:
    """Servers that run already, from a TOML file."""
    with needs("replay", "--engine sglang"):
        from voltana.profiles.engines.sglang import SglangEngine
        from voltana.profiles.engines.sglang_attach import attach
    return SglangEngine(lambda: attach(fleet), load_shape(model), is_attached=True)


def _started(wish: Wish, gpus: tuple[int, ...]) -> Engine:
    """Servers to start: one, or a pair, on the cards that are named or on the CPU."""
    with needs("replay", "--engine sglang"):
        from voltana.hwreplay.engines.launch import run_profiled
        from voltana.hwreplay.engines.plan import MIXED_ARGUMENT, Installation
        from voltana.profiles.engines.sglang import SglangEngine

    shape = load_shape(wish.model)
    if not Path(wish.model).is_dir():
        raise VoltanaError(
            "--model must be the folder of a model that SGLang can serve, got "
            f"{wish.model!r}: download it, or name servers that run already with --attach"
        )
    mixes = (MIXED_ARGUMENT,) if MIXED in _phases(wish.phases) else ()
    installation = Installation(
        python=wish.server_python,
        model=Path(wish.model),
        arguments=(*mixes, *shlex.split(wish.server_args)),
    )
    logs = wish.out / "logs"
    return SglangEngine(
        lambda: run_profiled(installation, logs, is_pair=wish.is_pair, gpus=gpus), shape
    )


def _torch(model: str, device: str, dtype: str, num_gpus: int) -> Engine:
    if num_gpus > 1:
        raise VoltanaError(
            f"--engine torch runs on one card, --gpu names {num_gpus}: name one, or take sglang"
        )
    with needs("torch", "--engine torch"):
        from voltana.profiles.engines.torch_llama import TorchEngine
    return TorchEngine(load_config(model), device=device, dtype=dtype)


def _clocks(text: str, card: Gpu) -> tuple[int, ...] | None:
    if text == "current":
        return None
    if text == "all":
        return card.supported_clocks_mhz()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise VoltanaError(
            f"--frequencies must be MHz separated by commas, all or current, got {text!r}"
        ) from None


def _phases(text: str) -> tuple[Phase, ...]:
    wanted, known = text.split(","), (*PHASES, MIXED)
    for name in wanted:
        if name not in known:
            raise VoltanaError(f"--phases must be phases, got {name!r}{nearest(name, known)}")
    return tuple(phase for phase in known if phase in wanted)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise VoltanaError(f"--budget must be a number with s, m or h, got {text!r}: e.g. 60m")
    seconds = float(found[1]) * _UNITS_S[found[2]]
    if seconds <= 0:
        raise VoltanaError(f"--budget must be > 0, got {text!r}: e.g. 60m")
    return seconds


def as_dict(made: Profile, out: Path) -> dict[str, Any]:
    """What was measured, for JSON."""
    return {
        "profile": str(out),
        "gpu": made.meta.gpu.name,
        "model": made.meta.model.name,
        "clocks_mhz": list(made.clocks_mhz),
        "prefill_points": _num_points(made.prefill),
        "decode_points": _num_points(made.decode),
        **({} if made.mixed is None else {"mixed_points": _num_points(made.mixed)}),
        "provenance": {key: dataclasses.asdict(e) for key, e in made.meta.provenance.items()},
    }


def _num_points(table: pd.DataFrame) -> int:
    return len(table.drop_duplicates([name for name in MIXED_POINT if name in table]))


def summary(made: Profile, out: Path) -> str:
    """The same in a line."""
    status = made.meta.provenance["decode_power"].status
    points, steps = _num_points(made.prefill), _num_points(made.decode)
    clocks = ", ".join(map(str, made.clocks_mhz))
    beside = "" if made.mixed is None else f", {_num_points(made.mixed)} of both together,"
    return (
        f"{out}: {points} prefill and {steps} decode points{beside} at {clocks} MHz; "
        f"time measured, power {status}; fit and plots in {out / 'report'}"
    )
