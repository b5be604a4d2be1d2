"""Record how llama.cpp cuts mixed and hostile texts, by the vocabularies of real models.

Run it from the project's root, in any environment that has this, which is compiled for some
minutes; FOLDER holds the vocabularies, `vocab/gpt-2.gguf` for one:

    pip install llama-cpp-python
    python -m tests.golden.record_tokens FOLDER

It writes `tokens.json`: no BOS, special tokens are not parsed.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp  # type: ignore[import-not-found, unused-ignore]

VERSIONS = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}"
VOCABULARIES = ("llama-spm", "gpt-2", "deepseek-coder")
TEXTS = 150
LONGEST = 10  # pieces


def _between(*ranges: tuple[int, int]) -> list[str]:
    return [chr(c) for first, last in ranges for c in range(first, last + 1)]


PIECES: list[Sequence[str]] = [
    _between((0x20, 0x7E)),
    _between((0xA0, 0x17F)),  # Latin with accents, and some signs
    _between((0x391, 0x3A1), (0x3B1, 0x3C9)),  # Greek
    _between((0x400, 0x45F)),  # Cyrillic
    _between((0x5D0, 0x5EA), (0x621, 0x64A)),  # Hebrew, Arabic
    _between((0x904, 0x94D)),  # Devanagari, with marks that combine
    _between((0x4E00, 0x9F00), (0x3041, 0x3096), (0x30A1, 0x30FA)),  # Chinese, Japanese
    _between((0xAC00, 0xD7A3)),  # Korean
    _between((0xFF01, 0xFF5E), (0x3001, 0x3011), (0x2010, 0x2027)),  # wide and other punctuation
    _between((0x300, 0x36F)),  # accents alone
    _between((0x1F300, 0x1F64F)),
    ["👨\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "🇩🇪", "1️⃣", "❤️"],
    [
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        " \n",
        "\v",
        "\f",
        "\u00a0",
        "\u2003",
        "\u3000",
    ],
    [*"0123456789", "12345", "3.14", "1e-5", "0x1F", "²", "½", "Ⅷ", "①", "٣", "५", "𝟘"],
    ["the", " don't", "I'll", " WE'VE", "'s", "'S", "naïve", "Straße", "можно", "中文", "العربية"],
    ["def f(x):", "\n    return", "x += 1;", "{}", "->", "!=", "//", "</div>", "foo_bar", '"""'],
    ["<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>", "▁", "Ġ", "\x00", "\x7f", "\x85"],
]


def main(folder: Path) -> None:
    print(VERSIONS)
    texts = some_texts()
    ids = {name: cut(folder / "vocab" / f"{name}.gguf", texts) for name in VOCABULARIES}
    rows = ",\n".join(
        json.dumps({"text": text} | {name: ids[name][n] for name in VOCABULARIES})
        for n, text in enumerate(texts)
    )
    path = Path(__file__).parent / "tokens.json"
    path.write_text(f'{{"recorded_by": "{VERSIONS}",\n"texts": [\n{rows}\n]}}\n')
    print({name: sum(map(len, found)) for name, found in ids.items()})


def some_texts() -> list[str]:
    """Each is mixed from one to four kinds of pieces."""
    rng, found = random.Random(7), []
    for _ in range(TEXTS):
        kinds = rng.sample(PIECES, rng.randint(1, 4))
        count = rng.randint(1, LONGEST)
        found.append("".join(rng.choice(rng.choice(kinds)) for _ in range(count)))
    return found


def cut(path: Path, texts: list[str]) -> list[list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
