"""How does a model become smaller?  The tensors of a GGUF file, packed as other types.

    source   rows of one tensor, mapped → values → packed → the new file
                                            └─ unpacked again: the squared error of each tensor

One piece of one tensor is in memory at a time. Which tensor gets which type: `weights/mixes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refollama.errors import BadRequest, FormatError, UnsupportedModel
from refollama.models.config import ARCHITECTURES
from refollama.weights import QuantTensor, open_weights, write_gguf
from refollama.weights.blocks import BLOCKS, TYPE_ID, nbytes
from refollama.weights.gguf import DEFAULT_ALIGNMENT, GGUF, TensorInfo, Typed, ValueType, encoded
from refollama.weights.importance import OUTPUT, Importance
from refollama.weights.mixes import MIXES, PLAIN, Traits, file_type, tensor_type, word
from refollama.weights.quants import LAYOUTS, Layout

Heard = Callable[[int], None]  # how many weights are packed by now
Pieces = Iterator[npt.NDArray[np.uint8]]

AT_ONCE = 1 << 16  # weights for each thread: what a search puts between fits into its cache
VERSION = 2  # of the block layouts: `general.quantization_version`


def _unheard(done: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one tensor."""

    name: str
    shape: tuple[int, ...]
    old: str  # type
    new: str

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """How many stand in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Its size in the new file."""
        return nbytes(TYPE_ID[self.new], self.shape)


