"""What may differ in the last bit, and on which machines.

Intel's MKL, asked for it, computes a row of a product alike whatever rows stand beside it. On a
processor where nothing does, laws that say "to the last bit" hold up to the rounding of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.models.exact import rows_are_exact

ROUNDING = 2e-5  # absolute; what tests compare is about 1


def same(a: Tensor, b: Tensor) -> bool:
    """Equal; to the last bit where this machine can."""
    if rows_are_exact() or a.dtype not in (torch.float32, torch.float16):
        return torch.equal(a, b)
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=ROUNDING, rtol=1e-3)
