"""The tokenizer of a checkpoint → the `tokenizer.*` keys of a GGUF file.

    tokenizer.model        SentencePiece: pieces, scores, types                    ┐ one of them
    tokenizer.json         byte-level BPE; or SentencePiece, spelled as its merges ┘
    added_tokens.json, tokenizer_config.json   tokens that were added, and what they are for
    generation_config.json                     all tokens that end an answer
    chat_template.jinja …                      how a conversation is written

A byte-level tokenizer cuts text into words first. Which cut of `bpe.PATTERNS` it is, is found by
trying: the file's own cutter and each of ours cut the same difficult text, and must agree.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from refollama.convert.folder import Folder, Settings
from refollama.errors import FormatError, UnsupportedModel
from refollama.text import pieces
from refollama.text.tokenizer import TokenType
from refollama.weights.gguf import Typed, ValueType

log = logging.getLogger(__name__)

SPACE = "\u2581"  # how SentencePiece writes one
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # token → its key
MARKS = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

# Words, numbers, marks and spaces on which families differ.
PROBE = (
    "Hello world! I'm, you'RE we'll IT'S 1 12 123 1234 12345678 a1b2c3 camelCaseWord HTTPServer "
    "x=y+z; foo_bar(baz)[0]{1}  two   three    four\n\nlines\r\n\ttabs\t\t end \n  x\n\n\n y   "
    "/usr/lib//a/ http://b.c/d?e=f&g #tag @me $5 €7 50% ~`^|<>\\ -- … “quote” ‘s’ — "
    "naïve café e\u0301 Ünïcödé ЁЖИК ёжик ΑΒγδ ǅ ªº ½ ² Ⅷ 中文字符，日本語のテキスト。한국어 문장 "
    "ไทย हिन्दी العربية עברית 🙂🚀 👍🏽 \u200b \u00a0 \u3000 ,,,... !?;: ''\" (a) 'tis 'Twas don't"
)


@dataclass(slots=True)
class Columns:
    """The tokens of a model by id, as a GGUF file has them."""

    kind: str  # "llama" or "gpt2"
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    space_prefix: bool | None = None
    around: Mapping[str, str] | None = None  # the tokens put around a text, by role; None: not said
    extra: dict[str, Any] = field(default_factory=dict)

    def put(self, id: int, text: str, kind: int) -> None:
        """A token that was added; ids that are left out on the way are never used."""
        while len(self.tokens) <= id:
            self._append(f"[PAD{len(self.tokens)}]")
        if self.types[id] == TokenType.UNKNOWN:
            kind = TokenType.UNKNOWN
        if kind == TokenType.USER_DEFINED and self.kind == "llama":
            text = text.replace(SPACE, " ")  # it is looked for in the text itself
        self.tokens[id], self.types[id] = text, kind

    def fill(self, count: int) -> None:
        """As many as the model has rows: more of these than tokens are common."""
        while len(self.tokens) < count:
            self._append(f"[PAD{len(self.tokens)}]")

    def _append(self, text: str) -> None:
        self.tokens.append(text)
        self.types.append(TokenType.UNUSED)
        if self.scores is not None:
            self.scores.append(-10000.0)


def vocabulary(folder: Folder, config: Settings, n_rows: int) -> dict[str, Any]:
    """The keys, for a model of so many rows.

    Raises: FormatError, UnsupportedModel for a kind of tokenizer that we cannot run.
    """
    spec = folder.settings("tokenizer.json")
    columns = _columns(folder, spec)
    for id, text, special in _added(folder, spec):
        if id >= n_rows:
            raise _too_many(text, id, n_rows)
        columns.put(id, text, TokenType.CONTROL if special else TokenType.USER_DEFINED)
    if len(columns.tokens) > n_rows:
        raise _too_many(columns.tokens[n_rows], n_rows, n_rows)
    columns.fill(n_rows)
    return _metadata(columns) | _roles(folder, config, columns) | _template(folder)


def _too_many(text: str, id: int, n_rows: int) -> FormatError:
    return FormatError(
        f"the tokenizer does not belong to this model: it has a token {text[:40]!r} of id {id}, "
        f"but vocab_size is {n_rows}"
    )


def _columns(folder: Folder, spec: Settings) -> Columns:
    model = spec.part("model")
    if _is_byte_level(spec):
        return _byte_level(folder.text("tokenizer.json"), spec, model)
    if "tokenizer.model" in folder.files:
        return _sentencepiece(folder.read("tokenizer.model"))
    if not spec.values:
        raise FormatError("the tokenizer is missing: tokenizer.model or tokenizer.json")
    return _merging(spec, model)


def _metadata(columns: Columns) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokenizer.ggml.model": columns.kind,
        "tokenizer.ggml.pre": columns.pre,
        "tokenizer.ggml.tokens": columns.tokens,
        "tokenizer.ggml.token_type": Typed(columns.types, ValueType.INT32),
    }
    if columns.scores is not None:
        found["tokenizer.ggml.scores"] = Typed(columns.scores, ValueType.FLOAT32)
    if columns.merges is not None:
        found["tokenizer.ggml.merges"] = Typed(columns.merges, ValueType.STRING)
    if columns.space_prefix is not None:
        found["tokenizer.ggml.add_space_prefix"] = columns.space_prefix
    return found


# ── SentencePiece ────────────────────────────────────────────────────────────────────────────────


def _sentencepiece(data: bytes) -> Columns:
    found = pieces.read(data)
    if found.model_type != pieces.BPE:
        kind = pieces.MODEL_TYPES.get(found.model_type, "unknown")
        raise UnsupportedModel(f"tokenizer.model is of the kind {kind}; supported: BPE")
    if found.normalizer not in ("", "identity"):
        log.warning("tokenizer.model: text is not normalised by %r here", found.normalizer)
    texts, scores, types = map(list, zip(*found.rows, strict=True))
    for id, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED:
            texts[id] = texts[id].replace(SPACE, " ")
    return Columns("llama", texts, types, scores, space_prefix=found.space_prefix)


def _merging(spec: Settings, model: Settings) -> Columns:
    """SentencePiece in the form of merges: what is merged first has the best score."""
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = model.get("type")
        kind = "BPE without bytes" if kind == "BPE" else repr(kind)
        raise UnsupportedModel(
            f"tokenizer.json: the model is {kind[:40]}; supported: byte-level BPE, "
            "BPE with byte_fallback"
        )
    (tokens, given), merges = _vocab(model), _merges(model)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    types = [_type(token, given, model.get("unk_token")) for token in tokens]
    prefix = _puts_space(spec)
    return Columns("llama", tokens, types, scores, space_prefix=prefix, around=_around(spec))


def _type(token: str, given: Container[str], unknown: object) -> int:
    if token not in given:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if token in BYTE_NAMES else TokenType.NORMAL


def _puts_space(spec: Settings) -> bool:
    """Does a text get a space in front?  By a normalizer, or by the cutter of newer files."""
    for part in _steps(spec.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend":
            return True
    for part in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            return part.get("prepend_scheme", "always") != "never"
    return False


def _steps(part: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """A step by itself, or those of a sequence."""
    if not isinstance(part, dict):
        return
    if part.get("type") == "Sequence" and isinstance(part.get(inner), list):
        for each in part[inner]:
            yield from _steps(each, inner)
        return
    yield part


# ── byte-level BPE ───────────────────────────────────────────────────────────────────────────────


def _is_byte_level(spec: Settings) -> bool:
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_level(text: str, spec: Settings, model: Settings) -> Columns:
    if model.get("type") != "BPE":
        kind = str(model.get("type"))
        raise UnsupportedModel(f"tokenizer.json: the model is {kind[:40]!r}; supported: BPE")
    tokens, given = _vocab(model)
    whole_words = bool(model.get("ignore_merges"))
    types: list[int] = [
        TokenType.NORMAL if token in given else TokenType.UNUSED for token in tokens
    ]
    pre = _cut(text, whole_words)
    merges = _merges(model)
    return Columns("gpt2", tokens, types, merges=merges, pre=pre, around=_around(spec))


def _cut(text: str, whole_words: bool) -> str:
    """The name of the cut that this tokenizer makes."""
    import tokenizers

    from refollama.text.bpe import PATTERNS, cutter

    try:
        own = tokenizers.Tokenizer.from_str(text).pre_tokenizer
        wanted = own.pre_tokenize_str(PROBE)
    except Exception as problem:  # the library raises nothing narrower
        raise FormatError(f"tokenizer.json cannot be read: {str(problem)[:200]}") from None
    for name, cut in PATTERNS.items():
        if cut.whole_words == whole_words and cutter(cut).pre_tokenize_str(PROBE) == wanted:
            return name
    raise UnsupportedModel(
        "tokenizer.json cuts text into words in a way that is not known here; known are those of: "
        f"{', '.join(PATTERNS)}"
    )


# ── what both kinds share ────────────────────────────────────────────────────────────────────────


def _vocab(model: Settings) -> tuple[list[str], Container[str]]:
    """Tokens by id, and those that are given; an id that is left out is never used."""
    vocab = model.part("vocab").values
    if not vocab or any(type(id) is not int or not 0 <= id < 2**24 for id in vocab.values()):
        raise FormatError("tokenizer.json: vocab must say an id for each token")
    tokens = {id: token for token, id in vocab.items()}
    return [tokens.get(id, f"[PAD{id}]") for id in range(max(tokens) + 1)], vocab


def _merges(model: Settings) -> list[str]:
    """What merges with what, "left right"; newer files have lists of two."""
    found = model.get("merges")
    if not isinstance(found, list):
        raise FormatError("tokenizer.json: merges must be a list")
    return [_merge(pair) for pair in found]


def _merge(pair: object) -> str:
    if isinstance(pair, str):
        return pair
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair):
        return " ".join(pair)
    raise FormatError("tokenizer.json: merges must be pairs of texts")


def _around(spec: Settings) -> Mapping[str, str]:
    """The tokens before and behind a text, as the file's own post-processor puts them there."""
    for step in _steps(spec.get("post_processor"), "processors"):
        parts = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(parts, list) and parts:
            ends = {"bos": _special(parts[0]), "eos": _special(parts[-1])}
            return {role: token for role, token in ends.items() if token}
    return {}


