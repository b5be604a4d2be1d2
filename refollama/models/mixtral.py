"""Mixtral: Llama, but each token's feed-forward network is a few experts out of many.

    x ─ ffn_gate_inp ─ softmax ─ the best k of E ─┬─ expert 3 ─ · 0.7 ─┐
                                                  └─ expert 0 ─ · 0.3 ─┴─ +

Source: Jiang et al. 2024, "Mixtral of Experts", arXiv 2401.04088, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.models.layers import swiglu
from refollama.models.llama import Block, Parts


class MixtralBlock(Block):
    """One layer whose feed-forward network is a mixture."""

    def add_feed_forward(self, parts: Parts, blk: str) -> None:
        E, M, F = self.config.n_experts, self.config.d_model, self.sizes.d_ff
        self.ffn_gate_inp = parts.linear(f"{blk}.ffn_gate_inp", E, M)
        self.ffn_gate_exps = parts.experts(f"{blk}.ffn_gate", E, F, M)
        self.ffn_up_exps = parts.experts(f"{blk}.ffn_up", E, F, M)
        self.ffn_down_exps = parts.experts(f"{blk}.ffn_down", E, M, F)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Every token thinks with the experts that its router chose."""
        tokens = x.flatten(0, 1)  # (B·T, d_model)
        shares, chosen = self.route(tokens)  # (B·T, k), (B·T, k)
        out = torch.zeros_like(tokens)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out[rows] += shares[rows, place, None] * self.think(tokens[rows], expert)
        return out.view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts, and how much of each: (n, d_model) → shares (n, k), experts (n, k).

        Of equals, the one with the lower number.
        """
        k = self.config.n_experts_used
        likely = self.ffn_gate_inp(x).softmax(-1)  # (n, E)
        likely, order = likely.sort(dim=-1, descending=True, stable=True)
        shares = likely[:, :k]
        return shares / shares.sum(-1, keepdim=True), order[:, :k]

    def think(self, x: Tensor, expert: int) -> Tensor:
        """One expert, a feed-forward network like Llama's: (n, d_model) → (n, d_model)."""
        hidden = swiglu(self.ffn_gate_exps(x, expert), self.ffn_up_exps(x, expert))
        down: Tensor = self.ffn_down_exps(hidden, expert)
        return down
