"""A small LLaVA of Hugging Face's making: settings by name, weights and pictures from a seed.

Recorder and test both build them here, so none are stored.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.golden.small_models import SIZES, Array, Settings, weights

SEED = 12
PICTURE = 47  # the id that stands for a row of a picture, the last of the vocabulary
VISION: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
    "layer_norm_eps": 1e-5,
}
TOWERS: dict[str, Settings] = {
    "quick_gelu": VISION | {"hidden_act": "quick_gelu"},
    "gelu": VISION | {"hidden_act": "gelu"},
}
TEXT: Settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES
N_ROWS = 16
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3): waves of colour, and noise."""
    rng = np.random.RandomState(SEED)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3), np.cos(y / 4), np.sin((x + y) / 5)], axis=-1)
    found: npt.NDArray[np.uint8]
    found = (127 + 90 * waves + 30 * rng.rand(height, width, 3)).clip(0, 255).astype(np.uint8)
    return found


def some_pixels() -> Array:
    """A picture that is scaled already: (3, S, S)."""
    size = VISION["image_size"]
    return np.random.RandomState(SEED).standard_normal((3, size, size)).astype(np.float32)


def some_prompt() -> list[int]:
    """Ids with two runs of rows among them; both are the same picture."""
    words = np.random.RandomState(SEED).randint(3, PICTURE, 12).tolist()
    return [1, *words[:3], *[PICTURE] * N_ROWS, *words[3:7], *[PICTURE] * N_ROWS, *words[7:]]


def vision_weights() -> dict[str, Array]:
    """Every tensor of tower and projector, by the endings of a checkpoint's names."""
    rng = np.random.RandomState(SEED)
    found = {}
    for name, shape in _shapes().items():
        drawn = rng.standard_normal(shape)
        if name.endswith("norm.weight") or ("layer_norm" in name and name.endswith("weight")):
            drawn = 1 + 0.1 * drawn
        elif len(shape) == 1:
            drawn = 0.3 * drawn
        else:
            drawn = drawn / np.prod(shape[1:]) ** 0.5
        found[name] = drawn.astype(np.float32)
    return found


def text_weights() -> dict[str, Array]:
    return {n.replace("model.", "language_model."): x for n, x in weights(TEXT).items()}


def _shapes() -> dict[str, tuple[int, ...]]:
    M, F, P = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    found: dict[str, Any] = {
        "embeddings.class_embedding": (M,),
        "embeddings.patch_embedding.weight": (M, 3, P, P),
        "embeddings.position_embedding.weight": (N_ROWS + 1, M),
        "pre_layrnorm.weight": (M,),
        "pre_layrnorm.bias": (M,),
        "post_layernorm.weight": (M,),
        "post_layernorm.bias": (M,),
    }
    for layer in range(VISION["num_hidden_layers"]):
        matrices = {f"self_attn.{name}_proj": (M, M) for name in ("q", "k", "v", "out")}
        matrices |= {"mlp.fc1": (F, M), "mlp.fc2": (M, F)}
        for name, shape in matrices.items():
            found[f"encoder.layers.{layer}.{name}.weight"] = shape
            found[f"encoder.layers.{layer}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"encoder.layers.{layer}.{norm}.{part}": (M,) for part in ("weight", "bias")}
    D = SIZES["hidden_size"]
    for name, shape in {"linear_1": (D, M), "linear_2": (D, D)}.items():
        found[f"multi_modal_projector.{name}.weight"] = shape
        found[f"multi_modal_projector.{name}.bias"] = shape[:1]
    return found
