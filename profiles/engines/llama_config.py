"""The shape of a Llama-like decoder: built in by name, or from a model's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes that decide what an iteration costs."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise VoltanaError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_kv_heads} ({self.name}): check config.json"
            )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    @property
    def num_parameters(self) -> int:
        """Weights, embedding and output head counted apart."""
        qkv = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        out = self.hidden_size * self.head_dim * self.num_heads
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        layers = self.num_layers * (qkv + out + mlp + norms)
        return layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a serving engine's profile says of any decoder with a KV cache."""

    name: str
    vocab_size: int
    max_context_tokens: int
    kv_numbers_per_token: int

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one token, all layers."""
        return self.kv_numbers_per_token * element_bytes


BUILT_IN: Final = {
    "toy": LlamaConfig(
        name="toy",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        max_context_tokens=4096,
    ),
    "llama-3.1-8b": LlamaConfig(
        name="llama-3.1-8b",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_context_tokens=131072,
        rope_theta=500_000.0,
    ),
}


def load_config(name_or_path: str) -> LlamaConfig:
    """A built-in shape by name, or a `config.json` (or the folder that holds one).

    Raises:
        VoltanaError: Neither; or the model is not Llama-shaped.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = _config_path(name_or_path)
    return _from_json(_read_json(path), path)


def load_shape(name_or_path: str) -> ModelShape:
    """As `load_config`, but for any model whose `config.json` tells heads and layers.

    Raises:
        VoltanaError: Neither a built-in shape nor such a file.
    """
    if name_or_path in BUILT_IN:
        config = BUILT_IN[name_or_path]
    else:
        path = _config_path(name_or_path)
        config = _from_json(_read_json(path), path, has_any_type=True)
    return ModelShape(
        name=config.name,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_context_tokens,
        kv_numbers_per_token=config.kv_bytes_per_token(1),
    )


def _config_path(name_or_path: str) -> Path:
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise VoltanaError(
            f"--model must be a built-in shape or a config.json, got {name_or_path!r}"
            f"{nearest(name_or_path, BUILT_IN)}"
        )
    return path


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    return found


def _from_json(data: Mapping[str, Any], path: Path, *, has_any_type: bool = False) -> LlamaConfig:
    if not has_any_type and data.get("model_type") not in ("llama", "mistral"):
        raise VoltanaError(
            f"the torch engine knows Llama-shaped models, got model_type "
            f"{data.get('model_type')!r} ({path}): profile this one with --engine sglang"
        )
    rope = data.get("rope_parameters") or {}
    try:
        num_heads = int(data["num_attention_heads"])
        return LlamaConfig(
            name=str(data.get("_name_or_path") or path.parent.name),
            num_layers=int(data["num_hidden_layers"]),
            hidden_size=int(data["hidden_size"]),
            intermediate_size=int(data["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(data.get("num_key_value_heads", num_heads)),
            head_dim=int(data.get("head_dim") or data["hidden_size"] // num_heads),
            vocab_size=int(data["vocab_size"]),
            max_context_tokens=int(data["max_position_embeddings"]),
            rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10_000.0),
            rms_norm_eps=float(data.get("rms_norm_eps", 1e-5)),
        )
    except KeyError as error:
        raise VoltanaError(f"config.json must have {error} ({path}): complete it") from None
