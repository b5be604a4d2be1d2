"""Which part of a text is each token?

    "Hi über"  ─►  ▁Hi 0…2 · ▁ü 2…5 · b 5…6 · er 6…8       bytes of the UTF-8 text

The parts of a text's tokens follow each other without a gap; two tokens may share a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """A token, and the bytes from `start` to `end` of the UTF-8 text that it stands for."""

    id: int
    start: int
    end: int


def spans(ids: Sequence[int], ends: Sequence[int], start: int) -> list[Span]:
    """Tokens and the places where each of them ends → what each stands for."""
    return [Span(*row) for row in zip(ids, [start, *ends], ends, strict=False)]


def ends_of(pieces: Sequence[bytes], text: str, printed: str) -> list[int]:
    """Where each token's part of a text ends, in bytes.

    `printed` is the text as the tokens' `pieces` spell it, character by character. Bytes that no
    piece spells (they got lost, or became the unknown token) belong to the token behind them, or
    to the unknown token that stands there.
    """
    spelled, ends, end = printed.encode(), list[int](), 0
    for piece, following in zip(pieces, _following(pieces), strict=True):
        at = spelled.find(piece or following, end)
        if at >= 0 and (piece or following):
            end = at + len(piece)
        elif not piece:
            end = len(spelled)
        ends.append(end)
    return ends if text == printed else _moved(ends, text, printed)


def _following(pieces: Sequence[bytes]) -> list[bytes]:
    """For each piece the next one that is not empty; b"" where there is none."""
    found = [b""]
    for piece in reversed(pieces[1:]):
        found.append(piece or found[-1])
    return found[::-1][: len(pieces)]


def _moved(ends: Sequence[int], text: str, printed: str) -> list[int]:
    """Places in one spelling as places in another that has other bytes for the same characters.

    A place within a character stays within it if it can.
    """
    places: list[int] = []
    starts = accumulate((len(char.encode()) for char in text), initial=0)
    for start, char, other in zip(starts, text, printed, strict=False):
        width = len(char.encode())
        places += [start + min(byte, width) for byte in range(len(other.encode()))]
    places.append(len(text.encode()))
    return [places[end] for end in ends]
