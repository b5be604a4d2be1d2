"""Blocks as routines of their own: compiled when somebody asks for it, kept on disk, shared.

    refollama warm MODEL ── warm ── BlockStep, for each shape of block ── C++ ──► ~/.cache/refollama
    any load afterwards ─── join ── blocks of that shape ── that routine, when one token is written

On a GPU matrices stay as they lie packed, and the routine unpacks each weight where it multiplies
by it; its launches are recorded (`recorded.py`).
Nothing is compiled while somebody waits for an answer, and without a compiler, or before `warm`,
all goes on as it did. Prompts, gradients and whatever is done `with exactly():` take the blocks
as they are; so does a block whose parts were replaced or hooked.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from refollama.errors import RefollamaError
from refollama.fast import step as source
from refollama.fast.half import HalfLinear
from refollama.fast.kept import KeptLinear
from refollama.fast.nibbles import Int4Linear
from refollama.fast.prepared import FEW, Made, PreparedLinear, may_differ
from refollama.fast.recorded import Recorded
from refollama.fast.slabs import columns, type_of
from refollama.fast.step import KEPT, NIBBLES, PACKED, PRODUCTS, BlockStep, Shape
from refollama.kvcache import PIECE, Rows
from refollama.models.layers import Linear
from refollama.models.llama import Block, Llama, Step
from refollama.models.meter import Told, unheard

Routine = Callable[[list[Tensor]], list[Tensor]]
PACKED_ON = ("cuda",)  # where products are made of packed rows
CACHES = (torch.float16, torch.float32)  # what keys and values may be kept as
CPUINFO = Path("/proc/cpuinfo")
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"

log = logging.getLogger(__name__)


class CompiledBlock(Block):
    """A block in place of another, with its parts, and with a routine for single tokens."""

    def __init__(self, block: Block, shape: Shape, routines: dict[torch.dtype, Routine]) -> None:
        nn.Module.__init__(self)
        self.layer, self.config, self.sizes = block.layer, block.config, block.sizes
        self.attend = block.attend
        for name, part in block.named_children():
            self.add_module(name, part)
        self.shape, self.routines = shape, routines
        self._gather()
        self.train(block.training)

    def __getstate__(self) -> dict[str, object]:
        """A copy has no routine; it computes as the block that it was made of."""
        return {**self.__dict__, "routines": {}}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        routine = self._routine_for(x, step)
        if routine is None or not self._is_whole():
            return super().forward(x, step)
        at_once = FEW if self.shape.at_once else 1
        if len(x) <= at_once:
            y = self._through(routine, x, step, slice(None))
        else:
            rows = range(0, len(x), at_once)
            y = torch.cat([self._through(routine, x, step, slice(r, r + at_once)) for r in rows])
        if self.shape.may_overflow and not y.isfinite().all():
            return super().forward(x, step)  # what float16 cannot hold, float32 can
        return y

    def _routine_for(self, x: Tensor, step: Step) -> Routine | None:
        if x.shape[1] != 1 or type(step.cache) is not Rows or not may_differ(x):
            return None
        if x.device.type != self.shape.device:
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for *_, weight, _ in self._parts):
            return None
        return self.routines.get(step.cache.cache.keys[self.layer].dtype)

    def _gather(self) -> None:
        """What the routine stands for: parts, their weights and how old these are."""
        self._parts = [
            (name, part, weight, -1 if weight.is_inference() else weight._version)
            for name, part in self.named_children()
            for weight in (part.get_buffer("weight"),)
        ]
        shape = shape_of(self, getattr(torch, self.shape.cache))
        if shape != self.shape:  # a weight of another size: the routine would read past its end
            self.routines = {}
            return
        self._made = [weight.contiguous() for weight in _weights(self)]

    def _is_whole(self) -> bool:
        """Are its parts those of the beginning, and does nobody listen to them?  This is asked for
        every token: it goes past what makes attributes of modules slow."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        changed = False
        for name, part, weight, age in self._parts:
            if self._modules[name] is not part or part._forward_hooks or part._forward_pre_hooks:
                return False
            changed |= part._buffers["weight"] is not weight
            changed |= age >= 0 and weight._version != age
            if part._buffers.get("bias") is not None:
                return False
        if changed:
            self._gather()
        return bool(self.routines)

    def _through(self, routine: Routine, x: Tensor, step: Step, rows: slice) -> Tensor:
        """The routine knows sizes, not strides: all must lie in one piece, as a cache does."""
        memory = step.cache.cache
        keys, values = memory.keys[self.layer], memory.values[self.layer]
        given = [x[rows, 0].contiguous(), *_shared(step, rows), keys, values, *self._made]
        [y] = routine(given)
        return y[:, None]


