"""Blocks as routines of their own: compiled when somebody asks for it, kept on disk, shared.

    refollama warm MODEL ── warm ── BlockStep, for each shape of block ── C++ ──► ~/.cache/refollama
    any load afterwards ─── join ── blocks of that shape ── that routine, when tokens are written

On a GPU matrices stay as they lie packed, and the routine unpacks each weight where it multiplies
by it; its launches are recorded (`recorded.py`).
Nothing is compiled while somebody waits for an answer, and without a compiler, or before `warm`,
all goes on as it did. Prompts, gradients and whatever is done `with exactly():` take the blocks
as they are; so does a block whose parts were replaced or hooked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from refollama.fast.attention import attend_in_parts
from refollama.fast.gates import swiglu_in_parts
from refollama.fast.half import HalfLinear
from refollama.fast.kept import KeptLinear
from refollama.fast.laned import TOGETHER, LaneLinear, filled, together_for
from refollama.fast.pieces import apart, gathered
from refollama.fast.prepared import FEW, Made, PreparedLinear, may_differ
from refollama.fast.recorded import Recorded
from refollama.fast.routines import Routine, compile_to, folder, loaded, path_for
from refollama.fast.rows import name_of
from refollama.fast.slabs import columns, type_of
from refollama.fast.step import IN_LANES, PACKED, PRODUCTS, BlockInto, BlockStep, Shape
from refollama.kvcache import PIECE, Rows
from refollama.models.layers import Linear, attend, swiglu
from refollama.models.llama import Block, Llama, Step
from refollama.models.meter import Told, unheard

PACKED_ON = ("cuda",)  # where products are made of packed rows
CACHES = (torch.float16, torch.float32)  # what keys and values may be kept as
ATTEND, SWIGLU = (attend, attend_in_parts), (swiglu, swiglu_in_parts)  # what routines compute


class CompiledBlock(Block):
    """A block in place of another, with its parts, and with routines for one token of each row."""

    def __init__(
        self, block: Block, shape: Shape, routines: dict[tuple[torch.dtype, int], Routine]
    ) -> None:
        """routines: for this type of keys and values, and so many tokens together."""
        nn.Module.__init__(self)
        self.layer, self.config, self.sizes = block.layer, block.config, block.sizes
        self.attend, self.swiglu = block.attend, block.swiglu
        for name, part in block.named_children():
            self.add_module(name, part)
        self.shape, self.routines = shape, routines
        self._gather()
        self.train(block.training)

    def __getstate__(self) -> dict[str, object]:
        """A copy has no routine; it computes as the block that it was made of."""
        return {**self.__dict__, "routines": {}}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if not self._is_for(x, step) or not self._is_whole():
            return super().forward(x, step)
        together = FEW if self.shape.device == "cuda" else together_for(len(x))
        routine = self.routines.get((step.cache.cache.keys[self.layer].dtype, together))
        if routine is None:
            return super().forward(x, step)
        if len(x) <= together:
            return self._through(routine, x, step, 0, together)
        some = enumerate(torch.split(x, together))
        found = [self._through(routine, one, step, at * together, together) for at, one in some]
        return torch.cat(found)

    def _is_for(self, x: Tensor, step: Step) -> bool:
        if x.shape[1] != 1 or type(step.cache) is not Rows or not may_differ(x):
            return False
        if x.device.type != self.shape.device:
            return False
        learns = torch.is_grad_enabled()
        return not (learns and any(weight.requires_grad for *_, weight, _ in self._parts))

    def _gather(self) -> None:
        """What the routine stands for: parts, where their hooks and buffers are, their weights
        and how old these are."""
        self._parts = [
            (name, part, part._forward_hooks, part._forward_pre_hooks, part._buffers, weight, age)
            for name, part in self.named_children()
            for weight in (part.get_buffer("weight"),)
            for age in (-1 if weight.is_inference() else weight._version,)
        ]
        shape = shape_of(self, getattr(torch, self.shape.cache))
        if shape != self.shape:  # a weight of another size: the routine would read past its end
            self.routines = {}
            return
        self._made = [weight.contiguous() for weight in _weights(self)]

    def _is_whole(self) -> bool:
        """Are its parts, and its ways to attend and to gate, those that were compiled, and does
        nobody listen to them?  This is asked for every token: it goes past what makes attributes of
        modules slow."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        if self.attend not in ATTEND or self.swiglu not in SWIGLU:
            return False
        changed, modules = False, self._modules
        for name, part, hooks, pre_hooks, buffers, weight, age in self._parts:
            if modules[name] is not part or hooks or pre_hooks or buffers.get("bias") is not None:
                return False
            if buffers["weight"] is not weight or (age >= 0 and weight._version != age):
                changed = True
        if changed:
            self._gather()
        return bool(self.routines)

    def _through(
        self, routine: Routine, x: Tensor, step: Step, start: int, together: int
    ) -> Tensor:
        """These rows of a step, from `start` on.

        The routine knows sizes, not strides: all must lie in one piece, as a cache does.
        """
        memory = step.cache.cache
        keys, values = memory.keys[self.layer], memory.values[self.layer]
        if self.shape.device == "cuda":
            together = len(x)
        told = _told(step, start, together)
        [y] = routine([filled(x, together), *told, keys, values, *self._made])
        return y if len(y) == len(x) else y[: len(x)]


