"""Logits made by hand and what is to be done to them; recorder and test both read it here.

Nothing stands on an edge: the recorder refuses a case whose survivors change when a parameter
changes by a thousandth of a percent, since there rounding would decide.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SHAPES = {  # V candidates, how far their logits spread, by how much one of them leads
    "steep": (64, 4.0, 0.0),
    "plain": (100, 1.5, 0.0),
    "flat": (32, 0.2, 0.0),
    "wide": (200, 2.5, 0.0),
    "one ahead": (100, 0.5, 6.0),
}

FILTERS: dict[str, list[float]] = {
    "top_k": [1, 3, 17],
    "top_p": [0.05, 0.5, 0.9, 0.99],
    "min_p": [0.01, 0.1, 0.6],
    "typical_p": [0.05, 0.3, 0.9, 0.99],
    "temperature": [0.25, 1.7],
}

RANKS = [3, 0, 2, 0, 9, 30, 1, 0, 2, 6]  # of the earlier tokens: many are likely ones

PENALTIES: list[dict[str, Any]] = [
    {"repeat_penalty": 1.3},
    {"repeat_penalty": 0.8},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -0.4, "presence_penalty": 0.3},
    {"repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "repeat_last_n": 4},  # of the ten
]

CHAINS: list[dict[str, Any]] = [
    {},  # the defaults
    {"temperature": 1.0, "repeat_penalty": 1.0, "top_k": 0, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.05, "temperature": 0.6},
    {"top_k": 50, "typical_p": 0.7, "top_p": 1.0},
    {"top_k": 25, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.02, "temperature": 0.9},
    {"top_k": 10, "typical_p": 0.5, "top_p": 0.6, "min_p": 0.1, "presence_penalty": 1.0},
    {"repeat_penalty": 1.5, "frequency_penalty": 0.3, "repeat_last_n": 5, "min_p": 0.03},
    {"repeat_last_n": 0, "repeat_penalty": 2.0, "top_p": 0.7},
    {"repeat_penalty": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.15},
    {"top_k": 0, "top_p": 0.6, "min_p": 0.4, "temperature": 2.0},
]

MIROSTATS: list[dict[str, Any]] = [
    {"version": 1, "tau": 3.0, "eta": 0.1, "temperature": 1.0},
    {"version": 1, "tau": 4.0, "eta": 0.4, "temperature": 0.8},
    {"version": 2, "tau": 3.0, "eta": 0.1, "temperature": 1.0},
    {"version": 2, "tau": 4.0, "eta": 0.4, "temperature": 0.8},
]
STEPS = 30


def logits(shape: str) -> Array:
    """(V,), all different; the leader is candidate 7."""
    size, spread, lead = SHAPES[shape]
    drawn = spread * np.random.RandomState(size).standard_normal(size)
    drawn[7] += lead
    return drawn.astype(np.float32)


def window(shape: str) -> list[int]:
    """Earlier tokens, the last one last."""
    best_first = np.argsort(-logits(shape))
    return [int(best_first[rank]) for rank in RANKS]


def logits_of_step(step: int) -> Array:
    """(200,), now steeper and now flatter: mirostat has something to learn."""
    rng = np.random.RandomState(1000 + step)
    return (rng.uniform(0.5, 3) * rng.standard_normal(200)).astype(np.float32)
