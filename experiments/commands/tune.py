"""`voltana tune`: parameters of a policy, found in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sim.config import parse_settings, read_toml

tune = typer.Typer(
    name="tune", help="Find a policy's parameters in the simulator.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(tune)


@tune.callback()
def _verbs() -> None:
    """Keeps `tune` a group: what is tuned is named after it."""


@tune.command("pid")
def tune_pid(
    out: Annotated[Path, typer.Option(help="Directory of the runs and of pid.toml")] = Path(
        "results/tune-pid"
    ),
    config: Annotated[
        Path | None, typer.Option(help="TOML file of configuration keys; --set overrides it")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, repeatable")
    ] = None,
    target: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of requests that is to keep both promises"),
    ] = 0.99,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to tune on: 11, 12, …")] = 2,
    held_out: Annotated[int, typer.Option(min=1, help="Seeds to judge by: 21, 22, …")] = 3,
    population: Annotated[int, typer.Option(min=5, help="Settings a generation")] = 16,
    generations: Annotated[int, typer.Option(min=1, help="Generations after the first")] = 6,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
) -> None:
    """Tune target and gains of `pid`, decode first, then prefill; write OUT/pid.toml.

    The file holds prefill_controller and decode_controller; `voltana simulate --config
    OUT/pid.toml` takes it as it is. Run the command again to go on after an interruption.
    Example: voltana tune pid --set rate_rps=30 --set duration_s=60 --set slo_itl_s=0.045
    """
    from experiments.study.tune import PidTuner

    base = (read_toml(config) if config else {}) | parse_settings(settings or [])
    tuner = PidTuner(
        base, out, seeds=range(11, 11 + seeds), held_out=range(21, 21 + held_out), target=target,
        population=population, generations=generations, jobs=jobs,
    )  # fmt: skip
    tuned = tuner.tune()
    lines = [f"# PID gains tuned in the simulator for {100 * target:g} % attainment"]
    for what, outcomes in (("tuning", tuned.tuning), ("held-out", tuned.held_out)):
        for name, o in outcomes.items():
            lines.append(
                f"# {what} seeds, {name}: {o.energy_j:,.0f} J at {100 * o.attainment:.2f} %"
            )
    lines += [f'{key} = "{value}"' for key, value in tuned.settings.items()]
    path = out / "pid.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    typer.echo("\n".join([*lines, str(path)]))
