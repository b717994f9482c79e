"""`voltana experiment`: the shipped questions, their runs, their figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voltana.experiments.options import AsJson, RequireSlo, that_begin

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


def _complete_experiment(incomplete: str) -> list[str]:
    from voltana.experiments.study.suite import list_experiments

    return that_begin(incomplete, [*list_experiments(), STEP_RESPONSE, "all"])


@experiment.command("list")
def list_all(json: AsJson = False) -> None:
    """List every experiment with its question."""
    from voltana.experiments.show import print_result
    from voltana.experiments.study.suite import list_experiments

    found = {
        **list_experiments(),
        STEP_RESPONSE: "How does each controller answer a step, a ramp, a pulse?",
    }
    print_result(found, *(f"{name}: {question}" for name, question in found.items()), as_json=json)


@experiment.command("run", short_help="Run one or all, and draw the figures")
def run(
    name: Annotated[
        str,
        typer.Argument(
            help="An experiment, a file ending in .toml, or all",
            autocompletion=_complete_experiment,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Parent directory of the results")] = Path(
        "results/experiments"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smoke size: 10 s, few points")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder that takes a copy of each NAME.png")
    ] = None,
    json: AsJson = False,
    require_slo: RequireSlo = False,
) -> None:
    """Run an experiment and draw its figure: OUT/NAME/results.csv, NAME.png and NAME.svg.

    Runs are kept by the hash of their configuration: what has been run is not run again, and the
    figure is drawn anew each time. --quick writes to OUT/NAME-quick.
    """
    from voltana.experiments.promise import end_with
    from voltana.experiments.show import print_result
    from voltana.experiments.study.suite import find_experiment, list_experiments, read_experiment
    from voltana.profiles.common.errors import VoltanaError
    from voltana.profiles.common.files import write_bytes

    names = list(list_experiments()) if name == "all" else [name]
    failures: dict[str, str] = {}
    told: dict[str, Any] = {}
    found: list[Overload] = []
    for each in names:
        try:
            if each == STEP_RESPONSE:
                told[each], lines = _run_step_response(out, quick=quick)
            else:
                chosen = read_experiment(find_experiment(each), quick=quick)
                told[each], lines, overloaded = _run_one(chosen, out, quick=quick, jobs=jobs)
                found += overloaded
        except VoltanaError as error:
            if name != "all":
                raise
            failures[each] = str(error)
            typer.echo(f"voltana: {each}: {error}", err=True)
            continue
        if not json:
            print_result({}, *lines, as_json=False)
        if figures is not None:
            picture = Path(told[each]["files"][0])
            figures.mkdir(parents=True, exist_ok=True)
            write_bytes(picture.read_bytes(), figures / picture.name)
    if json:
        print_result(told, as_json=True)
    if failures:
        raise VoltanaError(
            f"{len(failures)} of {len(names)} experiments failed: {', '.join(failures)} (each said "
            "why above); the others are done"
        )
    end_with(found, require_slo=require_slo, says=False)


def _run_step_response(out: Path, *, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """Responses in time and not sums over runs, so that it is no file with a grid.

    Its loads are disturbances that are meant to overload: nobody is warned of that.
    """
    from voltana.experiments.control.responses import draw_responses
    from voltana.experiments.control.step_response import SEEDS, describe_plant, run_all
    from voltana.experiments.draw.plots import save
    from voltana.experiments.show import rows_of

    directory = out / (f"{STEP_RESPONSE}-quick" if quick else STEP_RESPONSE)
    table, responses = run_all(SEEDS[:1] if quick else SEEDS)
    paths = save(draw_responses(responses), directory, STEP_RESPONSE)
    table.to_csv(directory / "results.csv", index=False)
    files = [*map(str, paths), str(directory / "results.csv")]
    text = table.to_string(index=False, float_format=lambda v: f"{v:.4g}")
    return {"rows": rows_of(table), "files": files}, [describe_plant(), text, " ".join(files)]


def _run_one(
    chosen: Experiment, out: Path, *, quick: bool, jobs: int | None
) -> tuple[dict[str, Any], list[str], list[Overload]]:
    """What it found, for JSON and for people, and the loads that are too much for top clocks."""
    from voltana.experiments.draw.plots import save
    from voltana.experiments.promise import overloads, tell
    from voltana.experiments.show import rows_of, width
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
    table = _table(chosen, frame)
    paths = save(draw_experiment(chosen, frame), directory, chosen.name)
    files = [*map(str, paths), str(directory / "results.csv")]
    overloaded = overloads(chosen.points, directory, jobs=jobs)
    tell(overloaded)
    text = table.to_string(index=False, float_format=lambda v: f"{v:.4g}", line_width=width())
    told = {"question": chosen.question, "rows": rows_of(table), "files": files}
    return told, [f"{chosen.name}: {chosen.question}", text, " ".join(files)], overloaded


def _table(chosen: Experiment, frame: pd.DataFrame) -> pd.DataFrame:
    """One line a point: what the figure shows, as numbers."""
    import pandas as pd

    from voltana.experiments.compare.measures import MEASURES
    from voltana.experiments.study.suite import PANEL

    spec = chosen.figure
    keys = [*([PANEL] if frame[PANEL].any() else []), spec.x, spec.series]
    columns = {MEASURES[r].label: MEASURES[r].of(frame) for r in spec.rows}
    table = pd.concat([frame[keys], pd.DataFrame(columns)], axis=1)
    return table.groupby(keys, sort=False, as_index=False).mean()
