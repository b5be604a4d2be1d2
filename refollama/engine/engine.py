"""The engine: one thread owns net and cache; everybody else gets an iterator of ids.

`stream(tokens, options)` puts a sequence into the queue and yields its tokens as they are drawn.
Closing the iterator is cancelling: the slot is free before the next step begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from refollama.engine import limits
from refollama.engine.net import Net
from refollama.engine.scheduler import Scheduler
from refollama.engine.sequence import End, Sequence
from refollama.errors import RefollamaError
from refollama.options import Options
from refollama.sampling.chain import Sampler

MAX_QUEUE = 512  # requests that may wait, as in Ollama


class Engine:
    """Runs many sequences on one net.

    `slots` sequences run side by side, others wait. The cache has one type for all of them
    (`f16_kv`), so that choice belongs to the engine and not to a request.
    """

    def __init__(
        self,
        net: Net,
        *,
        eos: Iterable[int] = (),
        newline: int | None = None,
        slots: int = 1,
        f16_kv: bool = True,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.net = net
        self.eos = frozenset(eos)
        self.newline = newline
        self._cache = net.new_cache(slots, torch.float16 if f16_kv else torch.float32)
        self._scheduler = Scheduler(slots, max_queue)
        self._changed = threading.Condition()  # guards the scheduler; notified when work arrives
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ── for everybody ─────────────────────────────────────────────────────────────────────────

    def stream(self, tokens: Iterable[int], options: Options) -> Stream:
        """The answer to these tokens, as an iterator of ids.

        Raises: PromptTooLong, ServerBusy.
        """
        prompt = list(tokens)
        limit = limits.answer(len(prompt), options, self.net.n_ctx)
        n_ctx = limits.context(options, self.net.n_ctx)
        sampler = Sampler(options, prompt, n_ctx=n_ctx, newline=self.newline)
        seq = Sequence(prompt, options, sampler, limit)
        if limit == 0:  # num_predict 0: the prompt is not even read
            seq.done_reason = "length"
            seq.finish()
            return Stream(self, seq)
        with self._changed:
            if self._closed:
                raise RefollamaError("the model has been unloaded")
            self._scheduler.add(seq)
            self._changed.notify()
        return Stream(self, seq)

    def cancel(self, seq: Sequence) -> None:
        """The sequence is not wanted any more; nothing happens if it has ended already."""
        with self._changed:
            seq.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """End all sequences, then the thread. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def active(self) -> int:
        """Sequences that run or wait."""
        with self._changed:
            return len(self._scheduler.running) + len(self._scheduler.waiting)

    # ── the engine's own thread ───────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while (step := self._next()) is not None:
            try:
                self._forward(step)
            except Exception as error:  # whatever it was, it ends these sequences, not the engine
                for seq in step:
                    seq.done_reason = "error"
                    seq.finish(error)

    def _next(self) -> list[Sequence] | None:
        """Wait for the next step; None when the engine is closed."""
        with self._changed:
            while True:
                self._dismiss()
                if self._closed:
                    return None
                for seq in self._scheduler.admit():
                    self._welcome(seq)
                if step := self._scheduler.next_step():
                    return step
                self._changed.wait()

    def _welcome(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self._cache.clear(seq.slot)
        seq.started = time.perf_counter_ns()

    def _dismiss(self) -> None:
        """Let go of those who are done; of all, if the engine is closing."""
        if self._closed:
            for seq in (*self._scheduler.running, *self._scheduler.waiting):
                seq.cancelled = True
        for seq in self._scheduler.remove_done():
            if not seq.ended:
                seq.finish(RefollamaError("the model has been unloaded") if self._closed else None)

    @torch.no_grad()
    def _forward(self, step: list[Sequence]) -> None:
        """One step of the model for one reader or all writers."""
        tokens = [seq.next_tokens(seq.options.num_batch) for seq in step]
        width = len(tokens[0])
        starts = torch.tensor([seq.seen for seq in step])
        positions = starts[:, None] + torch.arange(width)  # (B, T)
        slots = [seq.slot for seq in step if seq.slot is not None]
        logits = self.net(
            torch.tensor(tokens, device=self.net.device),
            positions.to(self.net.device),
            self._cache.rows(slots, int(positions.max()) + 1),
        )
        for seq, row in zip(step, logits, strict=True):
            seq.seen += width
            if not seq.reading:
                seq.take(seq.sampler(row), self.eos)


class Stream:
    """The tokens of one answer, as they are drawn. Use it in a `with`, or close it."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._finished = False
        self.sequence = sequence

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._finished:
            raise StopIteration
        item = self.sequence.outbox.get()
        if not isinstance(item, End):
            return item
        self._finished = True
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Closing is cancelling; after the end it does nothing."""
        if not self._finished:
            self._finished = True
            self._engine.cancel(self.sequence)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
