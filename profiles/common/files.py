"""Files that appear whole or not at all: every writer of the project goes through `replacing`.

Logs and journals, which grow line by line, are the exception: their last line may be cut.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@contextmanager
def replacing(path: Path, *, is_first_kept: bool = False) -> Iterator[Path]:
    """Yield a temporary name to write to; at the end the file is synced and renamed to `path`.

    No reader sees half a file, and a writer that fails or is interrupted leaves the old file.

    Args:
        path: The file.
        is_first_kept: If several writers (also on other machines) write it, the first one's file
            stays. On a file system without hard links two that end at the same instant may leave
            the later one's.

    Raises:
        OSError: With `path` as its file name, whatever name the failing library gave (a full disk,
            say, often comes without any).
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        _sync(partial)
        if is_first_kept:
            _place_if_free(partial, path)
        else:
            partial.replace(path)
    except OSError as error:
        if error.filename not in (None, str(partial), partial):
            raise
        raise _of(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_csv(frame: pd.DataFrame, path: Path, **options: Any) -> None:  # noqa: ANN401 (pandas')
    """Write a table without its index, whole or not at all; `options` are those of `to_csv`."""
    with replacing(path) as partial:
        frame.to_csv(partial, index=False, **{"compression": None, **options})


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, whole or not at all."""
    with replacing(path) as partial:
        frame.to_parquet(partial, index=False)


def write_figure(figure: Figure, path: Path, **options: Any) -> None:  # noqa: ANN401 (matplotlib's)
    """Draw a figure to PNG or SVG, as the name says, whole or not at all.

    The same figure gives the same bytes: an SVG holds no date.
    """
    kind = path.suffix.removeprefix(".")
    dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, **dated, **options)


def _place_if_free(partial: Path, path: Path) -> None:
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        pass
    except OSError:
        if not path.exists():
            partial.replace(path)


def _sync(path: Path) -> None:
    """Have the disk take the file before its name does: else a power cut leaves an empty one."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _of(path: Path, error: OSError) -> OSError:
    if error.errno:
        return OSError(error.errno, os.strerror(error.errno), str(path))
    return OSError(0, " ".join(str(error).split()) or type(error).__name__, str(path))
