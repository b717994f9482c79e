"""The profiler's SGLang servers where they run already."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_client import Endpoint, Endpoints

UNIFIED: Final = "unified"
"""The role of a server that does both phases."""


@contextmanager
def attach(path: Path) -> Iterator[Endpoints]:
    """Servers that run already, from a TOML file; they are left running.

    The file has `[[fleet.prefill]]` and `[[fleet.decode]]` as for `voltana replay` (the first of
    each is taken), or one `[[fleet.unified]]`; each with `url` and `metrics` (its ZMQ address), a
    prefill server with `bootstrap_port`.

    Raises:
        VoltanaError: The file cannot be read or lacks something.
    """
    try:
        fleet = tomllib.loads(path.read_text(encoding="utf-8")).get("fleet", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    if UNIFIED in fleet:
        found = _endpoint(fleet, UNIFIED, path)
        yield Endpoints(prefill=found, decode=found)
    else:
        prefill, decode = (_endpoint(fleet, role, path) for role in ("prefill", "decode"))
        if prefill.bootstrap_port is None:
            raise VoltanaError(f"[[fleet.prefill]] must name its bootstrap_port ({path})")
        yield Endpoints(prefill=prefill, decode=decode)


def _endpoint(fleet: dict[str, Any], role: str, path: Path) -> Endpoint:
    entries = fleet.get(role)
    first = entries[0] if isinstance(entries, list) and entries else None
    if not isinstance(first, dict) or not {"url", "metrics"} <= first.keys():
        raise VoltanaError(
            f"[[fleet.{role}]] must be there and name url and metrics ({path}): "
            'e.g. url = "http://127.0.0.1:30000", metrics = "ipc:///tmp/decode.0"'
        )
    port = first.get("bootstrap_port")
    return Endpoint(
        url=str(first["url"]).rstrip("/"),
        metrics=str(first["metrics"]),
        bootstrap_port=None if port is None else int(port),
    )
