"""Compute the shipped length histograms, the moments of their sources, and the rate curves.

`python -m voltana.sim.workload.build_histograms --traces DIR`; DIR holds CSV files with
input_tokens and output_tokens, and one of rates. Bins are about 9 % wide, so that drawing
uniformly within one keeps the means within 2 % and the percentiles within 5 % of the source.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.common.files import write_csv
from voltana.sim.workload.arrivals.curves import COLUMNS, SHIPPED
from voltana.sim.workload.lengths import DATA

SOURCES: Final = {
    "sharegpt": ("sharegpt_v3_4k_lengths.csv.gz", 3000),
    "sharegpt-8k": ("sharegpt_8k_lengths.csv.gz", None),
    "azure-conv": ("azure_llm_2023_conv.csv.gz", None),
    "azure-code": ("azure_llm_2023_code.csv.gz", None),
    "arxiv-summarization": ("arxiv_summarization_4k_lengths.csv.gz", None),
}
"""Name -> source file and the largest sum of prompt and output that is kept."""
RATES: Final = "servegen_rates.csv.gz"
"""Rates of ServeGen's pools: pool, window_start_s, rate_rps."""
POOLS: Final = {"alibaba-m-large": "m-large"}
BIN_RATIO: Final = 1.09


def kept_pairs(frame: pd.DataFrame, max_total_tokens: int | None) -> pd.DataFrame:
    """Pairs without a zero length whose sum is within the limit."""
    kept = frame[(frame["input_tokens"] >= 1) & (frame["output_tokens"] >= 1)]
    if max_total_tokens is not None:
        kept = kept[kept["input_tokens"] + kept["output_tokens"] <= max_total_tokens]
    return kept


def moments(frame: pd.DataFrame, max_total_tokens: int | None) -> dict[str, float]:
    """Count, means, standard deviations, largest values and correlation of the kept pairs."""
    kept = kept_pairs(frame, max_total_tokens)
    made: dict[str, float] = {"pairs": len(kept)}
    for side in ("input", "output"):
        tokens = kept[f"{side}_tokens"]
        made |= {
            f"{side}_mean": round(float(tokens.mean()), 3),
            f"{side}_std": round(float(tokens.std()), 3),
            f"{side}_max": int(tokens.max()),
        }
    made["total_max"] = int((kept["input_tokens"] + kept["output_tokens"]).max())
    return made | {"correlation": round(float(kept["input_tokens"].corr(kept["output_tokens"])), 4)}


def histogram(frame: pd.DataFrame, max_total_tokens: int | None) -> pd.DataFrame:
    """Counts of joint bins of a table of length pairs; pairs with a zero length are left out."""
    kept = kept_pairs(frame, max_total_tokens)
    columns = {}
    for side in ("input", "output"):
        tokens = kept[f"{side}_tokens"].to_numpy()
        edges = _edges(int(tokens.max()))
        at = np.searchsorted(edges, tokens, side="right") - 1
        columns[f"{side}_min"] = edges[at]
        columns[f"{side}_max"] = edges[at + 1] - 1
    keys = ["input_min", "input_max", "output_min", "output_max"]
    counts = pd.DataFrame(columns).groupby(keys, sort=True).size()
    return counts.rename("count").reset_index()


def _edges(largest: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    edges = [1]
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, int(edges[-1] * BIN_RATIO)))
    return np.array(edges, dtype=np.int64)


def main() -> None:
    """Write every histogram and the moments of its source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    rows = []
    for name, (file, limit) in SOURCES.items():
        source = pd.read_csv(options.traces / file)
        path = options.out / f"{name}.csv.gz"
        write_csv(histogram(source, limit), path, compression={"method": "gzip", "mtime": 0})
        rows.append({"name": name, **moments(source, limit)})
    rates = pd.read_csv(options.traces / RATES)
    for name, file in SHIPPED.items():
        curve = rates.loc[rates["pool"] == POOLS[name], list(COLUMNS)].round(3)
        write_csv(curve, options.out / file, compression={"method": "gzip", "mtime": 0})
    write_csv(pd.DataFrame(rows), options.out / "moments.csv")


if __name__ == "__main__":
    main()
