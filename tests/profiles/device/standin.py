"""The compiled NVML stand-in and a window on its state, for tests that run in fresh processes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

MAGIC = 0x564F4C54
FIELDS = (
    *("magic", "locked_mhz", "default_mhz", "deny_lock", "lost", "energy_mode", "power_mw"),
    *("throttle_bits", "stuck_mhz", "foreign_pid", "num_locks", "num_resets"),
    *("num_energy_reads", "temperature_c", "limit_mw", "num_limits"),
    *("num_gpus", "mig_mode"),
)
ROOT = Path(__file__).resolve().parents[3]


class Standin:
    """One fake card. Processes started with `env` load the stand-in as libnvidia-ml.so.1."""

    def __init__(self, library_dir: Path, state_path: Path) -> None:
        self.state_path = state_path
        state = dict.fromkeys(FIELDS, 0) | {"magic": MAGIC, "default_mhz": 1410}
        state |= {"power_mw": 250_000, "temperature_c": 40, "limit_mw": 400_000, "num_gpus": 1}
        state_path.write_bytes(struct.pack(f"<{len(FIELDS)}I", *state.values()))
        self.env = os.environ | {
            "LD_LIBRARY_PATH": str(library_dir),
            "VOLTANA_NVML_STATE": str(state_path),
            "PYTHONPATH": str(ROOT),
        }

    def __getitem__(self, field: str) -> int:
        data = self.state_path.read_bytes()
        return int(struct.unpack_from("<I", data, 4 * FIELDS.index(field))[0])

    def __setitem__(self, field: str, value: int) -> None:
        with self.state_path.open("r+b") as file:
            file.seek(4 * FIELDS.index(field))
            file.write(struct.pack("<I", value))

    def popen(self, code: str) -> subprocess.Popen[str]:
        """Start `code` in a fresh interpreter that sees this card."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> str:
        """Run `code`; returns what it printed, fails with its stderr if it failed."""
        process = self.popen(code)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip()


def compile_standin(directory: Path) -> Path:
    """Compile the stand-in into `directory` with gcc; returns `directory`."""
    source = Path(__file__).with_name("nvml_standin.c")
    target = directory / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    return directory
