"""`voltana frontier`: energy at equal attainment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.options import RequireSlo
from profiles.errors import VoltanaError
from sim.config import parse_settings


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("frontier")(frontier)


def frontier(
    config: Annotated[
        Path | None, typer.Argument(help="Frontier file; options are for a quick one without")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the runs, tables and figure")] = Path(
        "results/frontier"
    ),
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
        int | None, typer.Option(min=1, help="Repeats, with seeds 11, 12, … [default: 5]")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--load", help="Of the file's loads only these, by name, repeatable"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, repeatable")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    require_slo: RequireSlo = False,
) -> None:
    """Find each policy's least energy at equal attainment; compare with static clocks and a bound.

    Writes OUT/frontier.csv, frontier.md, frontier.png and .svg, and keeps every run by the hash of
    its configuration: run it again to go on. A saving is given only where the target is reached.
    """
    from experiments.compare.policies import STATIC_MAX
    from experiments.frontier.report import frontier_table, write_frontier
    from experiments.frontier.search import search_frontier
    from experiments.frontier.study import quick_study, read_study
    from experiments.promise import missed
    from profiles.folders import claim

    given = parse_settings(settings or [])
    if config is not None:
        named = (("--rate", rate), ("--policy", policy), ("--seeds", seeds))
        unused = [name for name, value in named if value]
        if unused:
            raise VoltanaError(f"{unused[0]} is for a search without a file: edit {config} instead")
        study, question = read_study(
            config, settings=given, load_names=only or (), target=target, attainment=attainment
        )
    else:
        if only:
            raise VoltanaError("--load picks from a frontier file: name one, or use --rate")
        study, question = quick_study(given, rate, policy, seeds, target, attainment), ""
    claim(out, "frontier")
    searches = search_frontier(study, out, jobs=jobs)
    frame = frontier_table(study, searches, out, jobs)
    for line in write_frontier(study, searches, frame, out, question):
        typer.echo(line)
    if require_slo and not frame.loc[frame["policy"] == STATIC_MAX, "reached"].all():
        raise missed("a load is too much for top clocks")
