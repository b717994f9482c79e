"""Writes the tiny Llama the engine tests serve: real random weights, from a fixed seed.

Run in the engine's own environment: `python make_model.py CONFIG.json OUT_DIR`. Saved weights and
not `--load-format dummy`, whose output ignores the KV cache, so that a test on it proves nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

SEED = 20260923


def main(config_path: str, out_dir: str) -> None:
    """Make the model of `config_path` and save it under `out_dir`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(config_path)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
