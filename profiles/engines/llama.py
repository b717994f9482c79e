"""A Llama-shaped decoder in plain PyTorch: random weights, contiguous KV cache, SDPA.

It computes what a serving engine computes in an iteration (projections, rotary embedding, grouped
attention over the cache, gated MLP, output head of the last position), so that its time and power
have the right shape. Its attention reads the contiguous cache of a fixed context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from voltana.profiles.engines.llama_config import LlamaConfig


@dataclass(slots=True, kw_only=True)
class KvCache:
    """Keys and values of a batch. Shape of each: (layer, batch, kv head, position, head_dim)."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def zeros(config: LlamaConfig, batch_size: int, length: int, like: Tensor) -> KvCache:
        """An empty cache on the device and in the type of `like`.

        Args:
            config: Of the model.
            batch_size: Sequences.
            length: Tokens that each can hold.
            like: Gives type and device.
        """
        shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
        return KvCache(keys=like.new_zeros(shape), values=like.new_zeros(shape))

    @staticmethod
    def random(config: LlamaConfig, batch_size: int, length: int, like: Tensor) -> KvCache:
        """A cache full of normal noise: reading zeros toggles no bits, and draws less power.

        Args:
            config: Of the model.
            batch_size: Sequences.
            length: Tokens that each can hold.
            like: Gives type and device.
        """
        cache = KvCache.zeros(config, batch_size, length, like)
        cache.keys.normal_()
        cache.values.normal_()
        return cache


Part = tuple[Tensor, int, KvCache]
"""A batch of a mixed pass: token ids, how many are cached in front of them, and where."""


@dataclass(slots=True, kw_only=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm_attention: Tensor
    norm_mlp: Tensor


class Llama:
    """The decoder. All methods run under `torch.inference_mode`."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        weight_std: float = 0.02,
    ) -> None:
        """Draw the weights from a normal distribution of `weight_std`."""
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        generator = torch.Generator(device=self.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            empty = torch.empty(shape, device=self.device, dtype=dtype)
            return empty.normal_(0.0, weight_std, generator=generator)

        width = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
        self.embedding = draw(config.vocab_size, config.hidden_size)
        self.head = draw(config.vocab_size, config.hidden_size)
        self.norm = torch.ones(config.hidden_size, device=self.device, dtype=dtype)
        self.layers = [
            _Layer(
                qkv=draw(width, config.hidden_size),
                out=draw(config.hidden_size, config.num_heads * config.head_dim),
                gate_up=draw(2 * config.intermediate_size, config.hidden_size),
                down=draw(config.hidden_size, config.intermediate_size),
                norm_attention=torch.ones_like(self.norm),
                norm_mlp=torch.ones_like(self.norm),
            )
            for _ in range(config.num_layers)
        ]
        self._rope = self._rope_table()

    @torch.inference_mode()
    def forward(self, ids: Tensor, start: int, cache: KvCache) -> Tensor:
        """Run new tokens behind `start` cached ones, writing their keys and values.

        Args:
            ids: Token ids. Shape (batch, new tokens).
            start: Cached tokens of every sequence that the new ones see.
            cache: Cache of at least `start` + new tokens positions.

        Returns:
            Logits of the last position. Shape (batch, vocabulary).
        """
        return F.linear(self.hidden(ids, start, cache)[:, -1], self.head)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, start: int, cache: KvCache) -> Tensor:
        """As `forward`, but the normed hidden states of all new positions.

        Args:
            ids: Token ids, shape (batch, new tokens).
            start: Position of the first of them.
            cache: Takes their keys and values.
        """
        end = start + ids.shape[1]
        cos, sin = self._rope[0][start:end], self._rope[1][start:end]
        x = F.embedding(ids, self.embedding)
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index, :, :, :end], cache.values[index, :, :, :end]
            normed = self._normed(x, layer.norm_attention)
            x = x + self._attention(layer, normed, keys, values, start, (cos, sin))
            x = x + self._mlp(layer, self._normed(x, layer.norm_mlp))
        return self._normed(x, self.norm)

    @torch.inference_mode()
    def mixed(self, parts: Sequence[Part]) -> Tensor:
        """One pass over several batches, as an engine runs a chunk of a prompt beside decode.

        All their tokens go through each linear layer together; attention is each batch's own.

        Args:
            parts: Token ids of shape (batch, new tokens), cached tokens in front, and the cache.

        Returns:
            Logits of the last position of each sequence, batch after batch.
        """
        sizes = [ids.numel() for ids, _, _ in parts]
        x = F.embedding(torch.cat([ids.flatten() for ids, _, _ in parts]), self.embedding)
        for index, layer in enumerate(self.layers):
            qkv = torch.split(F.linear(self._normed(x, layer.norm_attention), layer.qkv), sizes)
            attended = [
                self._part(index, part, own).flatten(0, 1)
                for part, own in zip(parts, qkv, strict=True)
            ]
            x = x + F.linear(torch.cat(attended), layer.out)
            x = x + self._mlp(layer, self._normed(x, layer.norm_mlp))
        rows = torch.split(self._normed(x, self.norm), sizes)
        ends = [
            own.view(*ids.shape, -1)[:, -1] for (ids, _, _), own in zip(parts, rows, strict=True)
        ]
        return F.linear(torch.cat(ends), self.head)

    def _part(self, index: int, part: Part, qkv: Tensor) -> Tensor:
        """Attention of one batch of a mixed pass, from its rows of the projection."""
        ids, start, cache = part
        end = start + ids.shape[1]
        rope = self._rope[0][start:end], self._rope[1][start:end]
        keys, values = cache.keys[index, :, :, :end], cache.values[index, :, :, :end]
        return self._attend(qkv.view(*ids.shape, -1), keys, values, start, rope)

    def _attention(
        self,
        layer: _Layer,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        attended = self._attend(F.linear(x, layer.qkv), keys, values, start, rope)
        return F.linear(attended, layer.out)

    def _attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, start: int, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Shape (batch, new, heads · head_dim), from that of all projections."""
        batch, new, _ = qkv.shape
        heads, kv_heads, dim = (
            self.config.num_heads,
            self.config.num_kv_heads,
            self.config.head_dim,
        )
        split = [heads * dim, kv_heads * dim, kv_heads * dim]
        q, k, v = torch.split(qkv, split, dim=-1)
        q = _rotate(q.view(batch, new, heads, dim).transpose(1, 2), *rope)
        keys[:, :, start:] = _rotate(k.view(batch, new, kv_heads, dim).transpose(1, 2), *rope)
        values[:, :, start:] = v.view(batch, new, kv_heads, dim).transpose(1, 2)
        mask = None
        if new > 1 and start > 0:
            ones = torch.ones(new, start + new, dtype=torch.bool, device=qkv.device)
            mask = ones.tril(diagonal=start)
        mixed = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=new > 1 and start == 0,
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).reshape(batch, new, heads * dim)

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _rope_table(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position, halves repeated. Shape (position, head_dim)."""
        dim = self.config.head_dim
        exponent = torch.arange(0, dim, 2, device=self.device, dtype=torch.float32) / dim
        position = torch.arange(
            self.config.max_context_tokens, device=self.device, dtype=torch.float32
        )
        angle = torch.outer(position, self.config.rope_theta**-exponent)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with the half-split layout of the published Llama weights."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
