"""Small real vision towers with their projectors, written as GGUF files from a seed.

With a language model of `tests/tiny.py`, which is as wide, each makes a LLaVA. And small pictures.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import Typed, ValueType, write_gguf
from refollama.weights.quants import pack

Shapes = dict[str, tuple[int, ...]]

WIDTH = 64  # of tests/tiny.py
SIZES = {
    "image_size": 24,
    "patch_size": 6,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.layer_norm_epsilon": 1e-5,
    "block_count": 2,
    "projection_dim": 16,  # which nobody reads
}
N_ROWS = 16
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def metadata(**changes: Any) -> dict[str, Any]:
    """Keys as the first converters wrote them; `changes` by key without `clip.vision.`."""
    sizes = {key: value for key, value in (SIZES | changes).items() if value is not None}
    return {
        "general.architecture": "clip",
        "general.name": "tiny eyes",
        "general.file_type": 0,
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.use_gelu": False,
        **{f"clip.vision.{key}": value for key, value in sizes.items()},
        "clip.vision.image_mean": Typed(MEAN, ValueType.FLOAT32),
        "clip.vision.image_std": Typed(STD, ValueType.FLOAT32),
    }


def shapes(keys: Mapping[str, Any], kind: str, *, width: int, swapped: bool) -> Shapes:
    """Every tensor, outermost dimension first."""
    M, P = keys["clip.vision.embedding_length"], keys["clip.vision.patch_size"]
    patches = (keys["clip.vision.image_size"] // P) ** 2
    found: Shapes = {
        "v.class_embd": (M,),
        "v.patch_embd.weight": (M, 3, P, P),
        "v.position_embd.weight": (patches + 1, M),
        **_both("v.pre_ln", M),
    }
    for layer in range(keys["clip.vision.block_count"]):
        found |= _block(f"v.blk.{layer}", M, keys["clip.vision.feed_forward_length"], swapped)
    return found | PROJECTORS[kind](M, width)


def _block(blk: str, M: int, F: int, swapped: bool) -> Shapes:
    up, down = ((M, F), (F, M)) if swapped else ((F, M), (M, F))
    matrices: Shapes = {f"attn_{name}": (M, M) for name in ("q", "k", "v", "out")}
    matrices |= {"ffn_up": up, "ffn_down": down, "ln1": (M,), "ln2": (M,)}
    return {
        k: s for name, shape in matrices.items() for k, s in _both(f"{blk}.{name}", *shape).items()
    }


def _both(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _linear(M: int, width: int) -> Shapes:
    return _both("mm.0", width, M)


def _mlp(M: int, width: int) -> Shapes:
    return _both("mm.0", 48, M) | _both("mm.2", width, 48)


def _mlp_norm(M: int, width: int) -> Shapes:
    norms = _both("mm.1", 48) | _both("mm.4", width)
    return _both("mm.0", 48, M) | _both("mm.3", width, 48) | norms


def _ldp(M: int, width: int) -> Shapes:
    found = _both("mm.model.mlp.1", width, M) | _both("mm.model.mlp.3", width, width)
    for block in (1, 2):
        name = f"mm.model.mb_block.{block}.block"
        found |= {f"{name}.0.0.weight": (width, 3, 3), f"{name}.2.0.weight": (width, width)}
        found |= _both(f"{name}.0.1", width) | _both(f"{name}.2.1", width)
        found |= _both(f"{name}.1.fc1", 16, width) | _both(f"{name}.1.fc2", width, 16)
    return found


def _ldpv2(M: int, width: int) -> Shapes:
    found = _both("mm.model.mlp.0", width, M) | _both("mm.model.mlp.2", width, width)
    return found | _both("mm.model.peg.0", width, 1, 3, 3)


PROJECTORS = {
    "mlp": _mlp,
    "mlp_norm": _mlp_norm,
    "linear": _linear,
    "ldp": _ldp,
    "ldpv2": _ldpv2,
}
ROWS = {"mlp": 16, "mlp_norm": 16, "linear": 16, "ldp": 4, "ldpv2": 4}


def write_eyes(
    path: Path,
    kind: str = "mlp",
    *,
    seed: int = 0,
    type: str = "F32",
    width: int = WIDTH,
    swapped: bool = True,
    keys: Mapping[str, Any] | None = None,
    drop: str = "",
    extra: Mapping[str, tuple[int, ...]] | None = None,
    **changes: Any,
) -> Path:
    """A tower and a projector with random weights, matrices packed as `type` where they can be.

    `keys` join the metadata. A kind that files of 2023 cannot name is named.
    """
    said = metadata(**changes)
    if kind.startswith("ldp"):
        said["clip.projector_type"] = kind
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in (
        shapes(said, kind, width=width, swapped=swapped) | dict(extra or {})
    ).items():
        if name == drop:
            continue
        values = torch.randn(shape, generator=rng) / np.prod(shape[1:]) ** 0.5
        if len(shape) == 1:
            values = (1.0 if name.endswith("weight") else 0.0) + 0.2 * values
        packs = type if len(shape) == 2 and shape[-1] % 32 == 0 else "F32"
        tensors[name] = (TYPE_ID[packs], shape, pack(values, packs).numpy())
    write_gguf(path, said | dict(keys or {}), tensors)
    return path


def png(colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of one colour with a darker corner."""
    image = Image.new("RGB", size, colour)
    image.paste((20, 20, 60), (0, 0, size[0] // 2, size[1] // 2))
    return encoded(image)


def encoded(image: Image.Image, format: str = "PNG", **more: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()
