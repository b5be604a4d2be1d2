"""Muon: each matrix takes steps that turn it in all directions alike.

A gradient of a matrix is often one great direction and many small ones, and an optimiser that
follows it learns little else. Muon follows the nearest matrix whose singular values are all 1.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the size of
a step: Liu et al. 2025, "Muon is scalable for LLM training", section 2.2. `torch.optim.Muon` does
the same in bfloat16, which takes three times as long on processors that have no units for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: they raise small values fastest
ITERATIONS = 5  # after which singular values are between 0.7 and 1.2
ADAM_STEP = 0.2  # root mean square of what AdamW changes an entry by, in units of the rate


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers, and for nothing else; `lr` is as large as AdamW's.

    Windows, (rows, channels, height, width), are matrices with a row for each.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along all gradients; what has none stays."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._turn(weight, weight.grad, group)

    def _turn(self, weight: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        lr, momentum, state = group["lr"], group["momentum"], self.state[weight]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(weight)
        mean = state["mean"].lerp_(grad, 1 - momentum)
        ahead = torch.lerp(grad, mean, momentum).flatten(1)  # Nesterov's
        size = lr * ADAM_STEP * max(ahead.shape) ** 0.5
        weight.mul_(1 - lr * group["weight_decay"])
        weight.add_(orthogonal(ahead).view_as(weight), alpha=-size)


def orthogonal(matrix: Tensor) -> Tensor:
    """The same singular vectors, with values near 1: (rows, columns) → (rows, columns)

    By Newton and Schulz's iteration: products only, no decomposition.
    """
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
