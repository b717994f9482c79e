"""How a module of this folder runs as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable

from voltana.profiles.common.errors import VoltanaError


def run_script(main: Callable[[], object]) -> None:
    """Run it; a user's mistake is one line and exit code 2.

    Raises:
        SystemExit: With 2, where `main` raised a VoltanaError.
    """
    try:
        main()
    except VoltanaError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
