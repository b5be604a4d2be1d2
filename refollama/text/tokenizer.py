"""What is a tokenizer to the rest of the house, and what do all of them share?

    text ── SpecialTokens.split ──► fragments ── encode (spm.py, bpe.py) ──► ids
    ids ── piece ──► bytes ── StreamDecoder ──► text, never half a character

`Tokenizer` is the protocol; `FragmentTokenizer` is what its kinds share; `Vocabulary` reads the
part of the metadata that every kind has.
"""

from __future__ import annotations

import codecs
import logging
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from numbers import Real
from typing import Any, Protocol

from refollama.errors import BadRequest, FormatError
from refollama.text.spans import Span, ends_of, spans

log = logging.getLogger(__name__)

# Names by which vocabularies mark that a text, a turn or a message has ended; and, in models of
# code, that padding, another repository or another file begins.  Source: llama.cpp, 2025 and 2026.
_ENDS = """
    </s> <eos> <EOT> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|>
    <end_of_turn> <end_of_utterance> <｜end▁of▁sentence｜>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
    <|file_sep|>
"""
END_MARKERS = frozenset(_ENDS.split())
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

SURROGATES = re.compile("[\ud800-\udfff]")  # halves of UTF-16 pairs: no UTF-8 can hold them
GUARD = "\udbff"  # "what I stand in is text, no special token"; one of those that no text can hold
_STRAY = re.compile(f"(?!{GUARD}){SURROGATES.pattern}")
UNBOUNDED = 2**31  # characters; more than any text has


