"""`voltana frontier`: energy at equal attainment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana.experiments.options import AsJson, RequireSlo, complete_setting
from voltana.profiles.common.binding import parse_settings
from voltana.profiles.common.errors import VoltanaError

if TYPE_CHECKING:
    from voltana.experiments.frontier.search import Study


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("frontier", short_help="Least energy at equal attainment, beside fixed clocks")(
        frontier
    )


def frontier(
    config: Annotated[
        Path | None, typer.Argument(help="Frontier file; options are for a quick one without")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the runs, tables and figure [default: results/frontier]"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="'controller + router', repeatable; {safe..cheap} in it marks the knob, as in "
            "'ecomin:headroom={0.5..0} + slo-pack'. Default: ecofreq + ecoroute, ecomin + ecoroute"
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Without a file: request rate, repeatable, a load each"),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Attainment to reach [default: 0.99]")
    ] = None,
    attainment: Annotated[
        str | None,
        typer.Option(help="attainment, ttft_attainment, itl_attainment or worse (of the two)"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Judging repeats, with seeds 11, 12, … [default: 5]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--load", help="Of the file's loads only these, by name, repeatable"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any configuration key, repeatable", autocompletion=complete_setting
        ),
    ] = None,
    uncertainty: Annotated[
        int | None,
        typer.Option(min=1, help="Judge again on so many draws from the profile's stated errors"),
    ] = None,
    contest: Annotated[
        bool,
        typer.Option("--contest", help="Run the shipped contest and write results/contest.csv"),
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(
            help="With --contest: redraw this folder's contest.md and figure; run nothing"
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    json: AsJson = False,
    require_slo: RequireSlo = False,
) -> None:
    """Find each policy's least energy at equal attainment; compare with static clocks and a bound.

    Knobs and static clocks are chosen on tuning seeds and judged on others. Writes
    OUT/frontier.csv, frontier.md, frontier.png and .svg, and keeps every run by the hash of its
    configuration: run it again to go on. A saving is given only where the target is kept. With
    --uncertainty what was chosen on the profile is judged on draws from its errors as well, into
    OUT/draws.csv.
    """
    given = parse_settings(settings or [])
    named = (("--rate", rate), ("--policy", policy), ("--seeds", seeds))
    if docs is not None and not contest:
        raise VoltanaError("--docs redraws the contest's page: give --contest, too")
    if contest:
        further = (*named, ("--set", settings), ("--target", target),
                   ("--attainment", attainment), ("a file", config),
                   ("--uncertainty", uncertainty), ("--require-slo", require_slo))  # fmt: skip
        _refuse(further, "is not for the contest: it runs its own files")
        _contest(out or Path("results/contest"), only, docs, jobs, as_json=json)
        return

    from voltana.experiments.frontier.study import quick_study, read_study

    if config is not None:
        _refuse(named, f"is for a search without a file: edit {config} instead")
        study, question = read_study(
            config, settings=given, load_names=only or (), target=target, attainment=attainment
        )
    else:
        if only:
            raise VoltanaError("--load picks from a frontier file: name one, or use --rate")
        study, question = quick_study(given, rate, policy, seeds, target, attainment), ""
    target_folder = out or Path("results/frontier")
    is_kept = _search(study, question, target_folder, jobs, uncertainty, as_json=json)
    if require_slo and not is_kept:
        from voltana.experiments.promise import missed

        raise missed("a load is too much for top clocks")


def _refuse(options: Sequence[tuple[str, object]], why: str) -> None:
    unused = [name for name, value in options if value]
    if unused:
        raise VoltanaError(f"{unused[0]} {why}")


def _contest(
    out: Path, only: list[str] | None, docs: Path | None, jobs: int | None, *, as_json: bool
) -> None:
    from voltana.experiments.contest.page import write_page
    from voltana.experiments.contest.run import CSV, run_contest
    from voltana.experiments.progress import note
    from voltana.experiments.show import print_result

    if docs is not None:
        files = [str(path) for path in write_page(CSV, docs)]
    else:
        run_contest(out, CSV, note if as_json else typer.echo, only=only or (), jobs=jobs)
        files = [str(CSV)]
    print_result({"files": files}, *files, as_json=as_json)


def _search(
    study: Study, question: str, out: Path, jobs: int | None, draws: int | None, *, as_json: bool
) -> bool:
    """One frontier, of a file or of the options; whether the top clocks carry every load."""
    import pandas as pd

    from voltana.experiments.compare.draws import require_drawable
    from voltana.experiments.frontier.drawn import drawn_table, drawn_text
    from voltana.experiments.frontier.search import search_frontier
    from voltana.experiments.frontier.search_page import write_frontier
    from voltana.experiments.frontier.table import carries, frontier_table
    from voltana.experiments.show import print_result, rows_of
    from voltana.profiles.common.files import write_csv
    from voltana.profiles.common.folders import claim
    from voltana.sim.config import make_config

    if draws is not None:
        require_drawable(make_config({**study.base, **study.loads[0].settings}))
    claim(out, "frontier")
    done = {load.name: row for load, row in search_frontier(study, out, jobs=jobs)}
    found = {load.name: done[load.name] for load in study.loads}
    frame = pd.concat([frontier_table(study, row, out, jobs) for row in found.values()])
    lines = write_frontier(study, found, frame, out, question)
    told = {"rows": rows_of(frame), "files": lines[-1].split()}
    if draws is not None:
        tables = {name: drawn_table(study, row, out, draws, jobs) for name, row in found.items()}
        for name, table in tables.items():
            lines.append(drawn_text(table, f"{name}: on {draws} draws of the profile's errors"))
        told["draws"] = rows_of(pd.concat(tables.values()))
        write_csv(pd.concat(tables.values()), out / "draws.csv")
    print_result(told, *lines, as_json=as_json)
    return all(carries(study, row) for row in found.values())
