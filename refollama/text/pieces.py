"""The model file of SentencePiece: pieces, scores and types, read and written.

    ModelProto      1 pieces, repeated · 2 trainer · 3 normalizer
    SentencePiece   1 text · 2 score · 3 type
    TrainerSpec     3 kind of model · 4 number of pieces · 35 bytes for what no piece spells
    NormalizerSpec  1 name · 3 a space is put in front · 4 spaces are tidied up · 5 written as ▁

Source: sentencepiece_model.proto, and protobuf's description of its wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from refollama.errors import FormatError

VARINT, FIXED64, BLOCK, FIXED32 = 0, 1, 2, 5  # kinds on the wire
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "words", 4: "characters"}
BPE = 2

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_NAME, _PREFIX, _TIDY, _ESCAPE = 1, 3, 4, 5

Value = int | float | bytes
Row = tuple[str, float, int]  # a piece: its text, score and type (1: an ordinary one)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What is in the file."""

    rows: list[Row]
    model_type: int = BPE
    space_prefix: bool = True
    escapes: bool = True  # is a space written as ▁ before pieces are looked for?
    normalizer: str = "identity"


def read(data: bytes) -> Pieces:
    """Raises: FormatError for what is no such file."""
    try:
        fields = list(_fields(data))
        rows = [_row(value) for number, value in fields if number == _PIECE]
        trainer, rules = _within(fields, _TRAINER), _within(fields, _NORMALIZER)
        name = rules.get(_NAME, b"")
        found = Pieces(
            rows,
            int(trainer.get(_MODEL_TYPE, 1)),
            bool(rules.get(_PREFIX, 1)),
            bool(rules.get(_ESCAPE, 1)),
            name.decode() if isinstance(name, bytes) else "",
        )
    except (ValueError, IndexError, TypeError, struct.error) as problem:
        raise FormatError(f"tokenizer.model is no SentencePiece model: {problem}") from None
    if not rows:
        raise FormatError("tokenizer.model is no SentencePiece model: it has no pieces")
    return found


def _row(raw: Value) -> Row:
    values = dict(_fields(_take(raw)))
    text = _take(values.get(_TEXT, b"")).decode()
    return text, float(values.get(_SCORE, 0.0)), int(values.get(_TYPE, 1))


def _within(fields: Iterable[tuple[int, Value]], wanted: int) -> dict[int, Value]:
    return {n: v for number, raw in fields if number == wanted for n, v in _fields(_take(raw))}


def _take(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a block belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field, in order."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == BLOCK:
            length, at = _read_varint(data, at)
        elif not length:
            raise ValueError(f"field {number} is of an unknown kind")
        if length > len(data) - at:
            raise ValueError("it ends too early")
        raw = data[at : at + length]
        yield number, struct.unpack("<f", raw)[0] if kind == FIXED32 else raw
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends: seven bits a byte, lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def write(pieces: Pieces) -> bytes:
    """The same as a file.  Law: read(write(pieces)) == pieces."""
    rows = (
        _block(_TEXT, text.encode()) + _float(_SCORE, score) + _number(_TYPE, kind)
        for text, score, kind in pieces.rows
    )
    has_bytes = any(kind == 6 for _, _, kind in pieces.rows)
    trainer = _number(_MODEL_TYPE, pieces.model_type) + _number(_VOCAB_SIZE, len(pieces.rows))
    trainer += _number(_BYTE_FALLBACK, has_bytes)
    rules = _block(_NAME, pieces.normalizer.encode()) + _number(_PREFIX, pieces.space_prefix)
    rules += _number(_TIDY, 0) + _number(_ESCAPE, pieces.escapes)
    return b"".join(_block(_PIECE, row) for row in rows) + (
        _block(_TRAINER, trainer) + _block(_NORMALIZER, rules)
    )


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | FIXED32) + struct.pack("<f", value)


def _block(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | BLOCK) + _varint(len(payload)) + payload


@lru_cache(maxsize=1 << 10)  # the same few fields and lengths, hundreds of thousands of times
def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
