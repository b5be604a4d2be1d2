"""How long a sequence may become: context, prompt, `num_keep` and `num_predict` in numbers.

A prompt that does not fit is cut; when an answer has filled the context, part of it is forgotten.
Both keep the first `num_keep` tokens (and BOS, where the prompt has one) and drop what comes next:

    cut     n_ctx 10, keep 2, 21 tokens     ■ ■ ✗ ✗ ✗ ✗ ✗ ✗ ✗ ✗ ✗ ✗ ✗ ✗ □ □ □ □ □ □ □
    shift   the same, when all are taken    ■ ■ ✗ ✗ ✗ ✗ □ □ □ □
"""

from __future__ import annotations

from collections.abc import Sequence

from refollama.errors import BadRequest, PromptTooLong
from refollama.options import Options

AT_LEAST_MOVING = 4  # tokens of the context that `num_keep` cannot hold
CONTEXTS = 10  # an answer without a limit of its own ends after so many contexts


def context(options: Options, trained: int) -> int:
    """Tokens that the context holds: `num_ctx`, but never more than the model was trained for."""
    return min(options.num_ctx or trained, trained)


def check(tokens: int, room: int) -> None:
    """Raises: PromptTooLong unless so many tokens fit."""
    if tokens > room:
        raise PromptTooLong(tokens, room)


def keep(prompt: Sequence[int], options: Options, n_ctx: int, bos: int | None) -> int:
    """Tokens at the beginning that stay when others must go: `num_keep` of them, and BOS.

    A negative `num_keep` means the whole prompt; a few places always move.
    """
    begins = 1 if prompt and prompt[0] == bos else 0
    wanted = len(prompt) if options.num_keep < 0 else options.num_keep + begins
    return min(wanted, len(prompt), max(0, n_ctx - AT_LEAST_MOVING))


def cut(prompt: Sequence[int], kept: int, n_ctx: int) -> list[int]:
    """A prompt that fits: blocks of half the moving part are dropped behind the kept tokens.

    Example: n_ctx 2048, nothing kept, 5000 tokens: three blocks of 1024 go, 1928 tokens stay.
    Source: the server of llama.cpp, December 2023.
    """
    if len(prompt) <= n_ctx:
        return list(prompt)
    block = max(1, (n_ctx - kept) // 2)
    dropped = (len(prompt) - kept - block) // block * block
    return [*prompt[:kept], *prompt[kept + dropped :]]


def discard(kept: int, n_ctx: int) -> int:
    """How many tokens behind the kept ones are forgotten when the context is full."""
    return max(1, (n_ctx - kept) // 2)


def answer(prompt: int, options: Options, n_ctx: int, *, shift: bool) -> int:
    """Tokens that may be drawn after a prompt of so many tokens.

    Without `shift` (or with `num_predict` -2) the answer ends when the context is full; the last
    token needs no place of its own.
    Raises: PromptTooLong if the prompt does not fit; BadRequest for an empty one.
    """
    check(prompt, n_ctx)
    if prompt == 0:
        raise BadRequest("the prompt is empty, and this model has no token to begin with")
    free = n_ctx - prompt + 1
    if options.num_predict == -2 or not shift:
        return free if options.num_predict < 0 else min(options.num_predict, free)
    return options.num_predict if options.num_predict >= 0 else CONTEXTS * n_ctx
