"""Configurations as people write them: TOML files, and key=value on the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from voltana.profiles.common.errors import VoltanaError


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Split `key=value` texts of the command line."""
    pairs: dict[str, str] = {}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise VoltanaError(f"--set takes key=value, got {text!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, or say in one line why it can't be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VoltanaError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
