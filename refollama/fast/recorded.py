"""On a GPU: the launches of a routine, recorded once and played back for every token.

    places ◄── x, angles, positions          weights, keys, values: as they lie
       └────────────── recording ──────────────────┘ ──► result

To launch a kernel from Python takes longer than many a kernel runs. A recording has fixed
addresses: what changes is copied into places of its own before it is played; where weights or
cache lie elsewhere, or sizes are others, another is made.

Source: PyTorch's documentation, "CUDA semantics: CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHANGING = 6  # of what a block's routine is given: x, cos, sin, positions, slots, visible
MOST = 16  # recordings: for so many numbers of rows

Run = Callable[[], list[Tensor]]
Record = Callable[[Run], tuple[Callable[[], None], list[Tensor]]]


def record_on_gpu(run: Run) -> tuple[Callable[[], None], list[Tensor]]:
    """How to play back what `run` launches, and where its results will be."""
    now, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(now)
    with torch.cuda.stream(aside):
        run()  # what is allocated and chosen at the first time must not be recorded
    now.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class Recording(NamedTuple):
    """Launches, and the tensors that they read and write."""

    places: list[Tensor]
    play: Callable[[], None]
    result: list[Tensor]


class Recorded:
    """A routine of a block, in place of itself.

    It may be called twice with the same arguments: what it writes into the cache is the same then.
    """

    def __init__(
        self, routine: Callable[[list[Tensor]], list[Tensor]], record: Record = record_on_gpu
    ) -> None:
        self.routine, self.record = routine, record
        self._lasting: list[tuple[int, torch.Size]] = []
        self._kept: dict[Sequence[torch.Size], Recording] = {}

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        lasting = [(one.data_ptr(), one.shape) for one in given[CHANGING:]]
        if lasting != self._lasting:
            self._kept.clear()
            self._lasting = lasting
        sizes = tuple(one.shape for one in given[:CHANGING])
        if sizes not in self._kept:
            if len(self._kept) == MOST:
                del self._kept[next(iter(self._kept))]
            self._kept[sizes] = self._recording(given)
        recording = self._kept[sizes]
        for place, one in zip(recording.places, given, strict=False):
            place.copy_(one)
        recording.play()
        return [one.clone() for one in recording.result]

    def _recording(self, given: list[Tensor]) -> Recording:
        places = [one.clone() for one in given[:CHANGING]]
        return Recording(places, *self.record(lambda: self.routine([*places, *given[CHANGING:]])))
