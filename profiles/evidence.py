"""Public measurements of serving: rows of the ML.ENERGY leaderboard, from its JSON or a table.

A row is a model on a card at one limit of running requests: the median gap between tokens, mean
power of all GPUs in a steady window (vLLM, Zeus, default clocks, prefill and decode mixed).

Source: ml-energy/leaderboard, data of version 3 (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.profiles.common.errors import VoltanaError

PROMPT_TOKENS: Final[Mapping[str, float]] = {"lm-arena-chat": 380.0, "gpqa": 230.0}
"""Mean prompt by task. Ours: the data has none. Where the KV cache limits the batch, and not
`max_num_seqs`, a request holds the cache over the batch: Qwen3-8B on an H100 held 474 (chat) and 82
(gpqa) requests in some 370,000 tokens, so about 780 and 4,500 each, outputs included."""
OUTPUT_HELD: Final = 0.55
"""Share of the mean output that a running request holds, where its distribution is not given. Half
if all outputs were as long; the longer ones run longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured point."""

    model: str
    task: str
    gpu: str
    num_gpus: int
    tensor_parallel: int
    precision: str
    """Of the weights; "" where the file does not say."""
    batch: float
    """Mean of running requests."""
    itl_s: float
    """Median."""
    power_w: float
    """Mean, all GPUs."""
    tokens_per_s: float
    output_tokens: float
    """Mean of a request."""
    held_output_tokens: float
    """Mean of what a running request has written."""

    @property
    def step_s(self) -> float:
        """Mean time between two tokens of a request, prefills between them included."""
        return self.batch / self.tokens_per_s

    def context_tokens(self, prompt_tokens: float) -> float:
        """Mean tokens of a running request."""
        return prompt_tokens + self.held_output_tokens


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of leaderboard files: of a task, of a model, or a CSV table of them.

    Raises:
        VoltanaError: A file cannot be read or has another form.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            rows += _from_csv(path) if path.suffix == ".csv" else _from_json(path)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise VoltanaError(
                f"{path} must be a task's or a model's JSON of the ML.ENERGY leaderboard (data "
                f"version 3), or a table of its rows: {type(error).__name__} {error}"
            ) from None
    return rows


def _from_csv(path: Path) -> list[Row]:
    return [
        _row(
            {str(k): v for k, v in record.items()},
            model=str(record["model"]),
            task=str(record["task"]),
            split=json.loads(str(record["parallelization"])),
            precision=str(record["weight_precision"]),
            output_tokens=float(record["avg_output_len"]),
        )
        for record in pd.read_csv(path).to_dict("records")
    ]


def _from_json(path: Path) -> list[Row]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lengths = data.get("output_length_distribution")
    held = _held(lengths) if lengths else None
    return [
        _row(
            record,
            model=str(record.get("model_id") or data["model_id"]),
            task=str(data["task"]),
            split=record.get("parallelization") or {},
            precision=str(data.get("weight_precision", "")),
            output_tokens=record["energy_per_request_joules"] / record["energy_per_token_joules"],
            held=held,
        )
        for record in data["configurations"]
    ]


def _row(
    record: Mapping[str, Any], *, model: str, task: str, split: Mapping[str, Any], precision: str,
    output_tokens: float, held: float | None = None,
) -> Row:  # fmt: skip
    rate = float(record.get("output_tokens_per_s") or record["output_throughput_tokens_per_sec"])
    watts = record.get("avg_power_w_all_gpus") or record["energy_per_token_joules"] * rate
    gpus = int(record["num_gpus"])
    return Row(
        model=model,
        task=task,
        gpu=str(record.get("gpu") or record["gpu_model"]),
        num_gpus=gpus,
        tensor_parallel=int(split.get("tensor_parallel") or gpus),
        precision=precision,
        batch=float(record["avg_batch_size"]),
        itl_s=1e-3 * float(record["median_itl_ms"]),
        power_w=float(watts),
        tokens_per_s=rate,
        output_tokens=output_tokens,
        held_output_tokens=OUTPUT_HELD * output_tokens if held is None else held,
    )


def _held(lengths: Mapping[str, Any]) -> float | None:
    """E[L²] / 2E[L]: what a request that is seen at random has written, outputs growing evenly."""
    edges, counts = [float(b) for b in lengths["bins"]], [float(c) for c in lengths["counts"]]
    if len(edges) == len(counts) + 1:
        middles = [0.5 * (a + b) for a, b in pairwise(edges)]
    elif len(edges) == len(counts):
        middles = edges
    else:
        raise ValueError(f"{len(edges)} bins of {len(counts)} counts")
    first = sum(c * m for c, m in zip(counts, middles, strict=True))
    second = sum(c * m * m for c, m in zip(counts, middles, strict=True))
    return second / (2.0 * first) if first > 0 else None
