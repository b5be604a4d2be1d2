"""From the metadata of a GGUF file to a `config.json`: what `convert.config` reads, said again.

What transformers has no setting for is not looked for one by one: the settings are read back, and
if that gives another model, the file is refused.

Source: the classes LlamaConfig, MistralConfig and MixtralConfig of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from refollama.convert.config import ARCHITECTURES, Language, language, llama3_divisors
from refollama.convert.folder import CONFIG, Settings
from refollama.errors import FormatError, UnsupportedModel
from refollama.models.config import LARGEST, ModelConfig, RopeConfig
from refollama.models.layers import yarn_gain
from refollama.weights import open_weights
from refollama.weights.gguf import GGUF

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CLASSES = {kind: name for name, kind in ARCHITECTURES.items()}
CLOSE = 1e-5  # of numbers that went through float32

# Llama 3 has one recipe for its divisors; what was trained on before it was stretched varies.
LOW, HIGH = 1.0, 4.0
OLD_CONTEXTS = (8192, *(2**n for n in range(3, 21)))

# Of the model: what must come back.  `pooling` says how vectors are made, which no config does.
_SAME = (
    *("layers", "d_model", "d_head", "d_value", "d_rotated", "n_ctx", "norm_eps", "window"),
    *("n_experts", "n_experts_used"),
)


def language_model(file: GGUF, *, tied: bool) -> tuple[dict[str, Any], Language]:
    """The settings of a language model, and what `convert` makes of them.

    tied: its first and last layer share a table.
    Raises: UnsupportedModel, FormatError.
    """
    config = ModelConfig.from_metadata(file.metadata)
    values = _values(file, config) | {"tie_word_embeddings": tied}
    found = language(values["model_type"], Settings(values, CONFIG))
    _check_same(file, config, ModelConfig.from_metadata(found.metadata))
    return values, found


def _values(file: GGUF, config: ModelConfig) -> dict[str, Any]:
    kind = "mixtral" if config.n_experts else "mistral" if config.window < LARGEST else "llama"
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None:
        raise FormatError(f"{file.path.name}: tensor token_embd.weight is missing")
    values = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocabulary.shape[0],
        "hidden_size": config.d_model,
        "intermediate_size": config.layers[0].d_ff,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": short(config.norm_eps),
        "rope_theta": short(config.rope.base),
    }
    if kind != "llama":
        values["sliding_window"] = config.window if config.window < LARGEST else None
    if kind == "mixtral":
        values["num_local_experts"] = config.n_experts
        values["num_experts_per_tok"] = config.n_experts_used
    return values | _rotation(file, config) | _biases(file, kind)


def _biases(file: GGUF, kind: str) -> dict[str, bool]:
    """All matrices of a kind have one, or none."""
    attention, mlp = (
        any(f"blk.0.{part}.bias" in file.tensors for part in parts.split())
        for parts in ("attn_q attn_k attn_v attn_output", "ffn_gate ffn_up ffn_down")
    )
    if kind == "llama":
        return {"attention_bias": attention, "mlp_bias": mlp}
    if attention or mlp:
        raise UnsupportedModel(
            f"{file.path.name}: transformers has no biases in a model of the kind {kind}"
        )
    return {}


# ── rotation ─────────────────────────────────────────────────────────────────────────────────────


def _rotation(file: GGUF, config: ModelConfig) -> dict[str, Any]:
    """`rope_scaling`, if there is any; there it has one kind only."""
    rope = config.rope
    scaling: dict[str, Any] = {}
    if rope.longrope:
        scaling = _long(file, config)
    elif rope.ext_factor:
        scaling = _yarn(rope)
    elif rope.scale != 1:
        scaling = {"rope_type": "linear", "factor": short(1 / rope.scale)}
    if "rope_freqs.weight" in file.tensors:
        if scaling:
            raise UnsupportedModel(
                f"{file.path.name}: rope_freqs.weight stands beside scaling of the kind "
                f"{scaling['rope_type']}, and transformers has settings for one of them only"
            )
        scaling = _llama3(file, config)
    return {"rope_scaling": scaling} if scaling else {}


def _yarn(rope: RopeConfig) -> dict[str, Any]:
    """Its gain is said only where it is not the paper's."""
    usual = yarn_gain(replace(rope, attn_factor=1.0, log_multiplier=0.0))
    own = not math.isclose(yarn_gain(rope), usual, rel_tol=CLOSE)
    return {
        "rope_type": "yarn",
        "factor": short(1 / rope.scale),
        "original_max_position_embeddings": rope.trained_on,
        "beta_fast": short(rope.beta_fast),
        "beta_slow": short(rope.beta_slow),
        **({"attention_factor": short(yarn_gain(rope))} if own else {}),
    }


def _long(file: GGUF, config: ModelConfig) -> dict[str, Any]:
    weights, rope = open_weights(file), config.rope
    factors = {
        f"{length}_factor": [short(x) for x in weights[name].unpack().tolist()]
        for length in ("short", "long")
        if (name := f"rope_factors_{length}.weight") in weights
    }
    return {
        "rope_type": "longrope",
        **factors,
        "factor": config.n_ctx / rope.trained_on,
        "attention_factor": short(rope.attn_factor),
        "original_max_position_embeddings": rope.trained_on,
    }


def _llama3(file: GGUF, config: ModelConfig) -> dict[str, Any]:
    """The recipe that gives these divisors."""
    divisors = open_weights(file)["rope_freqs.weight"].unpack().numpy()
    for old in OLD_CONTEXTS:
        found = {
            "rope_type": "llama3",
            "factor": short(float(divisors.max(initial=1))),
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": old,
        }
        values = {"rope_theta": short(config.rope.base), **found}
        made = llama3_divisors(Settings(values, "rope_scaling"), config.d_head)
        if made.shape == divisors.shape and np.allclose(made, divisors, rtol=CLOSE, atol=0):
            return found
    raise UnsupportedModel(
        f"{file.path.name}: rope_freqs.weight holds other divisors than those of Llama 3, and "
        "transformers has no settings for them"
    )


def short(value: float) -> float:
    """The shortest decimal of a number that was in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ── is it the same model? ────────────────────────────────────────────────────────────────────────


def _check_same(file: GGUF, ours: ModelConfig, theirs: ModelConfig) -> None:
    """Raises: UnsupportedModel, with what would be lost."""
    for name in _SAME:
        _check(file, name, getattr(ours, name), getattr(theirs, name))
    before, after = _turning(ours.rope), _turning(theirs.rope)
    for name in before:
        _check(file, f"rope {name}", before[name], after.get(name))


def _turning(rope: RopeConfig) -> Mapping[str, Any]:
    """All that decides how positions become angles."""
    found = {field.name: getattr(rope, field.name) for field in fields(rope)}
    found["gain"] = yarn_gain(rope)
    hidden = {"log_multiplier", "attn_factor"}  # parts of the gain
    if not rope.ext_factor:
        hidden |= {"beta_fast", "beta_slow"}
        hidden |= set() if rope.longrope else {"trained_on"}
    return {name: value for name, value in found.items() if name not in hidden}


def _check(file: GGUF, name: str, ours: Any, theirs: Any) -> None:
    if isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=CLOSE)
    else:
        same = ours == theirs
    if not same:
        raise UnsupportedModel(
            f"{file.path.name}: transformers has no setting for its {name}: {ours} would become "
            f"{theirs}"
        )
