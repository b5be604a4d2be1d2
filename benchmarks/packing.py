"""How fast is a model packed?  Each type of file, side by side with llama.cpp's own quantiser.

    python -m benchmarks.packing [--layers 1] [--width 2048] [--repeat 3] [--types Q8_0 Q4_K_M]
    python -m benchmarks.packing --blocks

Builds a Llama of this shape with random F16 weights in a temporary folder and packs it from file to
file, in turn here and there, with as many threads. Prints medians of millions of weights a second,
as a Markdown table. The rival is the package llama-cpp-python, which may be missing: it is compiled
for some minutes, and refollama does without it.

A type of file is a mixture: in a small model most of Q4_0 is its output matrix, which is Q6_K. So
`--blocks` measures each type of block by itself: float16 values, packed, unpacked again and
compared, as `refollama quantize` does it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.first_light import machine, spread, write_llama
from refollama.quantize import AT_ONCE, plan, repacked
from refollama.weights import open_gguf
from refollama.weights.blocks import TYPE_ID
from refollama.weights.mixes import MIXES
from refollama.weights.quants import LAYOUTS

COLUMNS = 2048
Packer = Callable[[Path, Path, str], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--types", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--blocks", action="store_true", help="types of blocks, without files")
    given = parser.parse_args()
    if given.blocks:
        show_blocks(given.repeat)
        return
    rival = llama_cpp()
    print(machine())
    print("llama-cpp-python is not installed: no rival\n" if rival is None else "")
    print("| type | M weights/s | llama.cpp | times as fast |\n|---|---|---|---|")
    with TemporaryDirectory() as name:
        source = write_llama(Path(name) / "source.gguf", "F16", given.layers, given.width)
        with open_gguf(source) as file:
            weights = plan(file, "F16").weights
        for type in given.types:
            ours, theirs = measured(source, type, weights, rival, given.repeat)
            ratio = f"{median(ours) / median(theirs):.2f}" if theirs else ""
            print(f"| {type} | {spread(ours)} | {spread(theirs) if theirs else ''} | {ratio} |")


def show_blocks(repeat: int) -> None:
    """A row for each type of block that is not plain numbers."""
    print(machine())
    print("\n| blocks | M weights/s |\n|---|---|")
    values = torch.randn(2048, COLUMNS, generator=torch.Generator().manual_seed(0)).half()
    rows = torch.split(values.view(torch.uint8), AT_ONCE * torch.get_num_threads() // COLUMNS)
    for type in dict.fromkeys(mix.base for mix in MIXES.values()):
        rates = [block_rate(type, rows) for _ in range(repeat + 1)]
        print(f"| {type} | {spread(tuple(rates[1:]))} |", flush=True)


def block_rate(type: str, pieces: Sequence[torch.Tensor]) -> float:
    """Millions of weights a second: float16 rows, some at a time."""
    start = time.perf_counter()
    for rows in pieces:
        repacked(LAYOUTS[TYPE_ID["F16"]], LAYOUTS[TYPE_ID[type]], rows, None)
    weights = sum(rows.numel() for rows in pieces) / 2
    return weights / 1e6 / (time.perf_counter() - start)


def measured(
    source: Path, type: str, weights: int, rival: Packer | None, repeat: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Millions of weights a second, here and there, in turn; a first try of each is to warm up."""
    packers = [here] if rival is None else [here, rival]
    rates: list[list[float]] = [[] for _ in packers]
    for _ in range(repeat + 1):
        for packer, found in zip(packers, rates, strict=True):
            target = source.with_name("target.gguf")
            start = time.perf_counter()
            packer(source, target, type)
            found.append(weights / 1e6 / (time.perf_counter() - start))
            target.unlink()
    ours, theirs = (tuple(found[1:]) for found in (*rates, [])[:2])
    return ours, theirs


def here(source: Path, target: Path, type: str) -> None:
    with open_gguf(source) as file:
        plan(file, type).write(target)


def llama_cpp() -> Packer | None:
    """The rival, if it is there."""
    try:
        import llama_cpp as rival  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    silent = rival.llama_log_callback(lambda *_: None)
    rival.llama_log_set(silent, None)

    def pack(source: Path, target: Path, type: str) -> None:
        given = rival.llama_model_quantize_default_params()
        assert silent  # it must live as long as this
        given.nthread, given.ftype = torch.get_num_threads(), MIXES[type].number
        given.quantize_output_tensor = True
        if rival.llama_model_quantize(str(source).encode(), str(target).encode(), given):
            raise RuntimeError(f"llama.cpp could not pack {type}")

    return pack


if __name__ == "__main__":
    main()
