"""SentencePiece: Llama 1 and 2, Mistral. The model is rebuilt from the vocabulary in a GGUF file.

    "Hello world" ─► "▁Hello▁world" ─► ▁Hello · ▁world ─► 15043 3186

A GGUF file has no SentencePiece model, only its columns: text, score and type of each token. They
are enough: the `sentencepiece` library gets a model with the same pieces and scores, of kind BPE
(merge the pair of best score until none is left), and with every rule about spaces switched off,
because the space in front and U+2581 for a space are matters of this file.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece

from refollama.errors import FormatError, UnsupportedModel
from refollama.text.pieces import Pieces, Row, write
from refollama.text.tokenizer import (
    SURROGATES,
    UNBOUNDED,
    Defaults,
    FragmentTokenizer,
    SpecialTokens,
    TokenType,
    Vocabulary,
    column,
    flag,
    utf8,
)

log = logging.getLogger(__name__)

SPACE = "\u2581"  # how a vocabulary writes a space; in a user's text it is one, too
DEFAULTS = Defaults(bos_id=1, eos_id=2, unknown_id=0, add_bos=True, add_eos=False)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class SpmTokenizer(FragmentTokenizer):
    """A SentencePiece BPE tokenizer with byte fallback.

    Law: decode(encode(text)) == text, for text without lone surrogates (they become U+FFFD),
    U+2581 (it becomes a space), and specials in its middle (a space follows them).
    Source: the behaviour of llama.cpp (February 2025); GGUF, `tokenizer.ggml.*`.
    """

    def __init__(
        self, vocabulary: Vocabulary, scores: Sequence[float], space_prefix: bool = True
    ) -> None:
        self.vocabulary = vocabulary
        self.space_prefix = space_prefix  # does each fragment of text get a space in front?
        self.longest = _longest(vocabulary)
        self._specials = SpecialTokens.of(vocabulary)
        self._pieces = _printed(vocabulary)
        self._model, self._ids = _rebuilt(vocabulary, scores)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SpmTokenizer:
        """Build it from the metadata of a GGUF file.

        Raises: UnsupportedModel if this is another kind of tokenizer; FormatError, naming the
        key, if the vocabulary is not sound.
        """
        found = metadata.get("tokenizer.ggml.model")
        if not isinstance(found, str) or found != "llama":
            raise UnsupportedModel(f"tokenizer.ggml.model is {found!r}, not 'llama'")
        vocabulary = Vocabulary.from_metadata(metadata, DEFAULTS)
        size = len(vocabulary.tokens)
        scores = column(metadata, "scores", size) or [0.0] * size
        return cls(vocabulary, scores, flag(metadata, "add_space_prefix", True))

    @property
    def newline_id(self) -> int | None:
        return self._pieces.index(b"\n") if b"\n" in self._pieces else None

    def piece(self, id: int, *, first: bool = False) -> bytes:
        self.vocabulary.check(id)
        piece = self._pieces[id]
        ours = first and self.space_prefix and self.vocabulary.types[id] == TokenType.NORMAL
        return piece.removeprefix(b" ") if ours else piece

    def _encode_fragment(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text without special tokens: the first one, or one after a special token."""
        spaced = " " + text if prefix and self.space_prefix else text
        found = self._model.encode(spaced.replace(" ", SPACE))
        ids = (self._ids[index] for index in found)
        return [id for id in ids if id is not None]

    def _printed(self, text: str) -> str:
        return text.replace(SPACE, " ")


def _printed(vocabulary: Vocabulary) -> list[bytes]:
    """What each token prints; control, unknown and unused tokens print nothing."""
    pieces = []
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == TokenType.NORMAL:
            pieces.append(utf8(id, token.replace(SPACE, " ")))
        elif kind == TokenType.USER_DEFINED:
            pieces.append(utf8(id, token))
        elif kind == TokenType.BYTE:
            pieces.append(_byte(id, token))
        else:
            pieces.append(b"")
    return pieces


def _byte(id: int, token: str) -> bytes:
    if token not in _BYTES:
        raise FormatError(f"tokenizer.ggml.tokens: entry {id} is a byte, but its name is {token!r}")
    return bytes([int(token[3:5], 16)])


# ------------------------------------------------------------------- a model out of its columns

_UNKNOWN: Row = ("<unk>", 0.0, TokenType.UNKNOWN)


def _rebuilt(
    vocabulary: Vocabulary, scores: Sequence[float]
) -> tuple[sentencepiece.SentencePieceProcessor, list[int | None]]:
    """The library's model and, for each of its pieces, our id (None: no such token).

    It holds what text can turn into: the unknown piece, the bytes, and what can be merged.
    """
    bytes_ = _byte_ids(vocabulary)
    merged = _mergeable(vocabulary)
    rows: list[Row] = [_UNKNOWN, *((name, 0.0, TokenType.BYTE) for name in bytes_)]
    rows += [(text, scores[id], vocabulary.types[id]) for text, id in merged.items()]
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(write(Pieces(rows, space_prefix=False, escapes=False)))
    except (RuntimeError, OverflowError, struct.error) as error:
        raise FormatError(f"the vocabulary is no SentencePiece model: {error}") from None
    return model, [vocabulary.unknown_id, *bytes_.values(), *merged.values()]


def _longest(vocabulary: Vocabulary) -> int:
    """Characters of the longest token. Without byte tokens any run of strange ones is one token."""
    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    spelled = {text for text, kind in rows if kind == TokenType.BYTE}
    return max(map(len, vocabulary.tokens)) if spelled >= set(_BYTES) else UNBOUNDED


def _byte_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """The tokens that spell what no other token can. The library wants all 256 of them, or none."""
    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids = {text: id for id, (text, kind) in enumerate(rows) if kind == TokenType.BYTE}
    if len(ids) < len(_BYTES):
        found = f"{len(ids)} of {len(_BYTES)}"
        log.warning("the vocabulary has %s byte tokens: some text becomes unknown", found)
    return {name: ids.get(name, vocabulary.unknown_id) for name in _BYTES} if ids else {}


def _mergeable(vocabulary: Vocabulary) -> dict[str, int]:
    """Text → id of the tokens that pairs may merge into; of two with one text the later counts.

    Unused ones are among them because the library splits them up again; user-defined ones are
    not, because `SpecialTokens` finds them first.
    """
    reserved = {"", _UNKNOWN[0], *_BYTES}
    kinds = (TokenType.NORMAL, TokenType.UNUSED)
    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids = {text: id for id, (text, kind) in enumerate(rows) if kind in kinds}
    return {t: id for t, id in ids.items() if t not in reserved and not SURROGATES.search(t)}
