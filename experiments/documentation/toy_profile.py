"""A profile of this machine's CPU in half a minute, to see how profiling works without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError

OPTIONS: Final = (
    "--model toy --device cpu --dtype float32 --power-w 100 --budget 10s --window 0.02"
    " --iterations 8 --trials 1 --max-batch 8 --max-tokens 1024"
)


def profile_toy(directory: Path) -> Profile | None:
    """Run `voltana profile` on a toy model on the CPU.

    Returns:
        The profile: times measured, power a stated constant of 100 W and marked modelled. None
        where PyTorch is not installed.

    Raises:
        VoltanaError: The command failed.
    """
    if find_spec("torch") is None:
        return None
    command = [sys.executable, "-m", "voltana.experiments.cli", "profile", *OPTIONS.split()]
    done = subprocess.run(
        [*command, "--out", str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a toy gains nothing from more, and shares
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise VoltanaError(f"voltana profile failed: {done.stderr.strip()}")
    return load_profile(directory)
