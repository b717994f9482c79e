"""The one progress bar of the commands: on standard error, and only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """How far a task is."""

    def __init__(self, progress: Progress, what: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)

    def advance(self, steps: float = 1, what: str | None = None) -> None:
        """Add finished steps; `what` says what is going on now."""
        self._progress.update(self._task, advance=steps, description=what)

    def at(self, done: float, total: float) -> None:
        """Set how many steps of how many are done."""
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress_bar(what: str, total: float | None = None) -> Iterator[Bar]:
    """A bar for as long as the block lasts; nothing is shown in a file, a pipe or a notebook.

    Args:
        what: What is going on.
        total: How many steps there are; None as long as nobody knows.
    """
    console = Console(stderr=True, force_jupyter=False)
    # a notebook says that it is a terminal, and shows red blocks
    is_shown = console.is_terminal and "ipykernel" not in sys.modules
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        yield Bar(progress, what, total)
