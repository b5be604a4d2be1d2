"""The same answer, sooner: parts of a finished net, replaced by others that are proved equal.

    net ── hasten ──┬─ a small net: every matrix is unpacked once (kept.py), every bit stays
                    └─ a large one: each matrix by its type
                         2 to 8 bits, after `refollama warm`
                                      ── sixteen rows side by side (lanes.py, laned.py)
                         4, 5, 8 bits in groups of 32, before it
                                      ── nibbles, multiplied as they lie (nibbles.py)
                         F16, BF16, all others
                                      ── 16 bits, multiplied as they lie (half.py, rows.py)
                         F32, and without memory
                                      ── unpacked some rows at a time (slabs.py)
         experts, each as a matrix of its type (experts.py)
         attention over a prompt, and gates, some tokens at a time (attention.py, gates.py)
         blocks, after `warm` ── one compiled routine for a token (step.py, compiled.py)
         the same on a GPU ── matrices stay packed, launches are recorded (recorded.py)
         copies, after it  ── mapped from where they were kept (copies.py)

Only a few tokens at a time are rounded, as when answers are written: each step needs all weights
for itself. Where products are compiled tokens have 16 bits (dots.py, instructions.py), those of
prompts as well. Other prompts go in slabs: as on the plain path, but for the order of sums; and so
does everything that is done `with exactly():`, as `llm.logits`, `score` and `embed` do.
"""

from refollama.fast.choice import (
    has_routines,
    hasten,
    lacking,
    more_bytes,
    threads_for_writing,
    warm,
)
from refollama.fast.compiled import CompiledBlock
from refollama.fast.copies import keep
from refollama.fast.prepared import exactly, reading

__all__ = [
    "CompiledBlock",
    "exactly",
    "has_routines",
    "hasten",
    "keep",
    "lacking",
    "more_bytes",
    "reading",
    "threads_for_writing",
    "warm",
]