def _shared(step: Step, rows: slice) -> Sequence[Tensor]:
    """What the routines of all blocks are told of these rows of a step, cos to visible: made by
    the first block and kept with the step, for as long as nobody gives it another of them."""
    told = step.cos, step.sin, step.positions, step.cache.slots, step.visible
    kept: dict[int | None, tuple[Sequence[Tensor], Sequence[Tensor]]]
    kept = vars(step).setdefault("told", {})
    before, made = kept.get(rows.start, ((), ()))
    if not before or any(one is not other for one, other in zip(before, told, strict=True)):
        cos, sin, positions, slots, visible = told
        slots = slots[rows].to(positions.device)
        some = cos[rows, 0, 0], sin[rows, 0, 0], positions[rows, 0], slots, visible[rows, 0]
        made = [one.contiguous() for one in some]
        kept[rows.start] = told, made
    return made


def _weights(block: Block) -> Iterator[Tensor]:
    """In the order of `BlockStep.forward`."""
    yield from (block.attn_norm.weight, block.ffn_norm.weight)
    for part in _products(block):
        yield from _made_of(part)


def _products(block: Block) -> list[Linear]:
    """Those parts that routines can multiply by."""
    parts = [getattr(block, name) for name in PRODUCTS]
    return [part for part in parts if isinstance(part, PreparedLinear) or _stays_packed(part)]


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
    """What its routine depends on; None for a block that has none: experts, adapters, biases, and
    matrices that are unpacked slab by slab."""
    if type(block) not in (Block, CompiledBlock):
        return None
    assert isinstance(block, Block)
    parts, config = _products(block), block.config
    if len(parts) < len(PRODUCTS) or any(part.bias is not None for part in parts):
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
        _name(dtype),
        block.attn_norm.weight.device.type,
    )


def _kind(part: Linear) -> str:
    if _stays_packed(part):
        return PACKED + type_of(part)
    kinds: dict[type[Linear], str] = {KeptLinear: KEPT, Int4Linear: NIBBLES}
    return _name(part.dtype) if isinstance(part, HalfLinear) else kinds[type(part)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ── on disk ───────────────────────────────────────────────────────────────────────────────────


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept, that can be made anew."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refollama" / kind


def folder() -> Path:
    """Where routines are kept."""
    return cache_folder("blocks")


def is_ours(path: Path) -> bool:
    """May nobody but its user have written it?  Raises: OSError if it is not there."""
    stat = path.stat()
    return not hasattr(os, "getuid") or (stat.st_uid == os.getuid() and not stat.st_mode & 0o022)


def path_of(shape: Shape) -> Path:
    """Of this shape, for this processor, by this torch and this code."""
    return folder() / f"{_maker(shape.device)}-{_digest(asdict(shape))}.pt2"


@cache
def _maker(device: str = "cpu") -> str:
    if device == "cuda":
        properties = [torch.cuda.get_device_name(), torch.version.cuda]
        return _digest([*properties, torch.__version__, inspect.getsource(source)])
    processor = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return _digest([processor, torch.__version__, inspect.getsource(source)])


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _loaded(path: Path, device: str = "cpu") -> Routine | None:
    """The routine of a file; None if there is none that may be trusted and works."""
    if not path.exists():
        return None
    if not is_ours(path):
        log.warning("%s is left alone: others than its user may write it", path)
        return None
    try:
        # What torch's own reader of packages is built on; that takes two seconds to import.
        # For a recording it must not ask the GPU, between its steps, whether it has ended.
        alone = device == "cuda"
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", alone, 1, -1)
    except (RuntimeError, AttributeError) as problem:
        log.warning("%s is no routine of a block: %s", path, str(problem).split("\n")[0])
        return None
    run: Routine = loader.run
    return run


def join(net: Llama) -> int:
    """Let every block have its routine, if there is one.  → how many have"""
    if not folder().is_dir():
        return 0
    count = 0
    for index, block in enumerate(net.blk):
        shape = shape_of(block)
        if shape is None:
            continue
        shapes = {dtype: replace(shape, cache=_name(dtype)) for dtype in CACHES}
        found = {dtype: _loaded(path_of(one), one.device) for dtype, one in shapes.items()}
        routines = {dtype: one for dtype, one in found.items() if one is not None}
        if shape.device == "cuda":
            routines = {dtype: Recorded(one) for dtype, one in routines.items()}
        if routines:
            assert isinstance(block, Block)
            net.blk[index] = CompiledBlock(block, shape, routines)
            count += 1
    return count


# ── compiling ─────────────────────────────────────────────────────────────────────────────────


def warm(net: Llama, dtype: torch.dtype = CACHES[0], told: Told = unheard) -> int:
    """Compile what blocks of this net have no routine yet, and let them have it.

    dtype: of the cache. told: is called with the shapes that are done, and those that there are.
    What other versions have left is removed. → the blocks that have a routine now
    Raises: RefollamaError without a compiler, or if it fails.
    """
    blocks = {shape: block for block in net.blk if (shape := shape_of(block, dtype)) is not None}
    told(0, len(blocks))
    for done, (shape, block) in enumerate(blocks.items()):
        if not path_of(shape).exists():
            assert isinstance(block, Block)
            _compile(block, shape)
            _loaded.cache_clear()
        told(done + 1, len(blocks))
    makers = tuple(map(_maker, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)))
    for old in folder().glob("*.pt2") if blocks else ():
        if not old.name.startswith(makers):
            old.unlink(missing_ok=True)
    return join(net)


