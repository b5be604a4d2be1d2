"""From the settings of a `config.json` to the metadata of a GGUF file.

    num_attention_heads → llama.attention.head_count        and so on: KEYS
    rope_theta, rope_scaling, rope_parameters → llama.rope.*, and a tensor of divisors for some

A setting that the file leaves out has the default of its architecture. What would make another
model of it (another activation, a quantised checkpoint) is refused.

Source: the classes LlamaConfig, MistralConfig and MixtralConfig of transformers, and the published
definitions of each `rope_type` there (modeling_rope_utils).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refollama.convert.folder import Settings
from refollama.errors import FormatError, UnsupportedModel
from refollama.models.config import ModelConfig

Floats = npt.NDArray[np.float32]

_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_MISTRAL = _COMMON | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# Where a file is silent.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _COMMON | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
MISTRAL_WINDOW = 4096  # where the file does not speak of it; null says that there is none

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "LlavaForConditionalGeneration": "llava",
}

# A setting → its key behind "llama.".
KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
# Of a `rope_scaling` whose type has a name there: kind in config.json → kind in GGUF.
SCALINGS = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
PLAIN = ("", "default", "dynamic")  # dynamic begins behind the trained context, where we end
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True)
class Language:
    """A language model: its sizes, the metadata that says them, and tensors made from settings."""

    sizes: Settings
    d_head: int
    n_kv_heads: int
    n_experts: int
    tied: bool
    metadata: dict[str, Any]
    tables: dict[str, Floats]


def architecture(config: Settings) -> str:
    """A key of DEFAULTS, or "llava".  Raises: UnsupportedModel, with what is known."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else config.get("model_type")
    known = {**ARCHITECTURES, **{kind: kind for kind in ARCHITECTURES.values()}}
    if not isinstance(name, str) or name not in known:
        key = "architectures" if named else "model_type"
        raise config.refused(key, ", ".join(ARCHITECTURES))
    return known[name]


