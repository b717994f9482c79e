"""A folder of kernel tables as the wheel has them, its times made of closed forms."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd

DEVICE = "NVIDIA H100 80GB HBM3"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, WORDS = 4, 1024, 2048, 8, 4, 128, 4096
CONFIG = (
    f'{{"model_type": "qwen3", "num_hidden_layers": {LAYERS}, "hidden_size": {HIDDEN},'
    f'"intermediate_size": {INNER}, "num_attention_heads": {HEADS}, "head_dim": {DIM},'
    f'"num_key_value_heads": {KV_HEADS}, "vocab_size": {WORDS}, "max_position_embeddings": 8192'
)


def gemm_ms(m: float, n: float, k: float) -> float:
    """Linear in each of the three, so that interpolation is exact."""
    return 1e-3 + 1e-9 * n * k + 1e-10 * m * n * k


def attention_ms(batch: float, length: float) -> float:
    """Linear in both."""
    return 2e-3 + 1e-6 * batch * length


def reduce_ms(elements: float, gpus: int) -> float:
    """Linear in the message."""
    return 1e-3 * gpus + 1e-7 * elements


def experts_ms(tokens: float) -> float:
    """Linear in tokens."""
    return 0.05 + 1e-4 * tokens


def make_tables(root: Path, device: str = DEVICE, version: str = "0.5.14") -> Path:
    """Write them below `root`, with rows that must not be taken: other types, power."""
    home = root / "systems" / "data" / "h100_sxm"
    common = {"device": device, "kernel_source": "fa3", "power": 1e6}
    m_s, n_s = (1, 16, 512, 20_000), (64, 1024, 4096, 8192)
    gemm = [
        {**common, "gemm_dtype": t, "m": m, "n": n, "k": k, "latency": f * gemm_ms(m, n, k)}
        for (t, f), m, n, k in itertools.product(
            (("bfloat16", 1), ("fp8", 9)), m_s, n_s, (512, 1024, 4096)
        )
    ]
    batches, lengths = (1, 8, 64, 512), (1, 128, 4096, 65_536)
    heads = [(HEADS, KV_HEADS), (HEADS // 2, KV_HEADS // 2)]
    attention = [
        {
            **common, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": w,
            "num_heads": h, "num_key_value_heads": kv, "head_dim": DIM, "batch_size": b,
            "isl": x, "step": x, "latency": (1 + w) * attention_ms(b, x),
        }
        for (h, kv), w, b, x in itertools.product(heads, (0, 128), batches, lengths)
    ]  # fmt: skip
    reduce = [
        {
            **common, "allreduce_dtype": "bfloat16", "num_gpus": g, "message_size": s,
            "latency": reduce_ms(s, g), "backend": f"sglang_{mode}",
        }
        for g, s, mode in itertools.product((2, 4), (128, 10**8), ("graph", "eager"))
    ]  # fmt: skip
    moe = [
        {
            **common, "moe_dtype": "bfloat16", "num_tokens": t, "hidden_size": HIDDEN,
            "inter_size": 256, "topk": 2, "num_experts": 8, "moe_tp_size": 1, "moe_ep_size": 1,
            "distribution": d, "latency": f * experts_ms(t),
        }
        for t, (d, f) in itertools.product((1, 16384), (("power_law_1.01", 1), ("balanced", 7)))
    ]  # fmt: skip
    for place, name, rows in (
        ("gemm", "gemm_perf", gemm),
        ("attention", "generation_attention_perf", attention),
        ("attention", "context_attention_perf", attention),
        ("comm", "custom_allreduce_perf", reduce),
        ("moe", "moe_perf", moe),
    ):
        path = home / place / "sglang" / version / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
    return root


def make_config(root: Path, more: str = "") -> str:
    """Write the model's `config.json`."""
    path = root / "small" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG + more + "}")
    return str(path)
