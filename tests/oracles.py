"""Slow and independent: what the specification says, computed one value at a time.

The dequantisers follow the formulas of the format, element by element, in float32 arithmetic and
in the order of ggml: scale · sub-scale, then · quant, then − minimum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf
import numpy as np


def half(block: bytes, at: int) -> np.float32:
    """The float16 at byte `at`."""
    return np.float32(struct.unpack_from("<e", block, at)[0])


def q3_k(block: bytes) -> list[np.float32]:
    """One block of 110 bytes → 256 values."""
    hmask, qs, scales, d = block[:32], block[32:96], block[96:108], half(block, 108)
    values = []
    for e in range(256):
        h, t, l = e // 128, e % 128 // 32, e % 32
        s = 8 * h + 2 * t + (l >= 16)
        q = (qs[32 * h + l] >> 2 * t & 3) - (0 if hmask[l] >> (4 * h + t) & 1 else 4)
        low = scales[s] & 15 if s < 8 else scales[s - 8] >> 4
        high = scales[8 + s % 4] >> 2 * (s // 4) & 3
        values.append(d * np.float32((low | high << 4) - 32) * np.float32(q))
    return values


def q4_k(block: bytes) -> list[np.float32]:
    """One block of 144 bytes → 256 values."""
    d, dmin, sc, qs = half(block, 0), half(block, 2), block[4:16], block[16:]
    values = []
    for e in range(256):
        j, l = e // 32, e % 32
        if j < 4:
            scale, minimum = sc[j] & 63, sc[j + 4] & 63
        else:
            scale = sc[j + 4] & 15 | sc[j - 4] >> 6 << 4
            minimum = sc[j + 4] >> 4 | sc[j] >> 6 << 4
        byte = qs[32 * (j // 2) + l]
        q = byte >> 4 if j % 2 else byte & 15
        values.append(d * np.float32(scale) * np.float32(q) - dmin * np.float32(minimum))
    return values


def q6_k(block: bytes) -> list[np.float32]:
    """One block of 210 bytes → 256 values."""
    ql, qh, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
    values = []
    for e in range(256):
        h, t, l = e // 128, e % 128 // 32, e % 32
        byte = ql[64 * h + 32 * (t & 1) + l]
        low = byte & 15 if t < 2 else byte >> 4
        q = (low | (qh[32 * h + l] >> 2 * t & 3) << 4) - 32
        scale = struct.unpack_from("b", scales, 8 * h + 2 * t + (l >= 16))[0]
        values.append(d * np.float32(scale) * np.float32(q))
    return values


def q5_0(block: bytes) -> list[np.float32]:
    """One block of 22 bytes → 32 values."""
    d, qh, qs = half(block, 0), struct.unpack_from("<I", block, 2)[0], block[6:]
    values = []
    for e in range(32):
        nibble = qs[e] & 15 if e < 16 else qs[e - 16] >> 4
        values.append(d * np.float32(nibble + 16 * (qh >> e & 1) - 16))
    return values


def q8_1(block: bytes) -> list[np.float32]:
    """One block of 36 bytes → 32 values."""
    return [half(block, 0) * np.float32(q) for q in struct.unpack_from("32b", block, 4)]


def q8_k(block: bytes) -> list[np.float32]:
    """One block of 292 bytes → 256 values."""
    d = np.float32(struct.unpack_from("<f", block)[0])
    return [d * np.float32(q) for q in struct.unpack_from("256b", block, 4)]


def q1_0(block: bytes) -> list[np.float32]:
    """One block of 18 bytes → 128 values."""
    d = half(block, 0)
    return [d if block[2 + e // 8] >> e % 8 & 1 else -d for e in range(128)]


def number(letter: str) -> Callable[[bytes], list[np.float32]]:
    """One number in little-endian order, rounded once."""
    return lambda block: [np.float32(np.array(struct.unpack("<" + letter, block)[0]))]


f64, i8, i16, i32, i64 = (number(letter) for letter in "dbhiq")


def iq2_xs(block: bytes) -> list[np.float32]:
    """One block of 74 bytes → 256 values, by the judge's table of patterns."""
    d, words, scales = half(block, 0), struct.unpack_from("<32H", block, 2), block[66:]
    values = []
    for e in range(256):
        word, nibble = words[e // 8], scales[e // 32] >> 4 * (e % 32 // 16) & 15
        signs = word >> 9 | (word >> 9).bit_count() % 2 << 7
        sign = np.float32(-1 if signs >> e % 8 & 1 else 1)
        step = d * (np.float32(0.5) + np.float32(nibble)) * np.float32(0.25)
        values.append(step * np.float32(grid("IQ2_XS")[word & 511][e % 8]) * sign)
    return values


def iq1_m(block: bytes) -> list[np.float32]:
    """One block of 56 bytes → 256 values, by the judge's table of patterns."""
    qs, qh, s = block[:32], block[32:48], struct.unpack_from("<4H", block, 48)
    bits = s[0] >> 12 | s[1] >> 8 & 0xF0 | s[2] >> 4 & 0xF00 | s[3] & 0xF000
    d = half(struct.pack("<H", bits), 0)
    values = []
    for e in range(256):
        high = qh[e // 16] >> 4 * (e // 8 % 2) & 15
        scale = s[e // 64] >> 3 * (e // 16 % 4) & 7
        shift = np.float32(-0.125 if high & 8 else 0.125)
        entry = np.float32(grid("IQ1_S")[qs[e // 8] | (high & 7) << 8][e % 8])
        values.append(d * np.float32(2 * scale + 1) * (entry + shift))
    return values


def grid(name: str) -> np.ndarray:
    """The patterns of a type, as the judge has them.  (entries, width) float32"""
    judge = getattr(gguf.quants, name)
    judge.init_grid()
    return judge.grid[0, 0]