@dataclass(frozen=True)
class Quantising:
    """A file that is to be packed as another one.  Made by `plan`."""

    file: GGUF
    type: str  # of the new file, such as "Q4_K_M"
    changes: tuple[Change, ...]
    importance: Importance | None = None
    errors: dict[str, float] = field(default_factory=dict)  # mean squares, of what is packed by now

    @property
    def source(self) -> str:
        """The type of most of the old weights."""
        many: dict[str, int] = {}
        for change in self.changes:
            many[change.old] = many.get(change.old, 0) + change.weights
        return max(many, key=many.__getitem__, default="F32")

    @property
    def tied(self) -> bool:
        """Is the embedding the output, too?"""
        return OUTPUT not in self.file.tensors

    @property
    def weights(self) -> int:
        """How many there are in all tensors."""
        return sum(change.weights for change in self.changes)

    @property
    def nbytes(self) -> int:
        """The size of the new file."""
        sizes = [change.nbytes for change in self.changes]
        return len(next(self.encoded())) + sum(size + -size % DEFAULT_ALIGNMENT for size in sizes)

    def write(self, target: Path, told: Heard = _unheard) -> None:
        """The new file; it appears under its name entirely or not at all.

        Raises: FormatError if a value is not finite, before or after; StoreError.
        """
        write_gguf(target, self._metadata(), self._tensors(told))

    def encoded(self, told: Heard = _unheard) -> Iterator[bytes | memoryview]:
        """The bytes of the new file in pieces.  Raises: FormatError, as `write` does."""
        return encoded(self._metadata(), self._tensors(told))

    def _metadata(self) -> dict[str, Any]:
        return {key: self.file.typed(key) for key in self.file.metadata} | {
            "general.file_type": Typed(MIXES[self.type].number, ValueType.UINT32),
            "general.quantization_version": Typed(VERSION, ValueType.UINT32),
        }

    def _tensors(self, told: Heard) -> dict[str, tuple[int, tuple[int, ...], Pieces]]:
        weights = open_weights(self.file)
        before = accumulate((change.weights for change in self.changes), initial=0)
        return {
            change.name: (
                TYPE_ID[change.new],
                change.shape,
                self._packed(change, weights, partial(_told_from, told, start)),
            )
            for change, start in zip(self.changes, before, strict=False)
        }

    def _packed(self, change: Change, weights: Mapping[str, QuantTensor], told: Heard) -> Pieces:
        """The bytes of one tensor, some rows at a time; nothing of it is there before its turn."""
        tensor, new = weights[change.name], LAYOUTS[TYPE_ID[change.new]]
        done, total = 0, 0.0
        for rows, columns in self._pieces(change, tensor):
            packed, error = repacked(tensor.layout, new, rows, columns)
            yield packed.numpy()
            done, total = done + rows.shape[0] * change.columns, total + error
            told(done)
        self.errors[change.name] = self._checked(change, total / change.weights)

    def _pieces(
        self, change: Change, tensor: QuantTensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Rows of one matrix, (r, row_bytes), and how much their columns matter, (cols,)."""
        step = max(1, AT_ONCE * torch.get_num_threads() // change.columns)
        many = math.prod(change.shape[:-2])  # experts lie in one tensor
        wanted = self._wanted(change) or [None] * many
        matrices = tensor.data.view(many, -1, tensor.data.shape[-1])
        for matrix, columns in zip(matrices, wanted, strict=True):
            for rows in matrix.split(step):
                yield rows, columns

    def _wanted(self, change: Change) -> list[Tensor | None]:
        """Of each matrix in a tensor; nothing where nothing is known, or nothing is to be done."""
        found = self.importance and self.importance.of(change.name, change.shape, self.tied)
        if found is None or change.old == change.new:
            return []
        return list(torch.from_numpy(found).view(-1, change.columns))

    def _checked(self, change: Change, error: float) -> float:
        if math.isfinite(error):
            return error
        raise FormatError(
            f"{self.file.path.name}: tensor '{change.name}' has values that are not finite, "
            f"or too large for {change.new}"
        )


def _told_from(told: Heard, start: int, done: int) -> None:
    told(start + done)


def repacked(
    old: Layout, new: Layout, rows: Tensor, columns: Tensor | None
) -> tuple[Tensor, float]:
    """Packed rows of the other type, and the sum of squared errors: NaN if any is not finite."""
    values = old.unpack_rows(rows)
    packed = rows if old is new else new.pack_rows(values, columns)
    off = new.unpack_rows(packed).sub(values)
    return packed, off.square_().sum().item()


# ── what is to be done ───────────────────────────────────────────────────────────────────────────


def plan(
    file: GGUF, type: str, *, again: bool = False, importance: Importance | None = None
) -> Quantising:
    """How a file is to be packed as a type such as "Q4_K_M".

    again: may a tensor be packed that is packed already?  Its errors add up.
    importance: how much each column matters; errors are made where they matter least.
    Raises: BadRequest for an unknown type, and for what is packed already; UnsupportedModel for
    files that are no language models; FormatError for an importance matrix of another model.
    """
    type = file_type(type)
    _check_model(file)
    traits = Traits.of(file.metadata, tuple(file.tensors))
    changes = tuple(_change(tensor, type, traits) for tensor in file.tensors.values())
    for change in changes:
        _check_source(file, change, again)
        if importance is not None:
            importance.of(change.name, change.shape, traits.tied)
    return Quantising(file, type, changes, importance)


def _change(tensor: TensorInfo, type: str, traits: Traits) -> Change:
    old = BLOCKS[tensor.type].name
    new = tensor_type(tensor.name, tensor.shape, old, type, traits)
    return Change(tensor.name, tensor.shape, old, new)


def _check_model(file: GGUF) -> None:
    says, file_name = file.metadata, file.path.name
    kind, family = word(says, "general.type", "model"), word(says, "general.architecture")
    if family == "clip" or kind != "model":
        named = "projector" if family == "clip" else kind[:80]
        raise UnsupportedModel(
            f"{file_name}: only language models can be quantised; this is a file of the kind "
            f"{named!r}"
        )
    parts = says.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{file_name} is one of {parts} parts: put them together first "
            "(llama-gguf-split --merge)"
        )
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file_name}: general.architecture is {family[:80]!r}; what can be quantised is what "
            f"runs here: {', '.join(ARCHITECTURES)}"
        )
    if not file.tensors:
        raise FormatError(f"{file_name}: there are no tensors in it")


def _check_source(file: GGUF, change: Change, again: bool) -> None:
    """Packing adds an error to the one that is there; unpacking adds none."""
    if again or change.old in PLAIN or change.new in PLAIN or change.old == change.new:
        return
    raise BadRequest(
        f"{file.path.name}: tensor '{change.name}' is {change.old} already; packing it once more "
        "adds to its errors, and needs --allow-requantize"
    )
