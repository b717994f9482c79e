"""`voltana validate`: a simulated run against a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("validate", short_help="Compare a simulation with what was observed")(validate)


def validate(
    simulated: Annotated[Path, typer.Argument(help="Run directory of simulate", metavar="SIM_DIR")],
    observed: Annotated[
        Path,
        typer.Argument(
            help="Run directory of replay, or output of aiperf, guidellm or bench_serving",
            metavar="REPLAY_DIR",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default REPLAY_DIR/validation")
    ] = None,
    energy_pct: Annotated[
        float, typer.Option(help="Largest error of energy and J/token that passes, %")
    ] = 5.0,
    p50_pct: Annotated[float, typer.Option(help="The same of TTFT, ITL, TPOT at p50, %")] = 10.0,
    p90_pct: Annotated[
        float | None, typer.Option(help="The same at p90, %; reported only if not given")
    ] = None,
    p99_pct: Annotated[float, typer.Option(help="The same at p99, %")] = 20.0,
    profile: Annotated[
        str | None, typer.Option(help="Predicts single iterations; default: the simulated run's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a simulation with what was observed, and judge it.

    Writes validation.md, validation.png and validation.json: the relative error of energy, J per
    token, TTFT/ITL/TPOT at p50/p90/p99, attainment and throughput; distributions over each other;
    each iteration's time as predicted and as observed; the share of time at each clock. Exit code
    1 if an error exceeds its limit, the workloads differ or a run did not end. Any two run
    directories can be compared.

    What a load generator wrote is judged by latencies alone: simulate the same requests first, with
    the same file as --trace.

    Example: voltana validate results/simulated results/replayed
    """
    from voltana.experiments.hardware.validate import run_validation
    from voltana.hwreplay.validate.validate import Thresholds

    thresholds = Thresholds(
        energy_frac=energy_pct / 100,
        p50_frac=p50_pct / 100,
        p90_frac=None if p90_pct is None else p90_pct / 100,
        p99_frac=p99_pct / 100,
    )
    folder = observed.parent if observed.is_file() else observed
    target = folder / "validation" if out is None else out
    passes, text, json_text = run_validation(
        simulated, observed, target, thresholds=thresholds, profile=profile
    )
    typer.echo(json_text if as_json else text)
    if not passes:
        raise typer.Exit(1)
