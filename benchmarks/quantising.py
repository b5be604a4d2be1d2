"""What does each type of `refollama quantize` cost?  Writes the tables of docs/quantising.md.

    python -m benchmarks.quantising [--conversations 100] [--model other.gguf] [--page other.md]

One table is of the types themselves: bits, the error on normal weights, what becomes of Llama 3 8B.
The other is measured on fable: it is packed as each type, with and without an importance matrix,
and foretells the answers of conversations that it never saw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

import refollama
from refollama.fable.bundled import FOLDER
from refollama.fable.lessons import conversation
from refollama.fable.train import NO_TARGET, answers
from refollama.fable.vocabulary import ASSISTANT, written
from refollama.imatrix import collect
from refollama.quantize import Quantising, plan
from refollama.text.tokenizer import Tokenizer
from refollama.weights import open_gguf
from refollama.weights.blocks import BLOCKS, TYPE_ID, nbytes
from refollama.weights.importance import Importance
from refollama.weights.mixes import MIXES, PLAIN, Traits, tensor_type
from refollama.weights.quants import LAYOUTS, pack

PAGE = Path(__file__).parent.parent / "docs" / "quantising.md"
FABLE = FOLDER / "fable" / "fable.gguf"
CONTEXT = 512  # tokens of fable's; longer conversations are left out
WHOLE = "F32"  # what all others are compared with
LISTENED = 50  # conversations that an importance matrix is made from

# By how much the perplexity of Llama 3 8B is above that of F16: published in llama.cpp's own list
# of types (`llama-quantize --help`, 2024 and later), without importance matrix.
LLAMA3 = {
    "Q8_0": 0.0026, "Q6_K": 0.0217, "Q5_K_M": 0.0569, "Q5_K_S": 0.1049, "Q5_1": 0.1062,
    "Q5_0": 0.1316, "Q4_K_M": 0.1754, "Q4_K_S": 0.2689, "Q4_1": 0.4511, "Q4_0": 0.4685,
    "Q3_K_L": 0.5562, "Q3_K_M": 0.6569, "Q3_K_S": 1.6321, "Q2_K": 3.5199,
}  # fmt: skip

# ── the types themselves ──────────────────────────────────────────────────────────────────────


def types_table() -> str:
    """A row for each type: what most matrices are, and what becomes of a model."""
    rows = [
        (
            f"`{type}`",
            MIXES[type].base,
            f"{block_bits(MIXES[type].base):.4g}",
            _percent(normal_error(MIXES[type].base)),
            f"{llama3_bytes(type) * 8 / _count(llama3_shapes()):.2f}",
            f"{llama3_bytes(type) / 2**30:.2f}",
            f"+{LLAMA3[type]:.4f}" if type in LLAMA3 else "",
        )
        for type in MIXES
    ]
    first = ("TYPE", "most matrices", "bits", "error", "Llama 3 8B: bits", "GiB", "perplexity")
    return table(first, rows)


def block_bits(type: str) -> float:
    """Bits of a weight in blocks of this type."""
    block = BLOCKS[TYPE_ID[type]]
    return block.nbytes * 8 / block.values


def normal_error(type: str) -> float:
    """The error of normal weights that are packed, beside their size (both root mean squares)."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(256, 1024, generator=rng)
    unpacked = LAYOUTS[TYPE_ID[type]].unpack_rows(pack(values, type))
    return (unpacked.sub(values).square().mean() / values.square().mean()).sqrt().item()


