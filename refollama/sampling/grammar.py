"""JSON mode: which tokens may come next, if the whole answer is to be JSON.

    the answer so far    {"age": 4
    may follow           2 · .5 · e1 · } · ,"        everything else gets the logit −inf

`format` is "json" (an object) or a JSON schema. The `llguidance` library turns it into a grammar,
follows the answer through it, and says of the whole vocabulary at once what may follow. This file
says which schemas are taken, lays out the vocabulary for it, and puts its mask over the logits.
What the grammar allows is less than JSON: no raw control characters, at most one space, or one
line feed and an indent, where JSON allows any whitespace, and none around the value.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from refollama.errors import BadRequest, RefollamaError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]

WRONG = 'format must be json or a JSON schema: "json", or an object'
ANY_OBJECT = {"type": "object"}  # what "json" stands for, as in 2023

# How the library reads a schema; all of it is given, so that no schema can say otherwise.
READ_AS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r"[ ]|\n[ \t]{0,20}",  # indents as models write them, and no more
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,  # what it cannot enforce is an error
    "json_allowed_escapes": 'nrbtf\\"u',  # \u for control characters alone: a key has one spelling
    "json_allow_general_unicode_escapes": False,
}
LIMITS = LLParserLimits(verbose_errors=False)  # an error is a sentence, not a listing

EXACT = 2**53  # the library counts in float64, which knows no neighbours of larger integers
MOST_REMAINDERS = 100_000  # states for `multipleOf`: about a second of work
SAID = {  # the library's own words for why a grammar ends
    "NoExtensionBias": "no text fits",
    "ParserTooComplex": "its grammar is too complex",
    "LexerTooComplex": "its patterns are too complex",
}
REMEMBERED = 8  # schemas; each request asks twice: before its model is loaded, and for the grammar
SHOWN = 10  # names in one line of the log


# ── format → grammar ──────────────────────────────────────────────────────────────────────────


def source(format: object) -> str | None:
    """The grammar that the `format` of a request asks for, as text; None if it asks for none.

    Raises: BadRequest if it is neither "json" nor a schema, or if part of the schema cannot be
    enforced: that part is named.
    """
    if format is None or format == "":
        return None
    if format == "json":
        format = ANY_OBJECT
    if not isinstance(format, Mapping):
        raise BadRequest(WRONG)
    try:
        return _grammar(json.dumps(format, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the JSON schema in format cannot be read: {error}") from None


@lru_cache(REMEMBERED)
def _grammar(schema: str) -> str:
    _check(json.loads(schema))
    with _panics():
        found = LLMatcher.grammar_from_json_schema(schema, overrides=READ_AS)
        problem = LLMatcher.validate_grammar(found, limits=LIMITS)
    if problem:
        raise _refusal(problem)
    return found


@contextlib.contextmanager
def _panics() -> Iterator[None]:
    """The library is written in Rust: what goes wrong in it unforeseen is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _refusal(f"the library failed with {error}") from None


def _check(schema: Mapping[str, Any]) -> None:
    """Refuse what the library would accept, but not hold to.

    Every object counts as a schema, wherever it stands: a `$ref` can make it one.
    """
    for part in _values(schema):
        if isinstance(part, int) and abs(part) > EXACT:
            raise _refusal(f"integers beyond {EXACT}")
        if isinstance(part, Mapping):
            _check_object(part)
    _check_multiples(schema)
    if names := sorted(_unknown(schema)):
        log.warning(
            "format: no keywords of JSON Schema, so ignored: %s",
            ", ".join(ascii(name[:40]) for name in names[:SHOWN]),
        )


def _check_object(part: Mapping[str, Any]) -> None:
    least, named = part.get("minProperties"), part.get("required")
    required = len(set(map(str, named))) if isinstance(named, list) else 0
    if isinstance(least, int | float) and least > max(1, required):
        raise _refusal("minProperties above 1, unless as many are required")  # a key may repeat
    if "prefixItems" in part and "additionalItems" in part:
        raise _refusal("additionalItems beside prefixItems: use items")


def _check_multiples(schema: Mapping[str, Any]) -> None:
    """A grammar counts remainders: it has a state for each of those of `multipleOf`."""
    objects = (part for part in _values(schema) if isinstance(part, Mapping))
    given = [part["multipleOf"] for part in objects if "multipleOf" in part]
    steps = [Decimal(repr(step)) for step in given if type(step) in (int, float) and step > 0]
    if not steps:
        return
    finest = min(int(step.normalize().as_tuple().exponent) for step in steps)
    states = math.lcm(*(int(step.scaleb(-finest)) for step in steps))
    if states * len(steps) > MOST_REMAINDERS:
        raise _refusal("multipleOf with so many different or so long numbers")


def _refusal(problem: str) -> BadRequest:
    if "coerce_one_of" in problem:  # advice that no request can follow
        problem = "oneOf, unless its cases plainly exclude each other: use anyOf"
    return BadRequest(f"this JSON schema cannot be enforced: {problem}")