def _special(part: Any) -> str:
    """The token that stands at this place of a template; "" where the text does."""
    inner = part.get("SpecialToken") if isinstance(part, dict) else None
    token = inner.get("id") if isinstance(inner, dict) else None
    return token if isinstance(token, str) else ""


def _added(folder: Folder, spec: Settings) -> Iterator[tuple[int, str, bool]]:
    """Id, text, and whether it is special; the file that knows most comes last."""
    plain = folder.settings("added_tokens.json")
    rows = [{"id": id, "content": text, "special": False} for text, id in plain.values.items()]
    given = spec.get("added_tokens")
    rows += given if isinstance(given, list) else []
    decoder = folder.settings("tokenizer_config.json").part("added_tokens_decoder")
    rows += [{**decoder.part(id).values, "id": _number(id)} for id in decoder.values]
    for row in rows:
        id, text = (row.get("id"), row.get("content")) if isinstance(row, dict) else (None, None)
        if type(id) is not int or id < 0 or not isinstance(text, str):
            raise FormatError("an added token must have an id and a content")
        yield id, text, bool(row.get("special"))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None


# ── what tokens are for ──────────────────────────────────────────────────────────────────────────


def _roles(folder: Folder, config: Settings, columns: Columns) -> dict[str, Any]:
    """Which tokens begin and end a text, and so on."""
    about = folder.settings("tokenizer_config.json")
    places = {text: id for id, text in enumerate(columns.tokens)}
    found: dict[str, Any] = {}
    for role, key in ROLES.items():
        named = _named(about.get(f"{role}_token") or (columns.around or {}).get(role), places)
        ids = _ids(named, _said(folder, config, f"{role}_token_id"), columns.types)
        if ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[0]
        if role == "eos" and len(ids) > 1:
            found["tokenizer.ggml.eos_token_ids"] = Typed(ids, ValueType.INT32)
    if "tokenizer.ggml.unknown_token_id" not in found and TokenType.UNKNOWN in columns.types:
        found["tokenizer.ggml.unknown_token_id"] = columns.types.index(TokenType.UNKNOWN)
    return found | _flags(about, columns)


