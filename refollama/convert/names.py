"""A checkpoint's names and a GGUF file's, side by side: which tensor is which, and how it is laid.

    model.layers.3.self_attn.q_proj.weight                   blk.3.attn_q.weight, rows by turns
    model.layers.3.block_sparse_moe.experts.0.w1.weight ┐
    model.layers.3.block_sparse_moe.experts.1.w1.weight ┴─   blk.3.ffn_gate_exps.weight, stacked

Import and export read this one table, so that what goes there comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refollama.convert.config import Language
from refollama.convert.folder import Settings
from refollama.weights.safetensors import Array

# Tensors that old programs wrote and nobody reads: they follow from the settings.
IGNORED = ("rotary_emb.inv_freq", "position_ids", "attention.masked_bias")


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a GGUF file, and where it comes from."""

    name: str
    sources: tuple[str, ...]  # its name in a checkpoint; of experts one for each
    shape: tuple[int, ...]  # of each source
    heads: int = 0  # their rows change places: see `neighbours`; 0: rows stay
    optional: bool = False
    exact: bool = False  # always F32: it is small, and much depends on it


# ── the language model ───────────────────────────────────────────────────────────────────────────


def language_slots(model: Language) -> Iterator[Slot]:
    """Every tensor of a llama, a mistral or a mixtral of this shape."""
    config = model.sizes
    V, M = config.size("vocab_size"), config.size("hidden_size")
    yield Slot("token_embd.weight", ("model.embed_tokens.weight",), (V, M))
    for layer in range(config.size("num_hidden_layers")):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        yield from _attention(model, ours, theirs)
        yield from _feed_forward(model, ours, theirs)
    yield _norm("output_norm", "model.norm", M)
    yield Slot("output.weight", ("lm_head.weight",), (V, M), optional=model.tied)


def _attention(model: Language, ours: str, theirs: str) -> Iterator[Slot]:
    M, D, Hk = model.sizes.size("hidden_size"), model.d_head, model.n_kv_heads
    H = model.sizes.size("num_attention_heads")
    attn = f"{theirs}self_attn."
    yield _norm(f"{ours}attn_norm", f"{theirs}input_layernorm", M)
    yield from _matrix(f"{ours}attn_q", f"{attn}q_proj", (H * D, M), heads=H)
    yield from _matrix(f"{ours}attn_k", f"{attn}k_proj", (Hk * D, M), heads=Hk)
    yield from _matrix(f"{ours}attn_v", f"{attn}v_proj", (Hk * D, M))
    yield from _matrix(f"{ours}attn_output", f"{attn}o_proj", (M, H * D))


def _feed_forward(model: Language, ours: str, theirs: str) -> Iterator[Slot]:
    M, F = model.sizes.size("hidden_size"), model.sizes.size("intermediate_size")
    yield _norm(f"{ours}ffn_norm", f"{theirs}post_attention_layernorm", M)
    shapes = {"gate": (F, M), "up": (F, M), "down": (M, F)}
    if not model.n_experts:
        for part, shape in shapes.items():
            yield from _matrix(f"{ours}ffn_{part}", f"{theirs}mlp.{part}_proj", shape)
        return
    moe = f"{theirs}block_sparse_moe."
    router = (f"{moe}gate.weight",)
    yield Slot(f"{ours}ffn_gate_inp.weight", router, (model.n_experts, M), exact=True)
    for part, number in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        each = tuple(f"{moe}experts.{e}.{number}.weight" for e in range(model.n_experts))
        yield Slot(f"{ours}ffn_{part}_exps.weight", each, shapes[part])


def _norm(ours: str, theirs: str, width: int) -> Slot:
    return Slot(f"{ours}.weight", (f"{theirs}.weight",), (width,))


def _matrix(ours: str, theirs: str, shape: tuple[int, int], heads: int = 0) -> Iterator[Slot]:
    """With a bias, where the checkpoint has one."""
    yield Slot(f"{ours}.weight", (f"{theirs}.weight",), shape, heads)
    yield Slot(f"{ours}.bias", (f"{theirs}.bias",), shape[:1], heads, optional=True)


# ── the eyes ─────────────────────────────────────────────────────────────────────────────────────


def vision_slots(vision: Settings, width: int) -> Iterator[Slot]:
    """CLIP's tower, and the projector to rows of this width."""
    M, F, P = (vision.size(key) for key in ("hidden_size", "intermediate_size", "patch_size"))
    patches = (vision.size("image_size") // P) ** 2
    at = "embeddings."
    yield Slot("v.class_embd", (f"{at}class_embedding",), (M,))
    yield Slot("v.patch_embd.weight", (f"{at}patch_embedding.weight",), (M, 3, P, P), exact=True)
    place = (f"{at}position_embedding.weight",)
    yield Slot("v.position_embd.weight", place, (patches + 1, M), exact=True)
    yield from _both("v.pre_ln", "pre_layrnorm", (M,))  # sic
    for layer in range(vision.size("num_hidden_layers")):
        ours, theirs = f"v.blk.{layer}.", f"encoder.layers.{layer}."
        yield from _both(f"{ours}ln1", f"{theirs}layer_norm1", (M,))
        for part in ("q", "k", "v", "out"):
            yield from _both(f"{ours}attn_{part}", f"{theirs}self_attn.{part}_proj", (M, M))
        yield from _both(f"{ours}ln2", f"{theirs}layer_norm2", (M,))
        yield from _both(f"{ours}ffn_up", f"{theirs}mlp.fc1", (F, M))
        yield from _both(f"{ours}ffn_down", f"{theirs}mlp.fc2", (M, F))
    yield from _both("v.post_ln", "post_layernorm", (M,))
    yield from _both("mm.0", "linear_1", (width, M))
    yield from _both("mm.2", "linear_2", (width, width))


def _both(ours: str, theirs: str, shape: tuple[int, ...]) -> Iterator[Slot]:
    yield Slot(f"{ours}.weight", (f"{theirs}.weight",), shape)
    yield Slot(f"{ours}.bias", (f"{theirs}.bias",), shape[:1])


# ── rows that are rotated together ───────────────────────────────────────────────────────────────


def neighbours(rows: Array, d_head: int) -> Array:
    """Rows of a head's first and second half → by turns.  (n · D, …) → the same

    What is rotated together lies together in a GGUF file of this family; in a checkpoint it lies
    half a head apart.   Example: one head of 6 rows, 0 1 2 3 4 5 → 0 3 1 4 2 5
    """
    return _swapped(rows, (-1, 2, d_head // 2))


def halves(rows: Array, d_head: int) -> Array:
    """The way back: `halves(neighbours(rows, D), D)` are the rows.  (n · D, …) → the same"""
    return _swapped(rows, (-1, d_head // 2, 2))


def _swapped(rows: Array, parts: tuple[int, int, int]) -> Array:
    apart = rows.reshape(*parts, *rows.shape[1:])
    found: npt.NDArray[np.generic] = apart.swapaxes(1, 2)
    return np.ascontiguousarray(found).reshape(rows.shape)
