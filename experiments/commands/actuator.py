"""`voltana actuator`: the privileged process of the replay."""

from __future__ import annotations

import typer

UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Its options are its own: root's entry, which has no typer, takes the same."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "actuator",
        short_help="Set clocks for agents that may not (as root)",
        context_settings=UNREAD,
        add_help_option=False,
    )(actuator)


def actuator(context: typer.Context) -> None:
    """Set clocks for replay agents that may not: run this as root, and only this."""
    from voltana.hwreplay.actuator.options import parse_options
    from voltana.hwreplay.actuator.start import start

    start(parse_options("voltana actuator", context.args))