def _compile(block: Block, shape: Shape) -> None:
    """The file appears whole, or not at all."""
    _check_compiler()
    given, dynamic = _example(block, shape)
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder()) as scratch, _quietly(scratch):
        try:
            exported = torch.export.export(BlockStep(shape), given, dynamic_shapes=dynamic)
            made = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(Path(scratch) / "block.pt2"),
                inductor_configs={"cpp.dynamic_threads": True},
            )
        except Exception as problem:  # a compiler says much; the log has all of it
            log.debug("compiling failed", exc_info=True)
            last = str(problem).strip().split("\n")[-1]
            raise RefollamaError(f"a block could not be compiled: {last}") from problem
        os.chmod(made, 0o600)
        os.replace(made, path_of(shape))


def _check_compiler() -> None:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        raise RefollamaError(
            "there is no C++ compiler: install g++ (Debian, Ubuntu: apt install g++), or name one "
            "in the environment variable CXX"
        ) from None


def _example(block: Block, shape: Shape) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Arguments for `BlockStep.forward`, and which of their sizes may be others."""
    B, slots, room, dtype = 2, 3, 2 * PIECE, getattr(torch, shape.cache)
    products = tuple(tuple(_made_of(part)) for part in _products(block))
    fresh = (
        torch.randn(B, shape.sizes[0][1]),
        *torch.randn(2, B, shape.d_rotated // 2),
        torch.tensor([5, 9]),
        torch.tensor([0, 2]),
        torch.ones(B, PIECE, dtype=torch.bool),
        torch.zeros(slots, shape.n_kv_heads, room, shape.d_head, dtype=dtype),
        torch.zeros(slots, shape.n_kv_heads, room, shape.d_value, dtype=dtype),
    )
    norms = block.attn_norm.weight, block.ffn_norm.weight
    given = (*(one.to(norms[0].device) for one in fresh), *norms, products)
    few = torch.export.Dim("B", min=1, max=FEW)
    seen, had, places = (torch.export.Dim(name, min=1) for name in ("S", "slots", "room"))
    rows: tuple[object, ...] = ({0: few},) * 5
    fixed = tuple(tuple(None for _ in made) for made in products)
    memory = {0: had, 2: places}
    return given, (*rows, {0: few, 1: seen}, memory, memory, None, None, fixed)


@contextmanager
def _quietly(scratch: str) -> Iterator[None]:
    """What torch compiles on the way lies in this folder; its advice is for others."""
    before = os.environ.get(INDUCTOR_CACHE)
    os.environ[INDUCTOR_CACHE] = scratch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            os.environ.pop(INDUCTOR_CACHE)
        else:
            os.environ[INDUCTOR_CACHE] = before
