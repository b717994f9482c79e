"""Output folders say what they hold, and nothing else is written into them.

A folder that a command fills has a file `voltana.json`, for example `{"holds": "sweep"}`. A command
goes on in a folder of its own kind, uses an empty one or makes a new one, and refuses any other. So
it never overwrites a user's file of the same name. Hidden files do not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text

FolderKind = Literal[
    "run",
    "probe",
    "sweep",
    "frontier",
    "tuning",
    "comparison",
    "validation",
    "advice",
    "service",
    "decisions",
]
MARKER: Final = "voltana.json"
_SIGNS: Final[tuple[tuple[str, str], ...]] = (
    ("profile.toml", "profile"),
    ("frontier.csv", "frontier"),
    ("pid.toml", "tuning"),
    ("overhead.json", "probe"),
    ("requests.jsonl", "run"),
    ("summary.json", "run"),
    ("points", "sweep"),
    ("validation.json", "validation"),
    ("shape.csv", "comparison"),
)
"""Files that tell the kind of a folder without a marker: a profile, or an older folder."""


def claim(directory: Path, kind: FolderKind) -> None:
    """Make a folder, or go on in one of the same kind, and mark it.

    Raises:
        VoltanaError: It holds something else.
    """
    check(directory, kind)
    mark(directory, kind)


def check(directory: Path, kind: FolderKind) -> None:
    """Refuse a folder that a command of this kind may not write into; touches nothing.

    Raises:
        VoltanaError: It holds something else.
    """
    if not directory.is_dir():
        return
    found = held(directory)
    if found == kind:
        return
    if found is not None:
        raise VoltanaError(f"{directory} holds a {found}, not a {kind}: name another folder")
    others = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
    if others:
        raise VoltanaError(
            f"{directory} holds files that are of no {kind} ({others[0]}"
            f"{', …' if len(others) > 1 else ''}): name an empty folder or a new one"
        )


def held(directory: Path) -> str | None:
    """What a folder holds, by its marker or else by its files; None if neither tells."""
    try:
        found = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return next((kind for name, kind in _SIGNS if (directory / name).exists()), None)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("holds"), str):
        raise VoltanaError(
            f"{directory / MARKER} does not say what the folder holds: name another folder"
        )
    return str(found["holds"])


def mark(directory: Path, kind: FolderKind) -> None:
    """Make the folder if it is not there and note what it holds."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MARKER
    if not path.exists():
        write_text(json.dumps({"holds": kind}) + "\n", path)
