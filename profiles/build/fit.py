"""Coefficients derived from the published measurements; only these are shipped, not the data.

Sources: EnergyLLM (github.com/qweewqq/EnergyLLM @ 3fffed3, A100-40GB, Llama-3.1-8B) for time and
power against the clock; Splitwise (github.com/Mutinifni/splitwise-sim @ 8f99e7d, MIT) for prompt
power; Vidur (github.com/microsoft/vidur @ 7d47513, MIT) for small operations.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from profiles.build.assumptions import BYTES_PER_ELEMENT, Assumptions, ModelShape
from profiles.build.kernels import FloatArray, Kernels, read_csv
from profiles.build.model import Coefficients, DirectModel

ENERGYLLM = "energyllm_a100_llama31_8b"
DIGITS = 5
"""Significant digits kept: far inside the uncertainty, so the file is the same everywhere."""
SMALL_OPS = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act")
LARGE_TOKENS = 1024
"""From here on small operations are proportional to tokens in the Vidur table."""
SPLITWISE_WEIGHTS = {"llama2-70b": 69.0e9, "bloom-176b": 176.2e9}
"""Published parameter counts of the two models in the Splitwise table."""


def fit_coefficients(data: Path, kernels: Kernels, given: Assumptions) -> Coefficients:
    """Fit everything, in the order of dependence: small operations, clock law, power."""
    constant, slope = _fit_small_ops(data)
    clocks, power_ratio, idle_below = _clock_tables(data)
    start = Coefficients(
        base_share=0.0, saturation=1.0, bandwidth_sag=0.0, compute_w=_fit_compute_power(data, given),
        small_ops_s_per_token=slope, small_ops_constant_s=constant,
        clocks_mhz=clocks, phi=[1.0] * len(clocks), idle_below_top_w=idle_below,
    )  # fmt: skip
    timed = _fit_clock_law(data, kernels, given, start)
    shape = given.models["llama-3.1-8b"]
    model = DirectModel(kernels, given, timed, shape)
    batch = given.power.moderate_batch
    step = model.decode(batch, batch * given.power.moderate_context_tokens)
    active, top = model.active_top_w(step), given.power.idle_top_w
    phi = [
        (ratio * (top + active) - (top - below)) / active
        for ratio, below in zip(power_ratio, idle_below, strict=True)
    ]
    return _rounded(dataclasses.replace(timed, phi=phi))


def measured_times(data: Path) -> pd.DataFrame:
    """EnergyLLM durations without the runs that stopped early."""
    grid = read_csv(data / ENERGYLLM / "llama31_8b_grid_recovered.csv")
    return grid[grid["early_stop_outlier"] == 0]


def prompt_power_points(data: Path, given: Assumptions) -> pd.DataFrame:
    """Splitwise single-prompt rows below the power limit: utilisation, TB/s and peak W."""
    table = read_csv(data / "splitwise_sim" / "a100_80gb_medians.csv")
    peak = table["peak_power_W_per_gpu_at_TDP400"]
    chosen = table[(table["batch_size"] == 1) & (peak < given.power.measured_cap_w)].copy()
    weights = chosen["model"].map(SPLITWISE_WEIGHTS) / chosen["tensor_parallel"]
    time_s = chosen["prompt_time"] * 1e-3
    chosen["used"] = 2 * weights * chosen["prompt_size"] / time_s / given.card.peak_tflops / 1e12
    chosen["tb_per_s"] = BYTES_PER_ELEMENT * weights / time_s / 1e12
    # From 1,024 prompt tokens the peak is one 100 ms sample among several: not one steady load.
    return chosen[chosen["prompt_size"] < LARGE_TOKENS]


def _fit_small_ops(data: Path) -> tuple[float, float]:
    table = read_csv(data / "vidur_a100" / "Meta-Llama-3-8B_mlp.csv")
    large = table[(table["num_tensor_parallel_workers"] == 1) & (table["num_tokens"] >= LARGE_TOKENS)]
    total = 1e-3 * large[[f"time_stats.{op}.median" for op in SMALL_OPS]].sum(axis=1)
    slope, constant = np.polyfit(large["num_tokens"], total, 1)
    return float(constant), float(slope)


def _clock_tables(data: Path) -> tuple[list[int], list[float], list[float]]:
    """Clocks, whole-card power ratio (smooth, 1 at the top) and idle power below the top's."""
    ratio = read_csv(data / ENERGYLLM / "relative_to_1410.csv").sort_values("gpu_frequency_mhz")
    idle = read_csv(data / ENERGYLLM / "idle_power_vs_locked_clock.csv")
    idle = idle.sort_values("gpu_frequency_mhz")
    watts = idle["idle_power_W_min_of_short_cells"].to_numpy(dtype=np.float64)
    clocks = [int(c) for c in ratio["gpu_frequency_mhz"]]
    x = 1 - np.array(clocks) / clocks[-1]
    measured = ratio["P_rel_median"].to_numpy(dtype=np.float64)
    basis = np.column_stack([x, x**2, x**3])  # through 1 at the top clock
    smooth = 1 + basis @ np.linalg.lstsq(basis, measured - 1, rcond=None)[0]
    below = np.interp(clocks, idle["gpu_frequency_mhz"], watts[-1] - watts)
    return clocks, [float(r) for r in smooth], [float(b) for b in below]


