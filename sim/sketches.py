"""The numbers of a run without its rows: exact counts, and quantiles within a relative error.

Counts, sums and attainment are exact. Quantiles come from DDSketch (Masson, Rim and Lee, VLDB
2019): the value reported lies within `RELATIVE_ERROR` of a value of that rank. Sketches of parts
of a run, or of several runs, merge into the sketch of the whole.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ddsketch import DDSketch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RELATIVE_ERROR: Final = 0.002
"""Largest error of a quantile: half comes from grouping values, half from the sketch itself."""
_HALF: Final = RELATIVE_ERROR / 2
_LOG_GAMMA: Final = math.log((1 + _HALF) / (1 - _HALF))
_SMALLEST_S: Final = 1e-9


class Sketch:
    """A weighted sample of durations (s), of which count and sum are exact."""

    __slots__ = ("_sketch", "count", "total")

    def __init__(self) -> None:
        self._sketch = DDSketch(_HALF)
        self.count = 0
        self.total = 0.0

    def add(self, values: FloatArray, weights: IntArray | None = None) -> None:
        """Add a batch: values >= 0, shape (n,), with counts >= 0, shape (n,), or one each."""
        if not len(values):
            return
        counts = np.ones(len(values), dtype=np.int64) if weights is None else weights
        self.count += int(counts.sum())
        self.total += float(np.dot(values, counts))
        # values whose logarithms round to one number are within half the error of each other
        keys = np.rint(np.log(np.maximum(values, _SMALLEST_S)) / _LOG_GAMMA).astype(np.int64)
        first = int(keys.min())
        grouped = np.bincount(keys - first, weights=counts)
        for offset in np.flatnonzero(grouped).tolist():
            self._sketch.add(math.exp((first + offset) * _LOG_GAMMA), float(grouped[offset]))

    def merge(self, other: Sketch) -> None:
        """Add another's sample to this one; the other stays as it is."""
        self._sketch.merge(other._sketch)
        self.count += other.count
        self.total += other.total

    def quantile(self, fraction: float) -> float:
        """Nearest rank, as in `voltana.sim.metrics`, within `RELATIVE_ERROR`; NaN when empty."""
        # of n values the sketch takes the first whose 0-based rank is not below q·(n - 1): half a
        # rank under the one wanted meets it whatever the rounding
        rank = max(1, math.ceil(fraction * self.count - 1e-9))
        asked = min(1.0, (rank - 0.5) / max(self.count - 1, 1))
        value = self._sketch.get_quantile_value(asked)
        return math.nan if value is None else float(value)

    def describe(self, levels: dict[str, float]) -> dict[str, float]:
        """Mean and the quantiles asked for, as `voltana.sim.metrics.describe`."""
        mean = self.total / self.count if self.count else math.nan
        return {"mean": mean} | {name: self.quantile(level) for name, level in levels.items()}


class RunSketch:
    """Everything `voltana.sim.metrics.summarise` needs of requests and token gaps."""

    COUNTS: Final = (
        "arrived", "completed", "rejected", "ttft_judged", "ttft_kept", "both_judged", "both_kept",
        "gaps", "gaps_kept", "output_tokens",
    )  # fmt: skip
    SAMPLES: Final = ("ttft_s", "itl_s", "tpot_s", "e2e_s")

    def __init__(self, *, slo_ttft_s: float, slo_itl_s: float) -> None:
        self.slo_ttft_s = slo_ttft_s
        self.slo_itl_s = slo_itl_s
        self.counts: dict[str, int] = dict.fromkeys(self.COUNTS, 0)
        self.samples: dict[str, Sketch] = {name: Sketch() for name in self.SAMPLES}

    def add_first_tokens(self, ttft_s: FloatArray) -> None:
        """Requests that have made their first token. Shape (n,)."""
        self.samples["ttft_s"].add(ttft_s)

    def add_finished(self, ttft_s: FloatArray, e2e_s: FloatArray, output_tokens: IntArray) -> None:
        """Requests that have ended; samples of TTFT come by `add_first_tokens`.

        Args:
            ttft_s: Time to first token. Shape (n,).
            e2e_s: Arrival to last token. Shape (n,).
            output_tokens: Shape (n,), all >= 1.
        """
        tpot_s = (e2e_s - ttft_s) / np.maximum(output_tokens - 1, 1)
        self.samples["e2e_s"].add(e2e_s)
        self.samples["tpot_s"].add(tpot_s[output_tokens > 1])
        in_time = ttft_s <= self.slo_ttft_s
        self.counts["ttft_kept"] += int(in_time.sum())
        self.counts["both_kept"] += int((in_time & (tpot_s <= self.slo_itl_s)).sum())
        self.counts["completed"] += len(e2e_s)
        self.counts["ttft_judged"] += len(e2e_s)
        self.counts["both_judged"] += len(e2e_s)
        self.counts["output_tokens"] += int(output_tokens.sum())

    def reject(self) -> None:
        """Count a request that no instance could hold: it misses both promises."""
        for name in ("rejected", "ttft_judged", "both_judged"):
            self.counts[name] += 1

    def add_in_flight(self, ttft_s: FloatArray, waited_s: FloatArray) -> None:
        """Requests that were in flight when the run was cut. See `voltana.sim.metrics.judged`.

        Args:
            ttft_s: NaN for those without a first token.
            waited_s: From their arrivals to the end of the run.
        """
        with np.errstate(invalid="ignore"):
            kept = ttft_s <= self.slo_ttft_s
        missed = ~kept & (waited_s > self.slo_ttft_s)
        self.counts["ttft_kept"] += int(kept.sum())
        self.counts["ttft_judged"] += int((kept | missed).sum())
        self.counts["both_judged"] += int(missed.sum())

    def add_gaps(self, gap_s: FloatArray, weight: IntArray) -> None:
        """Token gaps with their counts, shape (n,) each."""
        self.samples["itl_s"].add(gap_s, weight)
        self.counts["gaps"] += int(weight.sum())
        self.counts["gaps_kept"] += int(weight[gap_s <= self.slo_itl_s].sum())

    def merge(self, other: RunSketch) -> None:
        """Add another part of the run, or another run under the same promises."""
        for name in self.COUNTS:
            self.counts[name] += other.counts[name]
        for name in self.SAMPLES:
            self.samples[name].merge(other.samples[name])

    def percentiles(self) -> dict[str, Any]:
        """Every percentile of every sample, for a CDF."""
        levels = {f"p{level}": level / 100 for level in range(1, 100)} | {"p99.9": 0.999}
        return {name: sketch.describe(levels) for name, sketch in self.samples.items()}
