"""Which part of a net is replaced by which other?"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch import nn

from refollama.fast import fixed
from refollama.fast.attention import attend_in_parts
from refollama.fast.compiled import CACHES, CompiledBlock, compile_blocks, join, shapes
from refollama.fast.copies import kept
from refollama.fast.experts import FastExperts, matrices
from refollama.fast.gates import swiglu_in_parts
from refollama.fast.half import COPIED, NATIVE, HalfLinear
from refollama.fast.kept import KeptLinear
from refollama.fast.laned import ROUTINES, LaneLinear, compile_product, is_there
from refollama.fast.lanes import fits, form
from refollama.fast.nibbles import LINES, ROWS, Int4Linear
from refollama.fast.prepared import Made, PreparedLinear, has_avx2
from refollama.fast.routines import prune
from refollama.fast.rows import TILES, compile_rows, name_of, rows_are_there
from refollama.fast.slabs import SlabLinear, columns, type_of
from refollama.models.layers import Experts, Linear
from refollama.models.llama import Block, Llama
from refollama.models.meter import Count, Told, unheard

SMALL = 1 << 26  # bytes that all matrices of a net may take, to be kept unpacked
TINY = 1 << 24  # and for its answers to be written by one thread
FOR_COPIES = 0.5  # of the memory that is available
MEMINFO = Path("/proc/meminfo")

log = logging.getLogger(__name__)


def hasten(net: Llama, count: Count = unheard, sources: Sequence[Path] = ()) -> None:
    """Replace the matrices of a net by parts that are as good, and sooner done; blocks as well, if
    their like has been compiled.

    On a GPU and beside branches (LoRA) everything stays as it is. What would have to be copied, and
    finds no room, is unpacked slab by slab.
    count: is told the bytes of each matrix that is done.
    sources: the files that it was loaded from, of which copies may be kept on disk.
    """
    there = kept(sources) if sources else {}
    plain = {name: part for name, part in net.named_modules() if _can_be_replaced(part)}
    small = sum(map(unpacked_bytes, plain.values())) <= SMALL
    left = FOR_COPIES * available()
    for name, part in plain.items():
        left -= 0 if small else copied_bytes(part)
        make = KeptLinear if small else _by_type if left >= 0 else SlabLinear
        faster = FastExperts(part, make) if isinstance(part, Experts) else make(part)
        _put(net, name, faster.train(part.training))
        if not small:
            _make_ready(name, faster, there)
        count(part.weight.nbytes)
    for block in net.modules():
        if isinstance(block, Block):
            block.attend, block.swiglu = attend_in_parts, swiglu_in_parts
    join(net)
    if left < 0:
        log.warning("answers are slower than they could be: there is not enough memory for copies")


def _can_be_replaced(part: nn.Module) -> TypeGuard[Linear | Experts]:
    return type(part) in (Linear, Experts) and part.get_buffer("weight").device.type == "cpu"


def _put(net: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(net.get_submodule(owner), child, part)


def _by_type(part: Linear) -> Linear:
    kind = type_of(part)
    if _fits_lanes(part) and is_there(kind):
        return LaneLinear(part, kind)
    if _fits_nibbles(part, kind):
        return Int4Linear(part, kind)
    if kind in NATIVE or kind in COPIED:
        return HalfLinear(part, kind)
    return SlabLinear(part)


def _fits_nibbles(part: Linear, kind: str) -> bool:
    return has_avx2() and kind in LINES and len(part.weight) % ROWS == 0


def _fits_lanes(part: Linear) -> bool:
    return has_avx2() and fits(type_of(part), len(part.weight))


def _make_ready(name: str, part: nn.Module, there: Mapping[str, Made]) -> None:
    """What has to be packed anew is packed now, unless it was before."""
    if isinstance(part, FastExperts):
        for number, one in enumerate(part.each):
            _make_ready(f"{name}.{number}", one, there)
    if isinstance(part, PreparedLinear):
        part.prepare_now(there.get(name))


def available() -> float:
    """Bytes of main memory that may be had without swapping; ∞ where the system does not say."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())
    except OSError:
        return math.inf
    return int(found[1]) * 1024 if found else math.inf


def copied_bytes(part: Linear | Experts) -> float:
    """What `_by_type` will copy: lanes what they hold, nibbles 5 bits for each weight, or 10."""
    one, *others = matrices(part)
    kind = type_of(one)
    if _fits_lanes(one) and is_there(kind):
        laid = form(kind, len(one.weight), columns(one))
        return (1 + len(others)) * sum(dtype.itemsize * math.prod(size) for dtype, size in laid)
    bits = 16 if kind in COPIED else 0
    if _fits_nibbles(one, kind):
        bits = 5 if LINES[kind][1] == 4 else 10
    return (1 + len(others)) * len(one.weight) * columns(one) * bits / 8


# ── warming ───────────────────────────────────────────────────────────────────────────────────


