"""The tensors of a GGUF file as a checkpoint has them: unpacked, under its names, in its order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from refollama.convert.checkpoint import FILE_TYPES
from refollama.convert.names import Slot, halves
from refollama.convert.numbers import FLOATS, changed
from refollama.errors import FormatError, UnsupportedModel
from refollama.models.load import IGNORED
from refollama.weights import QuantTensor, open_gguf, open_weights
from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.gguf import GGUF, Typed, ValueType
from refollama.weights.lora import Adapter, Pair, open_adapter
from refollama.weights.safetensors import DTYPES, Array, Made

EXPERTS = 3  # dimensions of a tensor that holds a matrix for each
AT_ONCE = 1 << 22  # weights that are unpacked at once
SHOWN = 3  # names in an error message
READ_ELSEWHERE = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
APART = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)")  # an expert, in files of 2023
TABLE, OUTPUT = "token_embd.weight", "output.weight"


def majority(file: GGUF) -> str:
    """The float type of most weights; F16 for those that are packed."""
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        name = BLOCKS[info.type].name
        sizes[name if name in FLOATS else "F16"] += math.prod(info.shape)
    return sizes.most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class Source:
    """An open file, and the adapters that change it."""

    file: GGUF
    weights: Mapping[str, QuantTensor]  # the file's, and perhaps an output of its own
    adapters: Sequence[Adapter] = ()

    @classmethod
    def of(cls, path: Path, adapters: Sequence[Path] = ()) -> Source:
        """Raises: NotFound, FormatError, StoreError; UnsupportedModel for an adapter of another."""
        file = open_gguf(path)
        if not file.tensors:
            raise FormatError(f"{path.name}: there are no tensors in it, so it is no whole model")
        opened = [open_adapter(one, file) for one in adapters]
        return cls(file, _parted(open_weights(file), opened), opened)

    @property
    def tied(self) -> bool:
        """Is the table of the first layer that of the last, too?"""
        return OUTPUT not in self.weights

    @property
    def nbytes(self) -> int:
        """Of all tensors, as they lie in the file."""
        return sum(tensor.data.nbytes for tensor in self.weights.values())

    def made(self, slots: Iterable[Slot], dtype: str) -> dict[str, Made]:
        """All tensors of the slots, by their names in a checkpoint.

        Raises: FormatError for one that is missing or of another shape; UnsupportedModel for one
        that no slot asks for, and for a change that is in none of them.
        """
        found: dict[str, Made] = {}
        used: set[str] = set(READ_ELSEWHERE)
        for slot in slots:
            names = self._names(slot)
            if slot.optional and not names:
                continue
            found |= self._slot(slot, names, dtype)
            used.update(names)
        left = sorted(n for n in self.weights if n not in used and not n.endswith(IGNORED))
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise UnsupportedModel(
                f"{self.file.path.name}: tensors that transformers has no place for: "
                f"{', '.join(left[:SHOWN])}{more}"
            )
        self.check_added(used)
        return found

    def check_added(self, names: Iterable[str]) -> None:
        """Raises: UnsupportedModel for an adapter's change that is in none of these tensors."""
        places = {_place(name)[0] for name in names}
        for adapter in self.adapters:
            if lost := sorted(adapter.pairs.keys() - places):
                raise UnsupportedModel(
                    f"{adapter.file}: its change of {lost[0]}.weight has no place in what is "
                    f"exported of {self.file.path.name}"
                )

    def _names(self, slot: Slot) -> list[str]:
        """The tensor of this slot, or one for each expert, as files of 2023 have them."""
        each = [slot.name.replace("_exps", f".{e}") for e in range(len(slot.sources))]
        ways = ([slot.name], each)
        return next((names for names in ways if all(n in self.weights for n in names)), [])

    def _slot(self, slot: Slot, names: Sequence[str], dtype: str) -> dict[str, Made]:
        if not names:
            raise FormatError(f"{self.file.path.name}: tensor {slot.name} is missing")
        parts = [part for name in names for part in self.parts(name, slot)]
        if len(parts) != len(slot.sources):
            raise self._misshapen(names[0], slot)
        return {
            source: Made(dtype, slot.shape, _Rows(part, slot, dtype))
            for source, part in zip(slot.sources, parts, strict=True)
        }

    def parts(self, name: str, slot: Slot) -> Iterator[Part]:
        """The matrices in one tensor: several for experts that are stacked."""
        tensor, size = self.weights[name], math.prod(slot.shape)
        many = math.prod(tensor.shape) // size
        wide = slot.shape[-1] if len(slot.shape) in (1, 2) else tensor.shape[-1]
        if many * size != math.prod(tensor.shape) or tensor.shape[-1] != wide:
            raise self._misshapen(name, slot)
        matrices = tensor.data.reshape(many, -1, tensor.data.shape[-1])
        for number, rows in enumerate(matrices):
            yield Part(self.file.path.name, rows, tensor, self.changes(name, number))

    def changes(self, name: str, number: int = 0) -> list[Pair]:
        """What adapters add to a tensor or, of experts that are stacked, to this one."""
        place, expert = _place(name)
        found = [one.pairs[place] for one in self.adapters if place in one.pairs]
        return [_of(pair, number if expert is None else expert) for pair in found]

    def _misshapen(self, name: str, slot: Slot) -> FormatError:
        have, want = (" × ".join(map(str, s)) for s in (self.weights[name].shape, slot.shape))
        return FormatError(
            f"{self.file.path.name}: tensor {name} has shape {have}; expected {want}"
        )


