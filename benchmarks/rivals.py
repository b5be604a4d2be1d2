"""How fast does a model of real size read and write here, and elsewhere on the same machine?

    python -m benchmarks.rivals [--quick] [--types Q4_0 Q4_K_M Q8_0 F16] [--json FILE] [--plot FILE]

Builds a Llama of TinyLlama-1.1B's shape with random weights in a temporary folder, packed as each
type, and lets everybody have the same file, with as many threads, in turn: refollama, its plain
path if asked for, llama.cpp (the package llama-cpp-python), and transformers, which unpacks a file
to float32. Measured are tokens a second, read and written, over caches of different depth and for
eight sequences side by side, without tokenizer and sampler; and, in a process of their own, the
seconds until a model is loaded and until its first token, and the most memory that it took. Prints
medians and their spread as Markdown tables. A rival that is not installed is named as missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

import refollama
from benchmarks.first_light import VOCABULARY, machine, spread, write_llama
from refollama.fast import reading, warm
from refollama.quantize import plan
from refollama.weights import open_gguf
from refollama.weights.mixes import MIXES

WRITTEN = 32  # tokens
SIDE_BY_SIDE = 8
FIRST = 32  # tokens of the prompt before a first token
# What each rival is imported from; transformers opens no GGUF file without the other.
PACKAGES = {"llama.cpp": ["llama_cpp"], "transformers": ["transformers", "accelerate"]}
OURS, PLAIN = "refollama", "plain path"


@dataclass(frozen=True)
class Test:
    """So many tokens in steps of so many, after others, in so many sequences."""

    count: int
    at_once: int
    depth: int = 0
    rows: int = 1

    @property
    def name(self) -> str:
        """As the table has it."""
        what = f"read {self.count}" if self.at_once > 1 else f"write {self.count}"
        what += f" after {self.depth}" if self.depth else ""
        return what + (f", {self.rows} side by side" if self.rows > 1 else "")


def tests(quick: bool) -> list[Test]:
    """What is measured."""
    lengths, depths = ([128, 512], [0, 512]) if quick else ([32, 128, 512, 2048], [0, 512, 2016])
    found = [Test(length, min(length, 512)) for length in lengths]
    found += [Test(WRITTEN, 1, depth) for depth in depths]
    return [*found, Test(WRITTEN, 1, rows=SIDE_BY_SIDE)]


Rate = Callable[[Test, int], float]  # a test and a seed → tokens a second; 0: it cannot do that
Runner = Callable[[Path], AbstractContextManager[Rate]]
Rates = dict[str, dict[str, list[float]]]  # test → runner → rates


def main() -> None:
    """The command."""
    given = _parser().parse_args()
    if given.alone:
        print(json.dumps(alone(given.alone, given.file)))
        return
    runners, missing = _runners(given)
    print(machine())
    print(f"{given.layers} layers, {given.width} wide; medians of {given.repeat} (least – most)")
    for name in missing:
        print(f"{name} takes no part: it needs {' and '.join(PACKAGES[name])}")
    print()
    results: dict[str, Any] = {"machine": machine(), "missing": missing, "types": {}}
    with TemporaryDirectory() as name:
        source = write_llama(Path(name) / "source.gguf", "F16", given.layers, given.width)
        for type in given.types:
            path = Path(name) / f"{type}.gguf"
            with open_gguf(source) as file:
                plan(file, type).write(path)
            found = measured(path, runners, tests(given.quick), given.repeat)
            costs = {one: _in_a_process_of_its_own(one, path) for one in runners}
            show(type, found, costs, first=type == given.types[0])
            results["types"][type] = {"tokens_per_second": found, "costs": costs}
            path.unlink()
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    if given.plot:
        plot(results["types"], given.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer tests, and 4 layers only")
    parser.add_argument("--layers", type=int, default=0, help="22; 4 if --quick")
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--types", nargs="+", default=["Q4_0", "Q4_K_M", "Q8_0", "F16"], choices=list(MIXES)
    )
    parser.add_argument("--plain", action="store_true", help="the plain path as well: slow")
    parser.add_argument("--warm", action="store_true", help="ours as `refollama warm` has it")
    parser.add_argument(
        "--prompt-bits", type=int, default=32, choices=[8, 16, 32], help="ours, when it reads"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--plot", type=Path, help="draw bars here (matplotlib): a .png or .svg")
    parser.add_argument("--alone", choices=[OURS, PLAIN, *PACKAGES], help=argparse.SUPPRESS)
    parser.add_argument("file", nargs="?", type=Path, help=argparse.SUPPRESS)
    return parser


def _runners(given: argparse.Namespace) -> tuple[dict[str, Runner], list[str]]:
    """Who takes part, and who is missing."""
    given.layers = given.layers or (4 if given.quick else 22)
    missing = [
        name
        for name, packages in PACKAGES.items()
        if not all(map(importlib.util.find_spec, packages))
    ]
    left_out = missing if given.plain else [PLAIN, *missing]
    runners = {name: one for name, one in everybody().items() if name not in left_out}
    return runners | {OURS: partial(here, compiled=given.warm, bits=given.prompt_bits)}, missing


def everybody() -> dict[str, Runner]:
    """Whoever can take part, in the order of the table."""
    return {
        OURS: here,
        PLAIN: partial(here, fast=False),
        "llama.cpp": llama_cpp,
        "transformers": transformers,
    }


# ── measuring ─────────────────────────────────────────────────────────────────────────────────


def measured(
    path: Path, runners: Mapping[str, Runner], tests: Sequence[Test], repeat: int
) -> Rates:
    """Rates of each test and runner, taken in turn; a first one of each is to warm up."""
    found: Rates = {test.name: {} for test in tests}
    with ExitStack() as loaded:
        rates = {name: loaded.enter_context(runner(path)) for name, runner in runners.items()}
        for seed in range(repeat + 1):
            turn = seed % len(rates)  # nobody always comes after the same one
            for name, rate_of in [*rates.items()][turn:] + [*rates.items()][:turn]:
                for test in tests:
                    found[test.name].setdefault(name, []).append(rate_of(test, seed))
    return {test: {name: some[1:] for name, some in rows.items()} for test, rows in found.items()}


def _in_a_process_of_its_own(runner: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rivals", "--alone", runner, str(path)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def alone(runner: str, path: Path) -> dict[str, float]:
    """Seconds until the model is loaded, and until its first token after that; most memory."""
    start = perf_counter()
    with everybody()[runner](path) as rate_of:
        loaded = perf_counter()
        rate_of(Test(FIRST, FIRST), 0)
        first = perf_counter()
        rate_of(Test(FIRST, 1), 0)
    return {"load s": loaded - start, "first token s": first - loaded, "peak MB": _most_memory()}


def _most_memory() -> float:
    """Of this process, MB; what `getrusage` tells on Linux began with that of its parent."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _ids(test: Test, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(259, VOCABULARY, (test.rows, test.depth + test.count), generator=rng)


