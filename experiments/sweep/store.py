"""Results by the key of what was run: each written once, whole or not at all.

Several processes or machines can share one store: a folder (also over a network), or anything that
fsspec has a URL for (`s3://bucket/points`, `memory://points`). Who comes second finds the result
there and keeps it; where a store cannot promise that to the instant, its class says so. Two results
of one key differ in the time that the run took only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import uuid
from pathlib import Path
from typing import Any, Final, Protocol

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import replacing
from voltana.sim.results import finite

Summary = dict[str, Any]
_EXCLUSIVE: Final = frozenset({"memory", "s3", "s3a", "gs", "gcs"})
"""Protocols of fsspec whose `pipe_file(mode="create")` is one conditional request."""


class ResultStore(Protocol):
    """Summaries of runs by key."""

    @property
    def place(self) -> str:
        """Where they are kept, for people."""
        ...

    def has(self, key: str) -> bool:
        """Whether a result is kept under this key."""
        ...

    def get(self, key: str) -> Summary:
        """The result kept under this key. Raises VoltanaError if it is missing or unreadable."""
        ...

    def put(self, key: str, summary: Summary) -> None:
        """Write a result; if there is one already, that one stays."""
        ...


class FolderStore:
    """A file KEY.json for each result in a folder.

    A file appears under its name by a hard link, which fails if the name is taken: no reader sees
    half a file and no writer replaces another's. Where there are no hard links it is renamed: still
    whole, but of two writers at the same instant the later one's stays.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    @property
    def place(self) -> str:
        return str(self._folder)

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def get(self, key: str) -> Summary:
        try:
            return _parse(self._path(key).read_bytes(), str(self._path(key)))
        except FileNotFoundError:
            raise VoltanaError(f"no result {self._path(key)}: run the sweep again") from None

    def put(self, key: str, summary: Summary) -> None:
        with replacing(self._path(key), is_first_kept=True) as partial:
            partial.write_bytes(_text(summary))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


class UrlStore:
    """An object KEY.json for each result below an fsspec URL.

    Object stores (and memory) create it whole and only if it is not there. Elsewhere it is written
    under another name and moved: whole where the file system renames, but of two writers at the
    same instant the later one's stays.
    """

    def __init__(self, url: str) -> None:
        try:
            fsspec = importlib.import_module("fsspec")
        except ImportError:
            raise VoltanaError(
                f"{url} needs fsspec: pip install 'voltana[ray]', or name a folder"
            ) from None
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise VoltanaError(f"cannot open the store {url}: {error}") from None
        self._root = root.rstrip("/")
        self._files.makedirs(self._root, exist_ok=True)
        names = self._files.protocol
        self._is_exclusive = not _EXCLUSIVE.isdisjoint([names] if isinstance(names, str) else names)
        self.place = url

    def has(self, key: str) -> bool:
        self._files.invalidate_cache(self._root)  # another machine may have written since
        return bool(self._files.exists(self._path(key)))

    def get(self, key: str) -> Summary:
        try:
            return _parse(self._files.cat_file(self._path(key)), self._path(key))
        except FileNotFoundError:
            raise VoltanaError(f"no result {self._path(key)}: run the sweep again") from None

    def put(self, key: str, summary: Summary) -> None:
        if self._is_exclusive:
            with contextlib.suppress(FileExistsError):
                self._files.pipe_file(self._path(key), _text(summary), mode="create")
            return
        partial = f"{self._root}/.{key}.{uuid.uuid4().hex}"
        self._files.pipe_file(partial, _text(summary))
        if self.has(key):
            self._files.rm_file(partial)
        else:
            self._files.mv(partial, self._path(key))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}.json"


def open_store(where: str | Path) -> ResultStore:
    """The store at a folder or URL.

    Raises:
        VoltanaError: fsspec or the driver of that kind of URL is not installed.
    """
    text = str(where)
    if "://" in text and not text.startswith("file://"):
        return UrlStore(text)
    return FolderStore(Path(text.removeprefix("file://")))


def _text(summary: Summary) -> bytes:
    return (json.dumps(finite(summary), indent=1) + "\n").encode()


def _parse(data: bytes, where: str) -> Summary:
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise VoltanaError(f"{where} is no result of a run: remove it and run the sweep again")
    return parsed
