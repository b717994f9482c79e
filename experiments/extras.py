"""Commands that need an optional part of the installation name it when it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from voltana.profiles.common.errors import VoltanaError


@contextmanager
def needs(extra: str, command: str) -> Iterator[None]:
    """Around the imports of a command: a module that is not installed names its extra.

    Raises:
        VoltanaError: One of another project is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module == "voltana":
            raise
        raise VoltanaError(f"{command} needs {module}: pip install 'voltana[{extra}]'") from None
