"""What several matrices are made into, one behind the other: a tensor for each type of number.

    attn_q: words, d, s    attn_k: words, d, s    …    ──►    words, s, words, s, …    d, d, …

To hand a tensor to a compiled routine takes a microsecond, once the weights that pass by have
driven all that describes it out of the caches. A block has some forty; so it gets two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from refollama.fast.prepared import Form, Made, room


def gathered(made: Sequence[Made]) -> list[Tensor]:
    """A piece for each type of number: what they lie in, if they follow each other; else a copy."""
    found = []
    for dtype in dict.fromkeys(one.dtype for its in made for one in its):
        some = [one for its in made for one in its if one.dtype is dtype]
        sizes = [one.numel() for one in some]
        if _follow_each_other(some):
            found.append(some[0].as_strided((sum(sizes),), (1,)))
            continue
        [piece] = room([(dtype, (sum(sizes),))])
        for place, one in zip(torch.split(piece, sizes), some, strict=True):
            place.copy_(one.flatten())
        found.append(piece)
    return found


def _follow_each_other(some: Sequence[Tensor]) -> bool:
    """In one storage, without a gap?"""
    storage = some[0].untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() == storage for one in some) and all(
        one.data_ptr() + one.nbytes == other.data_ptr() for one, other in pairwise(some)
    )


def apart(pieces: Sequence[Tensor], forms: Sequence[Form]) -> list[Made]:
    """What `gathered` has put there: views."""
    parts = {}
    for piece in pieces:
        shapes = [shape for its in forms for dtype, shape in its if dtype is piece.dtype]
        parts[piece.dtype] = iter(torch.split(piece, [*map(math.prod, shapes)]))
    return [[next(parts[dtype]).view(shape) for dtype, shape in its] for its in forms]
