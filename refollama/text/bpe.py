"""Byte-level BPE: GPT-2 and its heirs, Llama 3 among them. Rebuilt from a GGUF file's vocabulary.

    "Hi über" ─ cut ─► "Hi" · " über" ─ bytes as letters ─► "Hi" · "ĠÃ¼ber" ─ merge ─► Hi Ġ Ã¼ ber

A text is first cut into words, by patterns that differ from family to family (`PATTERNS`); no
token reaches across a cut. Each byte of a word becomes one of 256 `LETTERS`, and pairs are merged,
the pair of lowest rank first. The `tokenizers` library does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from refollama.errors import UnsupportedModel
from refollama.text.tokenizer import (
    SURROGATES,
    UNBOUNDED,
    Defaults,
    FragmentTokenizer,
    SpecialTokens,
    TokenType,
    Vocabulary,
    texts,
    utf8,
)

log = logging.getLogger(__name__)

END_OF_TEXT = 11  # Falcon's <|endoftext|>; llama.cpp's default where a file names no BOS or EOS
SILENT = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED)  # tokens that print nothing


def _letters() -> tuple[str, ...]:
    """A visible letter for each byte: itself if it is visible, else the next from U+0100 on.

    Source: GPT-2's encoder.   Example: a space is Ġ, a line feed is Ċ.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in visible else next(spare)) for byte in range(256))


LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


# ------------------------------------------------------------------------------ text → words


@dataclass(frozen=True, slots=True)
class Cut:
    """How a family cuts text into words, and two habits that go with it."""

    patterns: tuple[str, ...]  # in turn, over every piece so far; matches and gaps are pieces
    whole_words: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


def _ranges(pairs: str) -> str:
    """Code points in hex as the inside of a character class: "41-5A B5" → "A-Zµ"."""
    ends = (pair.split("-") for pair in pairs.split())
    return "".join("-".join(chr(int(end, 16)) for end in pair) for pair in ends)


