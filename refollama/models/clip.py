"""CLIP's vision tower: a picture in, one vector for each patch of it out.

    336 × 336 pixels ─ patch_embd ─ 24 × 24 vectors ─┐
                                     class_embd ─────┴─⊕─ pre_ln ─ blk 0 ─ … ─ blk n − 1
                                     position_embd ────┘

    x ─┬─ ln1 ─ attention ─⊕─┬─ ln2 ─ feed_forward ─⊕─     one block
       └───────────────────┘ └──────────────────────┘

Modules carry the names of the file's tensors, `v.blk.3.attn_q` for one. Source: Radford et al.
2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020;
the tower is Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from refollama.errors import BadOption, FormatError, UnsupportedModel
from refollama.models.config import MOST_LAYERS, Keys
from refollama.models.layers import Convolution, LayerNorm, Linear, attend

LARGEST_PICTURE = 4096  # pixels of a side
MOST_PATCHES = 1 << 12  # attention takes memory for each pair of them; LLaVA has 576

Channels = tuple[float, float, float]


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x), which is what CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


# The keys that choose another activation than quick GELU; of both, the first counts.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "use_silu": functional.silu,
    "use_gelu": functional.gelu,
}


class Parts(Protocol):
    """Where the weights come from; each is checked for the shape that is asked for."""

    def linear(self, name: str, n_out: int, n_in: int) -> Linear: ...
    def layer_norm(self, name: str, width: int, eps: float) -> LayerNorm: ...
    def convolution(self, name: str, shape: tuple[int, ...]) -> Convolution: ...
    def table(self, name: str, shape: tuple[int, ...]) -> Tensor: ...
    def has(self, name: str) -> bool: ...
    def rows(self, name: str) -> int: ...


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """The shape of a vision tower, and the pictures that it was trained on.

    Source: GGUF metadata keys of architecture "clip".
    """

    image_size: int  # pixels of a side
    patch_size: int
    d_model: int
    d_ff: int
    n_heads: int  # H
    n_blocks: int  # that are run
    n_stored: int  # that the file holds
    norm_eps: float
    mean: Channels
    std: Channels
    activation: Callable[[Tensor], Tensor] = quick_gelu

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], n_blocks: int | None = None) -> ClipConfig:
        """Read the `clip.*` keys of a projector's file.

        n_blocks: so many are run, whatever the file says; −1: all that it holds but the last.
        Raises: UnsupportedModel for a tower that is not CLIP's; FormatError for a key that is
        missing or makes no sense; BadOption for blocks that there are not.
        """
        _check_supported(metadata)
        keys = Keys(metadata, "clip.vision.")
        config = cls(
            image_size=keys.size("image_size", most=LARGEST_PICTURE),
            patch_size=keys.size("patch_size", most=LARGEST_PICTURE),
            d_model=keys.size("embedding_length"),
            d_ff=keys.size("feed_forward_length"),
            n_heads=keys.size("attention.head_count"),
            n_blocks=_blocks(keys) if n_blocks is None else _chosen(keys, n_blocks),
            n_stored=keys.size("block_count", most=MOST_LAYERS),
            norm_eps=keys.number("attention.layer_norm_epsilon"),
            mean=_channels(keys, "image_mean"),
            std=_channels(keys, "image_std", least=1e-6),
            activation=next(
                (act for key, act in ACTIVATIONS.items() if metadata.get(f"clip.{key}")), quick_gelu
            ),
        )
        config._check()
        return config

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    def _check(self) -> None:
        """What must hold between the sizes."""
        if self.d_model % self.n_heads:
            raise FormatError(
                f"clip.vision.embedding_length is {self.d_model}, "
                f"which is no multiple of attention.head_count = {self.n_heads}"
            )
        if not 0 < self.grid**2 <= MOST_PATCHES:
            raise FormatError(
                f"clip.vision.image_size is {self.image_size} and patch_size {self.patch_size}: "
                f"expected 1 to {MOST_PATCHES} patches"
            )


class ClipBlock(nn.Module):
    """One layer: attention, then a feed-forward network, each added to what came in."""

    def __init__(self, config: ClipConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        self.config = config
        M, F, eps = config.d_model, config.d_ff, config.norm_eps
        blk = f"v.blk.{layer}"
        self.ln1 = parts.layer_norm(f"{blk}.ln1", M, eps)
        self.attn_q = parts.linear(f"{blk}.attn_q", M, M)
        self.attn_k = parts.linear(f"{blk}.attn_k", M, M)
        self.attn_v = parts.linear(f"{blk}.attn_v", M, M)
        self.attn_out = parts.linear(f"{blk}.attn_out", M, M)
        self.ln2 = parts.layer_norm(f"{blk}.ln2", M, eps)
        # Files of 2023 call the first layer "down" and the second one "up": the shapes tell.
        self.swapped = parts.rows(f"{blk}.ffn_down") == F != M
        up, down = ((M, F), (F, M)) if self.swapped else ((F, M), (M, F))
        self.ffn_up = parts.linear(f"{blk}.ffn_up", *up)
        self.ffn_down = parts.linear(f"{blk}.ffn_down", *down)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) → the same."""
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x))

    def attention(self, x: Tensor) -> Tensor:
        """Every patch gathers from all patches."""
        B, T, _ = x.shape
        q, k, v = (
            part(x).view(B, T, self.config.n_heads, -1)  # (B, T, H, D)
            for part in (self.attn_q, self.attn_k, self.attn_v)
        )
        everything = torch.ones(B, T, T, dtype=torch.bool, device=x.device)
        mixed = attend(q, k.transpose(1, 2), v.transpose(1, 2), everything)  # (B, T, H, D)
        return self.attn_out(mixed.flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Every patch thinks for itself."""
        first, second = self.ffn_up, self.ffn_down
        if self.swapped:
            first, second = second, first
        return second(self.config.activation(first(x)))


class Clip(nn.Module):
    """The tower.  `forward`: pictures (B, 3, S, S), scaled → (B, patches, d_model), row by row."""

    class_embd: Tensor
    position_embd: Tensor

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__()
        self.config = config
        M, P, eps = config.d_model, config.patch_size, config.norm_eps
        self.register_buffer("class_embd", parts.table("v.class_embd", (M,)))
        self.patch_embd = parts.convolution("v.patch_embd", (M, 3, P, P))
        positions = parts.table("v.position_embd.weight", (config.grid**2 + 1, M))
        self.register_buffer("position_embd", positions)
        self.pre_ln = parts.layer_norm("v.pre_ln", M, eps)
        self.blk = nn.ModuleList(ClipBlock(config, parts, i) for i in range(config.n_blocks))
        whole = config.n_blocks == config.n_stored  # the last norm belongs behind the last block
        ends = whole and parts.has("v.post_ln")
        self.post_ln = parts.layer_norm("v.post_ln", M, eps) if ends else None

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embd(pixels, stride=self.config.patch_size)  # (B, d_model, n, n)
        x = x.flatten(2).mT  # (B, n², d_model)
        first = self.class_embd.expand(len(x), 1, -1)
        x = self.pre_ln(torch.cat((first, x), dim=1) + self.position_embd)
        for block in self.blk:
            x = block(x)
        x = x if self.post_ln is None else self.post_ln(x)
        return x[:, 1:]  # the class token has gathered what a caption needs: no patch of its own


def _check_supported(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "clip":
        raise UnsupportedModel(f"general.architecture is {architecture!r}; expected 'clip'")
    if not metadata.get("clip.has_vision_encoder", True):
        raise UnsupportedModel("clip.has_vision_encoder is false: there is nothing to see with")
    kind = metadata.get("clip.vision.mm_patch_merge_type", "flat")
    if kind != "flat":
        raise UnsupportedModel(
            f"clip.vision.mm_patch_merge_type is {kind!r}; supported: 'flat' "
            "(a picture as one square, as in LLaVA 1.5, not in tiles)"
        )


def _blocks(keys: Keys) -> int:
    """How many blocks are run: all of the file, or as many as it says.

    LLaVA takes what the last block but one gives, so its files come without the last block: all
    that are there count. (llama.cpp leaves out one more, as −1 of `from_metadata` does.)
    """
    count = keys.size("block_count", most=MOST_LAYERS)
    wanted = np.atleast_1d(keys.metadata.get("clip.vision.feature_layer", [])).tolist()
    if not wanted:
        return count
    if len(wanted) > 1:
        raise UnsupportedModel(
            f"clip.vision.feature_layer names {len(wanted)} layers; supported: one"
        )
    one = Keys({"clip.vision.feature_layer": wanted[0]}, "clip.vision.")
    return one.size("feature_layer", most=count)


def _chosen(keys: Keys, wanted: int) -> int:
    """So many of the file's blocks; a negative number counts from the last one back."""
    count = keys.size("block_count", most=MOST_LAYERS)
    found = wanted + count if wanted < 0 else wanted
    if not 1 <= found <= count:
        raise BadOption(f"vision_blocks is {wanted}, but the tower has 1 … {count} blocks to run")
    return found


def _channels(keys: Keys, key: str, least: float = -1e6) -> Channels:
    """Three numbers: of red, green and blue."""
    given = keys.metadata.get(keys.prefix + key)
    values = np.asarray(given).tolist() if isinstance(given, np.ndarray | list) else []
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) != 3 or not all(least <= number <= 1e6 for number in numbers):
        raise FormatError(f"{keys.prefix}{key} must be three numbers, one for each colour")
    red, green, blue = numbers
    return red, green, blue
