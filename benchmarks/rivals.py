"""How fast does a model of real size read and write here, on the plain path, and in llama.cpp?

    python -m benchmarks.rivals [--layers 22] [--width 2048] [--repeat 5] [--types Q4_0 Q8_0 F16]

Builds a Llama of this shape (22 layers: that of TinyLlama-1.1B) with random weights in a temporary
folder, packed as each type, and measures the same file in turn everywhere, with as many threads:
tokens a second that are read, 256 at once, and written, 32 one after the other. No tokenizer and no
sampler takes part. Prints medians as a Markdown table, and how many times as fast as llama.cpp we
are. The rival is the package llama-cpp-python, which may be missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

import refollama
from benchmarks.first_light import VOCABULARY, machine, spread, write_llama
from refollama.bench import rate
from refollama.quantize import plan
from refollama.weights import open_gguf
from refollama.weights.mixes import MIXES

READ, WRITTEN = 256, 32  # tokens
TESTS = {f"read {READ}": (READ, READ), f"write {WRITTEN}": (WRITTEN, 1)}  # and how many at once
Rate = Callable[[int, int, int], float]  # tokens, in steps of so many, seed → tokens a second
Runner = Callable[[Path], AbstractContextManager[Rate]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "F16"], choices=list(MIXES))
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain path: slow")
    given = parser.parse_args()
    runners: dict[str, Runner] = {"refollama": here}
    if not given.no_plain:
        runners["plain path"] = partial(here, fast=False)
    if there := llama_cpp():
        runners["llama.cpp"] = there
    print(machine())
    print(f"{given.layers} layers, {given.width} wide; medians of {given.repeat} (least – most)")
    print("" if there else "llama-cpp-python is not installed: no rival\n")
    print(f"| type | test | {' | '.join(runners)} | times llama.cpp |")
    print("|---|---|" + "---|" * (len(runners) + 1))
    with TemporaryDirectory() as name:
        source = write_llama(Path(name) / "source.gguf", "F16", given.layers, given.width)
        for type in given.types:
            path = Path(name) / f"{type}.gguf"
            with open_gguf(source) as file:
                plan(file, type).write(path)
            show(type, measured(path, runners, given.repeat))
            path.unlink()


def show(type: str, found: dict[str, dict[str, list[float]]]) -> None:
    for test, rates in found.items():
        cells = [spread(tuple(some)) for some in rates.values()]
        ours, theirs = rates["refollama"], rates.get("llama.cpp")
        cells.append(f"{median(ours) / median(theirs):.2f}" if theirs else "")
        print(f"| {type} | {test} | {' | '.join(cells)} |", flush=True)


def measured(
    path: Path, runners: Mapping[str, Runner], repeat: int
) -> dict[str, dict[str, list[float]]]:
    """Rates of each test and runner, taken in turn; a first one of each is to warm up."""
    found: dict[str, dict[str, list[float]]] = {test: {} for test in TESTS}
    with ExitStack() as loaded:
        rates = {name: loaded.enter_context(runner(path)) for name, runner in runners.items()}
        for seed in range(repeat + 1):
            turn = seed % len(rates)  # nobody always comes after the same one
            for name, rate_of in [*rates.items()][turn:] + [*rates.items()][:turn]:
                for test, (count, at_once) in TESTS.items():
                    found[test].setdefault(name, []).append(rate_of(count, at_once, seed))
    return {test: {name: some[1:] for name, some in rows.items()} for test, rows in found.items()}


@contextmanager
def here(path: Path, *, fast: bool = True) -> Iterator[Rate]:
    llm = refollama.load(path, {"fast": fast})
    try:
        yield lambda count, at_once, seed: rate(llm.net, 0, count, at_once, seed)
    finally:
        llm.close()


def llama_cpp() -> Runner | None:
    """The rival, if it is there."""
    try:
        from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None

    @contextmanager
    def there(path: Path) -> Iterator[Rate]:
        threads = torch.get_num_threads()
        llm = Llama(
            str(path),
            n_ctx=max(count for count, _ in TESTS.values()),
            n_batch=READ,
            n_ubatch=READ,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

        def rate_of(count: int, at_once: int, seed: int) -> float:
            rng = torch.Generator().manual_seed(seed)
            ids = torch.randint(VOCABULARY, (count,), generator=rng).tolist()
            llm.reset()
            start = perf_counter()
            for first in range(0, count, at_once):
                llm.eval(ids[first : first + at_once])
            return count / (perf_counter() - start)

        try:
            yield rate_of
        finally:
            llm.close()

    return there


if __name__ == "__main__":
    main()
