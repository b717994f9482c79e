"""`python -I -m voltana.hwreplay.actuator SOCK --gpu N`: `voltana actuator` alone.

It imports the standard library, NVML's bindings and this package, so that an installation of root's
is small, and `-I` keeps the user's environment and folders out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from voltana.hwreplay.actuator.options import parse_options
from voltana.hwreplay.actuator.start import start
from voltana.profiles.common.errors import VoltanaError


def main(arguments: Sequence[str]) -> int:
    """Run the actuator; a user's mistake is one line and exit code 2."""
    try:
        start(parse_options("voltana.hwreplay.actuator", arguments))
    except VoltanaError as error:
        sys.stderr.write(f"voltana actuator: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
