"""Where profiles are, and the one file of a profile that a configuration needs first."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError

DATA: Final = Path(__file__).parent / "data"
"""Shipped profiles, `<gpu>/<model>`."""
SERVING: Final = "serving.toml"
"""Beside the tables where a serving engine was profiled."""
SERVING_VERSION: Final = 1


def profile_directory(name_or_path: str | Path) -> Path:
    """The directory of a shipped profile's name, or the path that was given."""
    shipped = DATA / name_or_path
    return shipped if (shipped / "profile.toml").is_file() else Path(name_or_path)


def serving_settings(name_or_path: str | Path) -> dict[str, Any]:
    """Time that requests of a profiled engine spend outside iterations, and the engine's limits.

    Args:
        name_or_path: As of `load_profile`; a profile that does not exist has none.

    Returns:
        Keys of a simulated configuration with their values; empty without `serving.toml`.

    Raises:
        VoltanaError: The file has another version.
    """
    path = profile_directory(name_or_path) / SERVING
    return read_serving(path)["simulate"] if path.is_file() else {}


def read_serving(path: Path) -> dict[str, Any]:
    """Read a `serving.toml`: `schema_version`, `measured` and `simulate`.

    Raises:
        VoltanaError: It cannot be read, or is none of this version.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    version = table.get("schema_version")
    if version != SERVING_VERSION or not isinstance(table.get("simulate"), dict):
        raise VoltanaError(
            f"{path} must have schema_version {SERVING_VERSION} and a table [simulate], got "
            f"version {version!r}: profile the engine again"
        )
    return table


def listed_profiles(text: str, key: str, count: int) -> list[str]:
    """The names in "A*2+B", one an instance.

    Args:
        text: As a configuration has it.
        key: Whose value it is, for errors.
        count: Instances that there are.

    Raises:
        VoltanaError: It is no such list, or of another length.

    Example:
        >>> listed_profiles("a*2+b", "decode_profiles", 3)
        ['a', 'a', 'b']
    """
    names: list[str] = []
    for part in text.split("+"):
        name, _, times = part.partition("*")
        if not name.strip() or not (times or "1").strip().isdigit():
            raise VoltanaError(f"{key} must be NAME or NAME*COUNT, joined by +, got {text!r}")
        names += [name.strip()] * int(times or 1)
    if len(names) != count:
        raise VoltanaError(f"{key} must name {count} instances, got {len(names)} in {text!r}")
    return names