def check_unpacked(config: Settings) -> None:
    """Raises: UnsupportedModel for a checkpoint whose numbers are packed."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config.part(key).get("quant_method") or "unknown"
            raise UnsupportedModel(
                f"{config.place}: the checkpoint is quantised by {str(method)[:40]!r}; supported: "
                "numbers as they are, in F32, F16 or BF16"
            )


def language(kind: str, given: Settings) -> Language:
    """Of a language model's settings; `kind` is a key of DEFAULTS.

    Raises: FormatError, UnsupportedModel.
    """
    config = Settings(given.values, given.place, DEFAULTS[kind])
    if config.word("hidden_act") not in ("silu", "swish"):
        raise config.refused("hidden_act", "silu")
    heads, width = config.size("num_attention_heads"), config.size("hidden_size")
    kv_heads = config.size("num_key_value_heads") if config.get("num_key_value_heads") else heads
    d_head = config.size("head_dim") if config.get("head_dim") else width // heads
    if heads % kv_heads or d_head < 2 or d_head % 2:
        raise FormatError(
            f"{config.place}: {heads} heads, {kv_heads} of them for keys, {d_head} wide: that does "
            "not fit together"
        )
    experts = config.size("num_local_experts") if kind == "mixtral" else 0
    rope, tables = _rope(config, d_head)
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": config.size(name) for name, key in KEYS.items()},
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": d_head,
        "llama.attention.value_length": d_head,
        "llama.attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
        "llama.rope.dimension_count": d_head,
        **{f"llama.{key}": value for key, value in rope.items()},
    }
    if experts:
        metadata["llama.expert_count"] = experts
        metadata["llama.expert_used_count"] = config.size("num_experts_per_tok")
    if window := _window(kind, config):
        metadata["llama.attention.sliding_window"] = window
    _check_runs(config, metadata)
    tied = bool(config.get("tie_word_embeddings"))
    return Language(config, d_head, kv_heads, experts, tied, metadata, tables)


def _check_runs(config: Settings, metadata: Mapping[str, Any]) -> None:
    """What the model would refuse when it is loaded is refused before a byte is written."""
    try:
        ModelConfig.from_metadata(metadata)
    except (FormatError, UnsupportedModel) as problem:
        raise type(problem)(f"{config.place}: {problem}") from None


def _window(kind: str, config: Settings) -> int:
    """How far a token looks back; 0: to the beginning."""
    if kind == "mistral" and "sliding_window" not in config.values:
        return MISTRAL_WINDOW
    if kind == "llama" or config.get("sliding_window") is None:
        return 0
    return config.size("sliding_window", least=0)


# ── rotation ─────────────────────────────────────────────────────────────────────────────────────


def _rope(config: Settings, d_head: int) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Keys behind "llama.", and tensors of divisors."""
    scaling = _scaling(config)
    kind = scaling.word("rope_type") or scaling.word("type")
    if kind not in (*PLAIN, *SCALINGS, "llama3"):
        raise UnsupportedModel(
            f"{scaling.place}: rope_type is {kind[:40]!r}; supported: {', '.join(KINDS)}"
        )
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise scaling.refused("partial_rotary_factor", "1: all of a head is rotated")
    keys = {"rope.freq_base": scaling.number("rope_theta")}
    if kind in PLAIN:
        return keys, {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": llama3_divisors(scaling, d_head)}
    keys |= {f"rope.scaling.{key}": value for key, value in _stretched(kind, scaling).items()}
    tables = {}
    if SCALINGS[kind] == "longrope":
        for length in ("short", "long"):
            factors = scaling.numbers(f"{length}_factor", d_head // 2)
            tables[f"rope_factors_{length}.weight"] = np.asarray(factors, np.float32)
    return keys, tables


def _scaling(config: Settings) -> Settings:
    """All that is said of rotation, whether by the old names or (since 2025) in one object."""
    outer = {
        key: config.get(key)
        for key in ("rope_theta", "max_position_embeddings", "original_max_position_embeddings")
    }
    new = config.part("rope_parameters").values
    found = new or config.part("rope_scaling").values
    if any(isinstance(value, dict) for value in found.values()):
        raise UnsupportedModel(f"{config.place}: layers are rotated differently; supported: alike")
    place = f"{config.place}: {'rope_parameters' if new else 'rope_scaling'}"
    return Settings(found, place, outer)


def _stretched(kind: str, scaling: Settings) -> dict[str, Any]:
    """Keys behind "llama.rope.scaling."; the context was trained on so much, and stretched."""
    longest = scaling.size("max_position_embeddings")
    trained = scaling.get("original_max_position_embeddings") or longest
    old = Settings({"original_max_position_embeddings": trained}, scaling.place)
    n_old = old.size("original_max_position_embeddings")
    found: dict[str, Any] = {"type": SCALINGS[kind], "original_context_length": n_old}
    if kind == "linear":
        return {"type": "linear", "factor": scaling.number("factor")}
    if SCALINGS[kind] == "longrope":
        return found | {"attn_factor": _long_gain(scaling, longest / n_old, n_old)}
    if scaling.get("truncate") is False:
        raise scaling.refused("truncate", "true")
    factor = scaling.number("factor")
    found |= {"factor": factor, "attn_factor": _yarn_gain(scaling, factor)}
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key) is not None:
            found[f"yarn_{key}"] = scaling.number(key)
    return found


def _yarn_gain(scaling: Settings, factor: float) -> float:
    """What the settings ask for, over what a reader of GGUF applies by itself."""

    def gain(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1

    wanted = gain(1)
    if scaling.get("attention_factor") is not None:
        wanted = scaling.number("attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        wanted = gain(scaling.number("mscale")) / gain(scaling.number("mscale_all_dim"))
    return wanted / gain(1)


def _long_gain(scaling: Settings, stretch: float, trained: int) -> float:
    """Source: Ding et al. 2024, "LongRoPE", arXiv 2402.13753, as published with Phi-3."""
    if scaling.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    if scaling.get("factor") is not None:
        stretch = scaling.number("factor")
    if stretch <= 1 or trained < 2:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(trained))


def llama3_divisors(scaling: Settings, d_head: int) -> Floats:
    """Llama 3.1's divisor of each pair's frequency, by its wavelength in tokens.  → (D/2,)

    Below old / high a pair is left alone, above old / low it is slowed by the factor; a blend of
    the frequencies lies between.
    """
    old = scaling.size("original_max_position_embeddings")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    factor = scaling.number("factor")
    if not low < high or factor < 1:
        raise FormatError(f"{scaling.place}: factor must be 1 or more, and low below high")
    base = scaling.number("rope_theta") ** (np.arange(0, d_head, 2) / d_head)
    share = np.clip((old / (2 * math.pi * base) - low) / (high - low), 0, 1)  # of what stays
    return (1 / (share + (1 - share) / factor)).astype(np.float32)
