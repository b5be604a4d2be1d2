"""The engine: one thread owns net and cache; everybody else gets an iterator of ids.

`stream(tokens, options)` puts a sequence into the queue and yields its tokens as they are drawn.
Closing the iterator is cancelling: the slot is free before the next step begins.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from refollama.engine import limits
from refollama.engine.net import Net, state
from refollama.engine.scheduler import Scheduler
from refollama.engine.sequence import NO_EXTRAS, NO_MARKS, End, Extras, Marks, Read, Sequence
from refollama.errors import Abandoned, RefollamaError, Stopping
from refollama.kvcache import KVCache
from refollama.options import Options
from refollama.sampling.chain import Sampler

log = logging.getLogger(__name__)

MAX_QUEUE = 512  # requests that may wait, as in Ollama
AT_ONCE = 512  # tokens of a prompt in one step: scores take memory for each pair of tokens
THREADS = torch.get_num_threads()  # what torch chose, or was told, before any engine began
Reading = Callable[[], contextlib.AbstractContextManager[None]]
LOOK_AROUND = 0.5  # seconds between two looks at whether the reader is still there


_running: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is still in torch when Python ends would abort the whole process."""
    for engine in list(_running):
        engine.close()


class Engine:
    """Runs many sequences on one net.

    As many as the cache has slots run side by side, others wait. The cache is the
    engine's own from now on. reading: what surrounds each step that reads of a prompt; a net that
    may round must not then, or an answer would depend on how its prompt was divided.
    writing_threads: of the steps that write, where no option says otherwise; 0: torch's own number.
    """

    def __init__(
        self,
        net: Net,
        cache: KVCache,
        marks: Marks = NO_MARKS,
        *,
        max_queue: int = MAX_QUEUE,
        reading: Reading = contextlib.nullcontext,
        writing_threads: int = 0,
    ) -> None:
        self.net = net
        self.marks = marks
        self._reading, self._writing_threads = reading, writing_threads
        self._cache = cache
        self._scheduler = Scheduler(cache.slots, max_queue)
        self._changed = threading.Condition()  # guards the scheduler; notified when work arrives
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        _running.add(self)

    # ── for everybody ─────────────────────────────────────────────────────────────────────────

    def stream(self, tokens: Iterable[int], options: Options, extras: Extras = NO_EXTRAS) -> Stream:
        """The answer to these tokens, as an iterator of ids.

        A prompt that does not fit is cut, or refused if `extras` say so. Once `extras.gone` says
        yes, the iterator raises Abandoned.
        Raises: PromptTooLong, BadRequest, ServerBusy, Stopping.
        """
        seq = self._sequence(list(tokens), options, extras)
        if seq.limit == 0:  # num_predict 0: the prompt is not even read
            seq.done_reason = "length"
            seq.finish()
            return Stream(self, seq)
        with self._changed:
            if self._closed:
                raise _unloaded()
            self._scheduler.add(seq)
            self._changed.notify()
        return Stream(self, seq)

    def _sequence(self, whole: list[int], options: Options, extras: Extras) -> Sequence:
        n_ctx = limits.context(options, self.net.n_ctx)
        keep = limits.keep(whole, options, n_ctx, self.marks.bos)
        prompt = limits.cut(whole, keep, n_ctx) if extras.truncate else whole
        sampler = Sampler(
            options,
            extras.words(prompt),
            n_ctx=n_ctx,
            newline=self.marks.newline,
            grammar=extras.grammar,
            on_stage=extras.on_stage,
        )
        return Sequence(
            prompt,
            options,
            sampler,
            limit=limits.answer(len(prompt), options, n_ctx, shift=extras.shift),
            n_ctx=n_ctx,
            keep=keep,
            dropped=len(whole) - len(prompt),
            extras=extras,
        )

    def forget(self) -> None:
        """Let no later prompt find its beginning in the cache."""
        with self._changed:
            self._scheduler.slots.forget()

    def memory(self) -> list[Tensor]:
        """The tensors of its cache, as they are now."""
        return [*self._cache.keys, *self._cache.values]

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
        torch.set_num_threads(THREADS)  # another engine may have had another number at this moment
        try:
            while (step := self._next()) is not None:
                self._step(step)
        except Exception as error:  # ours: nobody may wait for a thread that is gone
            log.exception("the engine failed")
            self._give_up(error)

    def _step(self, step: list[Sequence]) -> None:
        """One step; whatever goes wrong in it ends these sequences, not the engine."""
        try:
            self._forward(step)
        except Exception as error:
            log.exception("a step of the model failed")
            for seq in step:
                seq.broken = True
                if not seq.done:
                    seq.fail(_because(error))

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self._closed = True
            for seq in (*self._scheduler.running, *self._scheduler.waiting):
                if not seq.ended:
                    seq.fail(_because(error))

    def _next(self) -> list[Sequence] | None:
        """Wait for the next step; None when the engine is closed."""
        with self._changed:
            while True:
                self._dismiss()
                if self._closed:
                    return None
                if self._scheduler.can_admit:
                    self._scheduler.slots.trust(state(self.net))
                    self._welcome(*self._scheduler.admit())
                self._dismiss()
                if step := self._scheduler.next_step():
                    return step
                if not self._scheduler.can_admit:  # it can, if the one just admitted has failed
                    self._changed.wait()

    def _welcome(self, seq: Sequence, source: int) -> None:
        """Make its slot ready: what it has read already is in the slot `source`."""
        assert seq.slot is not None
        seq.started = time.perf_counter_ns()
        try:
            if source != seq.slot:
                self._cache.copy(source, seq.slot, seq.cached)
            self._cache.clear(seq.slot, seq.cached)
        except Exception as error:
            log.exception("a slot of the cache could not be made ready")
            seq.fail(_because(error))

    def _dismiss(self) -> None:
        """Let go of those who are done; of all, if the engine is closing."""
        if self._closed:
            for seq in (*self._scheduler.running, *self._scheduler.waiting):
                seq.cancelled = True
        if self._scheduler.any_done:  # was the net the same all the time?
            self._scheduler.slots.trust(state(self.net))
        for seq in self._scheduler.remove_done():
            if not seq.ended:
                seq.finish(None if seq.done_reason or not self._closed else _unloaded())

    @torch.no_grad()
    def _forward(self, step: list[Sequence]) -> None:
        """One step of the model for one reader or all writers."""
        for seq in step:
            if seq.full:
                self._shift(seq)
        tokens = [seq.next_tokens(min(seq.options.num_batch, AT_ONCE)) for seq in step]
        width = len(tokens[0])
        starts = torch.tensor([seq.length for seq in step])
        positions = starts[:, None] + torch.arange(width)  # (B, T)
        slots = [seq.slot for seq in step if seq.slot is not None]
        reading = self._reading() if step[0].reading else contextlib.nullcontext()
        usual = 0 if step[0].reading else self._writing_threads
        with threads(max(seq.options.num_thread for seq in step) or usual), reading:
            logits = self.net(
                torch.tensor(tokens, device=self.net.device),
                positions.to(self.net.device),
                self._cache.rows(slots, int(positions.max()) + 1),
            )
            for seq, row in zip(step, logits, strict=True):
                seq.seen(width)
                if not seq.reading:
                    self._choose(seq, row)

    def _shift(self, seq: Sequence) -> None:
        """Its context is full: what follows the kept tokens is forgotten, the rest moves up."""
        assert seq.slot is not None
        dropped = limits.discard(seq.keep, seq.n_ctx)
        self.net.shift(self._cache, seq.slot, seq.keep, seq.keep + dropped, seq.length)
        seq.length -= dropped
        seq.shifted = True

    def _choose(self, seq: Sequence, logits: Tensor) -> None:
        """Draw its next token. What is wrong with its logits ends it, and nobody else."""
        try:
            seq.choose(logits, self.marks.eos)
        except Exception as error:
            seq.fail(error)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for what follows, at most one a core; 0 = torch's own number."""
    wanted = min(count, os.cpu_count() or 1) or THREADS
    if wanted == torch.get_num_threads():
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(THREADS)


