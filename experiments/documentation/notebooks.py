"""Runs notebooks and keeps their outputs.

`python -m voltana.experiments.documentation.notebooks [FILE …]`

A notebook is kept as it looks after a run from top to bottom, so that it can be read where nothing
runs. What changes from run to run without meaning anything (dates, machine, version of Python) is
left out: an unchanged notebook gives an unchanged file, as far as its numbers are simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient

from voltana.profiles.common.files import write_text

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "notebooks"
CELL_TIMEOUT_S: Final = 600
"""The longest cell takes some 20 s; a machine under load may need many times that."""
METADATA: Final = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> Any:  # noqa: ANN401 (nbformat's own kind of dictionary)
    """A notebook as it is kept."""
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def execute(path: Path) -> Any:  # noqa: ANN401 (nbformat's own kind of dictionary)
    """Run a copy of a notebook from top to bottom and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = read(path)
    NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, startup_timeout=CELL_TIMEOUT_S, record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()  # fmt: skip
    notebook.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    return notebook


def main(names: Sequence[str]) -> None:
    """Run the notebooks of these names, or all, and write each with its outputs."""
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        text = nbformat.writes(execute(path))  # type: ignore[no-untyped-call]
        write_text(text.rstrip("\n") + "\n", path)
        sys.stdout.write(f"{path} ({path.stat().st_size / 1e3:.0f} kB)\n")


if __name__ == "__main__":
    main(sys.argv[1:])
