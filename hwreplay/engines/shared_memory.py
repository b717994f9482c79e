"""What a process group has in /dev/shm."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SHARED_MEMORY: Final = "/dev/shm/"
PROCESS_GROUP: Final = 2
"""Its field in /proc/PID/stat, counted after the command's name."""
MAPS_INODE: Final = 4


def find_shared_memory(process_group: int) -> list[Path]:
    """Files in /dev/shm that the processes of a group have mapped: load reports, semaphores.

    By inode, as the C library makes a semaphore under another name than the one it has then.
    """
    mapped = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[PROCESS_GROUP]) != process_group:
                continue
            maps = (stat.parent / "maps").read_text()
        except OSError:
            continue  # it has just ended
        for line in maps.splitlines():
            if SHARED_MEMORY in line:
                mapped.add(int(line.split()[MAPS_INODE]))
    return [path for path in sorted(Path(SHARED_MEMORY).iterdir()) if _inode(path) in mapped]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
