"""Options that several commands share, and what a shell may complete in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

RequireSlo = Annotated[
    bool,
    typer.Option(
        "--require-slo", help="Exit with 1 if even top clocks miss the promise at some load"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]

ANYWHERE = ("-q", "--quiet", "-v", "--verbose", "--no-color")
"""Options of `voltana` itself that may also stand behind a verb."""


class Interrupted(Exception):  # noqa: N818 (no error)
    """Ctrl-C, with what it left; typer would end without a word."""


class AnywhereGroup(TyperGroup):
    """The whole command line: its own flags count wherever they stand, up to `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer's own click)
        end = args.index("--") if "--" in args else len(args)
        flags = [a for a in args[:end] if a in ANYWHERE]
        rest = [a for a in args[:end] if a not in ANYWHERE]
        return super().parse_args(ctx, [*flags, *rest, *args[end:]])

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's own click)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop) or "stopped; no result was written") from None


def complete_profile(incomplete: str) -> list[str]:
    """Shipped profiles; a folder of one's own is the shell's to complete."""
    from voltana.profiles.places import DATA

    names = (p.parent.relative_to(DATA).as_posix() for p in DATA.glob("*/*/profile.toml"))
    return that_begin(incomplete, names)


def complete_controller(incomplete: str) -> list[str]:
    """Shipped controllers."""
    from voltana.sim.policies.registry import CONTROLLERS

    return that_begin(incomplete, CONTROLLERS)


def complete_router(incomplete: str) -> list[str]:
    """Shipped routers."""
    from voltana.sim.policies.registry import ROUTERS

    return that_begin(incomplete, ROUTERS)


def complete_workload(incomplete: str) -> list[str]:
    """Length distributions and sessions."""
    from voltana.sim.workload.generate import list_workloads

    return that_begin(incomplete, list_workloads())


def complete_trace(incomplete: str) -> list[str]:
    """Published traces by name."""
    from voltana.sim.workload.fetch import named_traces

    return that_begin(incomplete, named_traces())


def complete_setting(incomplete: str) -> list[str]:
    """Configuration keys, with the sign that follows them."""
    from voltana.sim.config import KEYS

    return that_begin(incomplete, (f"{key}=" for key in KEYS))


def that_begin(incomplete: str, names: Iterable[str]) -> list[str]:
    """Those names that what was typed may become."""
    return sorted(name for name in names if name.startswith(incomplete))
