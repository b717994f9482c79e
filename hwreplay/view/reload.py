"""What of a configuration may change while it serves: the policy, its knobs and the promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig

RELOADABLE: Final = (
    "controller", "prefill_controller", "decode_controller", "router",
    "slo_ttft_s", "slo_itl_s", "aim_ratio",
)  # fmt: skip
"""Keys of [simulate]."""


def check_sim_reload(old: SimConfig, new: SimConfig, where: str) -> None:
    """Refuse a new [simulate] that a running service cannot take.

    Args:
        old: As it serves now.
        new: As it is to serve.
        where: The file, for the error.

    Raises:
        VoltanaError: Another key than those of `RELOADABLE` has changed.
    """
    refuse_changes(old, new, where, section="simulate", but=RELOADABLE)


def refuse_changes(
    old: Any,  # noqa: ANN401 (two of one dataclass)
    new: Any,  # noqa: ANN401
    where: str,
    *,
    section: str,
    but: Iterable[str] = (),
) -> None:
    """Refuse the first field that has changed.

    Args:
        old: A dataclass as it is.
        new: Another of its kind.
        where: The file, for the error.
        section: The table that the fields are written in.
        but: Fields that may.

    Raises:
        VoltanaError: A field has changed.
    """
    for name in (item.name for item in dataclasses.fields(old) if item.name not in but):
        if getattr(old, name) != getattr(new, name):
            raise refusal(f"[{section}] {name}", where)


def refusal(what: str, where: str) -> VoltanaError:
    """What to say of a change that needs a restart."""
    return VoltanaError(
        f"a running service takes new {', '.join(RELOADABLE)} alone, {what} has changed ({where}): "
        "restart it for that"
    )
