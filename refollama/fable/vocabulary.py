"""The words of fable as tokens, and the marks between the turns of a conversation.

    conversations ──► words, counted ── sentencepiece (BPE) ──► pieces ──► metadata of a GGUF file

Whatever is copied from a question into an answer, or is an answer by itself, should be one token:
so all words of the world are learned as pieces, with the space before them and without. So are the
marks between a key of an object, its value and the next key: what stands three tokens ago is found
more easily than what stands seven ago. What people type besides is spelled by smaller pieces; the
last resort is bytes.

Pieces are learned of small letters, and each is there with a capital and in capitals as well:
Plukai and PLUKAI are spelled alike, so that one is found by the other.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import sentencepiece

from refollama.fable.exchange import capital
from refollama.fable.knowledge import BELOW_ZERO
from refollama.fable.lessons import Conversation, conversation
from refollama.fable.world import (
    ANIMALS,
    CITIES,
    COLOURS,
    DAYS,
    FAMILY,
    FOODS,
    FRUITS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    SAYS,
    THINGS,
    VIRTUES,
    WEATHER,
)
from refollama.text.tokenizer import TokenType
from refollama.weights.gguf import Typed, ValueType

PIECES = 1950  # in small letters
SAMPLE = 6_000  # conversations that are counted
COPIED = 8  # times that a word of the world is counted in any case
RARE = 3  # what comes less often is no word of the world
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

# Every printable character of ASCII is a piece, so that typing costs no bytes.
LETTERS = "".join(map(chr, range(33, 127)))

WORLD = (*NAMES, *ANIMALS, *COLOURS, *PLACES, *CITIES, *DAYS, *FOODS, *FRUITS)
WORLD += (*VIRTUES, *WEATHER, *THINGS)
# What is known by heart is no such word, but the answer to a question in one word.
BY_HEART = (*PEOPLE, *NUMBERS, *OPPOSITES, *FAMILY.values(), *SAYS.values(), *WEATHER.values())
BY_HEART += (BELOW_ZERO,)
# Of objects; and before the last two, what is asked about stands as near as before "?".
JOINTS = ('{"', '": "', '":', '", "', ', "', '"}', ", please?", ", please")

_WORD = re.compile(r"'s|'m| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]")
SPACE = "\u2581"

TEMPLATE = (
    "{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}"
    "{{ if .Prompt }}<|user|>{{ .Prompt }}<|end|>{{ end }}"
    "<|assistant|>{{ .Response }}<|end|>"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def written(talk: Conversation) -> str:
    """A conversation as the template writes it."""
    turns = (f"<|{one.role}|>{one.content}{END}" for one in talk.messages())
    return "".join(turns)


def words_of(texts: Iterable[str]) -> Counter[str]:
    """How often each word comes; one with a space before it is another word."""
    return Counter(word for text in texts for word in _WORD.findall(text))


def learn(seed: int, pieces: int = PIECES, sample: int = SAMPLE) -> dict[str, Any]:
    """A vocabulary, as `tokenizer.*` metadata: all from the conversations of a seed."""
    talks = (conversation(seed, index) for index in range(sample))
    texts = (text for talk in talks for text in said(talk))
    return learn_from(texts, (*WORLD, *BY_HEART), pieces, JOINTS)


def learn_from(
    texts: Iterable[str], copied: Iterable[str], pieces: int, joints: Iterable[str] = ()
) -> dict[str, Any]:
    """The vocabulary of these texts, in which all words of `copied` and all `joints` are whole.

    pieces: as many are learned, in small letters; with capitals there are nearly three times as
    many.
    """
    counts = words_of(text.lower() for text in texts)
    small = map(str.lower, copied)
    counts.update({form: COPIED for word in small for form in (word, f" {word}")})
    counts.update(dict.fromkeys(joints, sum(counts.values())))
    return _columns(_trained(counts, pieces))


def spellings(word: str) -> set[str]:
    """Within a sentence, one that was typed without capitals, a loud one; and at the front of one
    or of a loud one."""
    loud = word.upper()
    return {f" {word}", f" {word.lower()}", f" {loud}", capital(word), loud}


def said(talk: Conversation) -> list[str]:
    """All texts of a conversation, without the marks between them."""
    return [talk.system, *(text for turn in talk.turns for text in (turn.user, turn.answer))]


def _trained(counts: Counter[str], pieces: int) -> sentencepiece.SentencePieceProcessor:
    """Pairs are merged by how often they come; so that rare words are merged as well, a word
    counts by the logarithm of its number."""
    lines = [
        word.replace(" ", SPACE)
        for word, count in sorted(counts.items())
        if count >= RARE
        for _ in range(count.bit_length())
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_digits=False,
        required_chars=LETTERS,
        character_coverage=1.0,
        control_symbols=[SYSTEM, USER, ASSISTANT],
        eos_piece=END,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class Piece(NamedTuple):
    """A row of the vocabulary."""

    text: str
    score: float  # pairs are merged into the piece with the highest first
    kind: TokenType


def _columns(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    learned = [_piece(model, id) for id in range(model.get_piece_size())]
    found = {piece.text: piece for piece in learned}
    for piece in learned:
        for text in _louder(piece) if piece.kind == TokenType.NORMAL else ():
            found.setdefault(text, piece._replace(text=text))
    texts, scores, kinds = zip(*found.values(), strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.scores": Typed(list(scores), ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed(list(kinds), ValueType.INT32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _louder(piece: Piece) -> tuple[str, str]:
    """The same with a capital and in capitals, merged of theirs as it is of its parts."""
    word = piece.text.removeprefix(SPACE)
    return piece.text.removesuffix(word) + capital(word), piece.text.upper()


def _piece(model: sentencepiece.SentencePieceProcessor, id: int) -> Piece:
    return Piece(model.id_to_piece(id), model.get_score(id), _kind(model, id))


def _kind(model: sentencepiece.SentencePieceProcessor, id: int) -> TokenType:
    if model.is_unknown(id):
        return TokenType.UNKNOWN
    if model.is_control(id):
        return TokenType.CONTROL
    return TokenType.BYTE if model.is_byte(id) else TokenType.NORMAL