def _said(folder: Folder, config: Settings, key: str) -> list[Any]:
    """One id or several: what generating goes by, or else what the model's settings say."""
    said = folder.settings("generation_config.json").get(key)
    said = config.get(key) if said is None else said
    return said if isinstance(said, list) else [said]


def _ids(named: int | None, said: list[Any], types: list[int]) -> list[int]:
    """The token that has the name first, then those of these ids.

    Where there is a name, an id of ordinary text is a default that nobody has looked at.
    """
    ids = [id for id in said if type(id) is int and 0 <= id < len(types)]
    if named is None:
        return list(dict.fromkeys(ids))
    return list(dict.fromkeys([named, *(id for id in ids if types[id] in MARKS)]))


def _named(token: Any, places: Mapping[str, int]) -> int | None:
    """The id of a token by its text, which may stand in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return places.get(text) if isinstance(text, str) else None


def _flags(about: Settings, columns: Columns) -> dict[str, bool]:
    """Are BOS and EOS put around a text?  SentencePiece models are used with BOS."""
    around = {"bos": ""} if columns.around is None else columns.around
    found = {"add_bos_token": "bos" in around, "add_eos_token": "eos" in around}
    for key in found:
        said = about.get(key)
        if isinstance(said, bool):
            found[key] = said
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _template(folder: Folder) -> dict[str, str]:
    """How a conversation is written, in Jinja; of several the default one."""
    found: Any = folder.text("chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        found = found or folder.settings(name).get("chat_template")
    if isinstance(found, list):
        rows = [row for row in found if isinstance(row, dict) and row.get("name") == "default"]
        found = rows[-1].get("template") if rows else None
    return {"tokenizer.chat_template": found} if isinstance(found, str) and found else {}
