"""Compiles the emulated cards' NVML (in `make engine`).

python -m voltana.hwreplay.emulated.build DIR
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from voltana.hwreplay.emulated.card import CARDS, LIBRARY
from voltana.profiles.common.errors import VoltanaError

HERE: Final = Path(__file__).parent
SOURCES: Final = (HERE / "card.c", HERE / "nvml.c")
HEADER: Final = HERE / "card.h"
FLAGS: Final = (
    *("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"),
    f"-Wl,-soname,{LIBRARY}",  # a process that has loaded it gives it to pynvml too
)


def build_library(directory: Path) -> Path:
    """Compile the library into `directory`, unless it is there of the same sources.

    Returns:
        `directory`, for LD_LIBRARY_PATH.

    Raises:
        VoltanaError: No C compiler, or it refuses.
    """
    target, stamp = directory / LIBRARY, directory / "sources.sha256"
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in (HEADER, *SOURCES):
        digest.update(path.read_bytes())
    if target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
        return directory
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise VoltanaError("the emulated card needs a C compiler, there is none: install gcc")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        fresh = Path(scratch) / LIBRARY
        command = [compiler, *FLAGS, "-o", str(fresh), *map(str, SOURCES), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise VoltanaError(f"the emulated card must compile, {compiler} says: {first}")
        fresh.replace(target)
    stamp.write_text(digest.hexdigest())
    return directory


def environment(library_directory: Path, cards: Path) -> dict[str, str]:
    """Variables with which a fresh process sees the emulated cards, and no others."""
    search = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(library_directory), search))),
        CARDS: str(cards),
    }


def show_here(library_directory: Path, cards: Path) -> Mapping[str, str]:
    """The same for this process, where pynvml has not been used yet, and for those it starts.

    The loader reads LD_LIBRARY_PATH when a process starts; here the library is loaded under its
    name instead, which pynvml's search finds.
    """
    variables = environment(library_directory, cards)
    os.environ.update(variables)
    ctypes.CDLL(str(library_directory / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    return variables


if __name__ == "__main__":
    try:
        build_library(Path(sys.argv[1]))
    except VoltanaError as error:
        raise SystemExit(f"voltana: {error}") from None
