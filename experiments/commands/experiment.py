"""`voltana experiment`: the shipped questions, their runs, their figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana.experiments.options import RequireSlo

if TYPE_CHECKING:
    import pandas as pd

    from voltana.experiments.promise import Overload
    from voltana.experiments.study.suite import Experiment

STEP_RESPONSE = "step-response"
"""Runs only when named: `all` runs the experiments that are files with a grid."""

experiment = typer.Typer(
    name="experiment",
    help="Run the shipped experiments: each asks one question, runs a grid and draws one figure.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(experiment, short_help="The shipped questions: run and draw them")


@experiment.command("list")
def list_all() -> None:
    """List every experiment with its question."""
    from voltana.experiments.study.suite import list_experiments

    for name, question in list_experiments().items():
        typer.echo(f"{name}: {question}")
    typer.echo(f"{STEP_RESPONSE}: How does each controller answer a step, a ramp, a pulse?")


@experiment.command("run")
def run(
    name: Annotated[str, typer.Argument(help="An experiment, a file ending in .toml, or all")],
    out: Annotated[Path, typer.Option(help="Parent directory of the results")] = Path(
        "results/experiments"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smoke size: 10 s, few points")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder that takes a copy of each NAME.png")
    ] = None,
    require_slo: RequireSlo = False,
) -> None:
    """Run an experiment and draw its figure: OUT/NAME/results.csv, NAME.png and NAME.svg.

    Runs are kept by the hash of their configuration: what has been run is not run again, and the
    figure is drawn anew each time. --quick writes to OUT/NAME-quick.
    """
    from voltana.experiments.promise import end_with
    from voltana.experiments.study.suite import find_experiment, list_experiments, read_experiment
    from voltana.profiles.common.errors import VoltanaError
    from voltana.profiles.common.files import write_bytes

    names = list(list_experiments()) if name == "all" else [name]
    failures: dict[str, str] = {}
    found: list[Overload] = []
    for each in names:
        try:
            if each == STEP_RESPONSE:
                picture = _run_step_response(out, quick=quick)
            else:
                chosen = read_experiment(find_experiment(each), quick=quick)
                picture, overloaded = _run_one(chosen, out, quick=quick, jobs=jobs)
                found += overloaded
        except VoltanaError as error:
            if name != "all":
                raise
            failures[each] = str(error)
            typer.echo(f"voltana: {each}: {error}", err=True)
            continue
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
            write_bytes(picture.read_bytes(), figures / picture.name)
    if failures:
        raise VoltanaError(
            f"{len(failures)} of {len(names)} experiments failed: {', '.join(failures)} (each said "
            "why above); the others are done"
        )
    end_with(found, require_slo=require_slo, says=False)


def _run_step_response(out: Path, *, quick: bool) -> Path:
    """Responses in time and not sums over runs, so that it is no file with a grid.

    Its loads are disturbances that are meant to overload: nobody is warned of that.
    """
    from voltana.experiments.control.responses import draw_responses
    from voltana.experiments.control.step_response import SEEDS, describe_plant, run_all
    from voltana.experiments.draw.plots import save

    directory = out / (f"{STEP_RESPONSE}-quick" if quick else STEP_RESPONSE)
    table, responses = run_all(SEEDS[:1] if quick else SEEDS)
    typer.echo(describe_plant())
    typer.echo(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    paths = save(draw_responses(responses), directory, STEP_RESPONSE)
    table.to_csv(directory / "results.csv", index=False)
    typer.echo(" ".join(map(str, [*paths, directory / "results.csv"])))
    return paths[0]


def _run_one(
    chosen: Experiment, out: Path, *, quick: bool, jobs: int | None
) -> tuple[Path, list[Overload]]:
    """Its picture, and the loads that are too much for top clocks."""
    from voltana.experiments.draw.plots import save
    from voltana.experiments.promise import overloads, tell
    from voltana.experiments.study.curves import draw_experiment
    from voltana.experiments.study.suite import with_saving
    from voltana.experiments.sweep.run import run_sweep
    from voltana.profiles.common.errors import VoltanaError

    directory = out / (f"{chosen.name}-quick" if quick else chosen.name)
    results = run_sweep(chosen.points, directory, jobs=jobs)
    if len(results) < len(chosen.points):
        raise VoltanaError(
            f"{len(chosen.points) - len(results)} of {len(chosen.points)} runs have no result in "
            f"{directory}: run again"
        )
    frame = with_saving(results, chosen.figure)
    typer.echo(f"{chosen.name}: {chosen.question}")
    typer.echo(_table(chosen, frame))
    paths = save(draw_experiment(chosen, frame), directory, chosen.name)
    typer.echo(" ".join(map(str, [*paths, directory / "results.csv"])))
    overloaded = overloads(chosen.points, directory, jobs=jobs)
    tell(overloaded)
    return paths[0], overloaded


def _table(chosen: Experiment, frame: pd.DataFrame) -> str:
    """One line a point: what the figure shows, as numbers."""
    import pandas as pd

    from voltana.experiments.compare.measures import MEASURES
    from voltana.experiments.show import width
    from voltana.experiments.study.suite import PANEL

    spec = chosen.figure
    keys = [*([PANEL] if frame[PANEL].any() else []), spec.x, spec.series]
    columns = {MEASURES[r].label: MEASURES[r].of(frame) for r in spec.rows}
    table = pd.concat([frame[keys], pd.DataFrame(columns)], axis=1)
    means = table.groupby(keys, sort=False, as_index=False).mean()
    return means.to_string(index=False, float_format=lambda v: f"{v:.4g}", line_width=width())
