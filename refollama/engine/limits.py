"""How long a sequence may become: the context, the prompt and `num_predict` in numbers."""

from __future__ import annotations

from refollama.errors import BadRequest, PromptTooLong
from refollama.options import Options


def context(options: Options, trained: int) -> int:
    """Tokens that the context holds: `num_ctx`, but never more than the model was trained for."""
    return min(options.num_ctx or trained, trained)


def check(tokens: int, room: int, about: str = "") -> None:
    """Raises: PromptTooLong unless so many tokens fit."""
    if tokens > room:
        raise PromptTooLong(f"{about}{tokens}", room)


def answer(prompt: int, options: Options, trained: int) -> int:
    """Tokens that may be drawn after a prompt of so many tokens.

    The context is full when prompt and answer fill it; the last token needs no place of its own.
    Raises: PromptTooLong if there is no room for even one; BadRequest for an empty prompt.
    """
    room = context(options, trained)
    check(prompt, room)
    if prompt == 0:
        raise BadRequest("the prompt is empty, and this model has no token to begin with")
    free = room - prompt + 1
    return free if options.num_predict < 0 else min(options.num_predict, free)