_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN_2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _MARKS
_LLAMA_3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _MARKS
_QWEN_35 = _QWEN_2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_SEED = _QWEN_2.replace(_MARKS, r" ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES)
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Words in camelCase are two.  As the models' own tokenizers have it; llama.cpp, whose regex engine
# knows no categories inside a class, takes every letter beyond a-z for both upper and lower case.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = "|".join((*_CAMEL, r"\p{N}", _PATHS))
_GPT_4O = "|".join((*(word + _ENGLISH + "?" for word in _CAMEL), r"\p{N}{1,3}", _PATHS))

_CJK = rf"[{_ranges('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_DEEPSEEK_3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_EAST_ASIAN = rf"[{_ranges('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_CASED = _ranges(  # letters that have an upper and a lower case, as DeepSeek LLM counts them
    """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
    388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA
    1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59
    1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC
    1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139
    213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B
    A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F
    104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
    """
)
_PUNCTUATION = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    rf"\s?[{_PUNCTUATION}]+",
    r"(?<!\s)\s+(?![\s\S])",  # spaces at the end; said so that no run of them is read twice
    _EAST_ASIAN,
    r"\p{N}+",
)
_YOUTU = (
    f"[{_ranges('AC00-D7A3 3131-318E')}]+"
    f"|[{_ranges('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+"
    f"|[{_ranges('3105-312F')}]+|{_CJK}"
)
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT_2,
)
_BLOOM = r" ?[^(\s|.,!?" + _ranges("2026 3002 FF0C 3001 964 6D4 60C") + r")]+"

_FAMILIES: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    """gpt-2 mpt olmo jais phi-2 roberta-bpe gigachat jina-es jina-de jina-v1-en jina-v2-es
    jina-v2-de jina-v2-code a.x-4.0 mellum modern-bert exaone4 trillion granite-docling""": Cut(
        (_GPT_2,)
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Cut(
        (r"\p{N}", _GPT_2)
    ),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Cut(
        (_LLAMA_3,), whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": Cut((_LLAMA_3,)),
    "qwen2 deepseek-r1-qwen megrez stablelm2 kormo hunyuan solar-open grok-2 f2llmv2": Cut(
        (_QWEN_2,)
    ),
    "qwen35": Cut((_QWEN_35,)),
    "laguna": Cut((r"[^\n]+|[\n]+", _QWEN_2)),
    "ufakzeka": Cut((_QWEN_2.removeprefix(_ENGLISH + "|"),)),
    "minicpm5": Cut((r"\p{N}{1,3}", _LLAMA_3.replace("{1,3}", "+")), whole_words=True),
    "seed-coder": Cut((_SEED,)),
    "bailingmoe bailingmoe2 llada-moe": Cut((_BAILING,)),
    "deepseek-llm": Cut(_DEEPSEEK_LLM),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense": Cut((r"\p{N}{1,3}", _CJK, _DEEPSEEK_3)),
    "hyperclovax mu-choco": Cut((r"\p{N}", _CJK, _DEEPSEEK_3)),
    "tekken": Cut((_TEKKEN,), whole_words=True, add_bos=True),
    "youtu": Cut((_YOUTU, _GPT_4O.replace("{1,3}", "")), whole_words=True),
    "gpt-4o llama4 minimax-m2 kanana2 talkie": Cut((_GPT_4O,)),
    "chameleon": Cut(_CHAMELEON, add_bos=True),
    "poro-chat bloom gpt3-finnish": Cut((_BLOOM,)),
    "viking": Cut((_BLOOM, r"\p{N}")),
}

# By `tokenizer.ggml.pre`.  Source: llama.cpp (2025 and 2026) and the models' own files.
PATTERNS = {name: cut for names, cut in _FAMILIES.items() for name in names.split()}


def cut_of(metadata: Mapping[str, Any]) -> Cut:
    """The cut that a file asks for; the default one, with a warning, if nobody knows its name."""
    name = metadata.get("tokenizer.ggml.pre") or "default"
    if isinstance(name, str) and name in PATTERNS:
        return PATTERNS[name]
    log.warning("tokenizer.ggml.pre is %r, which is unknown: text is cut as by 'default'", name)
    return PATTERNS["default"]


# -------------------------------------------------------------------------------- words → ids


class BpeTokenizer(FragmentTokenizer):
    """A byte-level BPE tokenizer.

    Law: decode(encode(text)) == text, for text without lone surrogates (they become U+FFFD), if
    the vocabulary has a token for each byte. So nothing is tidied up: llama.cpp can take out the
    space in front of a full stop (`clean_spaces`), but only from a text decoded as a whole; what it
    streams keeps it.
    Source: the behaviour of llama.cpp (February 2025).
    """

    def __init__(
        self, vocabulary: Vocabulary, merges: Iterable[str], cut: Cut = PATTERNS["default"]
    ) -> None:
        self.vocabulary = vocabulary
        self._specials = SpecialTokens.of(vocabulary)
        self._pieces = [_printed(vocabulary, id) for id in range(len(vocabulary.tokens))]
        symbols, pairs = _symbols(vocabulary), _pairs(merges)
        self.longest = _longest(vocabulary, symbols)
        _spell_out(symbols, pairs)
        self._model = _rebuilt(symbols, pairs, cut)
        self._ids = list(symbols.values())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> BpeTokenizer:
        """Build it from the metadata of a GGUF file.

        Raises: UnsupportedModel if this is another kind of tokenizer; FormatError, naming the
        key, if the vocabulary is not sound.
        """
        found = metadata.get("tokenizer.ggml.model")
        if not isinstance(found, str) or found != "gpt2":
            raise UnsupportedModel(f"tokenizer.ggml.model is {found!r}, not 'gpt2'")
        cut = cut_of(metadata)
        defaults = Defaults(END_OF_TEXT, END_OF_TEXT, None, add_bos=cut.add_bos, add_eos=False)
        vocabulary = Vocabulary.from_metadata(metadata, defaults)
        return cls(vocabulary, texts(metadata, "merges"), cut)

    @property
    def newline_id(self) -> int | None:
        ids = self._encode_fragment("\n", prefix=False)
        return ids[0] if len(ids) == 1 else None

    def piece(self, id: int, *, first: bool = False) -> bytes:
        self.vocabulary.check(id)
        return self._pieces[id]

    def _encode_fragment(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text without special tokens; nothing is ever put in front of it."""
        # The batch call is the one that keeps no offsets, which takes half the time.
        (found,) = self._model.encode_batch_fast([text], add_special_tokens=False)
        return [id for symbol in found.ids for id in self._ids[symbol]]


def _printed(vocabulary: Vocabulary, id: int) -> bytes:
    """What a token prints: the bytes that its letters stand for, or itself if it is no such word.

    Control, unknown and unused tokens print nothing.
    """
    token, kind = vocabulary.tokens[id], vocabulary.types[id]
    if kind in SILENT:
        return b""
    if kind == TokenType.USER_DEFINED or not all(letter in _BYTES for letter in token):
        return utf8(id, token)
    return bytes(_BYTES[letter] for letter in token)


# --------------------------------------------------------------------- a model out of its columns

_Pair = tuple[str, str]
_Symbols = dict[str, tuple[int, ...]]  # what merging can make, and the ids that stand for it


def _symbols(vocabulary: Vocabulary) -> _Symbols:
    """The letters, and the tokens that are words or parts of them; of equal ones the later counts.

    Special tokens are no symbols: text that merely spells them is text. A letter is one always.
    """
    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids: _Symbols = dict.fromkeys(LETTERS, ())
    for id, (token, kind) in enumerate(rows):
        special = kind in SILENT or kind == TokenType.USER_DEFINED
        if token in _BYTES or not (special or token == "" or SURROGATES.search(token)):
            ids[token] = (id,)
    return ids


def _longest(vocabulary: Vocabulary, symbols: _Symbols) -> int:
    """Characters of the longest token; unbounded if there are bytes that become no token."""
    missing = sum(not symbols[letter] for letter in LETTERS)
    if missing:
        log.warning("the vocabulary has no token for %d of 256 bytes: they get lost", missing)
    return UNBOUNDED if missing else max(map(len, vocabulary.tokens))


def _pairs(merges: Iterable[str]) -> list[_Pair]:
    """What merges with what, lowest rank first; of a pair that comes twice the first counts.

    A merge is written "left right". The first character is never the border, whatever it is.
    """
    parted = ((merge, merge.find(" ", 1)) for merge in merges if not SURROGATES.search(merge))
    pairs = ((merge[:at], merge[at + 1 :]) for merge, at in parted if at > 0)
    return list(dict.fromkeys((left, right) for left, right in pairs if right))


def _spell_out(symbols: _Symbols, pairs: Iterable[_Pair]) -> None:
    """Give the symbols that merges go through, but that are no tokens, the ids of their letters."""
    for left, right in pairs:
        for symbol in (left, right, left + right):
            if symbol not in symbols:
                letters = (symbols.get(letter, ()) for letter in symbol)
                symbols[symbol] = tuple(id for ids in letters for id in ids)


def _rebuilt(symbols: _Symbols, pairs: list[_Pair], cut: Cut) -> tokenizers.Tokenizer:
    """The library's model. Its ids are the symbols' places, so every symbol can have one."""
    places = {symbol: place for place, symbol in enumerate(symbols)}
    model = tokenizers.Tokenizer(
        models.BPE(vocab=places, merges=pairs, ignore_merges=cut.whole_words)
    )
    model.pre_tokenizer = cutter(cut)
    return model


def cutter(cut: Cut) -> pre_tokenizers.PreTokenizer:
    """What turns a text into words, written in letters."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in cut.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, letters])
