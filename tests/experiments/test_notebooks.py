"""Notebooks run top to bottom, are kept without outputs and hold no logic."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOGIC = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If,
    ast.Try, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp,
)  # fmt: skip


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_narrated_and_without_logic(path: Path) -> None:
    cells = read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip outputs"
    assert cells[0].source.startswith("# ")
    assert len(cells) - len(code) >= 3
    for cell in code:
        plain = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        found = [type(node).__name__ for node in ast.walk(ast.parse(plain))]
        assert not set(found) & {kind.__name__ for kind in LOGIC}, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_notebook_runs(path: Path) -> None:
    notebook = read(path)
    # the longest cell takes some 20 s; a machine under load may need several times that
    NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any({"text/html", "text/markdown"} & set(o.get("data", {})) for o in outputs)
    printed = [o.text for o in outputs if o.output_type == "stream"]
    assert not any("Warning" in text for text in printed), printed
