"""The textbook loop: one sequence, one token after another, nothing else.

It is the first thing to read, and the judge of the engine: whatever that does to be fast, its
tokens must be these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from refollama.engine import limits
from refollama.engine.net import Net
from refollama.options import Options
from refollama.sampling.chain import Sampler


def generate(
    net: Net,
    prompt: Sequence[int],
    options: Options,
    *,
    eos: Collection[int] = (),
    bos: int | None = None,
    newline: int | None = None,
) -> Iterator[int]:
    """Token ids that follow the prompt, until the model ends, or the limit is reached.

    The end token itself is not among them. A prompt that does not fit is cut.
    """
    n_ctx = limits.context(options, net.n_ctx)
    keep = limits.keep(prompt, options, n_ctx, bos)
    prompt = limits.cut(prompt, keep, n_ctx)
    cache = net.new_cache(dtype=torch.float16 if options.f16_kv else torch.float32)
    sampler = Sampler(options, prompt, n_ctx=n_ctx, newline=newline)
    tokens, position = list(prompt), 0  # what the model has not seen yet, and where that begins
    for _ in range(limits.answer(len(prompt), options, n_ctx, shift=True)):
        if position == n_ctx:  # full: forget what follows the kept tokens
            dropped = limits.discard(keep, n_ctx)
            net.shift(cache, 0, keep, keep + dropped, position)
            position -= dropped
        end = position + len(tokens)
        with torch.no_grad():
            logits = net(
                torch.tensor([tokens], device=net.device),  # (1, T)
                torch.arange(position, end, device=net.device)[None],  # (1, T)
                cache.rows([0], end),
            )
        token = sampler(logits[0])
        if token in eos:
            return
        yield token
        tokens, position = [token], end
