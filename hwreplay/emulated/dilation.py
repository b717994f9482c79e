"""Time dilation: all clocks of a run go slower, so that a small machine keeps up with big cards.

A library that is preloaded (`dilate.c`) slows the clocks and stretches the waits of every process
that is started with it. Everything that counts time is slower alike: passes, timers, time limits,
control intervals, arrivals. What is written down is emulated time; nothing is scaled back.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from voltana.profiles.common.errors import VoltanaError

SOURCE: Final = Path(__file__).parent / "dilate.c"
LIBRARY: Final = "libvoltana_dilate.so"
ENVIRONMENT: Final = "VOLTANA_DILATION"
PRELOAD: Final = "LD_PRELOAD"


def build(directory: Path) -> Path:
    """Compile the library into `directory` unless a newer one is there; returns its path.

    Raises:
        VoltanaError: No C compiler, or it refuses.
    """
    target = directory / LIBRARY
    if target.exists() and target.stat().st_mtime >= SOURCE.stat().st_mtime:
        return target
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise VoltanaError("time dilation needs a C compiler, there is none: install gcc")
    directory.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    command = [compiler, *flags, "-o", str(fresh), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VoltanaError(f"time dilation must compile, {compiler} says: {done.stderr[:200]}")
    fresh.replace(target)
    return target


def present() -> float:
    """How many times slower the clocks of this process go."""
    return float(os.environ.get(ENVIRONMENT, "1").split()[0])


def environment(factor: float, library: Path) -> dict[str, str]:
    """Variables with which a process, and all that it starts, lives in slower time from now on.

    Raises:
        VoltanaError: The factor is below 1, or this process lives in slower time itself.
    """
    if not (factor >= 1 and math.isfinite(factor)):
        raise VoltanaError(f"dilation must be >= 1 and finite, got {factor:g}")
    if present() != 1:
        raise VoltanaError(f"time is dilated {present():g} times already: it can be only once")
    before = os.environ.get(PRELOAD)
    return {
        PRELOAD: str(library.resolve()) + (f":{before}" if before else ""),
        ENVIRONMENT: f"{factor!r} {time.monotonic_ns()} {time.time_ns()}",
    }


def enter(factor: float, directory: Path, command: Sequence[str]) -> None:
    """Become `command`, in slower time; returns only where time is that slow already.

    Args:
        factor: How many times slower.
        directory: Where the library is, or is compiled to.
        command: Python's arguments: a module and what it is told.
    """
    if factor == present():
        return
    variables = environment(factor, build(directory))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], os.environ | variables)
