"""`voltana frontier`: energy at equal attainment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
) -> None:
    """Find each policy's least energy at equal attainment; compare with static clocks and a bound.

    Writes OUT/frontier.csv, frontier.md, frontier.png and .svg, and keeps every run by the hash of
    its configuration: run it again to go on. A saving is given only where the target is reached.
    """
    from experiments.compare import STATIC_MAX
    from experiments.contenders import parse_contender
    from experiments.frontier import Load, search_frontier
    from experiments.frontier_report import (
        LEGEND,
        frontier_table,
        markdown_table,
        pareto_figure,
        text_table,
    )
    from experiments.frontier_study import check_settings, make_study, read_study
    from experiments.plots import save

    question = ""
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
        check_settings(given, [{"rate_rps": None}], "use --rate, --seeds and --policy")
        study = make_study(
            given,
            [Load(name=f"{r:g} requests/s", settings={"rate_rps": r}) for r in rate or [30.0]],
            [parse_contender(p) for p in policy or ("ecofreq + ecoroute", "ecomin + ecoroute")],
            target=0.99 if target is None else target,
            attainment=attainment or "attainment",
            seeds=range(11, 11 + (seeds or 5)),
        )
    searches = search_frontier(study, out, jobs=jobs)
    frame = frontier_table(study, searches, out, jobs)
    frame.to_csv(out / "frontier.csv", index=False)
    parts = [question] if question else []
    for load in searches:
        rows = frame[frame["load"] == load]
        title = f"{load}: least energy at {study.attainment} >= {100 * study.target:g} %"
        typer.echo(text_table(rows, title))
        parts.append(f"**{title}**\n\n{markdown_table(rows)}")
        if not bool(rows.loc[rows["policy"] == STATIC_MAX, "reached"].all()):
            typer.echo(f"{load}: overload, the top clock itself misses the target")
    typer.echo(LEGEND)
    parts.append(LEGEND)
    (out / "frontier.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    paths = save(pareto_figure(study, searches, frame), out, "frontier")
    typer.echo(" ".join(map(str, [*paths, out / "frontier.csv", out / "frontier.md"])))
