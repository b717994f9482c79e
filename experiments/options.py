"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RequireSlo = Annotated[
    bool,
    typer.Option(
        "--require-slo", help="Exit with 1 if even top clocks miss the promise at some load"
    ),
]
