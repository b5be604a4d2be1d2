"""The grammar: what may come next, judged by `json`, `jsonschema`, and a pattern of our own."""

import contextlib
import gc
import json
import logging
import math
import time
import weakref
from functools import cache, partial
from typing import Any

import jsonschema
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refollama.errors import BadRequest, RefollamaError
from refollama.options import Options
from refollama.sampling.chain import Candidates, Sampler
from refollama.sampling.grammar import JsonGrammar, Spellings, source
from refollama.text import tokenizer_from
from tests.text.test_bpe import trained as byte_level
from tests.text.vocabularies import columns, trained

BYTES = [bytes([byte]) for byte in range(256)]
END = 256  # of the vocabulary of bytes


def by_bytes(text):
    return list(text.encode())


@cache
def alone():
    """A vocabulary of 256 bytes and one end token."""
    return Spellings([*BYTES, b""], by_bytes, frozenset({END}))


@cache
def words(kind):
    """The spellings of a small trained vocabulary: SentencePiece, or byte-level BPE."""
    metadata = columns(trained()) if kind == "spm" else byte_level()
    tokenizer = tokenizer_from(metadata)
    pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    return Spellings(pieces, partial(tokenizer.encode, continues=True), tokenizer.eos_ids), pieces


def grammar(spellings, format):
    found = source(format)
    assert found is not None
    return JsonGrammar(spellings, found)


def allowed(walk):
    return set(walk.mask().nonzero().flatten().tolist())


def reads(format, text):
    """Can this text be written byte by byte, and is it whole then?"""
    walk = grammar(alone(), format).begin()
    for byte in text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text:
        if walk.complete or byte not in allowed(walk):
            return False
        walk.step(byte)
    return walk.complete or END in allowed(walk)


def written(spellings, pieces, format, seed, most=400):
    """What a model that knows nothing writes; None if it came to no end."""
    draw = torch.Generator().manual_seed(seed)
    sampler = Sampler(
        Options(temperature=1.5, top_k=0, top_p=1, repeat_penalty=1, seed=seed),
        grammar=grammar(spellings, format),
    )
    closing = torch.tensor([2.0 * any(byte in piece for byte in b'"]}') for piece in pieces])
    out = b""
    for _ in range(most):
        token = sampler(torch.randn(len(pieces), generator=draw) + closing)
        if token in spellings.ends:
            return out
        out += pieces[token]
        if sampler.complete:
            return out
    return None


# ── the language of "json" ────────────────────────────────────────────────────────────────────

SPACE = rb"(?:[ ]|\n[ \t]{0,20})?"
CHARACTER = rb"""(?:
    [\x20-\x21\x23-\x5b\x5d-\x7e] | \\["\\bfnrt] | \\u00(?:[01][0-9a-fA-F]|7[fF])
    | [\xc2-\xdf][\x80-\xbf] | \xe0[\xa0-\xbf][\x80-\xbf] | [\xe1-\xec\xee\xef][\x80-\xbf]{2}
    | \xed[\x80-\x9f][\x80-\xbf] | \xf0[\x90-\xbf][\x80-\xbf]{2} | [\xf1-\xf3][\x80-\xbf]{3}
    | \xf4[\x80-\x8f][\x80-\xbf]{2}
)"""
JUDGE = regex.compile(
    rb"""(?x)(?<object> \{ S (?: (?&pair) (?: , S (?&pair) )* )? \} )
    (?(DEFINE)
        (?<string> " CHARACTER* ")
        (?<number> -? (?: 0 | [1-9][0-9]* ) (?: \.[0-9]+ )? (?: [eE][+-]?[0-9]+ )? )
        (?<array> \[ S (?: (?&value) S (?: , S (?&value) S )* )? \] )
        (?<value> (?&object) | (?&array) | (?&string) | (?&number) | true | false | null )
        (?<pair> (?&string) S : S (?&value) S )
    )""".replace(b"S", SPACE).replace(b"CHARACTER", CHARACTER)
)

