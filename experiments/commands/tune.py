"""`voltana tune`: parameters of a policy, found in the simulator."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson
from voltana.experiments.progress import note
from voltana.profiles.common.binding import parse_settings
from voltana.sim.config import read_toml

tune = typer.Typer(
    name="tune", help="Find a policy's parameters in the simulator.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(tune, short_help="Find a policy's parameters")


@tune.callback()
def _verbs() -> None:
    """Keeps `tune` a group: what is tuned is named after it."""


@tune.command("pid", short_help="Target and gains of `pid`, by phase")
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
    json: AsJson = False,
    require_slo: Annotated[
        bool,
        typer.Option(
            "--require-slo", help="Exit with 1 if the tuned gains miss the target on held-out seeds"
        ),
    ] = False,
) -> None:
    """Tune target and gains of `pid`, decode first, then prefill; write OUT/pid.toml.

    The file holds prefill_controller and decode_controller; `voltana simulate --config
    OUT/pid.toml` takes it as it is. Run the command again to go on after an interruption.
    Example: voltana tune pid --set rate_rps=30 --set duration_s=60 --set slo_itl_s=0.045
    """
    from voltana.experiments.control.tune import PidTuner
    from voltana.experiments.promise import missed
    from voltana.experiments.show import print_result
    from voltana.profiles.common.files import write_text
    from voltana.profiles.common.folders import claim

    base = (read_toml(config) if config else {}) | parse_settings(settings or [])
    tuner = PidTuner(
        base, out, seeds=range(11, 11 + seeds), held_out=range(21, 21 + held_out), target=target,
        population=population, generations=generations, jobs=jobs,
    )  # fmt: skip
    claim(out, "tuning")
    tuned = tuner.tune()
    reached, top = tuned.held_out["tuned"].attainment, tuned.static_max.attainment
    lines = [_heading(target, reached)]
    if top < target:
        lines.append(_overload(target, top))
    for what, outcomes in (("tuning", tuned.tuning), ("held-out", tuned.held_out)):
        for name, o in outcomes.items():
            lines.append(
                f"# {what} seeds, {name}: {o.energy_j:,.0f} J at {100 * o.attainment:.2f} %"
            )
    lines += [f'{key} = "{value}"' for key, value in tuned.settings.items()]
    path = out / "pid.toml"
    write_text("\n".join(lines) + "\n", path)
    told = {
        "settings": tuned.settings,
        "target": target,
        "tuning": {name: asdict(o) for name, o in tuned.tuning.items()},
        "held_out": {name: asdict(o) for name, o in tuned.held_out.items()},
        "files": [str(path)],
    }
    print_result(told, *lines, path, as_json=json)
    if top < target:
        note(_overload(target, top).removeprefix("# "))
    if require_slo and reached < target:
        raise missed(f"the tuned gains keep {_pct(reached)} of {_pct(target)} on held-out seeds")


def _heading(target: float, reached: float) -> str:
    """What the gains are and, of seeds that the search has not seen, how far they come."""
    if reached >= target:
        return f"# PID gains tuned in the simulator for {_pct(target)} attainment"
    return (
        f"# PID gains tuned in the simulator that MISS the target of {_pct(target)} attainment: "
        f"{_pct(reached)} on held-out seeds"
    )


def _overload(target: float, top: float) -> str:
    return (
        f"# overload: even top clocks (static-max) keep {_pct(top)}, below {_pct(target)}: "
        "take a lower rate, more instances or a longer promise"
    )


def _pct(share: float) -> str:
    return f"{round(100 * share, 2):g} %"