def _told(step: Step, start: int, together: int) -> Sequence[Tensor]:
    """What the routines of all blocks are told of these rows of a step, cos to visible, filled up
    to as many as go together: made by the first block and kept with the step, for as long as nobody
    gives it another of them."""
    told = step.cos, step.sin, step.positions, step.cache.slots, step.visible
    kept: dict[tuple[int, int], tuple[Sequence[Tensor], Sequence[Tensor]]]
    kept = vars(step).setdefault("told", {})
    before, made = kept.get((start, together), ((), ()))
    if not before or not all(map(is_, before, told)):
        cos, sin, positions, slots, visible = told
        rows = slice(start, start + together)
        slots = slots[rows].to(positions.device)
        some = cos[rows, 0, 0], sin[rows, 0, 0], positions[rows, 0], slots, visible[rows, 0]
        made = [filled(one, together) for one in some]
        kept[start, together] = told, made
    return made


def _weights(block: Block) -> Iterator[Tensor]:
    """In the order of `BlockInto.forward`, and so of `BlockStep.forward`: no GPU has lanes."""
    yield from (block.attn_norm.weight, block.ffn_norm.weight)
    yield from _pieces(block)
    for made in _others(block):
        yield from made


def _pieces(block: Block) -> list[Tensor]:
    """Of its matrices in lanes, which lie in them from now on."""
    parts = [part for part in _products(block) if isinstance(part, LaneLinear)]
    # A tensor of inference mode would stop whoever wants to go backwards later.
    with torch.inference_mode(mode=False), torch.no_grad():
        pieces = gathered([part.prepared() for part in parts])
    for part, made in zip(parts, apart(pieces, [part.form() for part in parts]), strict=True):
        part.prepare_now(made)
    return pieces


def _others(block: Block) -> Iterator[Made]:
    """What each of its products is made with, nothing where that lies in pieces."""
    for part in _products(block):
        yield () if isinstance(part, LaneLinear) else tuple(_made_of(part))


def _products(block: Block) -> list[Linear]:
    """Those parts that routines can multiply by."""
    parts = [getattr(block, name) for name in PRODUCTS]
    kinds = LaneLinear | HalfLinear | KeptLinear
    return [part for part in parts if isinstance(part, kinds) or _stays_packed(part)]


def _stays_packed(part: nn.Module) -> TypeGuard[Linear]:
    if type(part) is not Linear or part.weight.device.type not in PACKED_ON:
        return False
    return type_of(part) != ""


def _count(part: Linear) -> int:
    """How many tensors `_made_of` will give; they need not be made for it."""
    return len(part.form()) if isinstance(part, PreparedLinear) else 1


def _made_of(part: Linear) -> Made:
    return part.prepared() if isinstance(part, PreparedLinear) else (part.weight,)


# ── which blocks ──────────────────────────────────────────────────────────────────────────────


def shape_of(block: nn.Module, dtype: torch.dtype = CACHES[0]) -> Shape | None:
    """What its routine depends on; None for a block that has none: experts, adapters, biases,
    matrices that are unpacked slab by slab, and one head alone, whose sums threads would share."""
    if type(block) not in (Block, CompiledBlock):
        return None
    assert isinstance(block, Block)
    parts, config = _products(block), block.config
    if len(parts) < len(PRODUCTS) or any(part.bias is not None for part in parts):
        return None
    if block.sizes.n_heads == 1:
        return None
    return Shape(
        tuple((len(part.weight), columns(part)) for part in parts),
        tuple(_kind(part) for part in parts),
        tuple(_count(part) for part in parts),
        block.sizes.n_kv_heads,
        config.d_head,
        config.d_value,
        config.d_rotated,
        config.norm_eps,
        name_of(dtype),
        block.attn_norm.weight.device.type,
    )


