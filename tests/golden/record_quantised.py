"""Record how well models foretell a text in llama.cpp that were quantised here, type by type.

Run it from the project's root, in any environment that has torch, numpy and this:

    pip install llama-cpp-python
    python -m tests.golden.record_quantised

It writes `quantised.json`: a text that the model has made up itself, so that it foretells it well,
and for each type the surprise of every window of it, and the perplexity of all. Types with
"+ imatrix" were quantised with an importance matrix.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import refollama
from refollama.imatrix import collect
from refollama.loaded import LoadedModel
from refollama.quantize import plan
from refollama.weights.gguf import open_gguf
from refollama.weights.importance import Importance
from refollama.weights.mixes import MIXES
from tests.golden.peaked_model import N_WINDOWS, NUM_CTX, SEED, write
from tests.golden.record_perplexity import VERSIONS, opened, recorded

WEIGHED = ("Q4_K_M", "Q2_K")


def main() -> None:
    print(VERSIONS)
    with tempfile.TemporaryDirectory() as name:
        source = write(Path(name, "source.gguf"))
        with refollama.load(source) as llm:
            ids = made_up(llm)
            weights = collect(llm, ids, NUM_CTX)
        found = {type: judged(source, type, ids) for type in MIXES}
        found |= {f"{type} + imatrix": judged(source, type, ids, weights) for type in WEIGHED}
    lines = ",\n".join(f'"{type}": {json.dumps(numbers)}' for type, numbers in found.items())
    path = Path(__file__).with_name("quantised.json")
    path.write_text(f'{{"recorded_by": "{VERSIONS}",\n"ids": {ids},\n"types": {{\n{lines}\n}}}}\n')


@torch.no_grad()
def made_up(llm: LoadedModel) -> list[int]:
    """Windows, each drawn from the model's own probabilities, BOS first; then one behind another.

    They are written all at once: (windows, 1) new tokens at each place.
    """
    rng, every = np.random.RandomState(SEED), range(N_WINDOWS)
    cache, ids = llm.net.new_cache(N_WINDOWS), torch.ones(N_WINDOWS, 1, dtype=torch.long)
    for at in range(NUM_CTX - 1):
        places = torch.full((N_WINDOWS, 1), at)
        likely = llm.net(ids[:, -1:], places, cache.rows(every, at + 1))  # (windows, V)
        drawn = (likely.numpy() + rng.gumbel(size=likely.shape)).argmax(-1)
        ids = torch.cat((ids, torch.from_numpy(drawn)[:, None]), 1)
    return ids.flatten().tolist()


def judged(
    source: Path, type: str, ids: list[int], importance: Importance | None = None
) -> dict[str, object]:
    target = source.with_name(f"{type}.gguf")
    with open_gguf(source) as file:
        plan(file, type, importance=importance).write(target)
    print(type, end=" ")
    return recorded(opened(target, NUM_CTX), ids, NUM_CTX)


if __name__ == "__main__":
    main()
