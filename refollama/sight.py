"""A model's eyes at work: pictures that a request shows, on their way to ids and to rows.

    file ── picture ──► ids, for the prompt ── looking ──► rows, before the prompt is read

What is cut from a prompt that is too long is not looked at: each picture takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from refollama.engine import limits
from refollama.engine.net import state
from refollama.engine.sequence import Extras
from refollama.messages import Reached
from refollama.models.llama import Llama
from refollama.models.llava import Llava, Picture
from refollama.options import Options


class Sight:
    """What one model sees; if its eyes are not what they were, it looks anew."""

    def __init__(self) -> None:
        self._eyes: object = None  # what they were when the pictures were looked at

    def forget(self) -> None:
        """The eyes may be others now."""
        self._eyes = None

    def picture(self, net: Llava, file: bytes) -> Picture:
        """What the net knows a picture as.  Raises: BadRequest, as `Llava.picture` does."""
        eyes = state(net.v), state(net.mm)
        if None in eyes or eyes != self._eyes:
            net.gallery.forget()
        self._eyes = eyes
        return net.picture(file)


def looking(
    net: Llama,
    tokens: Sequence[int],
    options: Options,
    extras: Extras,
    bos: int | None,
    check: Callable[[], None],
) -> Iterator[Reached]:
    """See to it that the pictures of a prompt have rows, and tell how many of the new ones do.

    check: called before each; it raises if nobody wants it any more.
    Raises: PromptTooLong for a prompt that may not be cut.
    """
    new = _new(net, tokens, options, extras, bos)
    for count, picture in enumerate(new):
        yield Reached("images", count, len(new))
        check()
        assert isinstance(net, Llava)
        net.look(picture)
    if new:
        yield Reached("images", len(new), len(new))


def _new(
    net: Llama, tokens: Sequence[int], options: Options, extras: Extras, bos: int | None
) -> list[Picture]:
    """Those whose rows the model will read, and that nobody has looked at."""
    if not extras.pictures or options.num_predict == 0:
        return []
    n_ctx = limits.context(options, net.n_ctx)
    if not extras.truncate:
        limits.check(len(tokens), n_ctx)
    read = frozenset(limits.cut(tokens, limits.keep(tokens, options, n_ctx, bos), n_ctx))
    pictures = (one for one in extras.pictures if isinstance(one, Picture))
    return [one for one in pictures if one.rows is None and not read.isdisjoint(one.ids)]
