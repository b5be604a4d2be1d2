"""The tokenizer of a GGUF file as the files that transformers reads, and how text is written to it.

kind "llama"   tokenizer.model (SentencePiece), and the same as merges in tokenizer.json
kind "gpt2"    tokenizer.json (byte-level BPE)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refollama.convert.vocabulary import SPACE
from refollama.errors import UnsupportedModel
from refollama.text import pieces, tokenizer_from
from refollama.text.bpe import Cut, cut_of, cutter
from refollama.text.tokenizer import SURROGATES, TokenType

Files = dict[str, bytes | str | Mapping[str, Any]]
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
ROLES = ("bos", "eos", "unk", "pad")
KEYS = {"unk": "unknown", "pad": "padding"}  # role → its key, where that is another word


def files(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Files:
    """By name.  Raises: UnsupportedModel for another kind, FormatError for what is unsound."""
    words = _Words(metadata)
    kind = metadata["tokenizer.ggml.model"]
    spec = _merging(words) if kind == "llama" else _byte_level(words)
    found: Files = {"tokenizer.json": spec}
    if kind == "llama":
        found["tokenizer.model"] = pieces.write(words.pieces())
    about = words.about(config["max_position_embeddings"])
    found["tokenizer_config.json"] = about
    found["generation_config.json"] = words.ends()
    if template := metadata.get("tokenizer.chat_template"):
        found["chat_template.jinja"] = str(template)
    return found


def found_first(token: str, *, special: bool) -> dict[str, Any]:
    """A token that is looked for in the text before all others, exactly as it is spelled."""
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **sides, "special": special}


class _Words:
    """The vocabulary in the metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.tokenizer = tokenizer_from(metadata)  # which checks it
        self.tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
        _check_utf8(self.tokens)
        size = len(self.tokens)
        self.types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [1] * size)]
        self.scores = [float(s) for s in metadata.get("tokenizer.ggml.scores", [0.0] * size)]

    @property
    def space_prefix(self) -> bool:
        return bool(self.metadata.get("tokenizer.ggml.add_space_prefix", True))

    def id_of(self, role: str) -> int | None:
        """The token for this role: one that the file names, or a mark that is used unnamed."""
        named = self.metadata.get(f"tokenizer.ggml.{KEYS.get(role, role)}_token_id")
        if isinstance(named, int) and 0 <= named < len(self.tokens):
            return named
        usual = {"bos": self.tokenizer.bos_id, "eos": min(self.marks(), default=None)}.get(role)
        return usual if usual is not None and self.types[usual] in ADDED else None

    def marks(self) -> list[int]:
        """What ends an answer; an ordinary word that is a default for want of better is none."""
        return [id for id in self.tokenizer.eos_ids if self.types[id] in ADDED]

    def puts(self, role: str) -> bool:
        """Is this token put at that end of a text?"""
        text = -1
        around = self.tokenizer.around([text])  # BOS and EOS may be one token: the place tells
        at = around.index(text)
        return self.id_of(role) in (around[:at] if role == "bos" else around[at + 1 :])

    def added(self) -> Iterator[dict[str, Any]]:
        """Tokens that are looked for in the text before all others."""
        for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in ADDED:
                yield {"id": id, **found_first(token, special=kind != TokenType.USER_DEFINED)}

    def about(self, longest: int) -> dict[str, Any]:
        """tokenizer_config.json"""
        added = {str(row.pop("id")): row for row in self.added()}
        named = {
            f"{role}_token": self.tokens[id]
            for role in ROLES
            if (id := self.id_of(role)) is not None
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.puts("bos"),
            "add_eos_token": self.puts("eos"),
            **named,
            "added_tokens_decoder": added,
        }

    def ends(self) -> dict[str, Any]:
        """generation_config.json: every token that ends an answer, the usual one first."""
        usual = self.id_of("eos")
        ends = sorted({*self.marks(), usual} - {None}, key=lambda id: (id != usual, id))
        found = {"bos_token_id": self.id_of("bos"), "pad_token_id": self.id_of("pad")}
        found = {key: id for key, id in found.items() if id is not None}
        return found | {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else found

    def pieces(self) -> pieces.Pieces:
        """As SentencePiece has them."""
        texts = [
            token.replace(" ", SPACE) if kind == TokenType.USER_DEFINED else token
            for token, kind in zip(self.tokens, self.types, strict=True)
        ]
        rows = list(zip(texts, self.scores, self.types, strict=True))
        return pieces.Pieces(rows, space_prefix=self.space_prefix)

    def around(self) -> dict[str, Any] | None:
        """The post-processor of tokenizer.json."""
        text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        known = {}
        for role in ("bos", "eos"):
            id = self.id_of(role)
            if id is None or not self.puts(role):
                continue
            token = self.tokens[id]
            part = {"SpecialToken": {"id": token, "type_id": 0}}
            text = [part, *text] if role == "bos" else [*text, part]
            known[token] = {"id": token, "ids": [id], "tokens": [token]}
        if not known:
            return None
        pair = [*text, {"Sequence": {"id": "B", "type_id": 1}}]
        return {"type": "TemplateProcessing", "single": text, "pair": pair, "special_tokens": known}


def _check_utf8(tokens: Sequence[str]) -> None:
    """Raises: UnsupportedModel for a token of other bytes: JSON has no way to write them."""
    wrong = next((id for id, token in enumerate(tokens) if SURROGATES.search(token)), None)
    if wrong is not None:
        raise UnsupportedModel(
            f"tokenizer.ggml.tokens: entry {wrong} is no valid UTF-8, and the files of "
            "transformers hold nothing else"
        )


def _spec(words: _Words, model: Mapping[str, Any], **steps: Any) -> dict[str, Any]:
    """tokenizer.json"""
    vocab = {token: id for id, token in enumerate(words.tokens)}
    empty = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(words.added()),
        **steps,
        "post_processor": words.around(),
        "model": {"type": "BPE", **empty, **model, "vocab": vocab},
    }


