"""What a profiling run says while it lasts: a bar on a terminal, a line a point elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is."""

    num_done: int
    num_planned: int
    left_s: float
    """Longest that it may still take: the rest of the budget, or less if the points need less."""
    is_over: bool = False
    """The budget is used up, and points without which there is no profile are still missing."""
    label: str
    """What comes next."""

    @property
    def text(self) -> str:
        """All of it in a line.

        Example:
            >>> Standing(num_done=3, num_planned=40, left_s=90.0, label="decode batch 8").text
            '[3/40, at most 1:30 left] decode batch 8'
        """
        minutes, seconds = divmod(round(max(self.left_s, 0.0)), 60)
        left = f"at most {minutes}:{seconds:02} left"
        if self.is_over:
            left = f"past the budget, about {minutes}:{seconds:02} for the ends of the grid"
        return f"[{self.num_done}/{self.num_planned}, {left}] {self.label}"


class Progress(Protocol):
    """Who is told."""

    def say(self, text: str) -> None:
        """What is going on outside the points: a server starts, a model loads."""

    def at(self, standing: Standing) -> None:
        """The next point begins."""


class Lines:
    """A line each, for logs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def say(self, text: str) -> None:
        self._file.write(f"voltana: {text}\n")
        self._file.flush()

    def at(self, standing: Standing) -> None:
        self.say(standing.text)


@contextmanager
def open_progress() -> Iterator[Progress]:
    """A bar on standard error if that is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield Lines(sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichBar

    columns = (BarColumn(), TextColumn("{task.description}", markup=False))
    with RichBar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        class Bar:
            def say(self, text: str) -> None:
                bar.console.print(f"voltana: {text}", markup=False, highlight=False)
                bar.update(task, description=text)

            def at(self, standing: Standing) -> None:
                done, planned = standing.num_done, standing.num_planned
                bar.update(task, completed=done, total=planned, description=standing.text)

        yield Bar()
