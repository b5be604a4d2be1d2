"""What docs/fidelity.md says around the numbers: its sections, its judges, its layout."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fidelity import Deviation, Record, Row


@dataclass(frozen=True)
class Section:
    """A table of the page.  `unit` is what is counted there."""

    title: str
    subject: str
    unit: str
    about: str


@dataclass(frozen=True)
class Judge:
    """Who says what is right.

    `package`: the library whose version is told; `recording`: a file of tests/golden that names
    its program; `apart`: needs the recorded answers that are no part of the project.
    """

    what: str
    package: str = ""
    recording: str = ""
    apart: bool = False

    def __str__(self) -> str:
        said = f"{self.package} {version(self.package)}" if self.package else ""
        if self.recording:
            said = json.loads((GOLDEN / self.recording).read_text())["recorded_by"]
        return f"{self.what} ({said})" if said else self.what


GOLDEN = Path(__file__).parent / "golden"


SECTIONS = {
    "unpacking": Section(
        "Block formats: unpacking",
        "type",
        "blocks",
        "Packed bytes → float32, on random blocks and on every byte value in every place. Compared "
        "bit by bit, the sign of zero included.",
    ),
    "packing": Section(
        "Block formats: packing",
        "type",
        "blocks",
        "Float32 → packed bytes, on normal and heavy-tailed rows. The K types leave the packer a "
        "choice: its squared error is compared with that of ggml's own packer; the worst of three "
        "ratios is shown, and below 1 is better than ggml.",
    ),
    "packed models": Section(
        "Packed models",
        "type",
        "tokens",
        "How well a model foretells a text after it was packed here, as each type of file: its "
        "perplexity in llama.cpp and here, relative difference. llama.cpp rounds activations to 8 "
        "bits, and we do not: in F32, where it does not either, there is no difference.",
    ),
    "tokenizers": Section(
        "Tokenizers",
        "tokenizer",
        "texts",
        "Text → token ids and back; what a user says holds no special tokens. A kind is named by "
        "its `tokenizer.ggml.model`, and tried on a small vocabulary that is trained for the test; "
        "a vocabulary is that of a real model.",
    ),
    "word patterns": Section(
        "Word patterns",
        "`tokenizer.ggml.pre`",
        "texts",
        "Byte-level BPE cuts text into words first. One row for each pattern; "
        "[more names](tokenizers.md) share it.",
    ),
    "models": Section(
        "Model variants",
        "variant",
        "tokens",
        "The largest absolute difference of any logit after each token. Logits of random models "
        "spread by about 1 (`random/tied-base1e6`: by 8), and float32 keeps seven digits: some "
        "1e-06 is rounding. Names without a path are small random models that differ from `plain` "
        "in what they are named for.",
    ),
    "fast parts": Section(
        "Fast parts",
        "type",
        "tokens",
        "What replaces the matrices of large nets (`refollama/fast/`): a product, relative to that "
        "of the plain path, and what that does to the next token's distribution: the mean "
        "Kullback-Leibler divergence in nats; with *warm*: as it is written for `refollama warm`, "
        "Q4_0 as it is compiled, too. Small nets and types that are not named here are not rounded "
        "at all.",
    ),
    "context shift": Section(
        "Context shift",
        "variant",
        "tokens",
        "When the context is full, a part is dropped, and the keys behind it are turned to their "
        "new places. By how much a key differs, in a cache of float32 or float16, and by how much "
        "the next logits of a model of one layer.",
    ),
    "sampling": Section(
        "Sampling",
        "stage",
        "cases",
        "Which candidates a stage keeps, or by how much a probability differs.",
    ),
    "determinism": Section(
        "Determinism",
        "what may not matter",
        "cases",
        "The same request with the same seed gives the same text, whatever happens around it: "
        "equal texts, and under them logits, keys and values that are the same bit for bit.",
    ),
    "options": Section(
        "Options",
        "option",
        "cases",
        "Every name that [the options](options.md) have, and the tests that prove what it does.",
    ),
}

JUDGES = {
    "gguf": Judge("the Python package of the format: `gguf.quants`", "gguf"),
    "byte map": Judge("the format's byte map, computed slowly, one value at a time"),
    "ggml's packer": Judge(
        "the errors of ggml's own packer without an importance matrix, recorded once "
        "(llama-cpp-python 0.2.44)"
    ),
    "sentencepiece": Judge("the library, with the model as it was trained", "sentencepiece"),
    "slow merge": Judge("merging by its definition, in plain Python"),
    "round trip": Judge("`decode(encode(text))` gives the text back, streamed or not"),
    "no special tokens": Judge("texts full of their spellings, encoded as plain text"),
    "other engine": Judge("the same patterns, run by another regex engine", "regex"),
    "llama.cpp's ids": Judge(
        "ids that llama.cpp gave to its own test texts and to mixed ones", apart=True
    ),
    "Llama 2's model": Judge(
        "the original SentencePiece model, in the library", "sentencepiece", apart=True
    ),
    "float64": Judge(
        "a forward pass in float64 and plain numpy, written from the papers; it unpacks by `gguf`"
    ),
    "llama.cpp's logits": Judge("logits that llama.cpp recorded, cache in float32", apart=True),
    "llama.cpp's perplexity": Judge(
        "a made model that is sure of itself, and a text by it; recorded once",
        recording="quantised.json",
    ),
    "transformers": Judge("its own models in float32, recorded once", recording="logits-yarn.json"),
    "all at once": Judge("the same net, reading all tokens in one step instead of through a cache"),
    "plain path": Judge("the same product by `models/`: unpacked to float32; relative norm"),
    "plain path, KL": Judge("the same, at the end of a whole net: mean KL of the next token, nats"),
    "alone": Judge("the same net, one sequence at a time"),
    "float32 cache": Judge("the same net, remembering in float32"),
    "in the file": Judge("the same model in a file that asks for it itself"),
    "kept alone": Judge("the same net, which has read only the tokens that were kept"),
    "complex turn": Judge("keys as complex numbers in float64, turned back by hand"),
    "enumeration": Judge("the definition, on every candidate in turn, in plain Python"),
    "published table": Judge("the tables of values in llama.cpp's own tests"),
    "llama.cpp's samplers": Judge(
        "what llama.cpp's own sampler functions kept, recorded once; the largest difference of a "
        "probability",
        recording="samplers.json",
    ),
    "probability": Judge("frequencies of many draws against the probability; largest difference"),
    "tau": Judge("mean surprise on 32,000 candidates after the first 300 draws; relative to tau"),
    "definition": Judge("what the option is defined to do, looked at in cases made by hand"),
    "on a GPU": Judge("where the weights lie, looked at on a GPU"),
    "textbook loop": Judge("one sequence, one token after the other, no engine"),
    "published story": Judge("the published text of a real model, byte for byte", apart=True),
    "itself": Judge("the same request, made in the other way"),
}

HEAD = """\
# Fidelity: how exact everything is

