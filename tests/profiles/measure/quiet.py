"""Progress that nobody is told of."""

from __future__ import annotations

from voltana.profiles.measure.progress import Standing


class Quiet:
    """Tells nobody."""

    def say(self, text: str) -> None:
        pass

    def at(self, standing: Standing) -> None:
        pass
