"""Llama: token ids in, logits out. The whole forward pass is on this page.

    token_embd ─┬─ attn_norm ─ attention ─⊕─┬─ ffn_norm ─ feed_forward ─⊕─ … ─ output_norm ─ output
                └─────────────────────────┘ └───────────────────────────┘
                                one block, n_layers times

Modules carry the names of the file's tensors, `blk.3.attn_q` for one, so a hook is put on what the
file calls it. Source: Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Mistral 7B (Jiang et
al. 2023, arXiv 2310.06825) is the same model with fewer key heads.
"""

from __future__ import annotations

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

    def __init__(self, config: ModelConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        M, eps = config.d_model, config.norm_eps
        H, Hk, D = config.n_heads, config.n_kv_heads, config.d_head
        self.layer, self.config = layer, config
        blk = f"blk.{layer}"
        self.attn_norm = parts.norm(f"{blk}.attn_norm", M, eps)
        self.attn_q = parts.linear(f"{blk}.attn_q", H * D, M)
        self.attn_k = parts.linear(f"{blk}.attn_k", Hk * D, M)
        self.attn_v = parts.linear(f"{blk}.attn_v", Hk * D, M)
        self.attn_output = parts.linear(f"{blk}.attn_output", M, H * D)
        self.ffn_norm = parts.norm(f"{blk}.ffn_norm", M, eps)
        self.add_feed_forward(parts, blk)

    def add_feed_forward(self, parts: Parts, blk: str) -> None:
        """The parts of the feed-forward network; a mixture of experts has others."""
        M, F = self.config.d_model, self.config.d_ff
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
        D = self.config.d_head
        q = self.attn_q(x).view(B, T, -1, D)  # (B, T, H, D)
        k = self.attn_k(x).view(B, T, -1, D)  # (B, T, Hk, D)
        v = self.attn_v(x).view(B, T, -1, D)  # (B, T, Hk, D)
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        k, v = step.cache.append(self.layer, step.positions, k, v)  # (B, Hk, S, D)
        return self.attn_output(attend(q, k, v, step.visible).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Every token thinks for itself."""
        return self.ffn_down(swiglu(self.ffn_gate(x), self.ffn_up(x)))


class Step:
    """What all blocks share while some tokens pass through: where they stand, what they may see."""

    def __init__(self, rope: Rope, positions: Tensor, cache: Rows) -> None:
        self.positions = positions  # (B, T)
        self.cache = cache
        keys = torch.arange(cache.length, device=positions.device)
        self.visible = keys <= positions[..., None]  # (B, T, S)
        self.cos, self.sin = rope(positions)


class Llama(nn.Module):
    """The model.  `forward`: tokens (B, T), positions (B, T) → logits (B, V) after the last."""

    def __init__(self, config: ModelConfig, parts: Parts, block: type[Block] = Block) -> None:
        super().__init__()
        self.config = config
        self.token_embd = parts.embedding("token_embd", config.d_model)
        self.rope_freqs = parts.rope("rope_freqs", config.rope, config.d_head)
        self.blk = nn.ModuleList(block(config, parts, layer) for layer in range(config.n_layers))
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
        step = Step(self.rope_freqs, positions, cache)
        x = self.token_embd(tokens)  # (B, T, d_model)
        for block in self.blk:
            x = block(x, step)
        return self.output_norm(x)

    def new_cache(self, slots: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
        """An empty memory that fits this model, for so many sequences at once."""
        config = self.config
        return KVCache(
            config.n_layers,
            config.n_kv_heads,
            config.d_head,
            slots=slots,
            dtype=dtype,
            device=self.device,
        )

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
        """Where the weights are."""
        return self.token_embd.weight.device
