"""How many values stand in how many bytes: every block type that a GGUF file may name.

A row of a tensor is a whole number of blocks, one after another; rows never share a block.
The bytes inside a block are drawn in `quants.py` and `codebooks.py`; here is only what finding a
tensor needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """The size of one block.  Units: values and bytes."""

    name: str
    values: int
    nbytes: int


# The key is the type number in the file. Missing numbers (4, 5, 31-33, 36-38) are types that the
# format has dropped. Source: ggml.
BLOCKS: Mapping[int, Block] = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    9: Block("Q8_1", 32, 36),
    10: Block("Q2_K", 256, 84),
    11: Block("Q3_K", 256, 110),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
    15: Block("Q8_K", 256, 292),
    16: Block("IQ2_XXS", 256, 66),
    17: Block("IQ2_XS", 256, 74),
    18: Block("IQ3_XXS", 256, 98),
    19: Block("IQ1_S", 256, 50),
    20: Block("IQ4_NL", 32, 18),
    21: Block("IQ3_S", 256, 110),
    22: Block("IQ2_S", 256, 82),
    23: Block("IQ4_XS", 256, 136),
    24: Block("I8", 1, 1),
    25: Block("I16", 1, 2),
    26: Block("I32", 1, 4),
    27: Block("I64", 1, 8),
    28: Block("F64", 1, 8),
    29: Block("IQ1_M", 256, 56),
    30: Block("BF16", 1, 2),
    34: Block("TQ1_0", 256, 54),
    35: Block("TQ2_0", 256, 66),
    39: Block("MXFP4", 32, 17),
    40: Block("NVFP4", 64, 36),
    41: Block("Q1_0", 128, 18),
}

TYPE_ID: Mapping[str, int] = {block.name: number for number, block in BLOCKS.items()}


def nbytes(type: int, shape: Sequence[int]) -> int:
    """Bytes of a tensor.  `shape` is outermost first; its last number fills whole blocks."""
    block = BLOCKS[type]
    return math.prod(shape) // block.values * block.nbytes