ACCEPTED = [
    "{}", '{ "a" : 1 }', '{"a":[1, 2.5e-3, -0, true, null, {"b":[]}]}', '{"é":"\u2028😀"}',
    '{\n  "a": "x\\n\\"\\u001f"\n}', '{"":{}}', '{"a":1e400}',
]  # fmt: skip
REFUSED = [
    "", " {}", "[]", "1", '{"a":01}', '{"a":1,}', '{"a":.5}', '{"a":1.}', '{"a":+1}', "{'a':1}",
    '{"a":"x\ny"}', '{"a":"x\ty"}', '{"a":"\\x"}', '{"a":NaN}', '{"a" "b"}', "{}{}", "{} ", "{}\n",
    '{  "a":1}', '{"a":\n\n1}', '{"a":\r\n1}', '{"a":1', '{"a":"\ud800"}', '{"a":"\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_is_taken_for_json_is_json(text):
    assert reads("json", text)
    assert isinstance(json.loads(text), dict) and JUDGE.fullmatch(text.encode())


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_object_or_spreads_itself_is_not(text):
    assert not reads("json", text)
    assert not JUDGE.fullmatch(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "inside",
    [b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf5", b"\xff"],
)
def test_bytes_that_are_no_utf_8_are_never_allowed(inside):
    assert not reads("json", b'{"' + inside + b'":1}')


@pytest.mark.parametrize("kind", ["spm", "bpe"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_mask_is_what_a_pattern_of_the_language_allows(kind, seed):
    """Each token of the vocabulary, tried one by one: may the answer and it begin an object?

    Where one token alone is allowed, others may spell the same bytes in smaller parts.
    """
    spellings, pieces = words(kind)
    chance = torch.Generator().manual_seed(seed)
    walk, text = grammar(spellings, "json").begin(), b""
    for _ in range(25):
        if walk.complete:
            break
        mask = allowed(walk)
        fits = {id for id, piece in enumerate(pieces) if piece and begins(text + piece)}
        assert mask == fits or (len(mask) == 1 and mask < fits), text
        token = sorted(mask)[int(torch.randint(len(mask), (), generator=chance))]
        walk.step(token)
        text += pieces[token]


def begins(text):
    return JUDGE.fullmatch(text, partial=True) is not None


# ── schemas ───────────────────────────────────────────────────────────────────────────────────

NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
SCHEMAS = {
    "any": {},
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "mood": {"enum": ["glad", "so so", None, 3]},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {}], "items": False},
    "number": {"type": "number", "exclusiveMinimum": -0.5, "maximum": 2.25},
    "steps": {"type": "integer", "multipleOf": 7, "minimum": 20},
    "tree": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]+$"},
    "date": {"type": "string", "format": "date"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "names": {"type": "object", "patternProperties": {"^a": {"type": "null"}}, "minProperties": 1},
    "both": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "either": {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    "const": {"const": {"a": [1, "é\n\""], "b c": 1.5}},
    "control": {"type": "object", "properties": {"\n": {"const": 1}}, "required": ["\n"]},
    "extra": {"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "string"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["spm", "bpe"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_is_valid(name, kind):
    """Logits are random and hot: the mask alone must make the answer fit."""
    spellings, pieces = words(kind)
    judge = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.FormatChecker()
    )
    answers = [written(spellings, pieces, SCHEMAS[name], seed) for seed in range(12)]
    whole = [answer for answer in answers if answer is not None]
    assert len(whole) >= 3
    for answer in whole:
        judge.validate(json.loads(answer))


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, '"not"'),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, '"if"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"properties": {"a": {"propertyNames": {"pattern": "a"}}}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "format": "int32"}, "int32"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"$ref": "http://example.com/s"}, "http://example.com/s"),
        ({"$ref": "#/$defs/none"}, r"/\$defs/none"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"type": "strin"}, "strin"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf.*anyOf"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"x": {"minProperties": 3, "required": ["a", "b"]}, "$ref": "#/x"}, "minProperties"),
        ({"prefixItems": [{"type": "null"}], "additionalItems": False}, "additionalItems"),
        ({"const": 2**53 + 1}, str(2**53)),
        ({"enum": [[[10**30]]]}, str(2**53)),
        ({"type": "integer", "multipleOf": 1234567}, "multipleOf"),
        ({"anyOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"minimum": math.inf}, "cannot be read"),
        ({"const": b""}, "cannot be read"),
        ({"const": "\ud800"}, "cannot be read"),
        ({"type": "string", "x-guidance": {"lenient": True}, "not": {}}, '"not"'),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_by_its_name(schema, named):
    with pytest.raises(BadRequest, match=f"(?s)JSON schema.*{named}"):
        source(schema)


def test_a_schema_may_ask_for_what_is_met_anyway():
    """Names are unlike each other only where they are given, so two may be asked for."""
    two = {"a": {"const": 1}, "b": {"const": 2}}
    schema = {"type": "object", "properties": two, "required": ["a", "b"], "minProperties": 2}
    assert reads(schema, '{"a":1,"b":2}') and not reads(schema, '{"a":1,"a":1}')


@pytest.mark.parametrize(
    "format", ["xml", "JSON", 1, True, False, [], ["json"], '{"type":"object"}']
)
def test_another_format_is_refused(format):
    with pytest.raises(BadRequest, match="^format must be json or a JSON schema"):
        source(format)


@pytest.mark.parametrize("format", [None, ""])
def test_no_format_asks_for_nothing(format):
    assert source(format) is None


def test_keywords_that_nobody_knows_are_ignored_with_a_warning(caplog):
    schema = {
        "type": "object",
        "minLenght": 1,
        "properties": {"colour": {"type": "null", "kolor": 1}, "default": {"default": {"x": 1}}},
        "$defs": {"y": {"anyOf": [{"zz": 1}]}},
        "title": "t",
    }
    with caplog.at_level(logging.WARNING):
        assert source(schema) == source(schema)
    (record,) = caplog.records
    assert record.getMessage().endswith("ignored: 'kolor', 'minLenght', 'zz'")


def test_a_schema_cannot_say_how_it_is_read():
    schema = {"const": [1], "x-guidance": {"whitespace_pattern": "x", "item_separator": ";"}}
    assert reads(schema, "[1]") and reads(schema, "[ 1]") and not reads(schema, "[x1]")


@pytest.mark.parametrize("shift", range(4))
def test_a_failure_inside_the_library_is_a_refusal(shift, capfd):
    """It cuts long values short in its errors, wherever that falls: in the middle of an é, too."""
    with pytest.raises(BadRequest, match="JSON schema"):
        source({"type": "object", "maxProperties": {"x" * shift: "é" * 200}})


HOSTILE = {
    "endless": {"$ref": "#"},
    "ring": {"a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}, "$ref": "#/a"},
    "long list": {"type": "array", "minItems": 10**9},
    "long text": {"type": "string", "minLength": 10**9},
    "powers": {"type": "string", "pattern": "^((((a{0,99}){0,99}){0,99}){0,99}){0,99}b$"},
    "choices": {"allOf": [{"anyOf": [{"required": [i + j]} for j in "abcde"]} for i in "abcdefgh"]},
    "many": {"enum": [str(i) * 9 for i in range(20_000)]},
    "cents": {"properties": {str(i): {"multipleOf": 0.01} for i in range(900)}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_costs_seconds_at_most(name):
    start = time.monotonic()
    with contextlib.suppress(RefollamaError):
        written(alone(), [*BYTES, b""], HOSTILE[name], seed=1, most=50)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("depth", [60, 500, 100_000])
def test_a_deep_schema_is_read_or_refused(depth):
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    try:
        assert source(schema)
    except BadRequest as error:
        assert depth > 60 and "JSON schema" in str(error)
    while "items" in schema:  # taken apart from outside: no destructor goes so deep
        schema = schema.pop("items")


# ── ends ──────────────────────────────────────────────────────────────────────────────────────


def test_end_tokens_are_allowed_when_the_value_is_whole_and_only_then():
    walk = grammar(alone(), {"type": "integer"}).begin()
    assert END not in allowed(walk)
    walk.step(ord("1"))
    assert END in allowed(walk) and ord("2") in allowed(walk) and not walk.complete
    walk.step(END)


def test_an_object_is_over_with_its_last_brace():
    walk = grammar(alone(), "json").begin()
    for byte in b"{}":
        assert not walk.complete
        walk.step(byte)
    assert walk.complete and allowed(walk) == {END}


def test_an_end_token_that_prints_something_is_no_text():
    """Where a file names no end, llama.cpp's default may hit a comma."""
    comma = ord(",")
    walk = grammar(Spellings(BYTES, by_bytes, frozenset({comma})), "json").begin()
    for byte in b'{"a":1 ':
        assert byte in allowed(walk)
        walk.step(byte)
    assert allowed(walk) == {ord("}")}


def test_a_model_without_end_tokens_comes_to_an_end():
    walk = grammar(Spellings(BYTES, by_bytes, frozenset()), {"enum": [10, 11]}).begin()
    for byte in b"11":
        walk.step(byte)
    assert walk.complete


def test_tokens_that_print_nothing_are_never_allowed():
    spellings = Spellings([*BYTES, b"", b""], by_bytes, frozenset({END}))
    walk = grammar(spellings, "json").begin()
    for byte in b'{"a"}':
        assert 257 not in allowed(walk)
        walk.step(byte) if byte in allowed(walk) else None


def test_walks_are_independent():
    shared = grammar(alone(), "json")
    one, other = shared.begin(), shared.begin()
    one.step(ord("{"))
    assert allowed(other) == {ord("{")} != allowed(one)


# ── vocabularies ──────────────────────────────────────────────────────────────────────────────


def test_a_text_that_must_come_is_spelled_as_the_model_is_used_to():
    spellings, pieces = words("spm")
    tokenizer = tokenizer_from(columns(trained()))
    walk = grammar(spellings, {"const": "hello, the sea"}).begin()
    walk.step(pieces.index(b'"'))
    drawn = []
    for _ in range(4):
        (token,) = allowed(walk)
        drawn.append(token)
        walk.step(token)
    assert drawn == tokenizer.encode('hello, the sea"', continues=True)[:4]


@pytest.mark.parametrize(
    "encode", [lambda text: [], lambda text: [0] * len(text)], ids=["no ids", "other ids"]
)
def test_a_tokenizer_that_loses_something_is_not_believed(encode):
    spellings = Spellings([*BYTES, b"", b"the "], encode, frozenset({END}))
    assert written(spellings, [*BYTES, b"", b"the "], {"const": "in the é"}, 1) == (
        '"in the é"'.encode()
    )


@pytest.mark.parametrize(
    ("missing", "format"),
    [(b"{", "json"), (b"\xc3", {"const": "é"}), (b"5", {"const": 5})],
)
def test_a_vocabulary_that_cannot_write_it_is_told(missing, format):
    pieces = [b"" if piece == missing else piece for piece in BYTES]
    spellings = Spellings([*pieces, b""], lambda text: [], frozenset({END}))
    with pytest.raises(RefollamaError, match="cannot"):
        written(spellings, [*pieces, b""], format, 1)


def test_a_dropped_vocabulary_is_freed():
    def encode(text):
        return list(text.encode())

    spellings = Spellings([*BYTES, b""], encode, frozenset({END}))
    grammar(spellings, "json").begin().mask()
    held = weakref.ref(encode)
    del spellings, encode
    gc.collect()
    assert held() is None


# ── in the chain ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {"mirostat": 1}, {"mirostat": 2}, {}, {"top_k": 1}, {"typical_p": 0.5}],
    ids=str,
)
def test_the_stage_stands_behind_the_penalties_whatever_follows(changes):
    seen: dict[str, Candidates] = {}
    sampler = Sampler(
        Options(seed=1).updated(changes),
        grammar=grammar(alone(), "json"),
        on_stage=seen.__setitem__,
    )
    logits = torch.randn(257, generator=torch.Generator().manual_seed(0))
    assert sampler(logits) == ord("{")
    assert list(seen)[:3] == ["logits", "penalties", "grammar"]
    assert seen["grammar"].ids.tolist() == [ord("{")] and len(seen["grammar"].dropped) == 256
    for _ in range(30):
        sampler(logits)
        if sampler.complete:
            break
        assert set(seen["draw"].ids.tolist()) <= set(seen["grammar"].ids.tolist())


def test_without_a_grammar_nothing_is_ever_complete():
    sampler = Sampler(Options(seed=1))
    sampler(torch.zeros(5))
    assert not sampler.complete and "grammar" not in dict(sampler.stages())


def test_a_keyword_cannot_forge_a_line_of_the_log(caplog):
    """What a client sends is shown on one line, short, and as ASCII."""
    with caplog.at_level(logging.WARNING):
        source({"type": "object", "zzz\n2026-01-01 INFO request \u202e" + "x" * 500: 1})
    (record,) = [r for r in caplog.records if "no keywords" in r.getMessage()]
    assert record.getMessage().isascii() and "\n" not in record.getMessage()
    assert len(record.getMessage()) < 200
