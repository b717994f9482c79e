"""Keys of a table that a file's class declares: its fields, defaults and docstrings, as written.

Read from the source and not imported: the documentation is built where no extra is installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import voltana
from voltana.profiles.common.markdown import markdown_table

ROOT: Final = Path(voltana.__file__).parent


def keys_table(
    file: str, name: str, without: frozenset[str] = frozenset(), constants_of: str | None = None
) -> str:
    """Key, default and meaning of each field in Markdown.

    Args:
        file: Below the package, e.g. hwreplay/router/config.py.
        name: The class in it.
        without: Fields that are no keys.
        constants_of: Another file whose constants are defaults.
    """
    tree = _read(file)
    constants = _constants(tree) | ({} if constants_of is None else _constants(_read(constants_of)))
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    rows = [
        (f"`{key}`", f"`{_WORDS.get(default, constants.get(default, default))}`", text)
        for key, default, text in _fields(found)
        if key not in without
    ]
    return markdown_table(("key", "default", "meaning"), rows)


_WORDS: Final = {"None": "none", "True": "true", "False": "false"}
"""As TOML and these pages have them."""


def _read(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        node.target.id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }


def _fields(found: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, default as written and docstring of each."""
    for field, after in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = "None" if field.value is None else ast.unparse(field.value)
            yield field.target.id, default, _text(after)


def _text(after: ast.stmt | None) -> str:
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return " ".join(str(after.value.value).split())
    return ""
