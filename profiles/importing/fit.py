"""Derive what the kernel tables leave out.

    python -m voltana.profiles.importing.fit --data DIR --out DIR

DIR holds `ml_energy_v3`, `rtx_pro_6000` and `aiconfigurator_sglang0.5.14`; only coefficients are
written, into the TOML files of `profiles/importing/data`.

- Host time: gaps between tokens of Qwen3-8B and Gemma-3-27B (vLLM) less the sum of their kernels,
  as a time a layer and one a request. Gemma-3-12B is held out.
- Power of H100 and B200: the same rows and Gemma-3-12B's. Above idle power, which is known from
  elsewhere, on weight bytes, cache bytes and arithmetic a second. A base that is fitted too comes
  out 50 to 60 W above idle, and predicts a model that is left out worse.
- RTX PRO 6000: mean clock and power under power caps, two AWQ models, one or 32 streams.
- A100's clock shape: that of the shipped A100 profiles, relative to the top clock.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tomli_w
from scipy.optimize import nnls

from voltana.profiles.build.clocks import PREFILL_SHARE, SHARE_ABOVE, TOP_MHZ
from voltana.profiles.build.kernels import Attention, Gemm, read_csv
from voltana.profiles.common.files import write_text
from voltana.profiles.evidence import PROMPT_TOKENS, Row, read_rows
from voltana.profiles.importing.decoder import BYTES, Decoder
from voltana.profiles.importing.systems import load_system
from voltana.profiles.importing.tables import open_tables
from voltana.profiles.places import DATA as PROFILES

FloatArray = npt.NDArray[np.float64]
MODELS: Final = {
    "Qwen/Qwen3-8B": Decoder(
        name="Qwen/Qwen3-8B", layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8,
        head_dim=128, vocabulary=151936, max_context_tokens=40960,
    ),
    "google/gemma-3-12b-it": Decoder(
        name="google/gemma-3-12b-it", layers=48, hidden=3840, intermediate=15360, heads=16,
        kv_heads=8, head_dim=256, vocabulary=262208, max_context_tokens=131072,
    ),
    "google/gemma-3-27b-it": Decoder(
        name="google/gemma-3-27b-it", layers=62, hidden=5376, intermediate=21504, heads=32,
        kv_heads=16, head_dim=128, vocabulary=262208, max_context_tokens=131072,
    ),
}  # fmt: skip
"""Their config.json; Gemma's sliding windows of 1,024 tokens hold the chat requests whole."""
CARDS: Final = {"h100": ("H100", "h100_sxm"), "b200": ("B200", "b200_sxm")}
HOST_UNCERTAINTY: Final = {
    "h100": (0.1, "about 10 % at the default clock and batches of 8 to 256"),
    "b200": (0.15, "about 15 %, more where a slow host holds the GPU back: experimental"),
}
"""Standard deviation, and in words."""
POWER_UNCERTAINTY: Final = {
    "h100": (0.1, "about 10 %; a model left out of the fit is off by 2 to 7 % on average"),
    "b200": (0.15, "about 10 to 15 %; a model left out of the fit is off by 8 to 10 % on average"),
}
"""Standard deviation, and in words. See `voltana.profiles.importing.held_out`."""
LARGEST_BATCH: Final = 260.0
CAP_SWEEP: Final = (
    "Light-Heart-Labs/MMBT-Messy-Model-Bench-Tests @ ec660c1 (RTX PRO 6000 Workstation, vLLM, "
    "AWQ-INT4, power caps, one run a cell)"
)
EVIDENCE: Final = "ml-energy/leaderboard @ 0cd52da (vLLM, dense bf16, one GPU, batches 8 to 256)"
TWO_OVER_ONE: Final = ("google/gemma-3-27b-it", 16, 8)
"""The tables have no 32 heads over 16: twice 16 over 8, as on two GPUs."""
IDLE: Final[dict[str, tuple[float, float, dict[str, float], str, str]]] = {
    "h100": (
        120.0, 0.2, {"0.5": 80.0, "0.7": 90.0},
        "at most 126 W with a context open (H200), 90.6 W locked at 1410 MHz (H100), bare 61 W",
        "25 W",
    ),
    "b200": (
        237.0, 0.17, {"0.5": 170.0, "0.7": 185.0},
        "230 to 245 W with a context open; its fall with the clock is taken over from the H100",
        "40 W; half of it at low clocks has no reading",
    ),
    "rtx-pro-6000": (
        85.0, 0.3, {"0.5": 65.0, "0.7": 70.0},
        "no reading of this card: an RTX 5090 draws 80 W at its lowest SM clock under load",
        "25 W",
    ),
}  # fmt: skip
"""Top, relative error of it, by relative clock, source, uncertainty; none was read under load of
this kind."""
RTX_TOP_MHZ: Final = 2430.0
RTX_MODELS: Final = {
    "Qwen3.6-27B-AWQ-INT4": {"weight_gb": 14.9, "experts_gb": 0.0, "active_b": 27.0},
    "Qwen3-Coder-Next-AWQ": {"weight_gb": 1.7, "experts_gb": 43.0, "active_b": 3.0},
}
"""Bytes at 0.55 a weight: of the dense part or the active one, and of all experts (10 of 512)."""
RTX_GRID: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def usable(rows: Sequence[Row], gpu: str) -> list[Row]:
    """Rows of one card that its host does not hold back, text only, up to a batch of 256."""
    return [
        r for r in rows
        if r.gpu == gpu and r.num_gpus == 1 and r.batch <= LARGEST_BATCH
        and r.task in PROMPT_TOKENS and not (gpu == "B200" and r.task == "gpqa")
    ]  # fmt: skip


