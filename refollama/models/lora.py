"""LoRA: small changes beside weights that stay as they are, packed.

    x ─┬─ W ──────────────────────────── ⊕ ─ …
       ├─ A₁ ─ B₁ ─ · scale₁ ─ · alpha/r ┤        r wide in between, where W is thousands
       └─ A₂ ─ B₂ ─ · scale₂ ─ · alpha/r ┘

A finished net is adapted: parts that an adapter changes are replaced by parts of the same name that
hold the same weights and the branches beside them. Under other scales it is another net, which
shares everything with the first.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from refollama.models.exact import linear, times
from refollama.models.layers import Embedding, Experts, Linear, RMSNorm

Scales = tuple[float, ...]  # one for each adapter, in the order in which they were given
Part = TypeVar("Part", bound=nn.Module)


class Branch(nn.Module):
    """What one adapter adds to one matrix: alpha/r · B·A.

    Shapes: a (r, in), b (out, r); of E experts (E, r, in) and (E, out, r).
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor, gain: float, adapter: int = 0) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.gain = gain  # alpha / r
        self.adapter = adapter  # its number

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """(…, in) → (…, out)."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return linear(linear(x, a), b)


class Branches(nn.ModuleList):
    """Those beside one part; `scales` says how much of each adapter is taken."""

    scales: Scales = ()  # (): all of each

    def live(self) -> Iterator[tuple[Branch, float]]:
        """Those that add anything, and what they are multiplied by."""
        for branch in self:
            assert isinstance(branch, Branch)
            scale = self.scales[branch.adapter] if self.scales else 1.0
            if scale:
                yield branch, scale * branch.gain


class LoraLinear(Linear):
    """`Linear` with branches."""

    def __init__(self, base: Linear, branches: Branches) -> None:
        super().__init__(base.weight, base.unpack, base.bias)
        self.branches = branches

    def dense(self) -> Tensor:
        """The matrix as it acts, (out, in) float32: a new tensor."""
        w = super().dense()
        for branch, scale in self.branches.live():
            w = w + scale * (branch.b @ branch.a)
        return w

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, super().dense(), self.bias)
        for branch, scale in self.branches.live():
            y = y + scale * branch(x)
        return y


class LoraExperts(Experts):
    """`Experts` with branches."""

    def __init__(self, base: Experts, branches: Branches) -> None:
        super().__init__(base.weight, base.unpack)
        self.branches = branches

    def forward(self, x: Tensor, expert: int) -> Tensor:
        y = super().forward(x, expert)
        for branch, scale in self.branches.live():
            y = y + scale * branch(x, expert)
        return y


class LoraEmbedding(Embedding):
    """`Embedding` with branches: b has a row for each token. Rows of pictures stay as they are."""

    def __init__(self, base: Embedding, branches: Branches) -> None:
        super().__init__(base.weight, base.unpack)
        self.base = base
        self.branches = branches

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.base(tokens)
        words = tokens < len(self.weight)
        for branch, scale in self.branches.live():
            more = times(branch.b[tokens * words], branch.a)
            x = x + scale * more * words[..., None]
        return x


class LoraNorm(RMSNorm):
    """`RMSNorm` with branches: a matrix of one row."""

    def __init__(self, base: RMSNorm, branches: Branches) -> None:
        super().__init__(base.weight, base.eps)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        for branch, scale in self.branches.live():
            w = w + scale * (branch.b @ branch.a)[0]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * w


# ── nets ──────────────────────────────────────────────────────────────────────────────────────────


def adapt(net: nn.Module, branches: Mapping[str, Sequence[Branch]]) -> None:
    """Put branches beside a net's parts, by the names of those.  Their shapes have been checked."""
    for name, some in branches.items():
        owner, _, child = name.rpartition(".")
        part = net.get_submodule(name)
        setattr(net.get_submodule(owner), child, _with(part, Branches(some)).train(part.training))


def _with(part: nn.Module, branches: Branches) -> nn.Module:
    if isinstance(part, Linear):
        return LoraLinear(part, branches)
    if isinstance(part, Experts):
        return LoraExperts(part, branches)
    if isinstance(part, Embedding):
        return LoraEmbedding(part, branches)
    assert isinstance(part, RMSNorm), f"{type(part).__name__} cannot be adapted"
    return LoraNorm(part, branches)


def count_adapters(net: nn.Module) -> int:
    """How many adapters a net has."""
    numbers = (part.adapter for part in net.modules() if isinstance(part, Branch))
    return max(numbers, default=-1) + 1


def rescaled(part: Part, scales: Scales) -> Part:
    """The same with so much of each adapter, (): all of it.  Weights, branches, and parts without
    branches are shared, and so are the hooks of all parts.
    """
    children = {name: rescaled(child, scales) for name, child in part.named_children()}
    branched = isinstance(part, Branches)
    if not branched and all(child is getattr(part, name) for name, child in children.items()):
        return part
    other = copy(part)
    other._modules = dict(part._modules)
    other._modules.update(children)
    if isinstance(other, Branches):
        other.scales = scales
    return other