def _values(value: object) -> Iterator[object]:
    """A JSON value and all that is in it."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _values(part)


# ── keywords ──────────────────────────────────────────────────────────────────────────────────

_INNER = """
    items additionalItems prefixItems additionalProperties anyOf oneOf allOf not if then else
    contains propertyNames unevaluatedItems unevaluatedProperties contentSchema
"""
_NAMED = "properties patternProperties $defs definitions dependentSchemas"
_PLAIN = """
    type enum const multipleOf maximum minimum exclusiveMaximum exclusiveMinimum format
    maxLength minLength pattern maxItems minItems uniqueItems maxContains minContains
    maxProperties minProperties required dependentRequired dependencies
    $schema $id id $ref $anchor $dynamicRef $dynamicAnchor $vocabulary $comment
    title description default deprecated readOnly writeOnly examples
    contentEncoding contentMediaType
"""
INNER, NAMED = _INNER.split(), _NAMED.split()  # hold schemas; hold schemas by name
KNOWN = frozenset([*INNER, *NAMED, *_PLAIN.split()])


def _unknown(schema: object) -> set[str]:
    """Keywords that JSON Schema does not know: they may be typing errors."""
    if isinstance(schema, list | tuple):
        return set[str]().union(*map(_unknown, schema))
    if not isinstance(schema, Mapping):
        return set()
    inner = [schema[name] for name in INNER if name in schema]
    for name in NAMED:
        named = schema.get(name)
        inner += named.values() if isinstance(named, Mapping) else ()
    return _unknown(inner) | {str(name) for name in schema if name not in KNOWN}


# ── grammar → mask ────────────────────────────────────────────────────────────────────────────


class Spellings:
    """What each token of a vocabulary prints, laid out for the library: once for each model.

    pieces: by id; b"" for tokens that print nothing: those are never allowed.
    encode: text → ids, as the model is used to; where a grammar leaves one text only, it is asked.
    ends: tokens that end an answer: allowed when it is complete, whatever they print.
    """

    def __init__(self, pieces: Sequence[bytes], encode: Encode, ends: frozenset[int]) -> None:
        self.size = len(pieces)
        self.ends = ends
        printed = [b"" if id in ends else piece for id, piece in enumerate(pieces)]
        self.library = LLTokenizer(
            TokenizerWrapper(_Words(printed, encode)),
            eos_token=[self.size, *sorted(ends)],
            slices=LLTokenizer.json_slices(),
        )


class _Words:
    """A tokenizer as the library asks for it. It does not know the library: no cycle to collect."""

    bos_token_id = None

    def __init__(self, printed: list[bytes], encode: Encode) -> None:
        self.tokens = [*printed, b""]
        self.eos_token_id = len(printed)  # one more: the model may have none
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        """Ids that print this text exactly: the model's own if those do."""
        ids = list(self._encode(text.decode()))
        return ids if b"".join(self.tokens[id] for id in ids) == text else self._longest(text)

    def _longest(self, text: bytes) -> list[int]:
        """At each place the longest token that fits; where none does, one that cannot be drawn."""
        ids = {piece: id for id, piece in enumerate(self.tokens) if piece and piece in text}
        found: list[int] = []
        while text:
            piece = max(filter(text.startswith, ids), key=len, default=b"")
            if not piece:
                return [self.eos_token_id]
            found.append(ids[piece])
            text = text[len(piece) :]
        return found


class JsonGrammar:
    """What an answer may be. It does not change: each answer begins a walk of its own.

    Raises: BadRequest if this vocabulary cannot spell even the beginning.
    """

    def __init__(self, spellings: Spellings, source: str) -> None:
        self._spellings = spellings
        self._start = LLMatcher(spellings.library, source, log_level=0, limits=LIMITS)
        if self._start.is_error():
            raise _refusal(self._start.get_error())
        try:
            self.begin().mask()
        except RefollamaError as error:
            raise BadRequest(f"this model cannot write what format asks for: {error}") from None

    def begin(self) -> JsonWalk:
        """The walk of one answer, at its beginning."""
        return JsonWalk(self._spellings, self._start.deep_copy())


class JsonWalk:
    """How far one answer has come through its grammar."""

    def __init__(self, spellings: Spellings, matcher: LLMatcher) -> None:
        self._spellings = spellings
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Is the answer whole, so that nothing may follow?"""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, logits: Tensor) -> Tensor:
        """Drop all tokens that cannot come next.  (V,) → (V,)

        Raises: RefollamaError if none can, or if the grammar is too much for the library.
        """
        return logits.masked_fill(~self.mask(), -math.inf)

    def mask(self) -> Tensor:
        """May this token come next?  → (V,) bool"""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)  # a bit for each
        self._check()
        bits = np.unpackbits(packed, bitorder="little", count=self._spellings.size)
        if not bits.any():
            raise RefollamaError("no token of this model's vocabulary can continue the JSON")
        return torch.from_numpy(bits).bool()

    def step(self, token: int) -> None:
        """This token was drawn."""
        if token in self._spellings.ends:
            return
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = self._matcher.get_error().partition("\n")[0]
            raise RefollamaError(f"the JSON cannot be continued: {SAID.get(why, why)}")
