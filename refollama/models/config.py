"""What a model is, before any weight is read: sizes and constants from the file's metadata."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from refollama.errors import FormatError, UnsupportedModel

ARCHITECTURES = ("llama",)  # Mistral, CodeLlama, TinyLlama and Yi files say "llama" as well
ROPE_SCALINGS = ("none", "linear", "yarn")

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
    yarn: bool = False  # stretch slow pairs only; what follows is for YaRN
    trained_on: int = 0  # tokens of context before the stretching
    attn_factor: float = 1.0
    beta_fast: float = 32.0  # turns within `trained_on`: pairs that turn more are left alone
    beta_slow: float = 1.0  # pairs that turn less are stretched in full


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model of the llama family.

    The letters are those of the shapes in the code: H query heads, Hk key heads, D head width.
    Source: GGUF metadata keys of architecture "llama".
    """

    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # Hk; each serves H / Hk query heads
    d_head: int  # D
    d_model: int
    d_ff: int
    n_ctx: int  # tokens that the model was trained to look back on
    norm_eps: float
    rope: RopeConfig
    n_experts: int = 0  # E; 0: no mixture
    n_experts_used: int = 0  # of E, for each token

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelConfig:
        """Read the `llama.*` keys of a GGUF file.

        Raises: UnsupportedModel for another architecture or a variant that is not built yet;
        FormatError for a key that is missing or makes no sense.
        """
        _supported(metadata)
        keys = Keys(metadata, "llama.")
        heads = keys.size("attention.head_count")
        width = keys.size("embedding_length")
        config = cls(
            n_layers=keys.size("block_count", most=MOST_LAYERS),
            n_heads=heads,
            n_kv_heads=keys.size("attention.head_count_kv", default=heads),
            d_head=keys.size("attention.key_length", default=width // heads),
            d_model=width,
            d_ff=keys.size("feed_forward_length"),
            n_ctx=keys.size("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=_rope(keys),
            n_experts=keys.size("expert_count", default=0, least=0, most=MOST_EXPERTS),
            n_experts_used=keys.size("expert_used_count", default=0, least=0, most=MOST_EXPERTS),
        )
        config._check(keys)
        return config

    def _check(self, keys: Keys) -> None:
        """What must hold between the sizes."""
        if not bool(self.n_experts) == bool(self.n_experts_used) or (
            self.n_experts_used > self.n_experts
        ):
            raise FormatError(
                f"llama.expert_used_count is {self.n_experts_used}, "
                f"but llama.expert_count is {self.n_experts}"
            )
        if self.n_heads % self.n_kv_heads:
            raise FormatError(
                f"llama.attention.head_count is {self.n_heads}, which is no multiple of "
                f"head_count_kv = {self.n_kv_heads}"
            )
        if self.d_head % 2:
            raise FormatError(f"a head is {self.d_head} wide; rotation needs an even width")
        rotated = keys.size("rope.dimension_count", default=self.d_head)
        if rotated != self.d_head:
            raise UnsupportedModel(
                f"llama.rope.dimension_count is {rotated}; expected the whole head, {self.d_head}"
            )
        valued = keys.size("attention.value_length", default=self.d_head)
        if valued != self.d_head:
            raise UnsupportedModel(
                f"llama.attention.value_length is {valued}; expected key_length, {self.d_head}"
            )


def _supported(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        found = "missing" if architecture is None else _shown(architecture)
        raise UnsupportedModel(
            f"general.architecture is {found}; supported are: {', '.join(ARCHITECTURES)}"
        )


def _rope(keys: Keys) -> RopeConfig:
    """Source: `rope.scaling.*`, the older `rope.scale_linear`, and overrides for YaRN."""
    kind = keys.metadata.get("llama.rope.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise UnsupportedModel(
            f"llama.rope.scaling.type is {_shown(kind)}; supported are: {', '.join(ROPE_SCALINGS)}"
        )
    factor = keys.number(
        "rope.scaling.factor", default=keys.number("rope.scale_linear", default=0.0)
    )
    if factor and not 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
        raise FormatError(f"llama.rope.scaling.factor is {factor}; expected 1/1000 to 1000")
    return RopeConfig(
        base=keys.number("rope.freq_base", default=10000.0, least=LEAST_BASE),
        scale=1.0 if kind == "none" or factor == 0 else 1.0 / factor,
        yarn=kind == "yarn",
        trained_on=keys.size(
            "rope.scaling.original_context_length", default=keys.size("context_length")
        ),
        attn_factor=keys.number("rope.scaling.attn_factor", default=1.0, most=LARGEST_FACTOR),
        beta_fast=keys.number(
            "rope.scaling.yarn_beta_fast", default=32.0, least=LEAST_BETA, most=MOST_BETA
        ),
        beta_slow=keys.number(
            "rope.scaling.yarn_beta_slow", default=1.0, least=LEAST_BETA, most=MOST_BETA
        ),
    )


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
