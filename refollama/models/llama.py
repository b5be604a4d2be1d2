"""Llama: token ids in, logits out. The whole forward pass is on this page.

    token_embd ─┬─ attn_norm ─ attention ─⊕─┬─ ffn_norm ─ feed_forward ─⊕─ … ─ output_norm ─ output
                └─────────────────────────┘ └───────────────────────────┘
                                one block, n_layers times

Modules carry the names of the file's tensors, `blk.3.attn_q` for one, so a hook is put on what the
file calls it. Source: Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Mistral 7B (Jiang et
al. 2023, arXiv 2310.06825) is the same model with fewer key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from refollama.kvcache import KVCache, Rows
from refollama.models.config import ModelConfig, RopeConfig
from refollama.models.layers import (
    Embedding,
    Experts,
    Linear,
    RMSNorm,
    Rope,
    attend,
    rotate,
    swiglu,
)


class Parts(Protocol):
    """Where the weights come from; each is checked for the shape that is asked for."""

    def linear(self, name: str, n_out: int, n_in: int) -> Linear: ...
    def norm(self, name: str, width: int, eps: float) -> RMSNorm: ...
    def embedding(self, name: str, width: int) -> Embedding: ...
    def experts(self, name: str, n_experts: int, n_out: int, n_in: int) -> Experts: ...
    def rope(self, name: str, config: RopeConfig, width: int) -> Rope: ...
    def has(self, name: str) -> bool: ...


class Block(nn.Module):
    """One layer: attention, then a feed-forward network, each added to what came in."""

    # Of a block, so that another way to the same can take its place.
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = staticmethod(attend)
    swiglu: Callable[[Tensor, Tensor], Tensor] = staticmethod(swiglu)

    def __init__(self, config: ModelConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        self.layer, self.config, self.sizes = layer, config, config.layers[layer]
        M, eps = config.d_model, config.norm_eps
        H, Hk, D, Dv = self.sizes.n_heads, self.sizes.n_kv_heads, config.d_head, config.d_value
        blk = f"blk.{layer}"
        self.attn_norm = parts.norm(f"{blk}.attn_norm", M, eps)
        self.attn_q = parts.linear(f"{blk}.attn_q", H * D, M)
        self.attn_k = parts.linear(f"{blk}.attn_k", Hk * D, M)
        self.attn_v = parts.linear(f"{blk}.attn_v", Hk * Dv, M)
        self.attn_output = parts.linear(f"{blk}.attn_output", M, H * Dv)
        self.ffn_norm = parts.norm(f"{blk}.ffn_norm", M, eps)
        self.add_feed_forward(parts, blk)

    def add_feed_forward(self, parts: Parts, blk: str) -> None:
        """The parts of the feed-forward network; a mixture of experts has others."""
        M, F = self.config.d_model, self.sizes.d_ff
        self.ffn_gate = parts.linear(f"{blk}.ffn_gate", F, M)
        self.ffn_up = parts.linear(f"{blk}.ffn_up", F, M)
        self.ffn_down = parts.linear(f"{blk}.ffn_down", M, F)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, d_model) → (B, T, d_model)."""
        x = x + self.attention(self.attn_norm(x), step)
        return x + self.feed_forward(self.ffn_norm(x))

    def attention(self, x: Tensor, step: Step) -> Tensor:
        """Every token gathers from the tokens before it, and from itself."""
        B, T, _ = x.shape
        D, Dv = self.config.d_head, self.config.d_value
        q = self.attn_q(x).view(B, T, -1, D)  # (B, T, H, D)
        k = self.attn_k(x).view(B, T, -1, D)  # (B, T, Hk, D)
        v = self.attn_v(x).view(B, T, -1, Dv)  # (B, T, Hk, Dv)
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        k, v = step.cache.append(self.layer, step.positions, k, v)  # (B, Hk, S, D or Dv)
        return self.attn_output(self.attend(q, k, v, step.visible).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Every token thinks for itself."""
        return self.ffn_down(self.swiglu(self.ffn_gate(x), self.ffn_up(x)))


class Step:
    """What all blocks share while some tokens pass through: where they stand, what they may see."""

    def __init__(self, rope: Rope, positions: Tensor, cache: Rows, window: int) -> None:
        self.positions = positions  # (B, T)
        self.cache = cache
        ago = positions[..., None] - torch.arange(cache.length, device=positions.device)
        self.visible = (ago >= 0) & (ago < window)  # (B, T, S)
        self.cos, self.sin = rope(positions)

    def on(self, device: torch.device) -> Step:
        """The same for a block on this device; itself if that is where it is."""
        if device == self.positions.device:
            return self
        other = copy(self)
        for name in ("positions", "visible", "cos", "sin"):
            setattr(other, name, getattr(self, name).to(device))
        return other


class Llama(nn.Module):
    """The model.  `forward`: tokens (B, T), positions (B, T) → logits (B, V) after the last."""

    def __init__(self, config: ModelConfig, parts: Parts, block: type[Block] = Block) -> None:
        super().__init__()
        self.config = config
        self.token_embd = parts.embedding("token_embd", config.d_model)
        for name in config.rope.tensors:
            self.add_module(name, parts.rope(name, config.rope, config.d_rotated))
        layers = range(len(config.layers))
        self.blk = nn.ModuleList(block(config, parts, layer) for layer in layers)
        self.output_norm = parts.norm("output_norm", config.d_model, config.norm_eps)
        self.output = (
            parts.linear("output", self.n_vocab, config.d_model)
            if parts.has("output")
            else Linear(self.token_embd.weight, self.token_embd.unpack)  # tied: one table, two uses
        )

    def forward(self, tokens: Tensor, positions: Tensor, cache: Rows) -> Tensor:
        """Logits (B, V) float32 for the token that follows each row's last."""
        return self.output(self.hidden(tokens, positions, cache)[:, -1])

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Rows) -> Tensor:
        """What the model makes of every token, (B, T, d_model); `output` turns it into logits."""
        for x in self.residual(tokens, positions, cache):
            last = x
        return self.output_norm(last.to(self.output_norm.weight.device))

    def residual(self, tokens: Tensor, positions: Tensor, cache: Rows) -> Iterator[Tensor]:
        """The sum that grows from block to block: first the embedding, then after each block.

        (B, T, d_model) each; a block is computed when it is asked for, on the device where it lies.
        """
        step = Step(self.rope, positions, cache, self.config.window)
        x = self.token_embd(tokens)
        yield x
        for block, device in zip(self.blk, self.devices, strict=True):
            step = step.on(device)
            x = block(x.to(device), step)
            yield x

    def new_cache(
        self,
        slots: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> KVCache:
        """An empty memory that fits this model, for so many sequences at once.

        Each layer's lies beside the layer, unless a device is given.
        """
        config = self.config
        shapes = [(layer.n_kv_heads, config.d_head, config.d_value) for layer in config.layers]
        devices = self.devices if device is None else [device] * len(shapes)
        return KVCache(shapes, slots=slots, dtype=dtype, devices=devices)

    def shift(self, cache: KVCache, slot: int, start: int, stop: int, end: int) -> None:
        """Drop positions start … stop − 1 of a slot; those up to end − 1 move down to follow on.

        A key holds its position as a turn, R(p), and turns add up: R(p − δ) = R(−δ)·R(p). So a key
        that moves down by δ is turned back by δ, and need not be computed anew.
        """
        back = torch.tensor(start - stop, device=self.device)
        cos, sin = (part.float() for part in self.rope.turn(back))  # (1, R/2) each
        cache.shift(
            slot,
            start,
            stop,
            end,
            lambda keys: rotate(keys, cos.to(keys.device), sin.to(keys.device)),
        )

    def with_rope(
        self, base: float | None = None, scale: float | None = None, n_ctx: int | None = None
    ) -> Llama:
        """The same modules and weights under another rotation; 0 or None: as it is.

        base: of the frequencies. scale: what positions are multiplied by, instead of the file's
        1 / factor. n_ctx: tokens of context in use, by which longrope chooses its divisors.
        """
        old = self.config.rope
        rope = replace(
            old, base=base or old.base, scale=scale or old.scale, n_ctx=n_ctx or old.n_ctx
        )
        if rope == old:
            return self
        other = Llama.__new__(Llama)
        nn.Module.__init__(other)
        other.config = replace(self.config, rope=rope)
        for name, part in self.named_children():
            if isinstance(part, Rope):
                part = Rope(rope, self.config.d_rotated, part.weight)
            other.add_module(name, part)
        return other.train(self.training)

    @property
    def rope(self) -> Rope:
        """The rotation in use: longrope has one for short contexts and one for long ones."""
        found = self.get_submodule(self.config.rope.tensor)
        assert isinstance(found, Rope)
        return found

    @property
    def n_vocab(self) -> int:
        """V: the rows of the embedding, one for each token."""
        return len(self.token_embd.weight)

    @property
    def n_ctx(self) -> int:
        """Tokens that the model was trained to look back on."""
        return self.config.n_ctx

    @property
    def device(self) -> torch.device:
        """Where tokens go in: where the embedding lies."""
        return self.token_embd.weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Where each block lies."""
        return [block.get_buffer("attn_norm.weight").device for block in self.blk]
