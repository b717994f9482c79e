"""The `voltana` command: each verb is a module of `voltana.experiments.commands`."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import sys
from typing import Annotated

import typer

from voltana.profiles.common.errors import VoltanaError

VERBS = (
    "simulate", "sweep", "demo", "plot", "experiment", "frontier", "recommend", "tune", "train",
    "list", "doctor", "profile_group", "compare_profiles", "actuator", "router", "agent", "serve",
    "replay", "validate", "report", "paper",
)  # fmt: skip
"""In the order of `voltana --help`."""

EXIT_FAILED = 1
EXIT_USAGE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_app() -> typer.Typer:
    """Build the command line with all its verbs."""
    app = typer.Typer(
        name="voltana",
        help="Energy-efficient LLM serving under latency promises: profile a GPU, simulate "
        "frequency controllers and routers, replay the chosen policy on real engines.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    for verb in VERBS:
        importlib.import_module(f"voltana.experiments.commands.{verb}").register(app)
    return app


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"voltana {importlib.metadata.version('voltana')}")
        raise typer.Exit


def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        make_app()()
    except VoltanaError as error:
        sys.stderr.write(f"voltana: {error}\n")
        raise SystemExit(EXIT_USAGE) from None
    except KeyboardInterrupt:
        sys.stderr.write("voltana: interrupted; what had finished is kept\n")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(EXIT_FAILED) from None
    except OSError as error:
        sys.stderr.write(f"voltana: {_os_error(error)}\n")
        raise SystemExit(EXIT_USAGE) from None


def _os_error(error: OSError) -> str:
    """What the system refused, on one line: of a file its name, the reason, and what to do."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None:
        return reason
    if error.errno in _NO_ROOM:
        return f"cannot write {error.filename}: {reason}; make room or name another place"
    return f"cannot read or write {error.filename}: {reason}; name another place"


if __name__ == "__main__":
    main()
