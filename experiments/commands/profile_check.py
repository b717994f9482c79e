"""`voltana profile check`: a profile beside public measurements of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson, complete_profile


def check_profile(
    profile: Annotated[
        str,
        typer.Argument(help="Profile: name or directory", autocompletion=complete_profile),
    ],
    rows: Annotated[
        list[Path], typer.Argument(help="JSON files of the ML.ENERGY leaderboard, or a CSV of rows")
    ],
    prompt_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Mean prompt of a task, TASK=TOKENS; the data has none (repeatable)"),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batches that the means are over")] = "8-256",
    json: AsJson = False,
) -> None:
    """Compare a profile's gaps between tokens and its power with measured rows, and print errors.

    Rows of the same model, card and number of GPUs are taken. A gap is that of a decode iteration
    at the top clock with the row's mean batch; power is that of decode and of the prefills that
    the batch needs, mixed by time, as the rows are.

    Example: voltana profile check h100-sxm/qwen3-8b leaderboard/data/tasks/lm-arena-chat.json
    """
    from voltana.experiments.compare.measured import (
        compare_rows,
        parse_prompts,
        parse_range,
        report_lines,
    )
    from voltana.experiments.show import print_result
    from voltana.profiles.catalog import load_profile
    from voltana.profiles.evidence import read_rows

    found = compare_rows(load_profile(profile), read_rows(rows), parse_prompts(prompt_tokens or ()))
    told = {"rows": [each.as_dict() for each in found]}
    print_result(told, *report_lines(found, parse_range(batches)), as_json=json)
