"""`voltana recommend`: which clocks, how many instances, and whether dynamic control pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from voltana.experiments.options import (
    AsJson,
    RequireSlo,
    complete_profile,
    complete_setting,
    complete_trace,
    complete_workload,
)
from voltana.profiles.common.binding import parse_settings


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("recommend", short_help="Clocks, instances and a policy for your load")(recommend)


def recommend(
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Profile name or directory; repeatable: compared", autocompletion=complete_profile
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="How many GPUs there are")] = None,
    watts: Annotated[
        float | None, typer.Option(help="What all GPUs together may draw at once, W")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help="Length distribution by name, or a file of lengths",
            autocompletion=complete_workload,
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Mean arrival rate, requests/s")] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Trace, or a log of one's own (OpenAI-style access log, SGLang, aiperf), in place"
            " of workload and rate",
            autocompletion=complete_trace,
        ),
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Promised TTFT, ms")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="Promised ITL, ms")] = None,
    target: Annotated[float, typer.Option(help="Share of requests that keep both")] = 0.99,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Dynamic policy 'controller + router', repeatable [default: four]"),
    ] = None,
    caps: Annotated[
        bool, typer.Option("--caps", help="Search power caps, too, for where locks are not allowed")
    ] = False,
    price: Annotated[float | None, typer.Option(help="Of a kWh")] = None,
    currency: Annotated[str, typer.Option(help="Of the price, for the reader")] = "",
    carbon: Annotated[float | None, typer.Option(help="g of CO2 a kWh")] = None,
    uncertainty: Annotated[
        int, typer.Option(min=0, help="Draws from the profile's stated errors; 0: none")
    ] = 10,
    seeds: Annotated[int, typer.Option(min=2, help="Repeats that judge")] = 5,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any configuration key, repeatable", autocompletion=complete_setting
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory of runs, page, figure and ready-made files")
    ] = Path("results/recommend"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")] = None,
    engine: Annotated[
        str, typer.Option(help="processes, or ray: the cluster of RAY_ADDRESS")
    ] = "processes",
    json: AsJson = False,
    require_slo: RequireSlo = False,
) -> None:
    """Recommend clocks, instances and a policy for a load, its promises and some GPUs.

    Searches the best fixed clocks on the best number of instances, and the best dynamic policy, on
    some requests; judges both on others, at 0.8 to 1.5 times the load and on draws from the
    profile's errors; and says whether dynamic control is worth it. Writes OUT/recommend.json,
    recommend.html, the figure knee, and OUT/ready with nvidia-smi lines, SGLang's start lines,
    Dynamo's annotations and voltana's own configurations. Every run is kept: run it again to go on.

    Example: voltana recommend --profile h100-sxm/llama-3.1-8b --gpus 8 --rate 60 --slo-itl-ms 30
    """
    from voltana.experiments.recommend.run import recommend_all
    from voltana.experiments.recommend.show import Costs, text
    from voltana.experiments.show import print_result

    options: dict[str, Any] = {
        "workload": workload, "trace": trace, "rate_rps": rate,
        "slo_ttft_s": None if slo_ttft_ms is None else slo_ttft_ms * 1e-3,
        "slo_itl_s": None if slo_itl_ms is None else slo_itl_ms * 1e-3,
    }  # fmt: skip
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    given |= parse_settings(settings or [])
    costs = Costs(price_per_kwh=price, currency=currency, carbon_g_per_kwh=carbon)
    found = recommend_all(
        profile or [], given, out, costs, gpus=gpus, watts=watts, target=target,
        policies=policy or (), seeds=seeds, draws=uncertainty, is_capped=caps, jobs=jobs,
        executor=engine,
    )  # fmt: skip
    lines = [text(advice, costs) for advice in found.advices]
    print_result(found.told, *lines, *found.lines, as_json=json)
    if require_slo and not all(a.keeps(a.best) for a in found.advices):
        from voltana.experiments.promise import missed

        raise missed("no setting keeps the promise")