def _unloaded() -> Stopping:
    return Stopping("the model has been unloaded")


def _because(error: Exception) -> RefollamaError:
    """An error of each sequence's own, since each is raised in a thread of its own."""
    failed = RefollamaError(f"the model failed with {type(error).__name__}: the log says more")
    failed.__cause__ = error
    return failed


class Stream:
    """The tokens of one answer, as they are drawn. Use it in a `with`, or close it."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._finished = False
        self._looked = time.monotonic()
        self.sequence = sequence

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        for item in self.items():
            if isinstance(item, int):
                return item
        raise StopIteration

    def items(self) -> Iterator[int | Read | None]:
        """The tokens and, where that is asked for, how much of the prompt has been read.

        None: there is nothing at this moment, and `extras.bell` will ring.
        """
        while not self._finished:
            item = self._next()
            if not isinstance(item, End):
                yield item
                continue
            self._finished = True
            if item.error is not None:
                raise item.error

    def _next(self) -> int | Read | End | None:
        """The next item; now and then, whether it comes or not, a look at who is waiting for it."""
        waits = self.sequence.extras.bell is None
        while True:
            if time.monotonic() - self._looked >= LOOK_AROUND:
                self._look()
            with contextlib.suppress(queue.Empty):
                return self.sequence.outbox.get(waits, LOOK_AROUND)
            if not waits:
                return None

    def _look(self) -> None:
        self._looked = time.monotonic()
        if self.sequence.extras.gone():
            self.close()
            raise Abandoned("whoever asked has gone")

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
