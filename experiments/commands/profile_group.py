"""`voltana profile`: measure a profile, import one from public tables, hold one against rows."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from voltana.experiments.commands.profile_check import check_profile
from voltana.experiments.commands.profile_gpu import profile
from voltana.experiments.commands.profile_import import import_profile

DEFAULT = "measure"
"""What `voltana profile --gpu 0 …` means, as it did before there were others."""


class _MeasureByDefault(TyperGroup):
    """A group whose first word may be left out: options alone mean `measure`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer's own click)
        if args and args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the verb with its three words."""
    group = typer.Typer(
        cls=_MeasureByDefault,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Make a profile: measure one on a GPU (the word measure may be left out), import one "
        "from public kernel tables without a GPU, or check one against public measurements.",
    )
    group.command(DEFAULT, short_help="Time and power of one GPU and engine")(profile)
    group.command("import", short_help="From public kernel tables, without a GPU")(import_profile)
    group.command("check", short_help="Beside public measurements of serving")(check_profile)
    app.add_typer(group, name="profile", short_help="Measure, import or check a profile")