def _kind(part: Linear) -> str:
    if _stays_packed(part):
        return PACKED + type_of(part)
    if isinstance(part, LaneLinear):
        return IN_LANES + part.kind
    return name_of(part.dtype if isinstance(part, HalfLinear) else torch.float32)


# ── which routines ────────────────────────────────────────────────────────────────────────────


def path_of(shape: Shape) -> Path:
    """Where the routine of this shape is kept."""
    return path_for(asdict(shape), shape.device)


def join(net: Llama) -> int:
    """Let every block have its routines, if there are any.  → how many have"""
    if not folder().is_dir():
        return 0
    count = 0
    for index, block in enumerate(net.blk):
        shape = shape_of(block)
        if shape is None:
            continue
        routines: dict[tuple[torch.dtype, int], Routine] = {}
        for dtype in CACHES:
            routines |= _routines(replace(shape, cache=name_of(dtype)))
        if routines:
            assert isinstance(block, Block)
            net.blk[index] = CompiledBlock(block, shape, routines)
            count += 1
    return count


def _routines(shape: Shape) -> dict[tuple[torch.dtype, int], Routine]:
    """For any number of tokens, or none at all: a block computes all of them alike."""
    found: dict[tuple[torch.dtype, int], Routine] = {}
    for together in _together(shape):
        routine = loaded(path_of(replace(shape, together=together)), shape.device)
        if routine is None:
            return {}
        whole = Recorded(routine) if shape.device == "cuda" else partial(_made_by, routine)
        found[getattr(torch, shape.cache), together] = whole
    return found


def _made_by(routine: Routine, given: list[Tensor]) -> list[Tensor]:
    """What `BlockInto` writes; each result has a place of its own."""
    place = torch.empty_like(given[0])
    routine([place, *given])
    return [place]


# ── compiling ─────────────────────────────────────────────────────────────────────────────────


def compile_blocks(net: Llama, dtype: torch.dtype, told: Told = unheard) -> int:
    """Compile what blocks of this net have no routine yet, and let them have it.

    dtype: of the cache. told: is called with the routines that are done, and those that there are.
    → the blocks that have routines now
    Raises: RefollamaError without a compiler, or if it fails.
    """
    there = shapes(net, dtype)
    told(0, len(there))
    for done, (shape, block) in enumerate(there.items()):
        if not path_of(shape).exists():
            on_stack = shape.device == "cpu"
            compile_to(path_of(shape), *_example(block, shape), shape.device, on_stack)
        told(done + 1, len(there))
    return join(net)


def shapes(net: Llama, dtype: torch.dtype) -> dict[Shape, Block]:
    """Those that routines are for, each with a block of that shape."""
    found = {}
    for block in net.blk:
        shape = shape_of(block, dtype)
        for together in _together(shape) if shape else ():
            assert isinstance(block, Block) and shape
            found[replace(shape, together=together)] = block
    return found


def _together(shape: Shape) -> tuple[int, ...]:
    """How many tokens its routines are for: on a GPU any number up to that."""
    return (FEW,) if shape.device == "cuda" else (1, TOGETHER)


def _example(block: Block, shape: Shape) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
    """What its routine computes, some arguments, and which of their sizes may be others."""
    B, slots, room, dtype = shape.together, 3, 2 * PIECE, getattr(torch, shape.cache)
    products, pieces = tuple(_others(block)), tuple(_pieces(block))
    fresh = (
        torch.randn(B, 1, shape.sizes[0][1]),
        *torch.randn(2, B, shape.d_rotated // 2),
        torch.arange(5, 5 + B),
        torch.arange(B) % slots,
        torch.ones(B, PIECE, dtype=torch.bool),
        torch.zeros(slots, shape.n_kv_heads, room, shape.d_head, dtype=dtype),
        torch.zeros(slots, shape.n_kv_heads, room, shape.d_value, dtype=dtype),
    )
    norms = block.attn_norm.weight, block.ffn_norm.weight
    given = (*(one.to(norms[0].device) for one in fresh), *norms)
    seen, had, places = (torch.export.Dim(name, min=1) for name in ("S", "slots", "room"))
    few = {0: torch.export.Dim("B", min=1, max=B)} if shape.device == "cuda" else {}
    fixed = tuple(tuple(None for _ in made) for made in products)
    memory = {0: had, 2: places}
    dynamic = (*(few,) * 5, {**few, 1: seen}, memory, memory, None, None)
    if shape.device == "cuda":
        return BlockStep(shape), (*given, products), (*dynamic, fixed)
    its = (None, dynamic, tuple(None for _ in pieces), fixed)
    return BlockInto(shape), (torch.empty_like(given[0]), given, pieces, products), its
