"""How fast is a model on this machine?

    read 512    512 tokens that nobody has seen before, in one step
    write 128   128 steps of one token, each after those before it

What is measured is the net and its cache, as llama.cpp's `llama-bench` does: no tokenizer, no
sampler, no server. Tokens are drawn at random; which they are does not matter. Each test runs once
without being counted, so that what is prepared on first use is ready.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from refollama.cachekind import CacheKind
from refollama.engine.engine import AT_ONCE
from refollama.errors import BadRequest
from refollama.fast import reading
from refollama.kvcache import KVCache
from refollama.loaded import LoadedModel
from refollama.models.llama import Llama
from refollama.models.meter import Told, unheard

READ, WRITE = 512, 128  # tokens, as llama-bench has it


@dataclass(frozen=True)
class Speed:
    """What one test found.  Units: tokens a second, one number for each time that it ran."""

    name: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest."""
        return min(self.rates), max(self.rates)


def bench(
    llm: LoadedModel,
    read: int | None = None,
    write: int | None = None,
    *,
    depth: int = 0,
    repeat: int = 5,
    told: Told = unheard,
) -> list[Speed]:
    """Both tests; one of 0 tokens is left out.

    read, write: tokens; None: 512 and 128, or as many as the model can look back on.
    depth: tokens that are in the cache before, over which each new one looks back.
    told: is called with the tests that are done, and those that there are.
    Raises: BadRequest if the model cannot look back on so many.
    """
    net = CacheKind.of(llm.defaults, llm.net).turned(llm.net)
    room = max(1, net.n_ctx - depth)
    read = min(READ, room) if read is None else read
    write = min(WRITE, room) if write is None else write
    tests = [(name, count) for name, count in (("read", read), ("write", write)) if count]
    if min(read, write, depth) < 0:
        raise BadRequest("tokens to read, to write and before them are numbers from 0 on")
    for name, count in tests:
        if depth + count > net.n_ctx:
            raise BadRequest(
                f"{name} {count} after {depth} does not fit: the model looks back on "
                f"{net.n_ctx} tokens"
            )
    if not tests or repeat < 1:
        raise BadRequest("there is nothing to measure: read or write at least one token, once")
    found, done, total = [], 0, len(tests) * (repeat + 1)
    for name, count in tests:
        rates = []
        for turn in range(repeat + 1):
            at_once = AT_ONCE if name == "read" else 1
            with reading(llm.defaults.prompt_bits) if at_once > 1 else nullcontext():
                rates.append(rate(net, depth, count, at_once, turn))  # as the engine does it
            done += 1
            told(done, total)
        at = f" after {depth}" if depth else ""
        found.append(Speed(f"{name} {count}{at}", tuple(rates[1:])))
    return found


@torch.no_grad()
def rate(net: Llama, depth: int, count: int, at_once: int, seed: int) -> float:
    """Tokens a second: so many after `depth` others, in steps of `at_once`."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(net.n_vocab, (depth + count,), generator=rng).to(net.device)
    cache = net.new_cache(dtype=torch.float16)
    cache.rows([0], depth + count)  # its memory is there before the clock runs
    _through(net, cache, ids, 0, depth, AT_ONCE)
    start = perf_counter()
    _through(net, cache, ids, depth, depth + count, at_once)
    return count / (perf_counter() - start)


def _through(net: Llama, cache: KVCache, ids: Tensor, start: int, end: int, at_once: int) -> None:
    for first in range(start, end, at_once):
        last = min(first + at_once, end)
        positions = torch.arange(first, last, device=ids.device)[None]
        logits = net(ids[None, first:last], positions, cache.rows([0], last))
        logits.sum().item()  # what a GPU has begun is done
