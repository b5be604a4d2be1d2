"""The words of fable as tokens, and the marks between the turns of a conversation.

    conversations ──► words, counted ── sentencepiece (BPE) ──► pieces ──► metadata of a GGUF file

Whatever is copied from a question into an answer, or is an answer by itself, should be one token:
so all words of the world are learned as pieces, with the space before them and without, and as
they are written in capitals. So are the marks between a key of an object, its value and the next
key: what stands three tokens ago is found more easily than what stands seven ago. What people type
besides is spelled by smaller pieces; the last resort is bytes.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sentencepiece

from refollama.fable.exchange import capital
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

PIECES = 3840
SAMPLE = 6_000  # conversations that are counted
COPIED = 8  # times that each spelling of a word of the world is counted in any case
RARE = 3  # what comes less often is no word of the world
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

# Every printable character of ASCII is a piece, so that typing costs no bytes.
LETTERS = "".join(map(chr, range(33, 127)))

WORLD = (*NAMES, *ANIMALS, *COLOURS, *PLACES, *CITIES, *DAYS, *FOODS, *FRUITS)
WORLD += (*VIRTUES, *WEATHER, *THINGS)
# What is known by heart is no such word, but the answer to a question in one word.
BY_HEART = (*PEOPLE, *NUMBERS, *OPPOSITES, *FAMILY.values(), *SAYS.values(), *WEATHER.values())
JOINTS = ('{"', '": "', '":', '", "', ', "', '"}')  # of objects

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
    """The vocabulary of these texts, in which all words of `copied` and all `joints` are whole."""
    counts = words_of(texts)
    counts.update({form: COPIED for word in copied for form in spellings(word)})
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


def _columns(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": Typed([model.get_score(id) for id in ids], ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed([_kind(model, id) for id in ids], ValueType.INT32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _kind(model: sentencepiece.SentencePieceProcessor, id: int) -> TokenType:
    if model.is_unknown(id):
        return TokenType.UNKNOWN
    if model.is_control(id):
        return TokenType.CONTROL
    return TokenType.BYTE if model.is_byte(id) else TokenType.NORMAL
