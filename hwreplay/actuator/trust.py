"""Whether this process runs code that another user than root may change.

A root process that runs from a user's checkout makes every program of that user root: whoever can
write one of its files decides what it does next time. The check comes after the code has been
loaded, so it stops the habit and not an attack under way.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from voltana.profiles.common.errors import VoltanaError

ROOT_UID: Final = 0
ROOT_GID: Final = 0


def loaded_paths() -> list[Path]:
    """What has been or may be run here: the interpreter, every module's file, the search path.

    Each as it is named, as each link on the way names it, and as it is: who may change a folder
    that holds a link may point it elsewhere.
    """
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    named = [Path(p) for p in (sys.executable, *files, *sys.path) if p and Path(p).exists()]
    ways = (way for path in named for way in (*_ways(path.absolute()), path.resolve()))
    return list(dict.fromkeys(ways))


def _ways(path: Path) -> Iterator[Path]:
    """The path, and what it becomes link by link."""
    yield path
    for part in (*reversed(path.parents), path):
        if part.is_symlink():
            target = part.parent / part.readlink()
            yield from _ways(Path(os.path.normpath(target / path.relative_to(part))))
            return


def find_changeable(paths: Iterable[Path], *, trusted_uid: int = ROOT_UID) -> Path | None:
    """The first path, or folder above one, that somebody beside `trusted_uid` and root may change.

    Args:
        paths: Absolute; a folder that holds a link counts, as whoever may change it.
        trusted_uid: Whose files are trusted, with root's.
    """
    seen: set[Path] = set()
    for path in paths:
        for part in (path, *path.parents):
            if part in seen:
                break  # and so are the folders above it
            seen.add(part)
            if _is_changeable(part.stat(), trusted_uid):
                return part
    return None


def _is_changeable(found: os.stat_result, trusted_uid: int) -> bool:
    if found.st_uid not in (ROOT_UID, trusted_uid):
        return True
    is_sticky = stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISVTX)
    by_group = bool(found.st_mode & stat.S_IWGRP) and found.st_gid != ROOT_GID
    return not is_sticky and (by_group or bool(found.st_mode & stat.S_IWOTH))


def check_code() -> None:
    """Refuse to be root with code that others may change.

    Raises:
        VoltanaError: Some of it is; the message names the first such path.
    """
    if os.geteuid() != ROOT_UID:
        return
    found = find_changeable(loaded_paths())
    if found is not None:
        raise VoltanaError(
            f"what runs as root must be writable by root alone, {found} is not: install the "
            "actuator in a folder of root's (docs/replay.md), or pass --allow-writable-code"
        )
