"""Build the calibrated A100-80G profiles.

    python -m voltana.profiles.build.a100 --data DIR --out DIR

Iteration time at 1410 MHz is a sum of kernels; clocks move it by T = A + B·1410/f with a small
loss of bandwidth at low clocks; power is idle(f) + active·phi(f), capped at the board limit,
where the clock sags until the cap is kept.
DIR holds the public measurements named in each module; only derived numbers are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd
import tomli_w

from voltana.profiles.build.clocks import IDLE_TOP_W, TOP_MHZ, ClockModel, fit_clock_model
from voltana.profiles.build.errors import ERRORS
from voltana.profiles.build.models import GRAPH_BATCHES, SHAPES, Cost, Shape
from voltana.profiles.build.spread import SPREAD, spread_provenance
from voltana.profiles.catalog import Profile, write_profile
from voltana.profiles.common.files import write_text
from voltana.profiles.ecopred import fit_report
from voltana.profiles.schema import (
    ClocksMeta,
    EngineMeta,
    GpuMeta,
    ModelMeta,
    ProfileMeta,
    Provenance,
)
from voltana.profiles.tables import AWAKE

GRID_MHZ: Final = (705, 810, 900, 1005, 1095, 1200, 1305, 1350, 1380, 1410)
SUPPORTED_MHZ: Final = tuple(range(705, 1411, 15))
CAP_W: Final = 400.0
DECODE_BASE_W: Final = 126.0
DECODE_W_PER_TB_PER_S: Final = 137.0
"""Decode power at the top clock = base + slope × HBM read rate: fit of three Splitwise rows; it
predicts a fourth (BLOOM-176B TP8) as 250 W against 254 W measured."""
PREFILL_PEAK_RATIO: Final = 1.05
"""Uncapped power of a 2,048-token prefill over the limit: Splitwise peaks are 1.00-1.09, under
the limit, so that they say that it is reached and not by how much."""
MODERATE_BATCH: Final = 16
MODERATE_CONTEXT_TOKENS: Final = 512
"""Decode load at which the sweep's ratio of whole-card power is made to hold (its middle)."""
MAX_PREFILL_TOKENS: Final = 16_384
MAX_RUNNING: Final = 1_024
PREFILL_STEPS: Final = (16, 32, 48, 64, 80, 96, 112, 128, 256, *range(512, 4353, 256))
"""Sizes at which the GEMM table may step: it holds each and the next."""
PREFILL_TOKENS: Final = tuple(sorted({
    1, 8, *PREFILL_STEPS, *(m + 1 for m in PREFILL_STEPS), 160, 161, 192, 193, 224, 384,
    *range(5120, 8193, 1024), 10240, 12288, 14336, 16384,
}))  # fmt: skip
PREFILL_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS: Final = (64, 128, 256, 512, 1024, 2048, 8192)
"""Tokens per request at which decode attention bends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What a calibration to an end-to-end result may change; the defaults are the sources' own."""

    attention_multiplier: float = 1.0
    """Factor on both attention kernels, for another attention backend."""
    prefill_host_s: float = 0.005
    """Scheduling between prefill batches, overlap off as the reference runs it. Modelled."""
    decode_host_s: float = 0.0
    """Between decode steps; hidden behind the GPU by the overlap scheduler."""
    prefill_peak_ratio: float = PREFILL_PEAK_RATIO
    """Uncapped power of a 2,048-token prefill over the card's limit."""
    awake_top_w: float = 0.0
    """Power of a GPU in service above all else, at the top clock; lower clocks by phi."""
    prompt_host_s: float = 0.0
    """Host time of each prompt of a prefill batch, nothing hidden."""
    request_host_s: float = 0.0
    """Host time of each request of a decode step, hidden as long as the GPU takes longer."""
    rank_sync_s: float = 0.0
    """What an iteration of more than one GPU waits for its ranks."""

    @property
    def text(self) -> str:
        """What differs from the sources, for a profile's provenance."""
        parts = [
            f"attention x {self.attention_multiplier:g}",
            f"prefill host {1e3 * self.prefill_host_s:g} ms",
            f"decode host {1e3 * self.decode_host_s:g} ms",
        ]
        further = {
            "prompt host": self.prompt_host_s, "hidden host a request": self.request_host_s,
            "rank synchronisation": self.rank_sync_s,
        }  # fmt: skip
        parts += [f"{name} {1e3 * time_s:g} ms" for name, time_s in further.items() if time_s]
        return ", ".join(parts)


AS_SOURCES: Final = Tuning()


