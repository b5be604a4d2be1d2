"""Adapters of 2023: the file `ggml-adapter-model.bin`, whose first letters are "ggla", as a number.

    u32 magic · u32 version 1 · i32 rank · i32 alpha
    until the end:  i32 number of dims (2) · i32 length of the name · i32 type (0 F32, 1 F16)
                    i32 × 2 dims, innermost first · name · padding to 32 bytes · values

    blk.0.attn_q.weight.loraA   dims rank, n_in         Both halves stand there so that a row of
    blk.0.attn_q.weight.loraB   dims rank, n_out        theirs is `rank` long: A is stored turned.

Two programs wrote such files. The converter of PEFT adapters left the rows of Q and K as Hugging
Face has them, though the models that it served had them in GGUF's order: here they are put right.
llama.cpp's own trainer (`finetune`) worked on a GGUF model, so its rows are right. Who wrote a file
shows in its names: only the trainer changes norms and the embedding.

Source: llama.cpp, December 2023.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refollama.errors import FormatError
from refollama.weights.lora.record import Adapter, Base, Pair, paired, turned

MAGIC = b"algg"
HEAD = struct.Struct("<4sIii")
ENTRY = struct.Struct("<iiiii")
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
ALIGNMENT = 32  # bytes
LONGEST = 1023  # bytes of a name
HALVES = (".weight.loraA", ".weight.loraB")


def read(path: Path, base: Base) -> Adapter:
    """The adapter in such a file.  Raises: FormatError, with the byte where it goes wrong."""
    try:
        return Adapter(path.name, _read(path.read_bytes(), base))
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def _read(data: bytes, base: Base) -> dict[str, Pair]:
    if len(data) < HEAD.size:
        raise FormatError("the header is cut off")
    magic, version, rank, alpha = HEAD.unpack_from(data)
    if magic != MAGIC or version != 1 or rank < 1:
        raise FormatError(f"version {version} and rank {rank}; expected version 1 and a rank")
    pairs = _pairs(dict(_tensors(data)), alpha / rank)
    if any(name.endswith(("_norm", "token_embd")) for name in pairs):
        return pairs
    return {name: turned(name, pair, base) for name, pair in pairs.items()}


def _tensors(data: bytes) -> Iterator[tuple[str, Tensor]]:
    """Names and values, (n, rank) each."""
    at = HEAD.size
    while at < len(data):
        if len(data) - at < ENTRY.size:
            raise FormatError(f"tensor at byte {at}: its head is cut off")
        n_dims, length, type, *dims = ENTRY.unpack_from(data, at)
        if n_dims != 2 or not 1 <= length <= LONGEST or type not in DTYPES or min(dims) < 1:
            raise FormatError(
                f"tensor at byte {at}: {n_dims} dims ({dims[0]} × {dims[1]}), a name of {length} "
                f"bytes, type {type}; expected 2 positive ones, at most {LONGEST}, and 0 or 1"
            )
        at += ENTRY.size
        name = data[at : at + length].decode("utf-8", "replace")
        at += length
        at += -at % ALIGNMENT
        count, dtype = math.prod(dims), DTYPES[type]
        if count * dtype.itemsize > len(data) - at:
            raise FormatError(f"{name}: {count} values do not fit into the file")
        values = np.frombuffer(data, dtype, count, at).astype(np.float32)
        yield name, torch.from_numpy(values).view(dims[1], dims[0])
        at += count * dtype.itemsize


def _pairs(tensors: dict[str, Tensor], scale: float) -> dict[str, Pair]:
    for name in tensors:
        if not name.endswith(HALVES):
            raise FormatError(f"{name!r} is no half of a change: expected …{' or …'.join(HALVES)}")
    return {name: Pair(a.mT.contiguous(), b, scale) for name, a, b in paired(tensors, HALVES)}
