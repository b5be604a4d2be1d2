"""Which form of a model does a request want?  What decides a token's keys, and where they lie.

Requests that want the same form share an engine and what it remembers. Another form has a cache of
its own, beside the same weights: nothing that was read under one is used under another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from refollama.engine import limits
from refollama.errors import BadOption
from refollama.models.llama import Llama
from refollama.models.lora import Scales, count_adapters, rescaled
from refollama.options import Options


class CacheKind(NamedTuple):
    """The options that decide it.

    Each choice needs a cache of its own; what makes no difference here is the same choice.
    """

    f16_kv: bool
    low_vram: bool
    rope_frequency_base: float
    rope_frequency_scale: float
    adapters: Scales  # (): all of each
    n_ctx: int  # the longest context that turns alike; 0 where all do (all but longrope)

    @classmethod
    def of(cls, options: Options, net: Llama) -> CacheKind:
        """What these options make of a net.  Raises: BadOption for scales without an adapter."""
        rope, n_ctx = net.config.rope, 0
        if rope.longrope:
            long = limits.context(options, net.n_ctx) > rope.trained_on
            n_ctx = net.n_ctx if long else rope.trained_on
        base, scale = options.rope_frequency_base, options.rope_frequency_scale
        return cls(
            options.f16_kv,
            options.low_vram and torch.cuda.is_available(),
            0.0 if base == rope.base else base,
            0.0 if scale == rope.scale else scale,
            _scales(options, net),
            n_ctx,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.float16 if self.f16_kv else torch.float32

    def turned(self, net: Llama) -> Llama:
        """The net in this form; its weights are shared."""
        turned = net.with_rope(self.rope_frequency_base, self.rope_frequency_scale, self.n_ctx)
        return rescaled(turned, self.adapters) if self.adapters else turned

    def with_parts(self, net: Llama) -> tuple[object, ...]:
        """This, and the parts that a net in this form would share: a swapped part is another."""
        return (self, *(net.modules() if self.adapters else net.children()))


def _scales(options: Options, net: Llama) -> Scales:
    given = options.adapters
    if not given:
        return ()
    count = count_adapters(net)
    if not count:
        raise BadOption("option 'adapters' is given, but the model has no adapter")
    if len(given) != count:
        raise BadOption(
            "option 'adapters' must have a number for each of the model's adapters, "
            f"{count} in all, not {len(given)}"
        )
    return () if set(given) == {1.0} else given
