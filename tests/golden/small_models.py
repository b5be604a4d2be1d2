"""Small models of Hugging Face's making: settings by name, weights from a seed.

Recorder and test both build the weights here, so none are stored. Settings and tensors have the
names of `config.json` and of checkpoint files.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Settings = dict[str, Any]

SEED = 11
N_TOKENS = 40
SIZES: Settings = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def _model(kind: str, **changes: Any) -> Settings:
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower()} | SIZES | changes


MODELS: dict[str, Settings] = {
    "mistral-window": _model("Mistral", sliding_window=8, head_dim=24),
    "mistral": _model("Mistral", sliding_window=None, rope_theta=1e6),
    "mixtral": _model(
        "Mixtral", sliding_window=None, rope_theta=1e6, num_local_experts=4, num_experts_per_tok=2
    ),
    # Within 32 tokens the first pair turns often enough to be left alone, the second is a blend.
    "llama3": _model(
        "Llama",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": _model(
        "Llama",
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 1.5,
            "beta_slow": 0.25,
        },
    ),
    "linear": _model("Llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
}


def some_tokens(settings: Settings) -> npt.NDArray[np.int64]:
    """(T,) ids."""
    return np.random.RandomState(SEED).randint(0, settings["vocab_size"], N_TOKENS)


def weights(settings: Settings) -> dict[str, Array]:
    """Every tensor of the checkpoint: norms near 1, biases small, rows of matrices of length 1.

    `RandomState` is numpy's old generator: its stream is promised never to change.
    """
    rng = np.random.RandomState(SEED)
    found = {}
    for name, shape in _shapes(settings).items():
        drawn = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.1 * drawn
        elif len(shape) == 1:
            drawn = 0.3 * drawn
        else:
            drawn = drawn / shape[-1] ** 0.5
        found[name] = drawn.astype(np.float32)
    return found


def head_width(settings: Settings) -> int:
    """D: what the settings say, or else an equal share of the width."""
    return int(
        settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    )


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    V, M = settings["vocab_size"], settings["hidden_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, M)}
    for layer in range(settings["num_hidden_layers"]):
        block = _attention(settings) | _feed_forward(settings)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    found["model.norm.weight"] = (M,)
    return found if settings.get("tie_word_embeddings") else found | {"lm_head.weight": (V, M)}


def _attention(settings: Settings) -> dict[str, tuple[int, ...]]:
    M, D = settings["hidden_size"], head_width(settings)
    H, Hk = settings["num_attention_heads"], settings["num_key_value_heads"]
    matrices = {"q": (H * D, M), "k": (Hk * D, M), "v": (Hk * D, M), "o": (M, H * D)}
    found: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": shape for name, shape in matrices.items()
    }
    if settings.get("attention_bias"):
        found |= {f"self_attn.{name}_proj.bias": shape[:1] for name, shape in matrices.items()}
    return found | {"input_layernorm.weight": (M,), "post_attention_layernorm.weight": (M,)}


def _feed_forward(settings: Settings) -> dict[str, tuple[int, ...]]:
    M, F = settings["hidden_size"], settings["intermediate_size"]
    if E := settings.get("num_local_experts"):
        found: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate.weight": (E, M)}
        for expert in range(E):
            matrices = {"w1": (F, M), "w2": (M, F), "w3": (F, M)}
            blk = f"block_sparse_moe.experts.{expert}"
            found |= {f"{blk}.{name}.weight": shape for name, shape in matrices.items()}
        return found
    matrices = {"gate": (F, M), "up": (F, M), "down": (M, F)}
    found = {f"mlp.{name}_proj.weight": shape for name, shape in matrices.items()}
    if settings.get("mlp_bias"):
        found |= {f"mlp.{name}_proj.bias": shape[:1] for name, shape in matrices.items()}
    return found
