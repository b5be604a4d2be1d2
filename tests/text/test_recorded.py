"""Our token ids against those that llama.cpp gave to mixed and hostile texts."""

import json
from pathlib import Path

import pytest

from refollama import load_tokenizer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "tokens.json").read_text())


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "deepseek-coder"])
def test_ids_equal_the_recorded(name, oracles, measured):
    tokenizer = load_tokenizer(oracles / "vocab" / f"{name}.gguf")
    for record in GOLDEN["texts"]:
        assert tokenizer.encode(record["text"]) == record[name], ascii(record["text"])
        measured("tokenizers", f"vocabulary {name}", "llama.cpp's ids", "equal")
