"""Who runs next. Prefill is one row, decode is one column, so no padding token ever exists.

prefill   B = 1, T = n    ▒▒▒▒▒▒      a part of one prompt, at most num_batch tokens
decode    B = n, T = 1    █           the newest token of every running sequence
                          █
                          █
"""

from __future__ import annotations

from collections import deque

from refollama.engine.sequence import Sequence
from refollama.engine.slots import Slots
from refollama.errors import ServerBusy


class Scheduler:
    """Sequences that wait and sequences that hold a slot; no model, no thread, no clock."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self.slots = Slots(slots)
        self.max_queue = max_queue
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._prefilled = False  # was the last step a prefill?

    def add(self, seq: Sequence) -> None:
        """Take a place in the queue.  Raises: ServerBusy when it is full."""
        if len(self.waiting) >= self.max_queue:
            raise ServerBusy(f"the server is busy: {self.max_queue} requests are waiting already")
        self.waiting.append(seq)

    @property
    def can_admit(self) -> bool:
        """Is there somebody who waits, a slot for them, and nobody who reads?

        Prompts are read one after another anyway; who comes in later can use what was read before.
        """
        return bool(self.slots and self.waiting) and not any(seq.reading for seq in self.running)

    def admit(self) -> tuple[Sequence, int]:
        """Give a free slot to the one who waits longest; it, and the slot that its beginning is in.

        To be called if `can_admit` only.
        """
        seq = self.waiting.popleft()
        held = {each.slot: each.held for each in self.running if each.slot is not None}
        seq.slot, seq.cached, source = self.slots.take(seq.prompt, held)
        seq.seen(seq.cached)
        self.running.append(seq)
        return seq, source

    def next_step(self) -> list[Sequence]:
        """One sequence that reads its prompt, or all that write; [] if there is nothing to do.

        Both in turn while there are both, so a long prompt does not silence running answers.
        """
        readers = [seq for seq in self.running if seq.reading]
        writers = [seq for seq in self.running if not seq.reading]
        self._prefilled = bool(readers) and not (writers and self._prefilled)
        return readers[:1] if self._prefilled else writers

    @property
    def any_done(self) -> bool:
        """Has somebody ended who still holds a slot?"""
        return any(seq.done for seq in self.running)

    def remove_done(self) -> list[Sequence]:
        """Sequences that ended or were cancelled; their slots are free at once."""
        done = [seq for seq in (*self.running, *self.waiting) if seq.done]
        self.running = [seq for seq in self.running if not seq.done]
        self.waiting = deque(seq for seq in self.waiting if not seq.done)
        for seq in done:
            if seq.slot is not None:
                self.slots.give_back(seq.slot, seq.held)
        return done