def warm(net: Llama, dtype: torch.dtype = CACHES[0], told: Told = unheard) -> int:
    """Compile what this net has no routine for yet: products of its types, and its blocks; and let
    it have them.  What other versions have compiled is removed.

    dtype: of the cache. told: is called with the routines that are done, and those that there are.
    → the blocks that have routines now
    Raises: RefollamaError without a compiler, or if it fails; the net computes as it did then.
    """
    before = {name: part for name, part in net.named_modules() if _may_be_laned(part)}
    products = _jobs(net)
    for name, part in before.items():
        laned = FastExperts(part, _laned) if isinstance(part, FastExperts) else _laned(part)
        _put(net, name, laned.train(part.training))
    try:
        total = len(products) + len(shapes(net, dtype))
        for done, job in enumerate(products):
            told(done, total)
            job()
        for old in before.values():  # lanes take no more memory than what they stand for
            for one in _each(old):
                one.release()
        count = compile_blocks(net, dtype, lambda done, _: told(len(products) + done, total))
        for name in before:
            _make_ready(name, net.get_submodule(name), {})
    except BaseException:
        for name, part in before.items():
            _put(net, name, part)
        raise
    _join_rows(net)
    prune()
    return count


def lacking(net: Llama) -> list[str]:
    """The types of its matrices whose products could be compiled, and are not: "Q4_0", or
    "float16" of those that stay in 16 bits."""
    kinds, by_rows, in_fixed_point = _lacking(net)
    return [*kinds, *sorted({*by_rows, *in_fixed_point})]


def _lacking(net: Llama) -> tuple[list[str], list[str], list[str]]:
    """Types in lanes, numbers of rows, and numbers of rows that prompts go by in fixed point."""
    parts = [one for part in net.modules() if _may_be_laned(part) for one in _each(part)]
    kinds = {type_of(one) for one in parts if _fits_lanes(one)}
    halves = [one for one in _halves(net) if not _fits_lanes(one)]
    by_rows = {name_of(one.dtype) for one in halves if one.in_pairs()}
    in_fixed_point = {name_of(one.dtype) for one in halves if one.goes_in_fixed_point()}
    return (
        sorted(kind for kind in kinds if not is_there(kind)),
        sorted(number for number in by_rows if not rows_are_there(number)),
        sorted(number for number in in_fixed_point if not fixed.is_there(number)),
    )


def _jobs(net: Llama) -> list[Callable[[], None]]:
    """What compiles each routine that is lacking."""
    kinds, by_rows, in_fixed_point = _lacking(net)
    found: list[Callable[[], None]] = []
    found += [partial(compile_product, kind, *which) for kind in kinds for which in ROUTINES]
    found += [partial(compile_rows, number, *tile) for number in by_rows for tile in TILES]
    for number in in_fixed_point:
        found += [partial(fixed.compile_largest, number), partial(fixed.compile_laying, number)]
    if in_fixed_point:
        found += [fixed.compile_rounding, fixed.compile_product]
    return found


def _join_rows(net: nn.Module) -> None:
    for one in _halves(net):
        one.join()


def _halves(net: nn.Module) -> list[HalfLinear]:
    parts = (one for part in net.modules() for one in _each(part))
    return [one for one in parts if isinstance(one, HalfLinear)]


def has_routines(net: Llama) -> bool:
    """Does it use anything that was compiled?"""
    parts = (one for part in net.modules() for one in (part, *_each(part)))
    return any(
        isinstance(one, LaneLinear | CompiledBlock)
        or (isinstance(one, HalfLinear) and one.has_routines)
        for one in parts
    )


def _each(part: nn.Module) -> list[PreparedLinear]:
    """It, or each of some experts, if they were prepared."""
    each = part.each if isinstance(part, FastExperts) else [part]
    return [one for one in each if isinstance(one, PreparedLinear)]


def _may_be_laned(part: nn.Module) -> TypeGuard[PreparedLinear | FastExperts]:
    kinds = Int4Linear | HalfLinear
    return any(isinstance(one, kinds) and _fits_lanes(one) for one in _each(part))


def _laned(part: Linear) -> Linear:
    return LaneLinear(part, type_of(part)) if _fits_lanes(part) else _by_type(part)


# ── what it costs ─────────────────────────────────────────────────────────────────────────────


def threads_for_writing(net: nn.Module) -> int:
    """How many threads should write an answer, one token at a time; 0: as many as torch chooses.

    Of a net whose matrices take some megabytes each product is done before another thread has
    begun; and whoever hands the tokens on has a core to itself.
    """
    kept = [part for part in net.modules() if isinstance(part, KeptLinear)]
    return 1 if kept and sum(map(unpacked_bytes, kept)) <= TINY else 0


def more_bytes(net: nn.Module) -> int:
    """What the fast parts of a net take beside its weights."""
    kinds = PreparedLinear | FastExperts
    return sum(part.more_bytes for part in net.modules() if isinstance(part, kinds))


def unpacked_bytes(part: Linear | Experts) -> int:
    """What a matrix takes as float32, or all of a stack."""
    one, *others = matrices(part)
    return (1 + len(others)) * len(one.weight) * columns(one) * torch.float32.itemsize
