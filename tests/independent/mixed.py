"""What both parts of a mixed iteration share, from `mixed.csv`, as docs/profiles.md says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Parts = Callable[[str, int, float, int], tuple[float, float]]
"""Time and power of a part by phase, clock, batch and tokens."""
KEY = ["frequency_mhz", "chunk_tokens", "batch_size", "tokens"]


class Shared:
    """Each row's overlap and ratios, interpolated axis by axis with `numpy.interp`."""

    def __init__(self, path: Path, parts: Parts, awake_w: Callable[[int], float]) -> None:
        rows = pd.read_csv(path).groupby(KEY)[["time_s", "power_w"]].median().reset_index()
        points = []
        for row in rows.to_dict("records"):
            clock, chunk, batch, tokens = (int(row[name]) for name in KEY)
            a_s, a_w = parts("prefill", clock, 1, chunk)
            b_s, b_w = parts("decode", clock, batch, tokens)
            sum_s, shorter_s = a_s + b_s, min(a_s, b_s)
            overlap = float(np.clip((sum_s - row["time_s"]) / shorter_s, 0.0, 1.0))
            mean_w = (a_s * a_w + b_s * b_w) / sum_s
            watts = row["power_w"] + awake_w(clock)  # of both parts it is on top too
            ratios = row["time_s"] / (sum_s - overlap * shorter_s), watts / mean_w
            place = (clock, np.log(chunk), np.log(batch), np.log(tokens / batch))
            points.append((place, (overlap, *ratios)))
        self._tree = _tree(points, 0)

    def at(self, clock: int, chunk: int, batch: float, tokens: int) -> list[float]:
        """Overlap, time ratio, power ratio."""
        return _along(self._tree, (clock, np.log(chunk), np.log(batch), np.log(tokens / batch)))


def _tree(points: list[Any], axis: int) -> Any:  # noqa: ANN401 (as deep as there are axes)
    if axis == len(KEY):
        return list(points[0][1])
    keys = sorted({place[axis] for place, _ in points})
    return keys, [_tree([p for p in points if p[0][axis] == key], axis + 1) for key in keys]


def _along(tree: Any, at: tuple[float, ...]) -> list[float]:  # noqa: ANN401
    if not at:
        return list(tree)
    keys, parts = tree
    columns = zip(*(_along(part, at[1:]) for part in parts), strict=True)
    return [float(np.interp(at[0], keys, column)) for column in columns]