def _fit_clock_law(
    data: Path, kernels: Kernels, given: Assumptions, start: Coefficients
) -> Coefficients:
    """Share of memory-bound kernels, saturation and sag that explain the EnergyLLM durations."""
    runs = measured_times(data)
    batches = runs["batch_size"].to_numpy()
    level_of = {b: batches == b for b in np.unique(batches)}
    shape = given.models["llama-3.1-8b"]

    def residuals(x: FloatArray) -> FloatArray:
        trial = _with_law(start, x)
        model = DirectModel(kernels, given, trial, shape)
        error = np.log(runs["total_latency_sec"].to_numpy()) - _log_times(model, runs, given)
        for chosen in level_of.values():  # run lengths differ: only the clock matters here
            error[chosen] -= np.median(error[chosen])
        return np.asarray(error)

    # Saturation between 0.6 and 1: large GEMMs reach 0.75-0.85 of peak in the kernel tables.
    bounds = ([0.0, 0.6, 0.0], [0.5, 1.0, 0.5])
    found = least_squares(residuals, [0.15, 0.8, 0.1], bounds=bounds, loss="soft_l1", f_scale=0.03)
    return _with_law(start, found.x)


def _with_law(start: Coefficients, x: FloatArray) -> Coefficients:
    share, saturation, sag = (float(v) for v in x)
    return dataclasses.replace(
        start, base_share=share, saturation=saturation, bandwidth_sag=sag
    )  # fmt: skip


def _log_times(model: DirectModel, runs: pd.DataFrame, given: Assumptions) -> FloatArray:
    context = given.power.moderate_context_tokens
    steps = {int(b): model.decode(int(b), int(b) * context) for b in runs["batch_size"].unique()}
    pairs = zip(runs["batch_size"], runs["gpu_frequency_mhz"], strict=True)
    return np.log([model.time_s(steps[int(b)], float(f)) for b, f in pairs])


def _fit_compute_power(data: Path, given: Assumptions) -> float:
    """Least squares of prompt peak power above the memory relation, on utilisation."""
    points = prompt_power_points(data, given)
    used = points["used"].to_numpy(dtype=np.float64)
    memory = given.power.decode_base_w + given.power.decode_w_per_tb_s * points["tb_per_s"]
    above = points["peak_power_W_per_gpu_at_TDP400"].to_numpy(dtype=np.float64) - memory.to_numpy()
    return float((used @ above) / (used @ used))


def _rounded(c: Coefficients) -> Coefficients:
    def kept(value: object) -> object:
        if isinstance(value, list):
            return [kept(v) for v in value]
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

    fields = {f.name: kept(getattr(c, f.name)) for f in dataclasses.fields(c)}
    return Coefficients(**fields)  # type: ignore[arg-type]


def weights_bytes(shape: ModelShape) -> int:
    """Weights of one GPU with the embedding, for the check of memory against KV capacity."""
    embedding = shape.vocabulary * shape.hidden // shape.tensor_parallel
    return BYTES_PER_ELEMENT * (shape.layer_weights() + shape.head_weights() + embedding)