class Tokenizer(Protocol):
    """Text ↔ token ids."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None if the vocabulary has none."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: end of text, of turn, of message."""

    @property
    def newline_id(self) -> int | None:
        """The token that prints a line feed alone; what `penalize_newline` is about."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 … vocab_size − 1."""

    @property
    def longest(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length over this."""

    def encode(
        self, text: str, *, bos: bool = False, special: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of a text.

        bos: put BOS in front, and EOS at the end, as the model's metadata asks.
        special: control tokens that are spelled in the text are meant, unless `guard` has been
        there; user-defined ones always are.
        continues: the text goes on where another ended, so no space is put in front of it.
        """

    def around(self, ids: list[int]) -> list[int]:
        """The ids of a whole text with BOS and EOS, as the model's metadata asks."""

    def spans(self, text: str, *, special: bool = False) -> list[Span]:
        """The ids that `encode` gives, each with the part of the text that it stands for."""

    def guard(self, text: str) -> str:
        """The text, to be put among others; no control token that it spells is meant.

        Law: encode(guard(text), special=True) == encode(text). A text that spells none comes back
        as it is; else there is a `GUARD` in each spelling.
        """

    def piece(self, id: int, *, first: bool = False) -> bytes:
        """What a token prints: b"" for control tokens, perhaps half a character.

        first: as the first token that prints, without the space that `encode` put in front.
        Raises: BadRequest for an id outside the vocabulary.
        """

    def spelling(self, id: int) -> bytes:
        """What a token prints or, if it prints nothing, how it is written: `</s>`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: the inverse of `encode`. Invalid UTF-8 becomes U+FFFD."""

    def stream(self, ids: Iterable[int], *, after: Iterable[int] = ()) -> Iterator[str]:
        """The text of an answer, piece by piece, none empty; `after` is the prompt's ids."""


# ------------------------------------------------------------------------------- ids → text


class StreamDecoder:
    """Ids in, text out as soon as its characters are complete.

    Law: joined pushes + finish == decode(after + ids)[len(decode(after)):], so the space of the
    first word of an answer is kept, unless the prompt printed nothing (BOS alone).
    If the prompt ends in half a character, that half counts as the answer's: the answer
    completes it, or begins with U+FFFD.
    spelled: control tokens that are written out; all others print nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        after: Iterable[int] = (),
        spelled: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._spelled = spelled
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False  # has any token printed something?
        for id in after:
            self.push(id)

    def push(self, id: int) -> str:
        """The characters that this token completes; often one word, sometimes nothing."""
        if id in self._spelled:
            return self._utf8.decode(self._tokenizer.spelling(id))
        piece = self._tokenizer.piece(id)
        if piece and not self._begun:
            self._begun = True
            piece = self._tokenizer.piece(id, first=True)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """No more ids come: U+FFFD if they ended in half a character."""
        return self._utf8.decode(b"", final=True)


def decode_whole(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """`Tokenizer.decode` for every kind: the whole is the sum of the stream."""
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.finish()


def decode_stream(
    tokenizer: Tokenizer, ids: Iterable[int], after: Iterable[int] = ()
) -> Iterator[str]:
    """`Tokenizer.stream` for every kind. `ids` is closed at the end if it can be."""
    decoder = StreamDecoder(tokenizer, after)
    try:
        for id in ids:
            if text := decoder.push(id):
                yield text
        if text := decoder.finish():
            yield text
    finally:
        hang_up(ids)


def decode_spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of some ids in which control tokens, which print nothing, are spelled out.

    Law: decode_spelled(encode(text, special=True)) == text, where `decode` has such a law.
    """
    texts = []
    for prints, run in groupby(ids, key=lambda id: tokenizer.piece(id) != b""):
        some = list(run)
        spelled = b"".join(map(tokenizer.spelling, some)).decode(errors="replace")
        texts.append(tokenizer.decode(some) if prints else spelled)
    return "".join(texts)


def valid(text: str) -> str:
    """Halves of UTF-16 pairs, which are no characters, become U+FFFD."""
    return SURROGATES.sub("\ufffd", text)


def unguarded(text: str) -> str:
    """The text without guards: what is encoded, and what its length is counted by."""
    return text.replace(GUARD, "")


def hang_up(source: object) -> None:
    """Close a stream that knows how to be closed; a plain list does not."""
    close = getattr(source, "close", None)
    if close is not None:
        close()


# --------------------------------------------------------------------- special tokens in text


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens that are found in a text by their spelling, before anything else is tokenised.

    At each place the longest spelling wins. One with a guard in it is none.
    """

    ids: Mapping[str, int]  # every special spelling
    _always: re.Pattern[str]  # user-defined tokens
    _asked: re.Pattern[str]  # these, control tokens and the unknown token
    _marks: re.Pattern[str]  # control tokens and the unknown token alone
    _guarded: re.Pattern[str]  # a mark's beginning (group 1: the mark), or a user-defined token

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> SpecialTokens:
        always = _spelled(vocabulary, {TokenType.USER_DEFINED})
        asked = _spelled(vocabulary, {TokenType.CONTROL, TokenType.UNKNOWN})
        asked = {text: id for text, id in asked.items() if text not in always}
        either, words, marks = _any_of(always, asked), _any_of(always), _any_of(asked=asked)
        return cls(
            ids=always | asked,
            _always=re.compile(words),
            _asked=re.compile(either),
            _marks=re.compile(marks),
            _guarded=re.compile(f"(?=({marks}))(?:{words}|.)|{words}", re.DOTALL),
        )

    def split(self, text: str, special: bool) -> Iterator[str | int]:
        """Text fragments, never empty, and the ids of special tokens, in order."""
        end = 0
        for match in (self._asked if special else self._always).finditer(text):
            if fragment := unguarded(text[end : match.start()]):
                yield fragment
            yield self.ids[match.group()]
            end = match.end()
        if fragment := unguarded(text[end:]):
            yield fragment

    def guard(self, text: str) -> str:
        """The same text with a guard behind the first character of each control token's spelling.

        Or behind the user-defined token that begins there: those stay whole.
        """
        return self._guarded.sub(_with_guard, text) if self._marks.search(text) else text


def _with_guard(match: re.Match[str]) -> str:
    return match[0] + GUARD if match[1] else match[0]


def _spelled(vocabulary: Vocabulary, kinds: Container[int]) -> dict[str, int]:
    """Spelling → id of the tokens of these kinds; of two with one text the later counts."""
    rows = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    found = {text: id for id, (text, kind) in rows if kind in kinds}
    return {text: id for text, id in found.items() if text and not SURROGATES.search(text)}


def _any_of(always: Iterable[str] = (), asked: Iterable[str] = ()) -> str:
    """A pattern for any of the spellings; for none at all if there are none.

    A single character has no room for a guard: the one behind it counts.
    """
    patterns = {text: re.escape(text) for text in always}
    patterns |= {text: re.escape(text) + f"(?!{GUARD})" * (len(text) == 1) for text in asked}
    return "|".join(patterns[text] for text in sorted(patterns, key=len, reverse=True)) or r"(?!)"


# ------------------------------------------------------------------------------- vocabulary


class TokenType(IntEnum):
    """How a token is used.  Source: GGUF specification, `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a kind of tokenizer assumes where the metadata is silent."""

    bos_id: int
    eos_id: int
    unknown_id: int | None
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a GGUF file, what they are for, and what is put around a text."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    add_eos: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], default: Defaults) -> Vocabulary:
        """Read the `tokenizer.ggml.*` keys.

        Raises: FormatError, naming the key, if a value is missing or does not fit.
        Source: llama.cpp's keys and defaults; ids outside the vocabulary are ignored, with a
        warning, and so are end markers' own types: they are control tokens.
        """
        tokens = _tokens(metadata)
        size = len(tokens)
        bos = token_id(metadata, "bos", size, default.bos_id)
        eos = token_id(metadata, "eos", size, default.eos_id)
        unknown = token_id(metadata, "unknown", size, default.unknown_id)
        ends = {token_id(metadata, name, size) for name in END_KEYS}
        ends |= {id for id, token in enumerate(tokens) if token in END_MARKERS}
        ends |= _more_ends(metadata, size)
        # Llama.cpp's defaults may hit a comma: that one ends an answer, but stays a comma.
        sure = ends | {id for id in (bos, eos) if id is not None and _is_mark(tokens[id])}
        sure.add(token_id(metadata, "bos", size))
        guessed = _guessed_types(tokens, bos if bos in sure else None, unknown)
        types = column(metadata, "token_type", size) or guessed
        control = sure & (ends | {eos})
        return cls(
            tokens=tokens,
            types=tuple(TokenType.CONTROL if id in control else t for id, t in enumerate(types)),
            bos_id=bos,
            eos_id=eos,
            unknown_id=unknown,
            eos_ids=frozenset(id for id in (eos, *ends) if id is not None),
            add_bos=flag(metadata, "add_bos_token", default.add_bos),
            add_eos=flag(metadata, "add_eos_token", default.add_eos),
        )

    def around(self, ids: list[int]) -> list[int]:
        """The ids with BOS and EOS where the model wants them."""
        before = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        behind = [self.eos_id] if self.add_eos and self.eos_id is not None else []
        return before + ids + behind

    def check(self, id: int) -> None:
        """Raises: BadRequest if there is no such token; a context sent by a client may lie."""
        if not 0 <= id < len(self.tokens):
            raise BadRequest(f"token id {id} is not in the vocabulary of {len(self.tokens)} tokens")


class FragmentTokenizer(ABC):
    """What all tokenizers over a GGUF vocabulary share.

    Special tokens are found first; what lies between them is encoded by the rules of the kind.
    """

    vocabulary: Vocabulary
    longest: int
    _specials: SpecialTokens

    @property
    def bos_id(self) -> int | None:
        return self.vocabulary.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.vocabulary.eos_ids

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    @abstractmethod
    def newline_id(self) -> int | None: ...

    def encode(
        self, text: str, *, bos: bool = False, special: bool = False, continues: bool = False
    ) -> list[int]:
        text = (_STRAY if special else SURROGATES).sub("\ufffd", text)
        ids: list[int] = []
        for part in self._specials.split(text, special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_fragment(part, prefix=bool(ids) or not continues)
        return self.around(ids) if bos else ids

    def around(self, ids: list[int]) -> list[int]:
        return self.vocabulary.around(ids)

    def spans(self, text: str, *, special: bool = False) -> list[Span]:
        found: list[Span] = []
        start = 0
        for part in self._specials.split(SURROGATES.sub("\ufffd", text), special):
            spelled = self.vocabulary.tokens[part] if isinstance(part, int) else part
            end = start + len(spelled.encode())
            if isinstance(part, int):
                found.append(Span(part, start, end))
            else:
                found += self._fragment_spans(part, start)
            start = end
        return found

    def guard(self, text: str) -> str:
        return self._specials.guard(valid(text))

    @abstractmethod
    def piece(self, id: int, *, first: bool = False) -> bytes: ...

    def spelling(self, id: int) -> bytes:
        return self.piece(id) or utf8(id, self.vocabulary.tokens[id])

    def decode(self, ids: Iterable[int]) -> str:
        return decode_whole(self, ids)

    def stream(self, ids: Iterable[int], *, after: Iterable[int] = ()) -> Iterator[str]:
        return decode_stream(self, ids, after)

    def _fragment_spans(self, text: str, start: int) -> list[Span]:
        ids = self._encode_fragment(text, prefix=True)
        pieces = [self.piece(id, first=at == 0) for at, id in enumerate(ids)]
        ends = [start + end for end in ends_of(pieces, text, self._printed(text))]
        return spans(ids, ends, start)

    def _printed(self, text: str) -> str:
        """A text as its tokens print it, character by character."""
        return text

    @abstractmethod
    def _encode_fragment(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text without special tokens.

        prefix: it is the first fragment, or follows a special token; a kind may put a space there.
        """


def token_id(
    metadata: Mapping[str, Any], name: str, size: int, default: int | None = None
) -> int | None:
    """The id of `tokenizer.ggml.NAME_token_id`, or None if there is no such token."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key, default)
    if value is None:
        return None
    id = _integer(key, value)
    if 0 <= id < size:
        return id
    if key in metadata:
        log.warning("%s is %d, outside the vocabulary of %d tokens; ignored", key, id, size)
    return None


def _more_ends(metadata: Mapping[str, Any], size: int) -> set[int]:
    """`tokenizer.ggml.eos_token_ids`, which Ollama writes where several tokens end an answer."""
    key = "tokenizer.ggml.eos_token_ids"
    given = _as_list(key, metadata[key]) if metadata.get(key) is not None else []
    ids = [_integer(key, value) for value in given]
    return {id for id in ids if 0 <= id < size}


def flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """The truth value of `tokenizer.ggml.NAME`; 0 and 1 pass, as do numpy's booleans."""
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if getattr(value, "ndim", 0) == 0 and value in (True, False):
        return bool(value)
    raise FormatError(f"{key} must be true or false, not {value!r}")


def column(metadata: Mapping[str, Any], name: str, size: int) -> list[Any] | None:
    """The list `tokenizer.ggml.NAME`, one number for each token; None if it is absent."""
    key = f"tokenizer.ggml.{name}"
    if metadata.get(key) is None:
        return None
    values = _as_list(key, metadata[key])
    if len(values) != size:
        raise FormatError(f"{key} has {len(values)} entries for {size} tokens")
    if not all(isinstance(value, Real) and value == value for value in values):  # NaN ≠ NaN
        raise FormatError(f"{key} must hold numbers only")
    return values


def texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    """The list `tokenizer.ggml.NAME`, all of it text. Raises: FormatError, also if it is absent."""
    key = f"tokenizer.ggml.{name}"
    if metadata.get(key) is None:
        raise FormatError(f"{key} is missing or empty: a model needs its vocabulary")
    values = _as_list(key, metadata[key])
    wrong = next((at for at, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        raise FormatError(f"{key}: entry {wrong} is no text, but {values[wrong]!r}")
    return values


def utf8(id: int, token: str) -> bytes:
    """A token as it is spelled. A reader of GGUF keeps bytes that are no UTF-8 as surrogates."""
    try:
        return token.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise FormatError(
            f"tokenizer.ggml.tokens: entry {id} is no valid text: {token!r}"
        ) from None


def _tokens(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = texts(metadata, "tokens")
    if not tokens:
        raise FormatError("tokenizer.ggml.tokens is missing or empty: a model needs its vocabulary")
    return tuple(tokens)


def _guessed_types(tokens: Sequence[str], bos: int | None, unknown: int | None) -> list[int]:
    """Types for a file that has none: byte tokens are known by name, BOS and unknown by id."""
    types = [
        TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL
        for token in tokens
    ]
    if bos is not None:
        types[bos] = TokenType.CONTROL
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return list(types)


def _is_mark(token: str) -> bool:
    """Does it look like <s> or <|endoftext|>, which nobody writes by chance?"""
    return re.fullmatch("<.+>", token) is not None


def _as_list(key: str, values: Any) -> list[Any]:
    """A list or an array (anything with `tolist`) as a list of Python's own values."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, list | tuple):
        return list(values)
    raise FormatError(f"{key} must be a list, not {type(values).__name__}")


def _integer(key: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise FormatError(f"{key} must be an integer, not {value!r}") from None
