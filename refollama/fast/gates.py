"""The gates of a prompt's feed-forward networks, for some of its tokens at a time.

Of 512 tokens with 5632 gates each there are 12 MiB: all at once they go to memory and come back
four times, in memory that the system has to clear first. Every number is computed alike, so what
comes out is the same to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.fast.prepared import is_free
from refollama.models.layers import swiglu

GATES = 1 << 18  # of a part: a megabyte of float32


def swiglu_in_parts(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes.  Shapes: (B, T, d_ff), (B, T, d_ff) → the same"""
    B, T, width = gate.shape
    at_once = max(1, GATES // max(1, B * width))
    if at_once >= T or not (is_free(gate) and is_free(up)):
        return swiglu(gate, up)
    found = torch.empty_like(gate)
    for some, others, place in zip(
        *(torch.split(one, at_once, 1) for one in (gate, up, found)), strict=True
    ):
        place.copy_(swiglu(some, others))
    return found
