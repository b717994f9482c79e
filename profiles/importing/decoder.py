"""What of a model's `config.json` decides the cost of an iteration: dense or mixture of experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.importing.tables import wheel_folder

MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
BYTES: Final = 2
"""bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder with grouped-query attention on `tensor_parallel` GPUs, in bf16."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Of the dense MLP, or of one expert."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context_tokens: int
    experts: int = 0
    """0: a dense MLP."""
    experts_per_token: int = 0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        tp = self.tensor_parallel
        if tp < 1 or self.heads % tp or self.intermediate % tp:
            raise VoltanaError(
                f"--tp must divide the {self.heads} heads and {self.intermediate} columns of "
                f"{self.name}, got {tp}"
            )

    @property
    def gpu_heads(self) -> int:
        """Query heads of one GPU."""
        return self.heads // self.tensor_parallel

    @property
    def gpu_kv_heads(self) -> int:
        """Heads of the KV cache on one GPU; with more GPUs than heads each one is held twice."""
        return max(self.kv_heads // self.tensor_parallel, 1)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers on all GPUs."""
        held = self.gpu_kv_heads * self.tensor_parallel
        return 2 * self.layers * held * self.head_dim * BYTES

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of the dense products of a layer on one GPU; those of experts are apart."""
        attention = self.gpu_heads * self.head_dim
        qkv = attention + 2 * self.gpu_kv_heads * self.head_dim
        products = [(qkv, self.hidden), (self.hidden, attention)]
        if self.experts:
            return (*products, (self.experts, self.hidden))
        inner = self.intermediate // self.tensor_parallel
        return (*products, (2 * inner, self.hidden), (self.hidden, inner))

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert of one layer on one GPU."""
        return 3 * self.hidden * self.intermediate // self.tensor_parallel if self.experts else 0

    @property
    def head_weights(self) -> int:
        """Parameters of the output head on one GPU."""
        return self.vocabulary * self.hidden // self.tensor_parallel

    def weights_read(self, tokens: float) -> float:
        """Parameters that one GPU reads in an iteration of so many tokens.

        Of the experts those that some token is routed to, if all are as likely.
        """
        dense = sum(n * k for n, k in self.gemms)
        missed = (1 - self.experts_per_token / self.experts) ** tokens if self.experts else 0.0
        touched = self.experts * (1 - missed) * self.expert_weights
        return self.layers * (dense + touched) + self.head_weights

    def flops(self, tokens: float) -> float:
        """Arithmetic of one GPU's matrix products for so many tokens."""
        dense = sum(n * k for n, k in self.gemms) + self.experts_per_token * self.expert_weights
        return 2.0 * tokens * (self.layers * dense + self.head_weights)

    @property
    def weight_bytes(self) -> float:
        """All weights on one GPU, the embedding included."""
        dense = sum(n * k for n, k in self.gemms) + self.experts * self.expert_weights
        return BYTES * float(self.layers * dense + 2 * self.head_weights)


def load_decoder(model: str, tensor_parallel: int, tables: Path | None = None) -> Decoder:
    """Read a model's shape.

    Args:
        model: A `config.json`, the folder that holds one, or a name such as Qwen/Qwen3-8B that
            the wheel has the configuration of.
        tensor_parallel: GPUs of an instance.
        tables: Where else than in the installed wheel `model_configs` may lie.

    Raises:
        VoltanaError: No such file or name, a model of another kind, or a degree that does not fit.
    """
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        path = _named(model, tables)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    kind = data.get("model_type")
    if kind not in MODEL_TYPES:
        raise VoltanaError(
            f"a model must be of type {', '.join(MODEL_TYPES)}, got {kind!r} ({path}): "
            "profile this one on a GPU"
        )
    name = model if path.name != "config.json" else data.get("_name_or_path") or path.parent.name
    try:
        return _decoder(data, str(name), tensor_parallel)
    except KeyError as error:
        raise VoltanaError(f"config.json must have {error} ({path}): complete it") from None


def _named(model: str, tables: Path | None) -> Path:
    homes = [h for h in (tables, wheel_folder()) if h is not None]
    found = {
        f.name.removesuffix("_config.json").replace("--", "/"): f
        for home in homes
        for f in sorted(home.glob("model_configs/*_config.json"))
    }
    if model not in found:
        raise VoltanaError(
            f"--model must be a config.json or a model that the tables know, got {model!r}"
            f"{nearest(model, found) if found else ': name its config.json'}"
        )
    return found[model]


def _decoder(data: Mapping[str, Any], name: str, tensor_parallel: int) -> Decoder:
    heads = int(data["num_attention_heads"])
    experts = int(data.get("num_experts") or data.get("num_local_experts") or 0)
    per_expert = data.get("moe_intermediate_size") or data["intermediate_size"]
    return Decoder(
        name=name,
        layers=int(data["num_hidden_layers"]),
        hidden=int(data["hidden_size"]),
        intermediate=int(per_expert if experts else data["intermediate_size"]),
        heads=heads,
        kv_heads=int(data.get("num_key_value_heads", heads)),
        head_dim=int(data.get("head_dim") or data["hidden_size"] // heads),
        vocabulary=int(data["vocab_size"]),
        max_context_tokens=int(data["max_position_embeddings"]),
        experts=experts,
        experts_per_token=int(data["num_experts_per_tok"]) if experts else 0,
        tensor_parallel=tensor_parallel,
    )
