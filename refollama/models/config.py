"""What a model is, before any weight is read: sizes and constants from the file's metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from refollama.errors import FormatError, UnsupportedModel

ARCHITECTURES = ("llama",)  # Mistral, CodeLlama, TinyLlama and Yi files say "llama" as well
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

# How the vectors of a text's tokens become one, by the file's `pooling_type`. Most files say
# nothing, or "none": then the last token, which has seen all others, stands for the text.
POOLINGS = {0: "last", 1: "mean", 2: "cls", 3: "last"}

# What else a file of this kind may say about the computation, and the values at which that changes
# nothing. Anything else is another model.
HARMLESS: dict[str, tuple[float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "use_parallel_residual": (False,),
}

# Sizes beyond these are damage, not models; checked before anything is allocated by them.
LARGEST = 2**31 - 1
MOST_LAYERS = 4096
MOST_EXPERTS = 4096
LEAST_BASE = 1.001  # of rotation: at 1 all pairs would turn alike
LARGEST_FACTOR = 1000.0  # of stretching; files have 2 to 64
LEAST_BETA, MOST_BETA = 0.001, 1e6


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.  Source: the `rope.*` keys of GGUF."""

    base: float = 10000.0
    scale: float = 1.0  # positions are multiplied by it: 1/4 stretches the context fourfold
    attn_factor: float = 1.0  # queries and keys are multiplied by it
    trained_on: int = 1  # tokens of context before the stretching
    # YaRN stretches the slow pairs only: how much of that there is, 0 to 1; 0 stretches all alike.
    ext_factor: float = 0.0
    log_multiplier: float = 0.0  # how much of YaRN's gain is taken back; 1: all of it
    beta_fast: float = 32.0  # turns within `trained_on`: pairs that turn more are left alone
    beta_slow: float = 1.0  # pairs that turn less are stretched in full
    # Longrope: frequencies have divisors for short contexts, and others for long ones.
    longrope: bool = False
    n_ctx: int = 0  # tokens of context in use, which decides between them

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that may hold divisors."""
        return ("rope_factors_short", "rope_factors_long") if self.longrope else ("rope_freqs",)

    @property
    def tensor(self) -> str:
        """The one whose divisors are in use."""
        return self.tensors[self.longrope and self.n_ctx > self.trained_on]


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    n_heads: int  # H
    n_kv_heads: int  # Hk; each serves H / Hk query heads
    d_ff: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model of the llama family.

    The letters are those of the shapes in the code: H query heads, Hk key heads, D head width.
    Source: GGUF metadata keys of architecture "llama".
    """

    layers: tuple[LayerConfig, ...]
    d_model: int
    d_head: int  # D, of queries and keys
    d_value: int  # the width of a value; D in most models
    d_rotated: int  # the first so many of D are rotated; all in most models
    n_ctx: int  # tokens that the model was trained to look back on
    norm_eps: float
    rope: RopeConfig
    window: int = LARGEST  # a token sees itself and so many − 1 tokens before it
    n_experts: int = 0  # E; 0: no mixture
    n_experts_used: int = 0  # of E, for each token
    pooling: str = "last"  # "mean", "cls" (the first token) or "last"
    embeds_only: bool = False  # made for embeddings: it was never taught to go on with a text

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelConfig:
        """Read the `llama.*` keys of a GGUF file.

        Raises: UnsupportedModel for another architecture or a variant that is not built;
        FormatError for a key that is missing or makes no sense.
        """
        keys = Keys(metadata, "llama.")
        _check_supported(keys)
        layers = _layers(keys)
        width = keys.size("embedding_length")
        d_head = keys.size("attention.key_length", default=width // layers[0].n_heads)
        config = cls(
            layers=layers,
            d_model=width,
            d_head=d_head,
            d_value=keys.size("attention.value_length", default=width // layers[0].n_heads),
            d_rotated=keys.size("rope.dimension_count", default=d_head),
            n_ctx=keys.size("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=_rope(keys),
            window=keys.size("attention.sliding_window", default=0, least=0) or LARGEST,
            n_experts=keys.size("expert_count", default=0, least=0, most=MOST_EXPERTS),
            n_experts_used=keys.size("expert_used_count", default=0, least=0, most=MOST_EXPERTS),
            pooling=_pooling(keys),
            embeds_only="llama.pooling_type" in metadata,
        )
        config._check()
        return config

    @property
    def n_heads(self) -> int:
        """H of the first layer, and of all in most models."""
        return self.layers[0].n_heads

    @property
    def n_kv_heads(self) -> int:
        """Hk of the first layer, and of all in most models."""
        return self.layers[0].n_kv_heads

    def _check(self) -> None:
        """What must hold between the sizes."""
        if not bool(self.n_experts) == bool(self.n_experts_used) or (
            self.n_experts_used > self.n_experts
        ):
            raise FormatError(
                f"llama.expert_used_count is {self.n_experts_used}, "
                f"but llama.expert_count is {self.n_experts}"
            )
        if self.d_rotated % 2 or self.d_rotated > self.d_head:
            raise FormatError(
                f"llama.rope.dimension_count is {self.d_rotated} and a head is {self.d_head} wide; "
                f"rotation needs an even number of its dimensions"
            )


def _layers(keys: Keys) -> tuple[LayerConfig, ...]:
    """Heads and feed-forward width of each layer: one number for all, or as many as layers."""
    count = keys.size("block_count", most=MOST_LAYERS)
    heads = keys.sizes("attention.head_count", count)
    kv_heads = keys.sizes("attention.head_count_kv", count, default=heads)
    widths = keys.sizes("feed_forward_length", count)
    for H, Hk in zip(heads, kv_heads, strict=True):
        if H % Hk:
            raise FormatError(
                f"llama.attention.head_count is {H}, which is no multiple of head_count_kv = {Hk}"
            )
    return tuple(map(LayerConfig, heads, kv_heads, widths))


def _check_supported(keys: Keys) -> None:
    architecture = keys.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        found = "missing" if architecture is None else _shown(architecture)
        raise UnsupportedModel(
            f"general.architecture is {found}; supported are: {', '.join(ARCHITECTURES)}"
        )
    for key, harmless in HARMLESS.items():
        value = keys.metadata.get(keys.prefix + key, harmless[0])
        if not isinstance(value, Real) or value not in harmless:
            raise UnsupportedModel(
                f"{keys.prefix}{key} is {_shown(value)}; supported: {_listed(harmless)}"
            )


def _pooling(keys: Keys) -> str:
    """A model that ranks (type 4) gives a score where others give a vector: another model."""
    kind = keys.size("pooling_type", default=0, least=0)
    if kind not in POOLINGS:
        raise UnsupportedModel(
            f"{keys.prefix}pooling_type is {kind}; supported: {_listed(POOLINGS)}"
        )
    return POOLINGS[kind]


def _rope(keys: Keys) -> RopeConfig:
    """Source: `rope.scaling.*`, the older `rope.scale_linear`, and overrides for YaRN."""
    kind = keys.metadata.get("llama.rope.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise UnsupportedModel(
            f"llama.rope.scaling.type is {_shown(kind)}; supported are: {_listed(ROPE_SCALINGS)}"
        )
    n_ctx = keys.size("context_length")
    return RopeConfig(
        base=keys.number("rope.freq_base", default=10000.0, least=LEAST_BASE),
        scale=1.0 if kind == "none" else 1.0 / _stretch(keys),
        attn_factor=keys.number("rope.scaling.attn_factor", default=1.0, most=LARGEST_FACTOR)
        * keys.number("rope.scaling.yarn_attn_factor", default=1.0, most=LARGEST_FACTOR),
        trained_on=keys.size("rope.scaling.original_context_length", default=n_ctx),
        ext_factor=_ext_factor(keys, kind),
        log_multiplier=keys.number(
            "rope.scaling.yarn_log_multiplier", default=0.0, most=LARGEST_FACTOR
        ),
        beta_fast=keys.number(
            "rope.scaling.yarn_beta_fast", default=32.0, least=LEAST_BETA, most=MOST_BETA
        ),
        beta_slow=keys.number(
            "rope.scaling.yarn_beta_slow", default=1.0, least=LEAST_BETA, most=MOST_BETA
        ),
        longrope=kind == "longrope",
        n_ctx=n_ctx,
    )


def _stretch(keys: Keys) -> float:
    """How many times longer the context is than it was trained; 0 in a file stands for 1."""
    old_name = keys.number("rope.scale_linear", default=0.0)
    factor = keys.number("rope.scaling.factor", default=old_name)
    if factor and not 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
        raise FormatError(f"llama.rope.scaling.factor is {factor}; expected 1/1000 to 1000")
    return factor or 1.0


def _ext_factor(keys: Keys, kind: str) -> float:
    """How much of YaRN's blend; below 0 in a file means: as the type of scaling says."""
    given = keys.number("rope.scaling.yarn_ext_factor", default=-1.0, least=-1.0, most=1.0)
    return given if given >= 0 else float(kind == "yarn")


@dataclass(frozen=True)
class Keys:
    """Metadata under one prefix, each value checked as it is taken."""

    metadata: Mapping[str, Any]
    prefix: str

    def size(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST
    ) -> int:
        """A count from `least` to `most`, stored as any kind of integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self.prefix}{key} must be one integer, not {_shown(value)}")
        if not least <= value <= most:
            raise FormatError(f"{self.prefix}{key} is {value}; expected {least} to {most}")
        return value

    def sizes(
        self, key: str, count: int, default: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """One size for each of `count` layers; a single one is for all."""
        values = self._get(key, default)
        if not isinstance(values, np.ndarray | list | tuple):
            return (self.size(key),) * count
        if len(values) != count:
            raise FormatError(f"{self.prefix}{key} has {len(values)} entries for {count} layers")
        each = np.asarray(values).tolist()
        return tuple(Keys({self.prefix + key: value}, self.prefix).size(key) for value in each)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float = 0.0,
        most: float = sys.float_info.max,
    ) -> float:
        """A finite number from `least` to `most`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise FormatError(f"{self.prefix}{key} must be one number, not {_shown(value)}")
        if not least <= float(value) <= most:
            raise FormatError(
                f"{self.prefix}{key} is {value}; expected a finite number, {least:g} to {most:g}"
            )
        return float(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise FormatError(f"the file does not say {self.prefix}{key}")
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
