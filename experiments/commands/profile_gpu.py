"""`voltana profile`: measure a GPU and an engine into a profile directory."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana.experiments.extras import needs
from voltana.profiles.errors import VoltanaError, nearest

if TYPE_CHECKING:
    from voltana.profiles.catalog import Profile
    from voltana.profiles.device.gpu import Gpu
    from voltana.profiles.engines.base import Engine, Phase
    from voltana.profiles.measure.campaign import Plan
    from voltana.profiles.measure.progress import Progress

ENGINES = ("torch", "sglang")
DEVICES = ("cuda", "cpu")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def profile(
    model: Annotated[str, typer.Option(help="Built-in shape (llama-3.1-8b, toy) or a config.json")],
    out: Annotated[Path, typer.Option(help="Profile directory; the same one resumes a run")],
    gpu: Annotated[
        str, typer.Option(help="NVML indices of all the cards of the engine: 0, or 0,1 for two")
    ] = "0",
    engine: Annotated[str, typer.Option(help=" or ".join(ENGINES))] = "torch",
    frequencies: Annotated[
        str, typer.Option(help="MHz list (1005,1200,1410), all, or current: touch no clock")
    ] = "current",
    phases: Annotated[str, typer.Option(help="prefill,decode or one of them")] = "prefill,decode",
    budget: Annotated[str, typer.Option(help="Time for the points, e.g. 90s, 60m, 2h")] = "60m",
    device: Annotated[str, typer.Option(help="Where the engine computes: cuda or cpu")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Type of weights and KV cache")] = "bfloat16",
    power_w: Annotated[
        float | None,
        typer.Option(help="No card: take this constant power, stated as modelled, never measured"),
    ] = None,
    window: Annotated[float, typer.Option(help="Shortest window of a trial, s")] = 2.0,
    iterations: Annotated[int, typer.Option(help="Fewest iterations of a trial")] = 32,
    warm_up: Annotated[float, typer.Option(help="Shortest warm-up of a point, s")] = 1.0,
    settle: Annotated[float, typer.Option(help="Rest before idle power is measured, s")] = 3.0,
    trials: Annotated[int, typer.Option(help="Phase-shifted trials of a point")] = 3,
    max_batch: Annotated[int, typer.Option(help="Largest decode batch")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a point")] = 10_000_000,
    attach: Annotated[
        Path | None,
        typer.Option(
            help="sglang: TOML file naming servers that run already, as for replay; on a GPU they "
            "are on the card, so add --allow-shared"
        ),
    ] = None,
    pair: Annotated[
        bool, typer.Option("--pair", help="sglang: start prefill and decode apart, not one server")
    ] = False,
    server_python: Annotated[
        Path, typer.Option(help="sglang: Python of the environment SGLang is installed in")
    ] = Path(sys.executable),
    server_args: Annotated[str, typer.Option(help="sglang: further arguments of a server")] = "",
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="Go on although others use the card")
    ] = False,
    restore_clock: Annotated[
        int | None,
        typer.Option(help="MHz to lock again at the end; without it the driver has the clock"),
    ] = None,
) -> None:
    """Measure iteration time and power against batch size and tokens, at each clock.

    On a machine with a GPU, without any privilege (no clock is touched, the profile has one):

        voltana profile --gpu 0 --engine torch --model llama-3.1-8b --frequencies current --out h200

    With clock control (root), several clocks; the driver has them back on exit, Ctrl-C and kill -9
    (or --restore-clock MHZ, where one was locked before):

        sudo voltana profile --model llama-3.1-8b --frequencies 1005,1200,1410 --out a100

    SGLang, started here (or running already: --attach FILE); times come from its own metrics, and
    OUT/serving.toml holds what a request spends outside the iterations:

        voltana profile --engine sglang --model DIR --frequencies current --out h200

    The real SGLang on a CPU (`make engine`), prefill and decode apart, the power a stated constant:

        voltana profile --engine sglang --pair --device cpu --power-w 100 --out cpu
        --server-python .engine/venv/bin/python --model .engine/model --budget 3m --window 0.2

    Without a GPU, to see it work:

        voltana profile --model toy --device cpu --dtype float32 --power-w 100 --budget 60s
        --window 0.1 --trials 1 --max-batch 16 --max-tokens 4096 --out toy

    Every finished point is kept in OUT/journal.jsonl; run the same command again to go on.
    """
    from voltana.profiles.device.cards import open_cards
    from voltana.profiles.measure.campaign import Plan
    from voltana.profiles.measure.progress import open_progress
    from voltana.profiles.measure.run import measure_profile
    from voltana.profiles.measure.trial import Protocol

    _check(engine, device, is_pair=pair, is_attached=attach is not None)
    check_out(out)
    protocol = Protocol(
        window_s=window,
        min_iterations=iterations,
        num_trials=trials,
        warm_up_s=warm_up,
        settle_s=settle,
    )
    with open_cards(gpu, power_w) as cards, open_progress() as progress:
        plan = Plan(
            clocks_mhz=_clocks(frequencies, cards[0]),
            phases=_phases(phases),
            budget_s=_seconds(budget),
            max_batch_size=max_batch,
            max_tokens=max_tokens,
            protocol=protocol,
        )
        if frequencies == "all":
            plan = _thinned(plan, progress)
        if engine == "torch":
            chosen = _torch(model, device, dtype, len(cards))
        else:
            gpus = () if device == "cpu" else tuple(card.identity.index for card in cards)
            chosen = (
                _started(model, server_python, server_args, out / "logs", is_pair=pair, gpus=gpus)
                if attach is None
                else _attached(model, attach)
            )
        made = measure_profile(
            cards,
            chosen,
            plan,
            out,
            progress,
            allow_shared=allow_shared,
            previous_clock_mhz=_restored_clock(restore_clock, cards),
        )
    typer.echo(_summary(made, out))


def _thinned(plan: Plan, progress: Progress) -> Plan:
    """Of all clocks those that the budget holds, and a line that says so."""
    from voltana.profiles.measure.budget import clock_s, thinned

    known_mhz = plan.clocks_mhz or ()
    clocks_mhz = thinned(known_mhz, plan)
    if len(clocks_mhz) < len(known_mhz):
        progress.say(
            f"--frequencies all: {len(known_mhz)} clocks of about {clock_s(plan):.0f} s each are "
            f"more than the budget of {plan.budget_s:.0f} s, {len(clocks_mhz)} evenly spaced ones "
            f"are measured: {', '.join(map(str, clocks_mhz))} MHz"
        )
    return replace(plan, clocks_mhz=clocks_mhz)


def _check(engine: str, device: str, *, is_pair: bool, is_attached: bool) -> None:
    if engine not in ENGINES:
        raise VoltanaError(f"--engine must be known, got {engine!r}{nearest(engine, ENGINES)}")
    if device not in DEVICES:
        raise VoltanaError(
            f"--device must be cuda or cpu, got {device!r}: choose the card with --gpu"
        )
    if engine != "sglang" and (is_pair or is_attached):
        option = "--pair" if is_pair else "--attach"
        raise VoltanaError(f"{option} must go with --engine sglang, got --engine {engine}")
    if is_pair and device != "cpu":
        raise VoltanaError(
            "--pair must go with --device cpu, got --device cuda: two servers would share one card "
            "and its power; leave --pair out, or --attach to a pair on cards of its own"
        )


def check_out(out: Path) -> None:
    """Refuse a place inside the installed package: its journals and logs would ship with it."""
    from voltana import profiles

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
    from voltana.profiles.engines.llama_config import load_shape

    return SglangEngine(lambda: attach(fleet), load_shape(model), is_attached=True)


def _started(
    model: str, python: Path, arguments: str, logs: Path, *, is_pair: bool, gpus: tuple[int, ...]
) -> Engine:
    """Servers to start: one, or a pair, on the cards that are named or on the CPU."""
    with needs("replay", "--engine sglang"):
        from voltana.hwreplay.engines.launch import run_profiled
        from voltana.hwreplay.engines.plan import Installation
        from voltana.profiles.engines.sglang import SglangEngine
    from voltana.profiles.engines.llama_config import load_shape

    shape = load_shape(model)
    if not Path(model).is_dir():
        raise VoltanaError(
            f"--model must be the folder of a model that SGLang can serve, got {model!r}: download "
            "it, or name servers that run already with --attach"
        )
    installation = Installation(
        python=python, model=Path(model), arguments=tuple(shlex.split(arguments))
    )
    return SglangEngine(lambda: run_profiled(installation, logs, is_pair=is_pair, gpus=gpus), shape)


def _torch(model: str, device: str, dtype: str, num_gpus: int) -> Engine:
    if num_gpus > 1:
        raise VoltanaError(
            f"--engine torch runs on one card, --gpu names {num_gpus}: name one, or take sglang"
        )
    try:
        from voltana.profiles.engines.torch_llama import TorchEngine
    except ModuleNotFoundError as error:
        raise VoltanaError(
            f"--engine torch needs {error.name}: pip install 'voltana[torch]'"
        ) from None
    from voltana.profiles.engines.llama_config import load_config

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
    from voltana.profiles.engines.base import PHASES

    wanted = text.split(",")
    for name in wanted:
        if name not in PHASES:
            raise VoltanaError(f"--phases must be phases, got {name!r}{nearest(name, PHASES)}")
    return tuple(phase for phase in PHASES if phase in wanted)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise VoltanaError(f"--budget must be a number with s, m or h, got {text!r}: e.g. 60m")
    seconds = float(found[1]) * _UNITS_S[found[2]]
    if seconds <= 0:
        raise VoltanaError(f"--budget must be > 0, got {text!r}: e.g. 60m")
    return seconds


def _summary(made: Profile, out: Path) -> str:
    status = made.meta.provenance["decode_power"].status
    points = len(made.prefill.drop_duplicates(["frequency_mhz", "batch_size", "tokens"]))
    steps = len(made.decode.drop_duplicates(["frequency_mhz", "batch_size", "tokens"]))
    clocks = ", ".join(map(str, made.clocks_mhz))
    return (
        f"{out}: {points} prefill and {steps} decode points at {clocks} MHz; "
        f"time measured, power {status}; fit and plots in {out / 'report'}"
    )
