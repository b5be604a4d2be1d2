"""How fast are products by matrices in lanes: weights a second, of each type?

    python -m benchmarks.products [--types Q4_0 Q4_K …] [--rows 61440] [--columns 2048]

Random blocks, laid as `refollama warm` has them; each product is compiled first, if it was not yet
(half a minute). One token, eight, and a prompt of 512; medians, as a Markdown table.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch

from benchmarks.first_light import machine
from refollama.fast import reading, slabs
from refollama.fast.laned import ROUTINES, TOGETHER, LaneLinear, compile_product, is_there, path_of
from refollama.fast.lanes import CODE
from refollama.models.layers import Linear
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS

PROMPT = 512  # tokens


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products", description=(__doc__ or "").split("\n")[0]
    )
    few = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
    parser.add_argument("--types", nargs="+", default=few, choices=list(CODE))
    parser.add_argument("--rows", type=int, default=61440, help="a multiple of 16")
    parser.add_argument("--columns", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--repeat", type=int, default=9)
    given = parser.parse_args()
    print(f"{machine()}; {given.rows} x {given.columns}; medians of {given.repeat}\n")
    print("| type | bits | one token: G weights/s | GB/s | eight: G products/s | 512 | in 8 bits |")
    print("|---|---|---|---|---|---|---|")
    for kind in given.types:
        print(row(kind, given.rows, given.columns, given.repeat), flush=True)


def row(kind: str, rows: int, columns: int, repeat: int) -> str:
    """Of the table."""
    for which in ROUTINES:
        if not path_of(kind, *which).exists():
            compile_product(kind, *which)
    if not is_there(kind):
        return f"| {kind} | its product could not be loaded | | | | | |"
    part, count = matrix(kind, rows, columns), rows * columns
    bits = 8 * sum(one.nbytes for one in part.prepared()) / count
    one, eight, prompt = (
        tokens * count / seconds(part, tokens, repeat) / 1e9 for tokens in (1, TOGETHER, PROMPT)
    )
    with reading(8):
        short = PROMPT * count / seconds(part, PROMPT, repeat) / 1e9
    cells = f"{one:.1f} | {one * bits / 8:.1f} | {eight:.1f} | {prompt:.1f} | {short:.1f}"
    return f"| {kind} | {bits:.2f} | {cells} |"


def matrix(kind: str, rows: int, columns: int) -> LaneLinear:
    """Of random blocks; a quiet not-a-number among their scales costs no time."""
    layout = LAYOUTS[TYPE_ID[kind]]
    width = columns // layout.block.values * layout.block.nbytes
    packed = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    part = LaneLinear(Linear(packed, layout.unpack_rows), kind)
    part.prepare_now()
    return part


@torch.inference_mode()
def seconds(part: LaneLinear, tokens: int, repeat: int) -> float:
    """Median of a product by so many tokens; the first is to warm up."""
    x, found = torch.randn(tokens, slabs.columns(part)), []
    for _ in range(repeat + 1):
        start = perf_counter()
        part(x)
        found.append(perf_counter() - start)
    return median(found[1:])


if __name__ == "__main__":
    main()
