"""The textbook loop: one sequence, one token after another, nothing else.

It is the first thing to read, and the judge of the engine: whatever that does to be fast, its
tokens must be these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from refollama.engine import limits
from refollama.engine.net import Net
from refollama.engine.sequence import NO_MARKS, Marks
from refollama.options import Options
from refollama.sampling.chain import Grammar, Sampler


def generate(
    net: Net,
    prompt: Sequence[int],
    options: Options,
    marks: Marks = NO_MARKS,
    grammar: Grammar | None = None,
) -> Iterator[int]:
    """Token ids that follow the prompt, until model or grammar end, or the limit is reached.

    The end token itself is not among them. A prompt that does not fit is cut.
    """
    n_ctx = limits.context(options, net.n_ctx)
    keep = limits.keep(prompt, options, n_ctx, marks.bos)
    prompt = limits.cut(prompt, keep, n_ctx)
    cache = net.new_cache(dtype=torch.float16 if options.f16_kv else torch.float32)
    sampler = Sampler(options, prompt, n_ctx=n_ctx, newline=marks.newline, grammar=grammar)
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
        if token in marks.eos:
            return
        yield token
        if sampler.complete:
            return
        tokens, position = [token], end