How far each part of refollama is from what judges it. This page is written by `make fidelity`,
which runs the tests that measure and collects what they report. Each test has a limit of its own;
if any fails, or if a block type, a word pattern, a variant or an option has no measurement, the
page is not written.

Made with torch {torch} on {machine}, {capability} instructions, {gpu}{apart}.

Deviations are the largest that were found, rounded to one digit. *Bit for bit* and *equal* mean
that nothing differs at all; 0 is a difference that was computed, and is none. What is drawn at
random is drawn from fixed seeds, so the page changes when the code does. The judges are explained
[at the end](#judges).
"""


# ── what has to be there ─────────────────────────────────────────────────────────────────────────


def required() -> dict[str, list[str]]:
    """Every subject that the page must have, by section, in the order of the code's own tables."""
    from refollama.fast.half import COPIED, NATIVE
    from refollama.fast.lanes import CODE
    from refollama.fast.nibbles import LINES
    from refollama.options import Options
    from refollama.text.bpe import PATTERNS
    from refollama.weights.mixes import MIXES
    from refollama.weights.quants import LAYOUTS
    from tests.models.test_llama import VARIANTS
    from tests.text.test_bpe import CUTS

    return {
        "unpacking": [layout.name for layout in LAYOUTS.values()],
        "packing": [layout.name for layout in LAYOUTS.values() if layout.pack],
        "packed models": list(MIXES),
        "tokenizers": [f"kind {kind}" for kind in kinds()],
        "word patterns": [name for name in PATTERNS if name in CUTS.values()],
        "models": list(VARIANTS),
        "fast parts": [
            *dict.fromkeys((*LINES, *NATIVE, *COPIED)),
            *(f"{one}, warm" for one in (*NATIVE, *CODE)),
        ],
        "options": [field.name for field in dataclasses.fields(Options)],
    }


def kinds() -> list[str]:
    """The kinds of tokenizer that a file may ask for."""
    from refollama.errors import UnsupportedModel
    from refollama.text import tokenizer_from

    try:
        tokenizer_from({})
    except UnsupportedModel as error:
        return re.findall(r"'([^']+)'", str(error).split("supported:")[1])
    raise AssertionError("a tokenizer of no kind was made")


def missing(rows: Sequence[Row]) -> list[str]:
    """What has to be on the page and was not measured: one line for each section."""
    lines = []
    for section, subjects in required().items():
        found = {row.subject for row in of(section, rows)}
        if lost := [name for name in subjects if name not in found and not idle(name)]:
            lines.append(f"{section}: {', '.join(lost)}")
    return lines


def idle(option: str) -> str:
    """Why an option does nothing here; "" for all others."""
    from refollama.options import Options

    fields = {field.name: field for field in dataclasses.fields(Options)}
    return fields[option].metadata.get("idle", "") if option in fields else ""


def of(section: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of a section, in the order of `required`, then by name.

    An option's rows are all that carry its name, in whatever section they were measured.
    """
    alike = {"sampling": "options", "context shift": "models"}
    names = required().get(alike.get(section, section), [])
    order = {subject: place for place, subject in enumerate(names)}
    chosen = [
        row
        for row in rows
        if row.section == section or (section == "options" and row.subject in order)
    ]
    return sorted(chosen, key=lambda r: (order.get(r.subject, len(order)), r.subject, r.judge))


# ── the page ─────────────────────────────────────────────────────────────────────────────────────


def page(record: Record) -> str:
    """The page, as Markdown."""
    parts = [head(record.rows)]
    parts += [section(name, record.rows) for name in SECTIONS]
    parts += [judges(record.rows), left_out(record.skipped)]
    return "\n".join(part for part in parts if part)


def head(rows: Sequence[Row]) -> str:
    import torch

    seen = {row.judge for row in rows}
    unseen = [name for name, judge in JUDGES.items() if judge.apart and name not in seen]
    return HEAD.format(
        torch=version("torch"),
        machine=platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        gpu="with a GPU" if torch.cuda.is_available() else "without a GPU",
        apart=", without some of the answers that were recorded elsewhere" if unseen else "",
    )


def section(name: str, rows: Sequence[Row]) -> str:
    """A title, what is measured, and the table."""
    about, chosen = SECTIONS[name], of(name, rows)
    title = f"## {about.title}\n\n{about.about}\n"
    if name == "options":
        return "\n".join((title, options_table(chosen), files(chosen)))
    if not chosen:
        return title + "\nNothing was measured.\n"
    lines = [(r.subject, r.judge, f"{r.cases:,}", shown(r.deviation)) for r in chosen]
    titles = about.subject, "judge", about.unit, "deviation"
    return "\n".join((title, table(titles, lines), files(chosen)))


def files(rows: Sequence[Row]) -> str:
    found = sorted({f"`{test.split('::')[0]}`" for row in rows for test in row.tests})
    return f"Measured in {', '.join(found)}.\n"


def options_table(rows: Sequence[Row]) -> str:
    """Each option with its proof, and those that do nothing with the reason."""
    lines = []
    for option in required()["options"]:
        for row in (row for row in rows if row.subject == option):
            tests = ", ".join(sorted(f"`{test.split('::')[1]}`" for test in row.tests))
            lines.append((option, row.judge, f"{row.cases:,}", shown(row.deviation), tests))
        if reason := idle(option):
            lines.append((option, "", "", "no effect", f"{reason[0].upper()}{reason[1:]}."))
    return table(("option", "judge", "cases", "deviation", "proved by"), lines)


def shown(deviation: Deviation) -> str:
    return deviation if isinstance(deviation, str) else f"{deviation:.1g}"


def judges(rows: Sequence[Row]) -> str:
    """The legend: those that judged here, and those that need answers recorded elsewhere."""
    seen = {row.judge for row in rows}
    lines = []
    for name, judge in JUDGES.items():
        if name in seen:
            lines.append((name, str(judge)))
        elif judge.apart:
            lines.append((name, f"{judge}: needs the recorded answers, not run"))
    return "## Judges\n\n" + table(("judge", "what it is"), lines)


def left_out(skipped: dict[str, str]) -> str:
    """Tests that would measure too, and why they did not."""
    reasons: dict[tuple[str, str], int] = {}
    for test, reason in skipped.items():
        key = test.split("[")[0], reason
        reasons[key] = reasons.get(key, 0) + 1
    lines = [(f"`{test}`", str(n), reason) for (test, reason), n in sorted(reasons.items())]
    return "## Not run\n\n" + table(("test", "cases", "reason"), lines) if lines else ""


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns stand one below the other; numbers to the right."""
    rows = [list(titles), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [title in {"blocks", "texts", "tokens", "cases"} for title in titles]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    return "\n".join(_line(row, widths, right) for row in (rows[0], rule, *rows[1:])) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if r else cell.ljust(width)
        for cell, width, r in zip(cells, widths, right, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def subjects(text: str) -> dict[str, set[str]]:
    """Which subjects a page has, by section."""
    titles = {about.title: name for name, about in SECTIONS.items()}
    found: dict[str, set[str]] = {name: set() for name in SECTIONS}
    for part in text.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
        if title in titles:
            found[titles[title]] = set(rows[2:])
    return found
