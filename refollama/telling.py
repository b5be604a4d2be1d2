"""From ids to records: an answer on its way out, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from refollama.engine.sequence import Extras, Logprob, Read
from refollama.engine.sequence import Sequence as Running
from refollama.errors import BadRequest
from refollama.messages import IDLE, Chunk, Reached, Stats, TokenLogprob
from refollama.text.stops import StopStrings
from refollama.text.tokenizer import StreamDecoder, Tokenizer

SHOWN = 8  # tokens in an error message


class Telling:
    """An answer on its way from ids to pieces of text; formed: a grammar says what it may be."""

    def __init__(
        self, tokenizer: Tokenizer, sequence: Running, stop: Sequence[str], extras: Extras
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence = sequence
        self.prompt = extras.words(sequence.prompt)  # a picture is no text
        self.formed = extras.grammar is not None
        self.spelled = extras.spelled
        self.stops = StopStrings(stop)
        self.drawn: list[int] = []
        self.shown = 0  # characters
        self._decoder = self._after_prompt()
        self._noted = 0  # tokens whose log-probabilities were told

    def hear(self, item: int | Read | None) -> Chunk | None:
        """What there is to say of the next item of a stream; see `Stream.items`."""
        if item is None:
            return IDLE
        if isinstance(item, Read):
            return Chunk(progress=Reached("prompt", item.tokens, len(self.sequence.prompt)))
        return self.push(item)

    def push(self, token: int) -> Chunk | None:
        """The text that is safe to show now, if there is any."""
        self.drawn.append(token)
        return self._chunk(self.stops.feed(self._decoder.push(token)))

    def finish(self) -> Chunk | None:
        """What was held back, once no more comes."""
        return self._chunk(self.stops.feed(self._decoder.finish()) + self.stops.finish())

    def done_reason(self) -> str:
        """Why the answer ended; one that must have a form is never whole before a stop string."""
        if not self.stops.hit:
            return self.sequence.done_reason
        return "length" if self.formed else "stop"

    def _after_prompt(self) -> StreamDecoder:
        decoder = StreamDecoder(self.tokenizer, self.prompt, self.spelled)
        if self.formed:
            decoder.finish()  # half a character of the prompt is no part of the form
        return decoder

    def _chunk(self, text: str) -> Chunk | None:
        self.shown += len(text)
        return Chunk(text, logprobs=self.noted(len(self.drawn))) if text else None

    def noted(self, count: int) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the first `count` tokens, less those that were told already.

        The engine may be ahead of what has been read of it, so its list may be longer.
        """
        likely = self.sequence.likely[self._noted : count]
        self._noted += len(likely)
        return tuple(self._named(one) for one in likely)

    def context(self) -> tuple[int, ...]:
        """The ids of the prompt's text and of what was shown; a token that was cut is respelled."""
        if not self.stops.hit:
            return (*self.prompt, *self.drawn)
        return (*self.prompt, *self._visible())

    def _visible(self) -> list[int]:
        """The ids of an answer's first `shown` characters."""
        decoder = self._after_prompt()
        kept: list[int] = []
        text = ""
        for token in self.drawn:
            longer = text + decoder.push(token)
            if len(longer) > self.shown:
                rest = longer[len(text) : self.shown]
                return kept + self.tokenizer.encode(rest, continues=True)
            kept.append(token)
            text = longer
        return kept

    def _named(self, one: Logprob) -> TokenLogprob:
        best = tuple(self._token(id, logprob) for id, logprob in one.best)
        asked = tuple(self._token(id, logprob) for id, logprob in one.named)
        return replace(self._token(one.id, one.logprob), top=best, named=asked)

    def _token(self, id: int, logprob: float) -> TokenLogprob:
        spelled = self.tokenizer.spelling(id)
        return TokenLogprob(id, spelled.decode(errors="replace"), spelled, logprob)


def token_ids(words: Tokenizer, tokens: Sequence[str | int]) -> tuple[int, ...]:
    """The ids of single tokens, which are given by id, or by what they print.

    Raises: BadRequest for a text that is not one token of the vocabulary, and for strange ids.
    """
    return tuple(_token_id(words, token) for token in tokens)


def _token_id(words: Tokenizer, token: str | int) -> int:
    if isinstance(token, int):
        words.piece(token)  # raises, if there is none
        return token
    some = token[: words.longest + 1]  # what is longer is not one token; that much shows why
    ids = words.encode(some, special=True, continues=True)
    written = [words.spelling(id).decode(errors="replace") for id in ids[:SHOWN]]
    if written != [token]:  # nor is what a vocabulary has no tokens for: it becomes another text
        more = " …" if len(ids) > SHOWN or some != token else ""
        shown = " ".join(map(repr, written)) or "none"
        raise BadRequest(f"{token[:40]!r} is not one token, but these: {shown}{more}")
    return ids[0]


def stats(seq: Running, start: int, drawn: int, looked: int) -> Stats:
    """Counts and durations of an answer that has just ended.

    looked: how long looking at pictures took, which is part of reading the prompt.
    """
    now = time.perf_counter_ns()
    read = seq.prompt_read or now
    return Stats(
        total_duration=now - start,
        prompt_eval_count=len(seq.prompt) if seq.prompt_read else 0,
        prompt_cached_count=seq.cached,
        prompt_truncated=seq.dropped,
        prompt_eval_duration=looked + read - (seq.started or read),
        eval_count=drawn,
        eval_duration=now - read,
    )