# ── SentencePiece ────────────────────────────────────────────────────────────────────────────────


def _merging(words: _Words) -> dict[str, Any]:
    """What has the best score is merged first."""
    space, prefix = {"String": " "}, words.space_prefix
    written: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] * prefix
    written.append({"type": "Replace", "pattern": space, "content": SPACE})
    read: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    read += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    unknown = words.id_of("unk")
    model = {
        "unk_token": None if unknown is None else words.tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "merges": list(_merges(words)),
    }
    return _spec(
        words,
        model,
        normalizer={"type": "Sequence", "normalizers": written},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": read},
    )


def _merges(words: _Words) -> Iterator[list[str]]:
    """Every pair of tokens that makes a third one."""
    plain = {
        token: score
        for token, score, kind in zip(words.tokens, words.scores, words.types, strict=True)
        if kind == TokenType.NORMAL
    }
    for token in sorted(plain, key=lambda token: -plain[token]):
        for at in range(1, len(token)):
            if token[:at] in plain and token[at:] in plain:
                yield [token[:at], token[at:]]


# ── byte-level BPE ───────────────────────────────────────────────────────────────────────────────


def _byte_level(words: _Words) -> dict[str, Any]:
    cut = cut_of(words.metadata)
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut.whole_words,
        "merges": _pairs(words),
    }
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _spec(
        words,
        model,
        normalizer=None,
        pre_tokenizer=_written(cut),
        decoder={**letters, "use_regex": True},
    )


def _pairs(words: _Words) -> list[list[str]]:
    """What merges with what, lowest rank first; of a pair that comes twice the first counts.

    Raises: UnsupportedModel for a merge through what is no token. Our tokenizer spells such a thing
    in letters; the library refuses it, and without that merge others would be made in its place.
    """
    known = set(words.tokens)
    found: dict[tuple[str, str], None] = {}
    for merge in words.metadata["tokenizer.ggml.merges"]:
        rest, _, right = merge[1:].partition(" ")  # the first character is never the border
        left = merge[:1] + rest
        strange = [symbol for symbol in (left, right, left + right) if symbol not in known]
        if right and strange:
            raise UnsupportedModel(
                f"tokenizer.ggml.merges: {merge[:40]!r} goes through {strange[0][:40]!r}, which is "
                "no token; transformers merges tokens only"
            )
        if right:
            found.setdefault((left, right))
    return [[left, right] for left, right in found]


def _written(cut: Cut) -> Any:
    """How a text is cut into words, in the library's own words."""
    return json.loads(cutter(cut).__getstate__())