def _timed(test: Test, through: Callable[[int, int], object]) -> float:
    """Tokens a second of a test; `through` puts tokens first … last − 1 through a net."""
    end = test.depth + test.count
    if test.depth:
        through(0, test.depth)
    start = perf_counter()
    for first in range(test.depth, end, test.at_once):
        through(first, min(first + test.at_once, end))
    return test.rows * test.count / (perf_counter() - start)


# ── who takes part ────────────────────────────────────────────────────────────────────────────


@contextmanager
def here(
    path: Path, *, fast: bool = True, compiled: bool = False, bits: int = 32
) -> Iterator[Rate]:
    """Our own net and cache, as the engine uses them."""
    llm = refollama.load(path, {"fast": fast})
    net = llm.net
    if compiled:
        warm(net)

    @torch.no_grad()
    def rate_of(test: Test, seed: int) -> float:
        ids, rows = _ids(test, seed), list(range(test.rows))
        cache = net.new_cache(test.rows, torch.float16)
        cache.rows(rows, ids.shape[1])  # its memory is there before the clock runs

        def through(first: int, last: int) -> None:
            positions = torch.arange(first, last).expand(test.rows, -1)
            with nullcontext() if last - first == 1 else reading(bits):  # as the engine does
                net(ids[:, first:last], positions, cache.rows(rows, last))

        return _timed(test, through)

    try:
        yield rate_of
    finally:
        llm.close()


@contextmanager
def llama_cpp(path: Path) -> Iterator[Rate]:
    """llama.cpp, through llama-cpp-python, whose `eval` knows one sequence."""
    from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]

    threads = torch.get_num_threads()
    llm = Llama(
        str(path),
        n_ctx=2048,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def rate_of(test: Test, seed: int) -> float:
        if test.rows > 1:
            return 0.0
        ids = _ids(test, seed)[0].tolist()
        llm.reset()
        return _timed(test, lambda first, last: llm.eval(ids[first:last]))

    try:
        yield rate_of
    finally:
        llm.close()


@contextmanager
def transformers(path: Path) -> Iterator[Rate]:
    """transformers, which unpacks the file to float32."""
    from transformers import (  # type: ignore[import-not-found, unused-ignore]
        AutoModelForCausalLM,
        DynamicCache,
    )

    net = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )

    @torch.no_grad()
    def rate_of(test: Test, seed: int) -> float:
        ids, cache = _ids(test, seed), DynamicCache()

        def through(first: int, last: int) -> None:
            net(ids[:, first:last], past_key_values=cache, use_cache=True, logits_to_keep=1)

        return _timed(test, through)

    yield rate_of


# ── what is shown ─────────────────────────────────────────────────────────────────────────────


def show(type: str, found: Rates, costs: dict[str, dict[str, float]], *, first: bool) -> None:
    """Tables of one type; the heads only once."""
    names = list(costs)
    rivals = [name for name in names if name != OURS]
    if first:
        heads = ["type", "test", *names, *(f"times {name}" for name in rivals)]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for test, rates in found.items():
        cells = [spread(tuple(rates[name])) if any(rates[name]) else "–" for name in names]
        cells += [_times(rates[OURS], rates[name]) for name in rivals]
        print(f"| {type} | {test} | {' | '.join(cells)} |", flush=True)
    for what in costs[OURS]:
        cells = [f"{costs[name][what]:.1f}" for name in names] + [""] * len(rivals)
        print(f"| {type} | {what} | {' | '.join(cells)} |", flush=True)


def _times(ours: list[float], theirs: list[float]) -> str:
    return f"{median(ours) / median(theirs):.2f}" if any(theirs) else ""


def plot(types: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: tokens a second, for each test a picture, for each type a group."""
    from matplotlib import pyplot

    names = list(next(iter(types.values()))["tokens_per_second"])
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 2.2 * len(names)), squeeze=False)
    for axis, test in zip(axes[:, 0], names, strict=True):
        rates = {type: found["tokens_per_second"][test] for type, found in types.items()}
        runners = list(next(iter(rates.values())))
        for at, runner in enumerate(runners):
            places = [group + at / (len(runners) + 1) for group in range(len(rates))]
            heights = [median(one[runner]) for one in rates.values()]
            axis.bar(places, heights, 1 / (len(runners) + 1), label=runner)
        axis.set_xticks(range(len(rates)), list(rates))
        axis.set_title(f"{test}: tokens/s")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
