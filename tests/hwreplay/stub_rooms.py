"""Where the halves of a pair of stub servers meet, in one process or through files."""

from __future__ import annotations

import asyncio
from pathlib import Path


class Room(asyncio.Event):
    """Where a pair meets; set once the prompt is prefilled."""

    asked_ns = 0
    """When the later of both servers was asked."""


class FileRoom(Room):
    """The same for servers in two processes: a file that prefill makes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def set(self) -> None:
        self._path.touch()

    def is_set(self) -> bool:
        return self._path.exists()


class FileRooms(dict[int, Room]):
    """Rooms in a folder."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def setdefault(self, key: int, default: Room | None = None) -> Room:
        if key not in self:
            self[key] = FileRoom(self._directory / str(key))
        return self[key]
