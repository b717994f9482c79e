"""What commands say on the way, on standard error: a bar on a terminal, lines where asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass
class Voice:
    """How much a command says beside its result; set by the command line alone."""

    is_quiet: bool = False
    """Results and errors only."""
    is_verbose: bool = False
    """Each step as a line, and where an error came from."""


VOICE = Voice()


def note(text: str) -> None:
    """Say something that is no result, on standard error, unless the user wants quiet."""
    if not VOICE.is_quiet:
        sys.stderr.write(f"voltana: {text}\n")


class Bar:
    """How far a task is."""

    def __init__(self, progress: Progress, what: str, total: float | None) -> None:
        self._progress = progress
        self._what = what
        self._task = progress.add_task(what, total=total)

    def advance(self, steps: float = 1, what: str | None = None) -> None:
        """Add finished steps; `what` says what is going on now."""
        self._progress.update(self._task, advance=steps, description=what)
        self._tell(what)

    def at(self, done: float, total: float) -> None:
        """Set how many steps of how many are done."""
        self._progress.update(self._task, completed=done, total=total)
        self._tell(None)

    @property
    def done(self) -> str:
        """How many steps of how many, in words."""
        task = self._progress.tasks[self._task]
        return f"{task.completed:g}" + ("" if task.total is None else f" of {task.total:g}")

    def _tell(self, what: str | None) -> None:
        if VOICE.is_verbose and self._progress.disable:
            note(f"{what or self._what}: {self.done} done")


@contextmanager
def progress_bar(
    what: str, total: float | None = None, *, kept: Path | str | None = None
) -> Iterator[Bar]:
    """A bar for as long as the block lasts; nothing is shown in a file, a pipe or a notebook.

    Args:
        what: What is going on.
        total: How many steps there are; None as long as nobody knows.
        kept: Where finished steps are kept, so that the command can go on from there.

    Raises:
        KeyboardInterrupt: As it came, with a text that says how many steps are kept, and where.
    """
    console = Console(stderr=True, force_jupyter=False)
    # a notebook says that it is a terminal, and shows red blocks
    is_shown = console.is_terminal and "ipykernel" not in sys.modules and not VOICE.is_quiet
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        bar = Bar(progress, what, total)
        try:
            yield bar
        except KeyboardInterrupt as stop:
            if kept is None or stop.args:  # an inner bar knows more
                raise
            raise KeyboardInterrupt(
                f"{what} stopped, {bar.done} done and kept in {kept}: run it again to go on"
            ) from None