class Builder:
    """Tables of one model.

    Args:
        data: Folder of the sources.
        shape: The model.
        clocks: How time and power move with the clock.
        tuning: What differs from the sources.
    """

    def __init__(
        self, data: Path, shape: Shape, clocks: ClockModel, tuning: Tuning = AS_SOURCES
    ) -> None:
        self._shape = shape
        self._clocks = clocks
        self._tuning = tuning
        self._cost = Cost(data, shape, attention_multiplier=tuning.attention_multiplier)
        self._w_per_flops = arithmetic_power(data, tuning.prefill_peak_ratio)

    def decode(self) -> pd.DataFrame:
        """Rows of decode.csv."""
        points = [(b, t) for b in decode_batches() for t in self._decode_tokens(b)]
        return _frame([r for b, t in points for r in self.decode_at(b, t, GRID_MHZ)])

    def decode_at(
        self, batch: int, tokens: float, clocks_mhz: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Rows of one decode point, from the model itself.

        Args:
            batch: Requests.
            tokens: Context tokens of the whole batch.
            clocks_mhz: SM clocks, one row each.
        """
        top_s = self._cost.decode_s(batch, tokens)
        loaded_w = decode_top_w(self._cost, batch, tokens, self._w_per_flops)
        share = self._clocks.decode_share_at(batch)
        active_w = loaded_w - IDLE_TOP_W
        host_s = self._tuning.decode_host_s + self._sync_s
        hidden_s = self._tuning.request_host_s * batch
        return self._at_clocks(batch, tokens, top_s, host_s, hidden_s, share, active_w, clocks_mhz)

    def prefill(self) -> pd.DataFrame:
        """Rows of prefill.csv."""
        points = [(b, t) for b in PREFILL_BATCHES for t in PREFILL_TOKENS]
        return _frame([r for b, t in points for r in self.prefill_at(b, t, GRID_MHZ)])

    def prefill_at(
        self, batch: int, tokens: float, clocks_mhz: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Rows of one prefill point, from the model itself.

        Args:
            batch: Prompts of equal length.
            tokens: New tokens of the whole batch.
            clocks_mhz: SM clocks, one row each.
        """
        top_s = self._cost.prefill_s(batch, tokens)
        rate = self._cost.decode_bytes(tokens) / top_s * 1e-12
        arithmetic_w = self._w_per_flops * self._cost.prefill_flops(batch, tokens) / top_s
        active_w = DECODE_BASE_W - IDLE_TOP_W + DECODE_W_PER_TB_PER_S * rate + arithmetic_w
        share = self._clocks.prefill_share_at(tokens)
        host_s = self._tuning.prefill_host_s + self._tuning.prompt_host_s * batch + self._sync_s
        return self._at_clocks(batch, tokens, top_s, host_s, 0.0, share, active_w, clocks_mhz)

    def idle(self) -> pd.DataFrame:
        """Rows of idle.csv; an unlocked card that holds a context stays at its top clock."""
        gpus = self._shape.tensor_parallel
        watts = {0: IDLE_TOP_W} | {f: self._clocks.power_w(0.0, f) for f in GRID_MHZ}
        rows = [(f, 0, gpus * w) for f, w in watts.items()]
        frame = pd.DataFrame(rows, columns=["frequency_mhz", "trial", "power_w"])
        awake_w = gpus * self._tuning.awake_top_w
        if not awake_w:
            return frame
        shape = [self._clocks.phi_at(clock or TOP_MHZ) for clock in watts]
        return frame.assign(**{AWAKE: [awake_w * phi for phi in shape]})

    @property
    def _sync_s(self) -> float:
        return self._tuning.rank_sync_s if self._shape.tensor_parallel > 1 else 0.0

    def _at_clocks(
        self, batch: int, tokens: float, top_s: float, exposed_s: float, hidden_s: float,
        share: float, active_w: float, clocks_mhz: Sequence[float],
    ) -> list[tuple[float, ...]]:  # fmt: skip
        rows: list[tuple[float, ...]] = []
        for clock in clocks_mhz:
            real = self._clocks.clock_under_cap(active_w, clock, CAP_W)
            time_s = top_s * self._clocks.time_factor(share, real)
            host_s = exposed_s + max(hidden_s - time_s, 0.0)
            power = min(self._clocks.power_w(active_w, real), CAP_W)
            idle = self._clocks.power_w(0.0, clock)
            mean_w = (power * time_s + idle * host_s) / (time_s + host_s)
            watts = self._shape.tensor_parallel * mean_w
            rows.append((clock, batch, tokens, 0, time_s + host_s, watts))
        return rows

    def _decode_tokens(self, batch: int) -> list[int]:
        capacity = self._shape.kv_capacity_tokens
        inner = [batch * c for c in CONTEXTS if 1 < batch * c < capacity]
        return [1, *inner, capacity]


def arithmetic_power(data: Path, peak_ratio: float = PREFILL_PEAK_RATIO) -> float:
    """W per FLOP/s such that a 2,048-token prefill of the 8B model draws its peak, uncapped."""
    cost = Cost(data, SHAPES["llama-3.1-8b"], attention_multiplier=1.0)
    top_s = cost.prefill_s(1, 2048)
    rest = DECODE_BASE_W + DECODE_W_PER_TB_PER_S * cost.decode_bytes(2048) / top_s * 1e-12
    return (peak_ratio * CAP_W - rest) / (cost.prefill_flops(1, 2048) / top_s)


def decode_top_w(cost: Cost, batch: int, tokens: float, w_per_flops: float) -> float:
    """Power of one decoding GPU at the top clock in W, as if there were no power limit.

    Args:
        cost: Times, bytes and arithmetic of the model's iterations.
        batch: Requests.
        tokens: Context tokens of the whole batch.
        w_per_flops: Power of arithmetic, W per FLOP/s.
    """
    top_s = cost.decode_s(batch, tokens)
    rate = cost.decode_bytes(tokens) / top_s * 1e-12
    return DECODE_BASE_W + DECODE_W_PER_TB_PER_S * rate + w_per_flops * cost.flops(batch) / top_s


def fit_clocks(data: Path, peak_ratio: float = PREFILL_PEAK_RATIO) -> ClockModel:
    """The clock model, anchored at a moderate decode load of the 8B model."""
    cost = Cost(data, SHAPES["llama-3.1-8b"], attention_multiplier=1.0)
    tokens = MODERATE_BATCH * MODERATE_CONTEXT_TOKENS
    loaded_w = decode_top_w(cost, MODERATE_BATCH, tokens, arithmetic_power(data, peak_ratio))
    return fit_clock_model(data, loaded_w)


def decode_batches() -> list[int]:
    """Every graph bucket and the batch just past it."""
    edges = [b for b in GRAPH_BATCHES if b <= MAX_RUNNING]
    return sorted({*edges, *(b + 1 for b in edges if b < MAX_RUNNING)})


def make_meta(data: Path, shape: Shape, tuning: Tuning = AS_SOURCES, why: str = "") -> ProfileMeta:
    """Metadata with the provenance of every quantity.

    Args:
        data: Folder of the sources.
        shape: The model.
        tuning: What a calibration changed.
        why: What it was tuned to; empty without a calibration.
    """
    tuned = f"; {why}: {tuning.text}" if why else ""
    kernels = "kernel times of ai-dynamo/aiconfigurator @ 095f58a (A100-SXM4-80GB, SGLang 0.5.10)"
    sweep = "clock sweep of qweewqq/EnergyLLM @ 3fffed3 (A100-40GB, vLLM 0.11)"
    splitwise = "Splitwise power rows (Mutinifni/splitwise-sim @ 8f99e7d)"
    reference = "VoltanaLLM v0.1 profiling script"
    return ProfileMeta(
        gpu=GpuMeta(name="NVIDIA A100-SXM4-80GB", power_limit_w=CAP_W, memory_gib=80.0),
        model=ModelMeta(
            name=shape.name,
            tensor_parallel=shape.tensor_parallel,
            kv_bytes_per_token=shape.kv_bytes_per_token,
            max_context_tokens=shape.max_context_tokens,
        ),
        engine=EngineMeta(
            name="sglang",
            version="0.5.10 kernels, 0.4.7 batching",
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            max_running_requests=MAX_RUNNING,
            kv_capacity_tokens=shape.kv_capacity_tokens,
        ),
        clocks=ClocksMeta(supported_mhz=SUPPORTED_MHZ, default_levels_mhz=(1005, 1410)),
        errors=ERRORS,
        spread=SPREAD,
        provenance={
            "clocks": _calibrated("A100 steps of 15 MHz; grid clocks are interpolated between", ""),
            "prefill_time": _calibrated(
                f"{kernels}; frequency-bound share modelled (0.95 above 512 tokens){tuned}",
                "about 15 % at 1410 MHz; clock dependence 10 %; 5 ms host time is modelled",
            ),
            "prefill_power": _calibrated(
                f"{splitwise}: 2,048 tokens at 1.05 of the limit uncapped{_peak_note(tuning)}; "
                f"{sweep}",
                "about 10 %",
            ),
            "decode_time": _calibrated(
                f"{kernels}; frequency-bound share from {sweep}, above batch 64 modelled{tuned}",
                "about 10 % at 1410 MHz and batch <= 256, 20 % above; clock dependence 15 % from "
                "batch 64 on and below 900 MHz, else 5 %; interpolation within 1.1 % of the model",
            ),
            "decode_power": _calibrated(
                f"126 W + 137 W per TB/s of HBM reads from {splitwise}; shape over clocks from "
                f"{sweep}; arithmetic share as in prefill",
                "about 10 %",
            ),
            "idle_power": _calibrated(
                f"63 W loaded and locked at 1410 MHz (public readings 62-65 W); fall from {sweep}; "
                "unlocked: a card with a context stays at its top clock",
                "10 W below 1410 MHz; another source reads 80 W for an unlocked context; "
                "awake power is not in it",
            ),
            "kv_capacity": _calibrated(f"{reference}, as measured by its authors", ""),
            "iteration_spread": spread_provenance(data),
            **_awake_provenance(tuning),
        },
    )


def _peak_note(tuning: Tuning) -> str:
    if tuning.prefill_peak_ratio == PREFILL_PEAK_RATIO:
        return ""
    return (
        f", raised to {tuning.prefill_peak_ratio:g}: the peak of 492 W of an A100-80GB under vLLM, "
        "which the limit had not cut yet (chuyishang/inference-energy @ e4743b3)"
    )


def _awake_provenance(tuning: Tuning) -> dict[str, Provenance]:
    if not tuning.awake_top_w:
        return {}
    source = (
        f"{tuning.awake_top_w:g} W a GPU at 1410 MHz: what one published panel's energy has above "
        "these tables (docs/paper.md); that it is there whatever the load, and falls with the "
        "clock as active power does, is modelled. For its size: a context alone adds 26 to 50 W "
        "to a bare card (arXiv 2605.23918)"
    )
    return {"awake_power": _calibrated(source, "10 W; how long a card stays awake is not known")}


def _calibrated(source: str, uncertainty: str) -> Provenance:
    return Provenance(status="calibrated", source=source, uncertainty=uncertainty)


def _frame(rows: list[tuple[float, ...]]) -> pd.DataFrame:
    columns = ["frequency_mhz", "batch_size", "tokens", "trial", "time_s", "power_w"]
    frame = pd.DataFrame(rows, columns=columns).sort_values(columns[:3], ignore_index=True)
    whole = dict.fromkeys(columns[:4], "int64")
    return frame.astype(whole).assign(
        time_s=frame["time_s"].map(lambda v: float(f"{v:.6g}")),
        power_w=frame["power_w"].map(lambda v: float(f"{v:.6g}")),
    )


def build_tuned(data: Path, directory: Path, model: str, tuning: Tuning, why: str) -> Profile:
    """Write one profile with tuned times.

    Args:
        data: Folder of the sources.
        directory: Profile directory.
        model: A name in `SHAPES`.
        tuning: What differs from the sources.
        why: What it was tuned to, for the provenance.
    """
    shape = SHAPES[model]
    builder = Builder(data, shape, fit_clocks(data, tuning.prefill_peak_ratio), tuning)
    meta = make_meta(data, shape, tuning, why)
    return write_profile(directory, meta, builder.prefill(), builder.decode(), builder.idle())


def build(data: Path, out: Path) -> None:
    """Write the three profiles and the derived coefficients; print the fit of the predictor."""
    clocks = fit_clocks(data)
    for name, shape in SHAPES.items():
        builder = Builder(data, shape, clocks)
        directory = out / "a100-80g-sxm" / name
        made = write_profile(
            directory, make_meta(data, shape), builder.prefill(), builder.decode(), builder.idle()
        )
        print(name, fit_report(made.fitted).to_string(index=False), sep="\n")  # noqa: T201
    tables = {"decode_share": clocks.decode_share, "phi": clocks.phi, "idle_w": clocks.idle_w}
    coefficients = {"sag": clocks.sag} | {
        key: {str(k): round(v, 5) for k, v in table.items()} for key, table in tables.items()
    }
    text = "# Written by voltana.profiles.build.a100: derived from the sources named in clocks.py\n"
    path = out / "a100-80g-sxm" / "coefficients.toml"
    write_text(text + tomli_w.dumps(coefficients), path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    build(options.data, options.out)


if __name__ == "__main__":
    main()
