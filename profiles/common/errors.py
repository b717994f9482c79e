"""The one error that users see: a single line with the rule, the value, the place, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VoltanaError(ValueError):
    """A user's mistake or bad input; the command line prints its message and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message that suggests the closest known name, or lists the known ones.

    Example:
        >>> nearest("ecofrq", ["ecofreq", "static"])
        ": did you mean 'ecofreq'?"
    """
    names = sorted(known)
    close = [n for n in names if name and n.startswith(name)]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(names)}"
