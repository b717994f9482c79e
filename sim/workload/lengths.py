"""Joint distributions of prompt and output lengths.

A histogram ships as counts of joint bins, `data/NAME.csv.gz` (input_min, input_max, output_min,
output_max, count; bounds inclusive), computed by `sim.workload.build_histograms` from public
traces: facts about lengths, no text and no order. A length is drawn uniformly within its bin,
so that a drawn total can pass the source's limit by a bin's width (about 9 %).
`lmsys` is modelled: see `lmsys_lengths`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, stats

from profiles.errors import VoltanaError, nearest

DATA = Path(__file__).parent / "data"
HISTOGRAMS: Final = {
    "sharegpt": "ShareGPT v3 conversations, prompt + output <= 3000 tokens (the reference's"
    " filter); mean 209 in, 325 out",
    "sharegpt-8k": "ShareGPT with conversation history, Llama-2 tokenizer, total <= 8192",
    "azure-conv": "Azure LLM inference trace 2023, conversation",
    "azure-code": "Azure LLM inference trace 2023, code completion",
    "arxiv-summarization": "arXiv summarisation, long prompts, total <= 4096",
}
LMSYS_MEAN_TOKENS: Final = (69.5, 214.5)
"""Published means of LMSYS-Chat-1M: prompt, response (Zheng et al., arXiv:2309.11998, table 1)."""
LMSYS_SIGMA: Final = (1.35, 1.0)
"""Spreads of the two logarithms: ours, the paper gives none."""
LMSYS_CORRELATION: Final = 0.2
"""Of the two logarithms: ours."""
LMSYS_MAX_TOKENS: Final = (2048, 1024)

IntArray = npt.NDArray[np.int64]


def list_lengths() -> dict[str, str]:
    """Every length distribution with one line of explanation."""
    return {
        **HISTOGRAMS,
        "lmsys": "LMSYS-Chat-1M, modelled: correlated lognormals with the published means,"
        " 69.5 in and 214.5 out",
    }


def draw_lengths(name: str, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Draw prompt and output lengths.

    Args:
        name: One of `list_lengths`.
        count: How many pairs.
        rng: Random stream; the same stream and count give the same lengths.

    Returns:
        Input and output tokens, each of shape (count,), all >= 1.

    Raises:
        VoltanaError: Unknown name; the nearest is suggested.
    """
    if name == "lmsys":
        return lmsys_lengths(count, rng)
    if name not in HISTOGRAMS:
        raise VoltanaError(f"unknown workload {name!r}{nearest(name, list_lengths())}")
    bins, cumulative = _histogram(name)
    draws = rng.random((count, 3))
    row = np.searchsorted(cumulative, draws[:, 0] * cumulative[-1], side="right")
    chosen = bins[row]
    inputs = chosen[:, 0] + (draws[:, 1] * (chosen[:, 1] - chosen[:, 0] + 1)).astype(np.int64)
    outputs = chosen[:, 2] + (draws[:, 2] * (chosen[:, 3] - chosen[:, 2] + 1)).astype(np.int64)
    return inputs, outputs


def lmsys_lengths(count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Modelled LMSYS lengths: two lognormals joined by a Gaussian copula, truncated and rounded up.

    The location of each logarithm is solved for so that the truncated, rounded mean is the
    published one; spread, correlation and truncation are ours.
    """
    normal = rng.standard_normal((count, 2))
    r = LMSYS_CORRELATION
    normal[:, 1] = r * normal[:, 0] + np.sqrt(1 - r * r) * normal[:, 1]
    uniform = stats.norm.cdf(normal)
    columns = []
    for i in range(2):
        log_mean = _lmsys_location(i)
        sigma, high = LMSYS_SIGMA[i], LMSYS_MAX_TOKENS[i]
        top = stats.norm.cdf((np.log(high) - log_mean) / sigma)
        length = np.exp(log_mean + sigma * stats.norm.ppf(uniform[:, i] * top))
        columns.append(np.clip(np.ceil(length), 1, high).astype(np.int64))
    return columns[0], columns[1]


@lru_cache(maxsize=2)
def _lmsys_location(i: int) -> float:
    sigma, high, mean = LMSYS_SIGMA[i], LMSYS_MAX_TOKENS[i], LMSYS_MEAN_TOKENS[i]
    whole = np.arange(0, high)

    def excess(log_mean: float) -> float:
        top = stats.norm.cdf((np.log(high) - log_mean) / sigma)
        with np.errstate(divide="ignore"):
            at_most = stats.norm.cdf((np.log(whole) - log_mean) / sigma) / top
        return float((1 - at_most).sum()) - mean  # E[ceil X] = sum over k >= 0 of P(X > k)

    return float(optimize.brentq(excess, 0.0, np.log(high)))


@lru_cache(maxsize=len(HISTOGRAMS))
def _histogram(name: str) -> tuple[IntArray, npt.NDArray[np.float64]]:
    frame = pd.read_csv(DATA / f"{name}.csv.gz")
    columns = ["input_min", "input_max", "output_min", "output_max"]
    return frame[columns].to_numpy(dtype=np.int64), np.cumsum(frame["count"].to_numpy(float))