def _parted(
    weights: Mapping[str, QuantTensor], adapters: Sequence[Adapter]
) -> Mapping[str, QuantTensor]:
    """A tied model's table twice, if an adapter changes one use of it: the other stays."""
    is_changed = any({"token_embd", "output"} & one.pairs.keys() for one in adapters)
    if OUTPUT in weights or not is_changed:
        return weights
    return {**weights, OUTPUT: replace(weights[TABLE], name=OUTPUT)}


def _place(name: str) -> tuple[str, int | None]:
    """Where an adapter has the change of a tensor; it knows experts as a stack, however they lie.

    Example: "blk.0.ffn_down.1.weight" → "blk.0.ffn_down_exps", 1
    """
    name = name.removesuffix(".weight")
    expert = APART.fullmatch(name)
    return (f"{expert[1]}_exps", int(expert[2])) if expert else (name, None)


def _of(pair: Pair, number: int) -> Pair:
    """The change of one matrix, where there are several in a tensor."""
    a, b, scale = pair
    return Pair(a[number], b[number], scale) if a.dim() > 2 else pair


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix in a tensor: its packed rows, and the low-rank changes that are added to it."""

    file: str  # for messages
    rows: Tensor  # (n, row_bytes) uint8
    tensor: QuantTensor
    changes: Sequence[Pair] = ()

    @property
    def columns(self) -> int:
        """Of a row."""
        return self.tensor.shape[-1] if self.tensor.shape else 1

    def values(self, multiple: int = 1) -> Iterator[Array]:
        """Some rows at a time, a multiple of `multiple`.  → (r, columns) float32"""
        step = max(1, AT_ONCE // self.columns // multiple) * multiple
        for start in range(0, len(self.rows), step):
            found = self.tensor.layout.unpack_rows(self.rows[start : start + step])
            for a, b, scale in self.changes:
                found = found + scale * (b[start : start + step] @ a)
            yield found.numpy()

    def cast(self, values: Array, type: str) -> Array:
        """Some of the values as another type.  Raises: UnsupportedModel if one is too large."""
        try:
            return changed(values, "F32", type)
        except UnsupportedModel as problem:
            raise UnsupportedModel(f"{self.file}: tensor {self.tensor.name}: {problem}") from None


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a checkpoint has of a part, made when it is asked for."""

    part: Part
    slot: Slot
    dtype: str

    def __iter__(self) -> Iterator[Array]:
        heads, shape = self.slot.heads, self.slot.shape
        d_head = shape[0] // heads if heads else 1
        together = d_head * math.prod(shape[1:]) // self.part.columns
        for values in self.part.values(max(1, together)):
            rows = values.reshape(-1, *shape[1:])
            yield self.part.cast(halves(rows, d_head) if heads else rows, self.dtype)


def with_rows(one: Made, count: int) -> Made:
    """A table with so many rows of zeros behind its own."""
    empty = np.zeros((count, *one.shape[1:]), DTYPES[one.dtype])
    return Made(one.dtype, (one.shape[0] + count, *one.shape[1:]), chain(one.pieces, [empty]))


def filled(value: float, shape: tuple[int, ...], dtype: str) -> Made:
    """A tensor of one value."""
    return Made(dtype, shape, [changed(np.full(shape, value, np.float32), "F32", dtype)])


# ── as GGUF ──────────────────────────────────────────────────────────────────────────────────────


def unpacked(
    source: Source, dtype: str | None, told: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...], Iterable[Array]]]]:
    """Metadata and tensors of the same model, as `write_gguf` takes them.

    dtype: of matrices; vectors stay F32. None: all stays what it is; what an adapter changes is
    F16, if it was packed.
    """
    file, done = source.file, 0
    source.check_added(source.weights)
    tensors: dict[str, tuple[int, tuple[int, ...], Iterable[Array]]] = {}
    metadata = {key: file.typed(key) for key in file.metadata if key != "general.alignment"}
    if dtype:
        metadata["general.file_type"] = Typed(FILE_TYPES[dtype], ValueType.UINT32)
    for name, tensor in source.weights.items():
        type = _type(tensor, dtype, bool(source.changes(name)))
        pieces = _pieces(source, tensor, type, partial(_after, told, done))
        tensors[name] = (TYPE_ID[type], tensor.shape, pieces)
        done += tensor.data.nbytes
    return metadata, tensors


def _after(told: Callable[[int], None], before: int, done: int) -> None:
    told(before + done)


def _type(tensor: QuantTensor, dtype: str | None, is_changed: bool) -> str:
    plain = tensor.type in FLOATS
    if dtype and (plain or tensor.type not in ("F64", "I8", "I16", "I32", "I64")):
        return dtype if len(tensor.shape) > 1 else "F32"
    return "F16" if is_changed and not plain else tensor.type


def _pieces(
    source: Source, tensor: QuantTensor, type: str, told: Callable[[int], None]
) -> Iterator[Array]:
    shape = tensor.shape[1:] if len(tensor.shape) == EXPERTS else tensor.shape
    done, slot = 0, Slot(tensor.name, (), shape)
    for part in source.parts(tensor.name, slot):
        if tensor.type == type and not part.changes:
            yield part.rows.numpy()
        else:
            yield from (part.cast(values, type) for values in part.values())
        told(done := done + part.rows.nbytes)
