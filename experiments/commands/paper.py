"""`voltana paper`: the published main result, fitted, compared and predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana.experiments.options import AsJson

if TYPE_CHECKING:
    from voltana.experiments.paper.calibrate import Unknowns

paper = typer.Typer(
    name="paper",
    help="The published main result: fit the unknowns to one panel, compare, predict the others.",
    no_args_is_help=True,
)

PanelFile = Annotated[
    Path, typer.Option(help="CSV of the published panel (Llama-3.1-8B, ShareGPT)")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default")]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(paper, short_help="Fit and predict the published panels")


@paper.command("fit", short_help="Fit the unknowns to one panel")
def fit(
    panel: PanelFile,
    data: Annotated[Path, typer.Option(help="Folder of the measurements profiles are built from")],
    out: Annotated[Path, typer.Option(help="Takes trial profiles and runs")] = Path(
        "results/paper-fit"
    ),
    workload: Annotated[str, typer.Option(help="Length distribution")] = "sharegpt-client",
    max_evaluations: Annotated[int, typer.Option(min=1, help="Bound on the search")] = 80,
    jobs: Jobs = None,
    json: AsJson = False,
) -> None:
    """Fit both SLOs, the attention multiplier and the prefill host time to one panel.

    Writes OUT/fitted.toml and prints how to build the profiles from it. Interrupted, it resumes.
    """
    from dataclasses import asdict

    import tomli_w

    from voltana.experiments.paper.calibrate import fit_panel
    from voltana.experiments.paper.panel import read_panel
    from voltana.experiments.show import print_result
    from voltana.profiles.common.files import write_text

    found = fit_panel(
        read_panel(panel), data, out, workload=workload, max_evaluations=max_evaluations,
        jobs=jobs, report=_say_aside if json else _say,
    )  # fmt: skip
    fitted = {
        **asdict(found.unknowns),
        "workload": workload,
        "score": round(found.score, 4),
        "evaluations": found.evaluations,
    }
    path = out / "fitted.toml"
    write_text(tomli_w.dumps(fitted), path)
    print_result(
        {**fitted, "files": [str(path)]},
        path.read_text(encoding="utf-8").strip(),
        f"build its profiles: voltana paper build --data {data} --fitted {path} --out DIR",
        as_json=json,
    )


@paper.command("build", short_help="Build profiles from a fit")
def build(
    data: Annotated[Path, typer.Option(help="Folder of the measurements profiles are built from")],
    out: Annotated[Path, typer.Option(help="Takes one profile directory a model")],
    fitted: Annotated[
        Path | None, typer.Option(help="fitted.toml of `voltana paper fit`; by default the shipped")
    ] = None,
    mechanisms: Annotated[
        bool, typer.Option(help="with awake power and the higher draw of prefill, or fitted only")
    ] = True,
    json: AsJson = False,
) -> None:
    """Build the profiles of the three models with the fitted kernel and host times."""
    from voltana.experiments.paper.calibrate import read_fitted
    from voltana.experiments.paper.panel import FITTED
    from voltana.experiments.show import print_result
    from voltana.profiles.build.a100 import build_tuned
    from voltana.profiles.build.models import SHAPES

    unknowns = read_fitted(fitted or FITTED)
    tuning = unknowns.with_mechanisms if mechanisms else unknowns.tuning
    for model in SHAPES:
        build_tuned(data, out / model, model, tuning, "tuned to a published panel")
    folders = [str(out / model) for model in SHAPES]
    print_result({"profiles": folders}, *folders, as_json=json)


@paper.command("compare", short_help="The panel as shipped, rate by rate")
def compare(
    panel: PanelFile,
    out: Annotated[Path, typer.Option(help="Takes residuals.csv, residuals.png and the runs")] = (
        Path("results/paper-compare")
    ),
    jobs: Jobs = None,
    json: AsJson = False,
) -> None:
    """Run the published panel as shipped and print the difference, rate by rate."""
    from voltana.experiments.draw.plots import save
    from voltana.experiments.paper.figure import draw_panel
    from voltana.experiments.paper.panel import panel_residuals, read_panel, score, worst
    from voltana.experiments.show import print_result, rows_of, width
    from voltana.profiles.common.files import write_csv

    published = read_panel(panel)
    compared = panel_residuals(published, out, jobs=jobs)
    write_csv(compared.round(2), out / "residuals.csv")
    save(draw_panel(compared), out, "residuals")
    short = compared.drop(columns=["model", "dataset"]).rename(columns=_short)
    wide = width()
    files = [str(out / name) for name in ("residuals.csv", "residuals.png")]
    print_result(
        {"rows": rows_of(compared), "score": score(compared), "files": files},
        short.to_string(index=False, na_rep="", float_format=lambda v: f"{v:.1f}", line_width=wide),
        worst(compared).to_string(index=False, line_width=wide),
        f"score {score(compared):.3f}; {' '.join(files)}",
        as_json=json,
    )


@paper.command("predict", short_help="All panels, with their bands")
def predict(
    out: Annotated[
        Path, typer.Option(help="Takes paper_prediction.csv, paper_bands.csv, .png")
    ] = Path("results"),
    runs: Annotated[Path, typer.Option(help="Takes the runs")] = Path("results/paper-predict"),
    jobs: Jobs = None,
    json: AsJson = False,
) -> None:
    """Predict all panels: the central prediction, and the band over the rules for promises."""
    from voltana.experiments.draw.plots import save
    from voltana.experiments.paper.bands import bands, central, draw_bands, predict_by_rule
    from voltana.experiments.show import print_result, rows_of, width
    from voltana.profiles.common.files import write_csv

    by_rule = predict_by_rule(runs, jobs=jobs)
    found = bands(by_rule)
    out.mkdir(parents=True, exist_ok=True)
    predicted = central(by_rule)
    write_csv(predicted, out / "paper_prediction.csv")
    write_csv(found, out / "paper_bands.csv")
    save(draw_bands(found), out, "paper_bands")
    chosen = by_rule[["model", "promises", "slo_ttft_s", "slo_itl_s"]].drop_duplicates()
    print_result(
        {"promises": rows_of(chosen), "prediction": rows_of(predicted), "bands": rows_of(found)},
        chosen.to_string(index=False, line_width=width()),
        f"{out / 'paper_prediction.csv'}: {len(found)} rows",
        as_json=json,
    )


def _say(unknowns: Unknowns, score: float) -> None:
    typer.echo(f"{score:.4f}  {unknowns}")


def _say_aside(unknowns: Unknowns, score: float) -> None:
    typer.echo(f"{score:.4f}  {unknowns}", err=True)


def _short(column: str) -> str:
    for part in ("_pct", "_attainment", "_ours"):
        column = column.replace(part, "")
    return column.replace("_published", " pub").replace("_error", " err")
