"""`voltana profile`: measure a GPU and an engine into a profile directory."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiles.errors import VoltanaError, nearest

if TYPE_CHECKING:
    from profiles.catalog import Profile
    from profiles.device.gpu import Gpu
    from profiles.engines.base import Engine, EngineFacts, Phase
    from profiles.measure.campaign import Plan, Progress
    from profiles.measure.journal import Journal

ENGINES = ("torch", "sglang")
SERVING = "serving.toml"
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("profile")(profile)


def profile(
    model: Annotated[str, typer.Option(help="Built-in shape (llama-3.1-8b, toy) or a config.json")],
    out: Annotated[Path, typer.Option(help="Profile directory; the same one resumes a run")],
    gpu: Annotated[int, typer.Option(help="NVML index of the card")] = 0,
    engine: Annotated[str, typer.Option(help=" or ".join(ENGINES))] = "torch",
    frequencies: Annotated[
        str, typer.Option(help="MHz list (1005,1200,1410), all, or current: touch no clock")
    ] = "current",
    phases: Annotated[str, typer.Option(help="prefill,decode or one of them")] = "prefill,decode",
    budget: Annotated[str, typer.Option(help="Time for the points, e.g. 90s, 60m, 2h")] = "60m",
    device: Annotated[str, typer.Option(help="Where torch computes: cuda, cuda:N, cpu")] = "cuda",
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
) -> None:
    """Measure iteration time and power against batch size and tokens, at each clock.

    On a machine with a GPU, without any privilege (no clock is touched, the profile has one):

        voltana profile --gpu 0 --engine torch --model llama-3.1-8b --frequencies current --out h200

    With clock control (root), several clocks; they are put back on exit, Ctrl-C and kill -9:

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
    from profiles.measure.campaign import Plan
    from profiles.measure.trial import Protocol

    if engine not in ENGINES:
        raise VoltanaError(f"--engine must be known, got {engine!r}{nearest(engine, ENGINES)}")
    protocol = Protocol(
        window_s=window,
        min_iterations=iterations,
        num_trials=trials,
        warm_up_s=warm_up,
        settle_s=settle,
    )
    with _open_gpu(gpu, power_w) as card:
        plan = Plan(
            clocks_mhz=_clocks(frequencies, card),
            phases=_phases(phases),
            budget_s=_seconds(budget),
            max_batch_size=max_batch,
            max_tokens=max_tokens,
            protocol=protocol,
        )
        if engine == "torch":
            chosen = _torch(model, device, dtype)
        else:
            launch = (server_python, pair, server_args, out / "logs")
            chosen = _sglang(model, device, attach, launch)
        made = _measure(card, chosen, plan, out, allow_shared=allow_shared)
    typer.echo(_summary(made, out))


def _measure(card: Gpu, engine: Engine, plan: Plan, out: Path, *, allow_shared: bool) -> Profile:
    from profiles.device.lock import ClockSession
    from profiles.measure.assemble import assemble
    from profiles.measure.campaign import Campaign, measure_bare_idle
    from profiles.measure.journal import Journal
    from profiles.measure.report import write_report

    log = Journal.open(out / "journal.jsonl")
    with ClockSession([card], allow_shared=allow_shared) as session:
        if not engine.is_attached:
            measure_bare_idle([card], plan, session, log)
        with engine, _progress() as progress:
            facts = engine.facts
            log.describe(_run_of(card, facts, plan))
            Campaign(engine, [card], plan, session, log, progress).run()
            _measure_serving(engine, out)
    made = assemble(out, log, [card.identity], facts)
    write_report(made, out / "report")
    _warn_of_failures(log)
    return made


def _run_of(card: Gpu, facts: EngineFacts, plan: Plan) -> dict[str, object]:
    return {
        "gpu": card.identity.uuid,
        "engine": facts.engine_name,
        "model": facts.model_name,
        "notes": dict(facts.notes),
        "is_power_measured": card.identity.is_power_measured,
        "power_limit_w": card.identity.power_limit_w,
        "is_clock_left_alone": plan.clocks_mhz is None,
        "window_s": plan.protocol.window_s,
    }


def _measure_serving(engine: Engine, out: Path) -> None:
    """What a request spends outside the iterations; only a serving engine has it."""
    import tomli_w

    from profiles.engines.base import NotHeldError

    try:
        table = engine.measure_serving()
    except NotHeldError as error:
        typer.echo(f"voltana: no {SERVING}: {error}", err=True)
        return
    if table is not None:
        (out / SERVING).write_text(tomli_w.dumps(table), encoding="utf-8")


@contextmanager
def _open_gpu(index: int, power_w: float | None) -> Iterator[Gpu]:
    if power_w is not None:
        from profiles.device.constant import ConstantPowerGpu

        yield ConstantPowerGpu(power_w)
        return
    from profiles.device.nvml import NvmlGpu

    with NvmlGpu(index) as card:
        yield card


def _sglang(
    model: str, device: str, attach: Path | None, plan: tuple[Path, bool, str, Path]
) -> Engine:
    """Servers to attach to, or to start: (Python, a pair?, further arguments, logs)."""
    try:
        from profiles.engines import sglang_fleet
        from profiles.engines.sglang import SglangEngine
    except ModuleNotFoundError as error:
        raise VoltanaError(
            f"--engine sglang needs {error.name}: pip install 'voltana[replay]'"
        ) from None
    from profiles.engines.llama_config import load_shape

    shape = load_shape(model)
    if attach is not None:
        return SglangEngine(lambda: sglang_fleet.attach(attach), shape, is_attached=True)
    if not Path(model).is_dir():
        raise VoltanaError(
            f"--model must be the folder of a model that SGLang can serve, got {model!r}: download "
            "it, or name servers that run already with --attach"
        )
    python, is_pair, arguments, logs = plan
    launch = sglang_fleet.LaunchPlan(
        python=python,
        model=model,
        logs=logs,
        is_cpu=device == "cpu",
        is_pair=is_pair,
        arguments=arguments,
    )
    return SglangEngine(lambda: sglang_fleet.start_servers(launch), shape)


def _torch(model: str, device: str, dtype: str) -> Engine:
    try:
        from profiles.engines.torch_llama import TorchEngine
    except ModuleNotFoundError as error:
        raise VoltanaError(
            f"--engine torch needs {error.name}: pip install 'voltana[torch]'"
        ) from None
    from profiles.engines.llama_config import load_config

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
    from profiles.engines.base import PHASES

    wanted = text.split(",")
    for name in wanted:
        if name not in PHASES:
            raise VoltanaError(f"--phases must be phases, got {name!r}{nearest(name, PHASES)}")
    return tuple(phase for phase in PHASES if phase in wanted)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise VoltanaError(f"--budget must be a number with s, m or h, got {text!r}: e.g. 60m")
    return float(found[1]) * _UNITS_S[found[2]]


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("points")
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )


def _warn_of_failures(log: Journal) -> None:
    for (clock_mhz, _), reason in log.failures.items():
        typer.echo(f"voltana: point left out at {clock_mhz} MHz: {reason}", err=True)


def _summary(made: Profile, out: Path) -> str:
    status = made.meta.provenance["decode_power"].status
    points = len(made.prefill.drop_duplicates(["frequency_mhz", "batch_size", "tokens"]))
    steps = len(made.decode.drop_duplicates(["frequency_mhz", "batch_size", "tokens"]))
    clocks = ", ".join(map(str, made.clocks_mhz))
    return (
        f"{out}: {points} prefill and {steps} decode points at {clocks} MHz; "
        f"time measured, power {status}; fit and plots in {out / 'report'}"
    )
