"""Energy as DCGM exporter tells it, where the agent cannot open its cards but can reach that page.

The exporter reads its cards every so often (`--collect-interval`, 30 s unless told otherwise) and
repeats what it has in between. A reading counts from the moment that it has changed: energy in sum
is exact, who used it is known as well as readings are close, see docs/deploy.md.

Source: the text format of https://github.com/NVIDIA/dcgm-exporter, 3.x and 4.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import requests
from prometheus_client.parser import text_string_to_metric_families

from voltana.profiles.device.gpu import DeviceError, NoAnswerError, UnsupportedQueryError

ENERGY: Final = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
"""mJ since the driver was loaded."""
POWER: Final = "DCGM_FI_DEV_POWER_USAGE"
"""W."""
PART: Final = "GPU_I_ID"
"""Label of a MIG instance, whose energy is the whole card's."""
TIMEOUT_S: Final = 2.0


class DcgmCards:
    """The cards of one instance, as one: what a meter asks."""

    def __init__(self, url: str, cards: Sequence[int | str]) -> None:
        """Look once.

        Args:
            url: Of the exporter's page, e.g. http://127.0.0.1:9400/metrics.
            cards: By UUID, or by DCGM's own numbers, which are the host's.

        Raises:
            DeviceError: It does not answer, or lacks a card.
        """
        self._url = url
        self._cards = tuple(cards)
        self._session = requests.Session()
        self._read((POWER, ENERGY))

    def energy_j(self) -> float:
        """Sum of the counters.

        Raises:
            UnsupportedQueryError: The exporter was not told to show them.
            NoAnswerError: It does not answer now.
        """
        return self._read((ENERGY,)) * 1e-3

    def power_w(self) -> float:
        """Sum of the powers; errors as of `energy_j`."""
        return self._read((POWER,))

    def _read(self, names: Sequence[str]) -> float:
        """The sum over the cards of the first of these metrics that is there."""
        found = _by_card(self._text(), names)
        if not found:
            raise UnsupportedQueryError(
                f"DCGM exporter must show {' or '.join(names)}, {self._url} does not: name it in "
                "the exporter's list of counters"
            )
        missing = [card for card in self._cards if str(card) not in found]
        if missing:
            raise DeviceError(
                f"DCGM exporter must show {missing}, {self._url} has {', '.join(sorted(found))}: "
                "name the cards by UUID, or by the host's numbers"
            )
        return sum(found[str(card)] for card in self._cards)

    def _text(self) -> str:
        try:
            answer = self._session.get(self._url, timeout=TIMEOUT_S)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise NoAnswerError(
                f"DCGM exporter must answer at {self._url}, it does not ({type(error).__name__}): "
                "start it, or leave dcgm out"
            ) from None
        return answer.text


def _by_card(text: str, names: Iterable[str]) -> dict[str, float]:
    """The first of these metrics that is there, by UUID and by number."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    try:
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    except ValueError as error:
        raise NoAnswerError(f"DCGM exporter must speak Prometheus's format: {error}") from None
    for sample in samples:
        if (cards := found.get(sample.name.removesuffix("_total"))) is None:
            continue
        if PART in sample.labels:
            raise DeviceError(
                f"a card must not be partitioned, {sample.labels.get('UUID')} is in MIG mode: the "
                "energy is the whole card's"
            )
        for label in ("UUID", "gpu"):
            if label in sample.labels:
                cards[sample.labels[label]] = sample.value
    return next((cards for cards in found.values() if cards), {})
