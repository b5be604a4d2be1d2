"""What may differ in the last bit, and on which machines.

On Intel's and AMD's processors a row of a product is computed alike whatever rows stand beside it.
Where nothing does so, laws that say "to the last bit" hold up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from refollama.models.exact import rows_are_exact

ROUNDING = 2e-5  # absolute; what tests compare is about 1


def same(a: Tensor, b: Tensor) -> bool:
    """Equal; to the last bit where this machine can."""
    if rows_are_exact() or a.dtype not in (torch.float32, torch.float16):
        return torch.equal(a, b)
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=ROUNDING, rtol=1e-3)


def alike(a: Any, b: Any) -> bool:
    """Equal, with all that is in it; numbers that a net has computed as in `same`."""
    if rows_are_exact():
        return bool(a == b)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 10 * ROUNDING
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if is_dataclass(a) and type(a) is type(b):
        return all(alike(getattr(a, one.name), getattr(b, one.name)) for one in fields(a))
    return bool(a == b)
