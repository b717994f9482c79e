"""`voltana report`: results as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs
from voltana.experiments.options import AsJson


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report", short_help="One self-contained HTML page of runs and sweeps")(report)


def report(
    directory: Annotated[
        Path,
        typer.Argument(
            help="A run, a folder of runs, a sweep, an experiment, a load generator's output",
            metavar="DIR",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The file; default DIR/report.html")] = None,
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Attainment that counts as keeping the SLO")
    ] = 0.99,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(help="Promised TTFT of load generators' outputs [default: of runs beside]"),
    ] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="The same of ITL, ms")] = None,
    series: Annotated[
        list[str] | None,
        typer.Option(help="Id (or its beginning) of a run whose time series to show, repeatable"),
    ] = None,
    no_series: Annotated[bool, typer.Option("--no-series", help="Leave them out")] = False,
    json: AsJson = False,
) -> None:
    """Write one self-contained HTML file, about 5 MB, that opens without any network.

    It has the summary as a sortable table, energy against SLO with its Pareto front, time series
    of clock, batch, queue and power with zoom, clock residency, configuration and provenance.

    A sweep keeps no time series: the policies at the highest load at which one keeps the SLO are
    simulated again for them, or the runs that --series names by the id in the table.

    Outputs of aiperf (profile_export.jsonl or its folder), guidellm (benchmarks.json) and SGLang's
    bench_serving (--output-details) stand beside runs, judged by the same promises; a client knows
    no joule, so that their energy is empty.

    Example: voltana report results/demo
    """
    with needs("report", "voltana report"):
        from voltana.experiments.report.page import write_report
    from voltana.experiments.progress import note
    from voltana.experiments.show import print_result

    folder = directory.parent if directory.is_file() else directory
    path = folder / "report.html" if out is None else out
    failures = write_report(
        directory, path, target=target, wanted=series or (), with_series=not no_series,
        promises=(_seconds(slo_ttft_ms), _seconds(slo_itl_ms)),
    )  # fmt: skip
    for line in failures:
        note(f"no time series: {line}")
    size = path.stat().st_size
    told = {"files": [str(path)], "bytes": size, "without_series": failures}
    print_result(told, f"{path} ({size / 1e6:.1f} MB)", as_json=json)


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms * 1e-3
