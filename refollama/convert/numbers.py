"""Numbers from one float type to another, without torch: F64, F32, F16, and BF16 as its bits."""

from __future__ import annotations

import numpy as np

from refollama.errors import UnsupportedModel
from refollama.weights.safetensors import Array

# The types of checkpoints that we read → what they are in a GGUF file, if nobody asks otherwise.
KEPT = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F32"}
FLOATS = ("F32", "F16", "BF16")  # what may be asked for


def changed(values: Array, source: str, target: str) -> Array:
    """Values of one type in another; of the same type they stay as they are, to the last bit.

    Raises: UnsupportedModel for a number that is too large for the new type.
    """
    if source == target:
        return values
    plain = as_float32(values, source)
    if target == "F32" and source != "F64":
        return plain
    found = _narrowed(plain, target)
    before = values if source == "F64" else plain
    if (np.isinf(as_float32(found, target)) & np.isfinite(before)).any():
        raise UnsupportedModel(f"a number is too large for {target}")
    return found


def as_float32(values: Array, source: str) -> Array:
    """Any of them as float32; all but F64 without loss."""
    if source == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _narrowed(plain: Array, target: str) -> Array:
    if target == "BF16":
        return _bfloat16(plain)
    with np.errstate(over="ignore"):
        return plain.astype(np.float16 if target == "F16" else np.float32, copy=False)


def _bfloat16(values: Array) -> Array:
    """float32 → the bits of the nearest bfloat16, a tie to the even one; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