def llama3_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of Llama 3 8B."""
    M, F, V, kv = 4096, 14336, 128256, 1024
    block: Mapping[str, tuple[int, ...]] = {
        "attn_norm": (M,), "attn_q": (M, M), "attn_k": (kv, M), "attn_v": (kv, M),
        "attn_output": (M, M), "ffn_norm": (M,), "ffn_gate": (F, M), "ffn_up": (F, M),
        "ffn_down": (M, F),
    }  # fmt: skip
    shapes = {"token_embd.weight": (V, M), "output_norm.weight": (M,), "output.weight": (V, M)}
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(32) for name, shape in block.items()}
    return shapes | blocks


def llama3_bytes(type: str) -> int:
    """All tensors of Llama 3 8B, as a file of this type has them."""
    traits = Traits(n_layers=32, shared_by=4)
    return sum(
        nbytes(TYPE_ID[tensor_type(name, shape, "BF16", type, traits)], shape)
        for name, shape in llama3_shapes().items()
    )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


# ── fable ─────────────────────────────────────────────────────────────────────────────────────


class Talk(NamedTuple):
    """A conversation that is to be foretold."""

    ids: list[int]
    asked: Tensor  # (T − 1,) bool: of the tokens after the first, those that answer


def talks(words: Tokenizer, count: int) -> Iterator[Talk]:
    """So many conversations of combinations that fable never saw, as its template writes them."""
    [begins] = words.encode(ASSISTANT, special=True)
    for index in range(count):
        ids = words.encode(written(conversation(1, index, held=True)), bos=True, special=True)
        if len(ids) <= CONTEXT:
            targets = answers(ids, begins, words.eos_ids)[:-1]
            yield Talk(ids, torch.tensor(targets) != NO_TARGET)


def heard(model: Path) -> Importance:
    """An importance matrix, from conversations such as fable was trained on."""
    llm = refollama.load(model)
    texts = (written(conversation(0, index)) for index in range(LISTENED))
    ids = [id for text in texts for id in llm.tokenizer.encode(text, bos=True, special=True)]
    return collect(llm, ids)


def surprises(model: Path, given: Sequence[Talk]) -> Tensor:
    """Of each token of all answers, in nats: (n,) float64."""
    llm = refollama.load(model)
    found = [llm.score(talk.ids)[talk.asked] for talk in given]
    return -torch.cat(found).double()


class Measured:
    """fable as each type, and how well it foretells; what comes out alike is measured once."""

    def __init__(self, model: Path, folder: Path, count: int) -> None:
        self.whole = folder / "whole.gguf"
        with open_gguf(model) as file:
            plan(file, WHOLE).write(self.whole)
        self.talks = list(talks(refollama.load(self.whole).tokenizer, count))
        self.importance = heard(self.whole)
        self.known: dict[object, Tensor] = {}

    def row(self, type: str) -> tuple[str, ...]:
        """Of the table."""
        work, found = self.planned(type), self.surprises(type)
        weighed = "" if type in PLAIN else _more(self.surprises(type, self.importance), self.base)
        return (
            f"`{type}`",
            becomes(work),
            f"{tensor_bits(work):.2f}",
            f"{work.nbytes / 1e6:.2f}",
            f"{found.mean().exp():.4f}",
            "" if type == WHOLE else _more(found, self.base),
            weighed,
        )

    @property
    def base(self) -> Tensor:
        """What all others are compared with."""
        return self.surprises(WHOLE)

    def planned(self, type: str, importance: Importance | None = None) -> Quantising:
        """What is to be done; nothing is packed yet."""
        return plan(open_gguf(self.whole), type, importance=importance)

    def surprises(self, type: str, importance: Importance | None = None) -> Tensor:
        """Of each token of all answers."""
        work = self.planned(type, importance)
        key = *(change.new for change in work.changes), importance is None
        if key not in self.known:
            work.write(packed := self.whole.with_name("packed.gguf"))
            self.known[key] = surprises(packed, self.talks)
            packed.unlink()
        return self.known[key]


def fable_table(model: Path, count: int) -> str:
    """A row for each type."""
    first = ("TYPE", "matrices become", "bits", "MB", "perplexity", "more", "more, with imatrix")
    with TemporaryDirectory() as folder:
        measured = Measured(model, Path(folder), count)
        rows = []
        for type in MIXES:
            rows.append(measured.row(type))
            print(*rows[-1], sep="  ", flush=True)
    return table(first, rows)


def becomes(work: Quantising) -> str:
    """The types of its matrices, that of most weights first.  Example: Q4_0, Q8_0"""
    counts: dict[str, int] = {}
    for change in work.changes:
        if len(change.shape) > 1:
            counts[change.new] = counts.get(change.new, 0) + change.weights
    return ", ".join(sorted(counts, key=lambda type: -counts[type]))


def tensor_bits(work: Quantising) -> float:
    """Bits of a weight, without the vocabulary, which is much of a small file."""
    return sum(change.nbytes for change in work.changes) * 8 / work.weights


def _more(found: Tensor, base: Tensor) -> str:
    """By how many percent a perplexity is higher, ± the standard error, token by token."""
    more = found - base
    error = more.std() / len(more) ** 0.5
    return f"{more.mean().expm1() * 100:+.2f} % ± {error * 100:.2f}"


# ── the page ──────────────────────────────────────────────────────────────────────────────────


def table(first: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; all columns but two are numbers."""
    lines = [first, ["---", "---", *["--:"] * (len(first) - 2)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _percent(part: float) -> str:
    return f"{part * 100:.2f} %" if part else "0"


def put(page: str, name: str, table: str) -> str:
    """The page with a table between its marks `<!-- name -->` and `<!-- /name -->`."""
    before, rest = page.split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->\n")
    return f"{before}<!-- {name} -->\n{table}<!-- /{name} -->\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--conversations", type=int, default=100, help="that are foretold (100)")
    parser.add_argument("--model", type=Path, default=FABLE, help="a file of fable's")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    page = put(given.page.read_text(), "types", types_table())
    page = put(page, "fable", fable_table(given.model, given.conversations))
    given.page.write_text(page)
    print(f"wrote {given.page}")


if __name__ == "__main__":
    main()
