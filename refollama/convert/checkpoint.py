"""A checkpoint's folder → GGUF files: a language model, and a projector if it can see.

    config.json ─► metadata ─┐
    tokenizer   ─► metadata ─┼─► Converted: all that `write_gguf` takes
    tensors     ─► rows      ┘

All is checked before a byte is written: that each tensor is there, and has the shape that the
settings ask for. The tensors themselves pass through in pieces, whatever the model's size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refollama.convert import llava
from refollama.convert.config import architecture, check_unpacked, language
from refollama.convert.folder import CONFIG, Folder, Settings
from refollama.convert.names import IGNORED, Slot, language_slots, neighbours
from refollama.convert.numbers import FLOATS, KEPT, changed
from refollama.convert.vocabulary import vocabulary
from refollama.errors import BadRequest, FormatError, UnsupportedModel
from refollama.weights import gguf
from refollama.weights.blocks import TYPE_ID, nbytes
from refollama.weights.gguf import DEFAULT_ALIGNMENT
from refollama.weights.safetensors import Array, Stored

STACKED = "_exps.weight"  # one tensor of all experts, even if there is but one
SHOWN = 3  # names in an error message
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # `general.file_type`


@dataclass(frozen=True, slots=True)
class Converted:
    """A GGUF file that is not written yet."""

    kind: Literal["model", "projector"]
    metadata: Mapping[str, Any]
    tensors: gguf.Tensors

    @property
    def size(self) -> int:
        """Bytes of the file."""
        sizes = (nbytes(type, shape) for type, shape, _ in self.tensors.values())
        return len(next(self.pieces())) + sum(size + -size % DEFAULT_ALIGNMENT for size in sizes)

    @property
    def width(self) -> int:
        """Of the rows that a model reads, or that a projector makes."""
        name = "token_embd.weight" if self.kind == "model" else "mm.2.weight"
        _, shape, _ = self.tensors[name]
        return shape[1] if self.kind == "model" else shape[0]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file.  Raises: UnsupportedModel, StoreError."""
        return gguf.encoded(self.metadata, self.tensors)


def convert(folder: Folder, dtype: str | None = None) -> tuple[Converted, ...]:
    """A language model, and a projector behind it if the checkpoint has one.

    dtype: one of FLOATS for all matrices; None keeps what each is. Norms and biases are F32.
    Raises: FormatError, UnsupportedModel, StoreError; BadRequest for another dtype.
    """
    if dtype not in (None, *FLOATS):
        raise BadRequest(f"dtype is {dtype!r}; supported: {', '.join(FLOATS)}")
    config = folder.settings(CONFIG)
    if not config.values:
        raise FormatError(f"{CONFIG} is missing, or says nothing")
    kind = architecture(config)
    check_unpacked(config)
    if kind == "llava":
        parts = llava.parted(config, folder)
        check_unpacked(parts.text)
        model = _language(parts.text_kind, parts.text, folder, parts.tensors, dtype)
        eyes = _tensors(parts.slots, parts.eyes, dtype)
        return model, Converted("projector", parts.metadata | _file_type(eyes), eyes)
    return (_language(kind, config, folder, folder.tensors(), dtype),)


def _language(
    kind: str, config: Settings, folder: Folder, stored: Mapping[str, Stored], dtype: str | None
) -> Converted:
    model = language(kind, config)
    if model.tied:
        stored = {name: one for name, one in stored.items() if name != "lm_head.weight"}
    tensors = _tensors(list(language_slots(model)), stored, dtype)
    for name, values in model.tables.items():
        tensors[name] = (TYPE_ID["F32"], values.shape, values)
    words = vocabulary(folder, config, model.sizes.size("vocab_size"))
    about = {"general.type": "model", "general.name": folder.name} if folder.name else {}
    metadata = {**model.metadata, **about, **_file_type(tensors), **words}
    return Converted("model", metadata, tensors)


def _file_type(tensors: gguf.Tensors) -> dict[str, int]:
    """What most numbers are; matrices decide, as they are most of the model."""
    sizes: Counter[int] = Counter()
    for type, shape, _ in tensors.values():
        sizes[type] += math.prod(shape)
    names = {TYPE_ID[name]: number for name, number in FILE_TYPES.items()}
    return {"general.file_type": names[sizes.most_common(1)[0][0]]}


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Rows:
    """The bytes of one tensor, made from others when they are asked for, each time anew."""

    sources: tuple[Stored, ...]
    type: str
    multiple: int  # so many rows belong together
    order: Callable[[Array], Array]

    def __iter__(self) -> Iterator[Array]:
        for source in self.sources:
            for piece in source.pieces(self.multiple):
                yield self._changed(source, self.order(piece))

    def _changed(self, source: Stored, piece: Array) -> Array:
        try:
            return changed(piece, source.dtype, self.type)
        except UnsupportedModel as problem:
            raise UnsupportedModel(f"tensor {source.name}: {problem}") from None


def _tensors(
    slots: Iterable[Slot], stored: Mapping[str, Stored], dtype: str | None
) -> dict[str, tuple[int, tuple[int, ...], gguf.Data]]:
    """What the slots ask for.

    Raises: FormatError for a tensor that is missing or of another shape, UnsupportedModel for one
    that nobody asks for, or of another type of numbers.
    """
    found: dict[str, tuple[int, tuple[int, ...], gguf.Data]] = {}
    used: set[str] = set()
    for slot in slots:
        if slot.optional and not all(name in stored for name in slot.sources):
            continue
        sources = tuple(_taken(stored, name, slot.shape) for name in slot.sources)
        used |= set(slot.sources)
        stacked = (len(sources),) if slot.name.endswith(STACKED) else ()
        rows = _rows(slot, sources, dtype)
        found[slot.name] = (TYPE_ID[rows.type], (*stacked, *slot.shape), rows)
    left = sorted(n for n in stored if n not in used and not n.endswith(IGNORED))
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise UnsupportedModel(
            f"tensors that a model of these settings does not have: {', '.join(left[:SHOWN])}{more}"
        )
    return found


def _rows(slot: Slot, sources: tuple[Stored, ...], dtype: str | None) -> _Rows:
    small = slot.exact or len(slot.shape) == 1
    type = "F32" if small else dtype or KEPT[sources[0].dtype]
    if not slot.heads:
        return _Rows(sources, type, 1, lambda piece: piece)
    d_head = slot.shape[0] // slot.heads
    return _Rows(sources, type, d_head, lambda piece: neighbours(piece, d_head))


def _taken(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> Stored:
    if name not in stored:
        raise FormatError(f"tensor {name} is missing; expected, of the shape {_sides(shape)}")
    one = stored[name]
    if one.shape != shape:
        raise FormatError(
            f"tensor {name} has the shape {_sides(one.shape)}; {CONFIG} asks for {_sides(shape)}"
        )
    if one.dtype not in KEPT:
        raise UnsupportedModel(
            f"tensor {name} is of the type {one.dtype}; supported: {', '.join(KEPT)}"
        )
    return one


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "one number"
