"""`voltana compare-profiles`: a measured profile beside a calibrated one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson, complete_profile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compare-profiles", short_help="Time and power of two profiles, side by side")(
        compare
    )


def compare(
    measured: Annotated[
        str,
        typer.Argument(help="Profile: name or directory", autocompletion=complete_profile),
    ],
    model: Annotated[
        str,
        typer.Argument(help="The one to hold it against", autocompletion=complete_profile),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the note, its figure and its tables")],
    json: AsJson = False,
) -> None:
    """Compare the shape of two profiles: how time and power grow with batch and tokens.

    One factor for each phase is taken out first, since two cards differ by one. The note says how
    far the rest lies apart, point by point, and which steps of batch size both have.

    Example: voltana compare-profiles profiles/data/h200/llama-3.1-8b a100-80g-sxm/llama-3.1-8b
    --out results/h200-beside-a100
    """
    from voltana.experiments.compare.profiles import compare_profiles, note_text
    from voltana.experiments.draw.comparison import write_comparison
    from voltana.experiments.show import print_result
    from voltana.profiles.catalog import load_profile

    found = compare_profiles(load_profile(measured), load_profile(model))
    write_comparison(found, out)
    print_result(found.as_dict(), note_text(found), as_json=json)
