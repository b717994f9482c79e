"""Notebooks run top to bottom, are kept with the outputs of such a run, and hold no logic."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from voltana.experiments.documentation.notebooks import execute, read

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASURED = "01_profile_a_gpu"
"""Measures this machine: its numbers differ from run to run."""
LARGEST_BYTES = 300_000
"""Of a notebook with its pictures; the whole repository is a few MB."""
LOGIC = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If,
    ast.Try, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp,
)  # fmt: skip


def outputs(notebook: Any) -> Iterator[Any]:  # noqa: ANN401 (nbformat's own kind of dictionary)
    return (o for cell in notebook.cells for o in cell.get("outputs", ()))


def tables(notebook: Any) -> list[str]:  # noqa: ANN401 (nbformat's own kind of dictionary)
    """What readers see of numbers: HTML and Markdown, in order."""
    kinds = ("text/html", "text/markdown")
    return [o.data[kind] for o in outputs(notebook) for kind in kinds if kind in o.get("data", {})]


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_narrated_and_without_logic(path: Path) -> None:
    cells = read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("# ")
    assert len(cells) - len(code) >= 3
    for cell in code:
        plain = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        found = [type(node).__name__ for node in ast.walk(ast.parse(plain))]
        assert not set(found) & {kind.__name__ for kind in LOGIC}, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_kept_as_it_looks_after_a_run(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "make notebooks"
    shown = list(outputs(notebook))
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert tables(notebook)
    assert not any(o.output_type in ("stream", "error") for o in shown), "progress or warnings"
    assert path.stat().st_size <= LARGEST_BYTES
    seen = "".join(tables(notebook))
    assert not re.search(r"/tmp/|/home/|/root/|/work/", seen), "a path of the machine"
    assert "![" not in seen, "a picture that a notebook has no file for"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_notebook_runs_and_shows_what_is_kept(path: Path) -> None:
    notebook = execute(path)
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))
    printed = [o.text for o in outputs(notebook) if o.output_type == "stream"]
    assert printed == []
    if path.stem != MEASURED:  # simulated: to the last digit shown
        assert tables(notebook) == tables(read(path)), "run make notebooks"
