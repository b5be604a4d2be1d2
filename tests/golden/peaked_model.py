"""A small model that is sure of itself: what a type takes from it shows in its perplexity.

Recorder and test both build it here, to the last bit on any machine: weights are whole numbers,
times a step that is a power of two. Its rows are multiples of 256, so that K types pack it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import write_gguf
from tests import tiny

SEED = 21
NUM_CTX = 128  # tokens of a window, as many as it can read
N_WINDOWS = 32
SIZES: dict[str, Any] = {
    "block_count": 3,
    "embedding_length": 256,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
SURE = {"output.weight": 3, "token_embd.weight": 8}  # times as large as other matrices


def write(path: Path) -> Path:
    """As a GGUF file of float32."""
    keys = tiny.metadata(**SIZES)
    rng = np.random.RandomState(SEED)
    tensors = {}
    for name, shape in tiny.shapes(keys).items():
        values = _norm(rng, shape) if len(shape) == 1 else SURE.get(name, 1) * _matrix(rng, shape)
        tensors[name] = (TYPE_ID["F32"], shape, values.astype(np.float32))
    write_gguf(path, keys, tensors)
    return path


def _matrix(rng: np.random.RandomState, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Sums of four draws, nearly normal; a row of 256 has a length of about 1."""
    drawn = rng.randint(-127, 128, (4, *shape)).sum(0)
    return drawn / 2**11


def _norm(rng: np.random.RandomState, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Near 1."""
    return 1 + rng.randint(-32, 33, shape) / 2**8
