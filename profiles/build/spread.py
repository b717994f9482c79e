"""What public measurements say of how much an iteration's time varies from one to the next.

`python -m voltana.profiles.build.spread --data DIR` prints it. No source gives the times of single
iterations of a server, so the spread of the calibrated profiles is modelled, between two readings:

- vidur_a100 (microsoft/vidur @ 7d47513): Llama-3-8B's kernels on an A100, standard deviation of
  some twenty repeats of each. Those of a layer are put together as if they moved as one (a clock
  that drifts) and as if each went its own way.
- splitwise_sim (Mutinifni/splitwise-sim @ 8f99e7d): five or more repeats of whole requests on
  A100-80GB servers. `prompt_time` is one prefill; `token_time` is a mean over a request's decode
  iterations, so its spread from request to request is the least that a single one can have.

Neither has the host's share: scheduling, Python's garbage collector, other tenants.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.build.kernels import read_csv
from voltana.profiles.schema import Provenance, SpreadMeta

SPREAD: Final = SpreadMeta(prefill=0.02, decode=0.02)
"""Spread of the calibrated profiles; modelled, see `Evidence`."""
_LARGEST_DECODE_BATCH: Final = 256
_KERNELS: Final = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
    "mlp_up_proj", "mlp_act", "mlp_down_proj", "add",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Standard deviations over means or medians."""

    decode_kernels_together: float
    """Median over sizes of up to 256 tokens, kernels of a layer moving as one."""
    decode_kernels_apart: float
    decode_requests: float
    """Median over points of the spread of a request's mean decode time."""
    decode_steps: float
    """Spread of one iteration if those of a request are independent: the largest possible."""
    prefill_kernels_together: float
    """As `decode_kernels_together`, over sizes of more than 256 tokens."""
    prefill_kernels_apart: float
    prefill_requests: tuple[float, float]
    """Median and third quartile over points of the spread of a prefill."""

    def text(self) -> str:
        """One line for a profile's provenance."""
        low, high = self.prefill_requests
        return (
            "kernels on an A100 repeat within "
            f"{self.decode_kernels_apart:.1%} (each its own way) to "
            f"{self.decode_kernels_together:.1%} (as one) up to 256 tokens and "
            f"{self.prefill_kernels_apart:.1%} to {self.prefill_kernels_together:.1%} above "
            f"(microsoft/vidur @ 7d47513); on Splitwise's A100 servers a prefill repeats within "
            f"{low:.1%} (median) to {high:.1%} (third quartile), a request's mean decode step "
            f"within {self.decode_requests:.1%}, so a single one within {self.decode_requests:.1%} "
            f"(all of a request alike) to {self.decode_steps:.1%} (independent)"
        )


def spread_evidence(data: Path) -> Evidence:
    """Compute the readings from the sources in the folder `data`."""
    layers = _layer_spreads(read_csv(data / "vidur_a100" / "Meta-Llama-3-8B_mlp.csv"))
    small = layers.index <= _LARGEST_DECODE_BATCH
    requests = read_csv(data / "splitwise_sim" / "perf_model.csv")
    requests = requests[requests["hardware"] == "a100-80gb"]
    point = ["model", "tensor_parallel", "prompt_size", "batch_size", "token_size"]
    groups = requests.groupby(point)
    prefill = groups["prompt_time"].std() / groups["prompt_time"].mean()
    decode = groups["token_time"].std() / groups["token_time"].mean()
    return Evidence(
        decode_kernels_together=float(layers["together"][small].median()),
        decode_kernels_apart=float(layers["apart"][small].median()),
        decode_requests=float(decode.median()),
        decode_steps=float((decode * np.sqrt(decode.index.get_level_values(-1))).median()),
        prefill_kernels_together=float(layers["together"][~small].median()),
        prefill_kernels_apart=float(layers["apart"][~small].median()),
        prefill_requests=(float(prefill.median()), float(prefill.quantile(0.75))),
    )


def spread_provenance(data: Path) -> Provenance:
    """The provenance of a calibrated profile's spread."""
    return Provenance(
        status="modelled",
        source=(
            "2 % in both phases, at every clock and batch: in the upper part of what sources "
            f"allow, as verdicts are about tails; {spread_evidence(data).text()}"
        ),
        uncertainty="0.5 to 5 %; what the host adds is not known",
    )


def _layer_spreads(table: pd.DataFrame) -> pd.DataFrame:
    """Relative spread of a layer's time by tokens, on one GPU."""
    table = table[table["num_tensor_parallel_workers"] == 1].set_index("num_tokens")
    time = sum(table[f"time_stats.{k}.median"] for k in _KERNELS)
    spreads = [table[f"time_stats.{k}.std"] for k in _KERNELS]
    apart = np.sqrt(sum(s * s for s in spreads))
    return pd.DataFrame({"together": sum(spreads) / time, "apart": apart / time})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    print(spread_evidence(parser.parse_args().data).text())  # noqa: T201
