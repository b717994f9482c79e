"""Joint distributions of prompt and output lengths.

A histogram ships as counts of joint bins, `data/NAME.csv.gz` (input_min, input_max, output_min,
output_max, count; bounds inclusive), computed by `voltana.sim.workload.build_histograms` from
public traces: facts about lengths, no text and no order. A length is drawn uniformly within its bin
and then held to the source's own limits. `moments.csv` keeps the source's means and spreads, which
a histogram only nears. `lmsys` and `sharegpt-client` are modelled: see `lmsys_lengths`, `TILT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, stats

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.sim.workload.traces import read_lengths

DATA = Path(__file__).parent / "data"
HISTOGRAMS: Final = {
    "sharegpt": "ShareGPT v3 conversations, prompt + output <= 3000 tokens (the reference's"
    " filter); mean 209 in, 325 out",
    "sharegpt-8k": "ShareGPT with conversation history, Llama-2 tokenizer, total <= 8192",
    "azure-conv": "Azure LLM inference trace 2023, conversation",
    "azure-code": "Azure LLM inference trace 2023, code completion",
    "arxiv-summarization": "arXiv summarisation, long prompts, total <= 4096",
}
SHAREGPT_CLIENT: Final = "sharegpt-client"
SHAREGPT_CLIENT_MEAN_TOKENS: Final = (250.0, 203.0)
"""What SGLang's benchmark client sends: the first prompt of a ShareGPT v3 conversation, and as many
output tokens as ChatGPT's first answer has. 250 in: the reference's own comment on its trace
(VoltanaLLM v0.1, p_server.sh). 203 out: 203,068 tokens of 1,000 answers by Llama-3.1-8B's tokenizer
(vllm-project/vllm, pull request 18566). The outputs of the `sharegpt` source are longer (mean
324): it does not say whose they are."""
TILT: Final = (1.772e-4, -2.8129e-3)
"""Per input and output token: bins of `sharegpt` times exp(tilt · lengths) have those means. Of all
distributions with these means it is the one nearest to the histogram (least relative entropy)."""
LMSYS_MEAN_TOKENS: Final = (69.5, 214.5)
"""Published means of LMSYS-Chat-1M: prompt, response (Zheng et al., arXiv:2309.11998, table 1)."""
LMSYS_SIGMA: Final = (1.35, 1.0)
"""Spreads of the two logarithms: ours, the paper gives none."""
LMSYS_CORRELATION: Final = 0.2
"""Correlation of the two logarithms: ours."""
LMSYS_MAX_TOKENS: Final = (2048, 1024)

IntArray = npt.NDArray[np.int64]


def list_lengths() -> dict[str, str]:
    """Every length distribution with one line of explanation."""
    return {
        **HISTOGRAMS,
        SHAREGPT_CLIENT: "ShareGPT as SGLang's benchmark client sends it, modelled: `sharegpt`"
        " re-weighted to the means of first prompts and first answers, 250 in and 203 out",
        "lmsys": "LMSYS-Chat-1M, modelled: correlated lognormals with the published means,"
        " 69.5 in and 214.5 out",
    }


def draw_lengths(name: str, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Draw prompt and output lengths.

    Args:
        name: One of `list_lengths`, or a file of lengths
            (`voltana.sim.workload.traces.read_lengths`), whose requests are drawn with replacement.
        count: How many pairs.
        rng: Random stream; the same stream and count give the same lengths.

    Returns:
        Input and output tokens, each of shape (count,), all >= 1.

    Raises:
        VoltanaError: Unknown name; the nearest is suggested. Or the file cannot be read.
    """
    if name == "lmsys":
        return lmsys_lengths(count, rng)
    if is_file_of_lengths(name):
        inputs, outputs = _file_lengths(name, Path(name).stat().st_mtime_ns)
        drawn = rng.integers(len(inputs), size=count)
        return inputs[drawn], outputs[drawn]
    if name not in HISTOGRAMS and name != SHAREGPT_CLIENT:
        raise VoltanaError(f"unknown workload {name!r}{nearest(name, list_lengths())}")
    made = _histogram(name)
    draws = rng.random((count, 3))
    row = np.searchsorted(made.cumulative, draws[:, 0] * made.cumulative[-1], side="right")
    chosen = made.bins[row]
    inputs = chosen[:, 0] + (draws[:, 1] * (chosen[:, 1] - chosen[:, 0] + 1)).astype(np.int64)
    outputs = chosen[:, 2] + (draws[:, 2] * (chosen[:, 3] - chosen[:, 2] + 1)).astype(np.int64)
    # every bin holds a pair of the source: its smallest lengths are within the limits
    inputs = np.minimum(inputs, np.minimum(made.max_input, made.max_total - chosen[:, 2]))
    outputs = np.minimum(outputs, np.minimum(made.max_output, made.max_total - inputs))
    return inputs, outputs


def is_file_of_lengths(name: str) -> bool:
    """Whether a workload's name is a file's: one with a suffix, or in a folder."""
    if name in list_lengths() or not (Path(name).suffix or "/" in name):
        return False
    if not Path(name).is_file():
        raise VoltanaError(f"no such file of lengths: {name}")
    return True


@lru_cache(maxsize=4)
def _file_lengths(name: str, changed_ns: int) -> tuple[IntArray, IntArray]:
    return read_lengths(Path(name))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Histogram:
    bins: IntArray
    """Shape (n, 4): smallest and largest input, smallest and largest output."""
    cumulative: npt.NDArray[np.float64]
    max_input: int
    max_output: int
    max_total: int


@lru_cache(maxsize=len(HISTOGRAMS) + 1)
def _histogram(name: str) -> _Histogram:
    source = "sharegpt" if name == SHAREGPT_CLIENT else name
    frame = pd.read_csv(DATA / f"{source}.csv.gz")
    bins = frame[["input_min", "input_max", "output_min", "output_max"]].to_numpy(dtype=np.int64)
    weights = frame["count"].to_numpy(dtype=np.float64)
    if name == SHAREGPT_CLIENT:
        weights *= np.exp(TILT[0] * bins[:, :2].mean(axis=1) + TILT[1] * bins[:, 2:].mean(axis=1))
    limits = source_moments().loc[source].to_dict()
    return _Histogram(
        bins=bins,
        cumulative=np.cumsum(weights),
        max_input=int(limits["input_max"]),
        max_output=int(limits["output_max"]),
        max_total=int(limits["total_max"]),
    )


@lru_cache(maxsize=1)
def source_moments() -> pd.DataFrame:
    """Moments of the sources of the histograms, by name; tokens, `correlation` a number."""
    return pd.read_csv(DATA / "moments.csv", index_col="name")