def host_design(
    rows: Sequence[Row], data: Path | None, system: str
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Layers and requests, gap less kernels, and gap (s) of each row; Gemma-3-12B has no tables.

    Args:
        rows: Measured iterations.
        data: Folder of the kernel tables; None for the installed ones.
        system: Name of the card there.
    """
    tables = open_tables(load_system(system), "sglang", "0.5.14", data)
    gemm = Gemm(tables.read("gemm"))
    attention = tables.read("decode_attention")
    design, rest, gaps = [], [], []
    for row in (r for r in rows if r.model != "google/gemma-3-12b-it"):
        model = MODELS[row.model]
        name, heads, kv_heads = TWO_OVER_ONE
        times = 2 if row.model == name else 1
        shape = (heads, kv_heads) if times == 2 else (model.heads, model.kv_heads)
        layer = times * Attention(attention, "decode", *shape, model.head_dim).time_s(
            row.batch, row.context_tokens(PROMPT_TOKENS[row.task])
        ) + sum(gemm.time_s(row.batch, n, k) for n, k in model.gemms)
        kernels_s = model.layers * layer + gemm.time_s(row.batch, model.vocabulary, model.hidden)
        design.append((model.layers, row.batch))
        rest.append(row.itl_s - kernels_s)
        gaps.append(row.itl_s)
    return np.array(design, dtype=float), np.array(rest), np.array(gaps)


def power_design(rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
    """TB/s of weights and of cache, TFLOP/s, shape (n, 3); and the W of each row."""
    design, watts = [], []
    for row in rows:
        model, prompt = MODELS[row.model], PROMPT_TOKENS[row.task]
        tera = 1e-12 / row.step_s
        cache = row.batch * row.context_tokens(prompt) * model.kv_bytes_per_token
        prefilled = row.batch * (1.0 + prompt / row.output_tokens)
        weights = BYTES * model.weights_read(row.batch)
        design.append((weights * tera, cache * tera, model.flops(prefilled) * tera))
        watts.append(row.power_w)
    return np.array(design), np.array(watts)


def fit_host(rows: Sequence[Row], data: Path | None, system: str) -> tuple[float, float, float]:
    """The host's share of an iteration: what the kernels leave of the measured gaps.

    Args:
        rows: Measured serving of one card.
        data: Folder of kernel tables; None: those of the installed wheel.
        system: The card, as the kernel tables call it.

    Returns:
        Time a layer and time a request in s, and the mean relative error of the gaps with them.
    """
    found, error = relative_fit(*host_design(rows, data, system))
    return float(found[0]), float(found[1]), error


def fit_power(rows: Sequence[Row], idle_w: float) -> tuple[FloatArray, float]:
    """W per TB/s of weights and of cache and per TFLOP/s, above idle; and the mean error."""
    design, watts = power_design(rows)
    return relative_fit(design, watts - idle_w, watts)


def fit_rtx(data: Path) -> tuple[FloatArray, float, dict[float, float], dict[int, float]]:
    """Power at the top clock with its error, phi by relative clock, clock-bound share by batch."""
    sweep = read_csv(data / "rtx_pro_6000" / "vllm_powercap_sweep.csv")
    design, watts, shapes, shares = [], [], [], {}
    for (name, streams), part in sweep.groupby(["model", "concurrency"]):
        part = part.sort_values("sm_clock_mhz_after_60s")
        clocks = part["sm_clock_mhz_after_60s"].to_numpy(dtype=float)
        drawn = part["power_w_after_60s"].to_numpy(dtype=float)
        rate = part["output_tok_s"].to_numpy(dtype=float)
        top_w = float(np.interp(RTX_TOP_MHZ, clocks, drawn))
        tokens_per_s = float(np.interp(RTX_TOP_MHZ, clocks, rate))
        model, batch = RTX_MODELS[str(name)], int(str(streams))
        touched = 1.0 - (1.0 - 10.0 / 512.0) ** batch if batch > 1 else 0.0
        read_gb = max(model["weight_gb"], touched * model["experts_gb"])
        design.append((1.0, 1e-3 * read_gb * tokens_per_s / batch,
                       2e-3 * model["active_b"] * tokens_per_s))  # fmt: skip
        watts.append(top_w)
        idle_w = IDLE["rtx-pro-6000"][0]
        shapes.append([(float(np.interp(r * RTX_TOP_MHZ, clocks, drawn)) - idle_w)
                       / (top_w - idle_w) if r * RTX_TOP_MHZ >= clocks[0] else np.nan
                       for r in RTX_GRID])  # fmt: skip
        if "Coder" not in str(name):
            slope, constant = np.polyfit(RTX_TOP_MHZ / clocks, tokens_per_s / rate, 1)
            shares[batch] = float(slope / (slope + constant))
    found, error = relative_fit(np.array(design), np.array(watts), np.array(watts))
    phi = np.maximum.accumulate(np.nanmedian(np.array(shapes), axis=0))
    return found, error, dict(zip(RTX_GRID, map(float, phi), strict=True)), shares


def a100_shape() -> dict[str, Any]:
    """The clock shape of the shipped A100 profiles, relative to 1410 MHz."""
    path = PROFILES / "a100-80g-sxm" / "coefficients.toml"
    known = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        "status": "modelled",
        "source": "shape over clocks of the A100 profiles, relative to the top clock "
        "(qweewqq/EnergyLLM @ 3fffed3: A100-40GB, vLLM 0.11, 705 to 1410 MHz), taken over to "
        "another card",
        "uncertainty": "another card's: 0.15 of phi; time 5 % above 0.7 of the top clock, 15 % at "
        "half of it and large batches",
        "time_error": 0.25,  # 15 % of the time at half the top clock, of which half is added
        "power_error": 0.4,  # 0.15 of phi = 0.48 at half the top clock: 2^0.4 = 1.3
        "sag": known["sag"],
        "phi": {f"{int(f) / TOP_MHZ:.4f}": p for f, p in known["phi"].items()},
        "decode_share": known["decode_share"],
        "prefill_share": {str(t): s for t, s in PREFILL_SHARE.items()},
    }


def relative_fit(
    design: FloatArray, wanted: FloatArray, whole: FloatArray
) -> tuple[FloatArray, float]:
    """Non-negative least squares of relative errors.

    Args:
        design: Shape (n, k), a column a coefficient.
        wanted: Shape (n,), what the columns are to add up to.
        whole: Shape (n,), what an error is relative to.

    Returns:
        Coefficients, shape (k,), and the mean of the absolute relative errors.
    """
    found, _ = nnls(design / whole[:, None], wanted / whole)
    return found, float(np.abs((design @ found - wanted) / whole).mean())


def _power_table(
    name: str, found: FloatArray, status: str, source: str, sure: tuple[float, str]
) -> dict[str, Any]:
    top_w, idle_error, lower, idle_source, idle_sure = IDLE[name]
    keys = ("base_w", "w_per_weight_tb_per_s", "w_per_cache_tb_per_s", "w_per_tflop_per_s")
    return {
        "systems": [CARDS[name][1]] if name in CARDS else ["rtx_pro_6000_server"],
        "status": status, "source": source, "power_error": sure[0], "uncertainty": sure[1],
        **{key: round(float(v), 2) for key, v in zip(keys, found, strict=True)},
        "idle_top_w": top_w, "idle_status": "modelled", "idle_source": idle_source,
        "idle_error": idle_error, "idle_uncertainty": idle_sure, "idle_w": lower,
    }  # fmt: skip


def derive(data: Path, tables: Path | None) -> dict[str, dict[str, Any]]:
    """All files by their path below `profiles/importing/data`."""
    rows = read_rows([data / "ml_energy_v3" / "qwen3_8b_gemma3_h100_b200.csv"])
    hosts: dict[str, Any] = {}
    files: dict[str, dict[str, Any]] = {}
    for name, (gpu, system) in CARDS.items():
        chosen = usable(rows, gpu)
        layer_s, request_s, error = fit_host(chosen, tables, system)
        hosts[name] = {
            "systems": [system],
            "per_layer_s": round(layer_s, 8),
            "per_request_s": round(request_s, 8),
            "time_error": HOST_UNCERTAINTY[name][0],
            "uncertainty": HOST_UNCERTAINTY[name][1],
            "source": f"fitted to the gaps between tokens of Qwen3-8B and Gemma-3-27B on {gpu}, "
            f"mean error {error:.1%}: {EVIDENCE}; not SGLang's own",
        }
        idle_w = IDLE[name][0]
        found, error = fit_power(chosen, idle_w)
        files[f"power/{name}.toml"] = _power_table(
            name, np.insert(found, 0, idle_w), "calibrated",
            f"bytes and arithmetic a second, above idle power, fitted to {len(chosen)} rows of "
            f"Qwen3-8B, Gemma-3-12B and -27B on {gpu}, mean error {error:.1%}: {EVIDENCE}, "
            "default clocks, prefill and decode mixed",
            POWER_UNCERTAINTY[name],
        )  # fmt: skip
    found, error, phi, shares = fit_rtx(data)
    files["power/rtx-pro-6000.toml"] = _power_table(
        "rtx-pro-6000", np.insert(found, 2, found[1]), "modelled",
        f"four cells at {RTX_TOP_MHZ:.0f} MHz, mean error {error:.1%}, bytes read by our reading: "
        f"{CAP_SWEEP}; bf16 and the Server Edition are taken to be alike", (0.25, "25 %"),
    )  # fmt: skip
    files["clocks/rtx-pro-6000.toml"] = {
        "status": "calibrated",
        "source": f"mean clock and power under caps, of power above an idle one that is assumed: "
        f"{CAP_SWEEP}; share of prefill and of batches above 32 modelled as of the A100",
        "uncertainty": "0.1 of phi (idle is assumed, a cap is no lock); time 10 %",
        "time_error": 0.25,
        "power_error": 0.25,  # 0.1 of phi = 0.57 at half the top clock
        "sag": 0.0,
        "phi": {f"{r:g}": round(p, 4) for r, p in phi.items()},
        "decode_share": {str(b): round(s, 4) for b, s in shares.items()}
        | {str(b): s for b, s in SHARE_ABOVE.items()},
        "prefill_share": {str(t): s for t, s in PREFILL_SHARE.items()},
    }  # fmt: skip
    files["clocks/a100.toml"] = a100_shape()
    files["host.toml"] = hosts
    return files


def main(say: Callable[[str], object] = print) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", type=Path, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tables = options.tables or options.data / "aiconfigurator_sglang0.5.14"
    for name, content in derive(options.data, tables).items():
        text = "# Written by voltana.profiles.importing.fit\n" + tomli_w.dumps(content)
        write_text(text, options.out / name)
        say(f"{name}:\n{text}")


if __name__ == "__main__":
    main()
