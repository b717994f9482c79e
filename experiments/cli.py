"""The `voltana` command: each verb is a module of `voltana.experiments.commands`."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import sys
import traceback
from typing import Annotated

import typer

from voltana.experiments.options import AnywhereGroup, Interrupted
from voltana.experiments.progress import VOICE
from voltana.profiles.common.errors import VoltanaError

VERBS = (
    "simulate", "sweep", "demo", "plot", "experiment", "frontier", "recommend", "tune", "train",
    "list", "doctor", "profile_group", "compare_profiles", "actuator", "router", "agent", "serve",
    "replay", "validate", "report", "paper",
)  # fmt: skip
"""In the order of `voltana --help`."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""As shells have it: 128 and the signal's number."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_app() -> typer.Typer:
    """Build the command line with all its verbs."""
    app = typer.Typer(
        name="voltana",
        cls=AnywhereGroup,
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
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", help="Say results and errors only. Also behind a verb."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", help="Say each step, and where an error came from. Also there."
        ),
    ] = False,
    no_color: Annotated[
        bool, typer.Option("--no-color", help="No colour, as with NO_COLOR=1. Also there.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise VoltanaError("--quiet and --verbose ask for opposite things: leave one out")
    VOICE.is_quiet, VOICE.is_verbose = quiet, verbose
    if no_color:
        os.environ["NO_COLOR"] = "1"


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        make_app()()
    except VoltanaError as error:
        if VOICE.is_verbose:
            traceback.print_exc()
        sys.stderr.write(f"voltana: {error}\n")
        raise SystemExit(EXIT_USAGE) from None
    except Interrupted as stop:
        sys.stderr.write(f"voltana: {stop}\n")
        raise SystemExit(EXIT_INTERRUPTED) from None
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
