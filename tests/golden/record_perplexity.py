"""Record what llama.cpp makes of a text, window by window, with the windows of its own tool.

Run it from the project's root, with `REFOLLAMA_ORACLES` set, in any environment that has numpy and
this, which is compiled for some minutes:

    pip install llama-cpp-python
    python -m tests.golden.record_perplexity

It writes `perplexity.json`: for each way to cut the text the mean surprise of every window, and
the perplexity of all. Keys and values are float32, as ours.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

VERSIONS = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}, numpy {np.__version__}"
MODEL = "stories260K.gguf"
WAYS = ({"num_ctx": 128}, {"num_ctx": 257}, {"num_ctx": 128, "stride": 48})
F32 = 0
TEXT = """\
Once upon a time there was a small dog called Max. Max lived with a girl named Anna in a red house
near the forest. Every morning they went to the park and played with a big blue ball. One day the
ball rolled down the hill and fell into the water. Max barked and barked, but the ball did not
come back. Anna was sad. "What can we do?" she asked. An old duck heard her and came closer. "I
can help you," said the duck. It swam to the ball and pushed it with its yellow beak, slowly,
until the ball was near the grass again. Anna clapped her hands and Max jumped up and down. "Thank
you, kind duck!" she said. The duck was happy, too. It asked, "May I play with you?" So they all
played together until the sun went down. When it was time to go home, Anna gave the duck some
bread. "Come again tomorrow," said the duck. That night Anna told her mom about her new friend,
and her mom smiled. "It is good to help others," she said. "Then you are never alone." Anna hugged
Max and fell asleep.
The next day it rained. Tom, who lived next door, wanted to bake a cake. He had flour and milk,
but he had no eggs. He looked in the box and under the table and behind the door. There was
nothing but a little mouse with a very long tail. "Please do not be scared," said Tom. "I only
look for eggs." The mouse thought for a while. Then it showed him a basket that his grandma had
left on the chair. In it were six white eggs and a note: "For my dear Tom." He made the cake, and
the mouse got the first piece.
"""


def main() -> None:
    print(VERSIONS)
    llm = opened(Path(os.environ["REFOLLAMA_ORACLES"], MODEL), 512)
    ids = llm.tokenize(TEXT.encode(), add_bos=True, special=False)
    records = [way | recorded(llm, ids, **way) for way in WAYS]
    lines = ",\n".join(json.dumps(record) for record in records)
    said = f'"recorded_by": {json.dumps(VERSIONS)},\n"text": {json.dumps(TEXT)},\n"ids": {ids}'
    path = Path(__file__).parent / "perplexity.json"
    path.write_text(f'{{{said},\n"ways": [\n{lines}\n]}}\n')


def opened(path: Path, n_ctx: int) -> Any:
    """A model in llama.cpp, with room for so many tokens."""
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, logits_all=True, type_k=F32, type_v=F32, verbose=False, n_threads=1
    )


def recorded(llm: Any, ids: list[int], num_ctx: int, stride: int = 0) -> dict[str, Any]:
    """Surprises in nats, six digits."""
    found = [surprises(llm, window, scored) for window, scored in cut(ids, num_ctx, stride)]
    mean = np.concatenate(found).mean()
    print(num_ctx, stride, len(found), np.exp(mean))
    return {
        "windows": [round(float(one.mean()), 6) for one in found],
        "perplexity": round(float(np.exp(mean)), 6),
    }


def cut(ids: list[int], num_ctx: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows, and how many of their last ids are scored, counted as the tool does."""
    if not stride:
        for i in range(len(ids) // num_ctx):
            yield ids[i * num_ctx : (i + 1) * num_ctx], num_ctx - 1 - num_ctx // 2
        return
    size = num_ctx + stride // 2
    for i in range((len(ids) - size + stride - 1) // stride):
        yield ids[i * stride : i * stride + size], stride


def surprises(llm: Any, window: list[int], scored: int) -> Any:
    window = [llm.token_bos(), *window[1:]]
    llm.reset()
    llm.eval(window)
    logits = np.array(llm.scores[: len(window)], dtype=np.float64)[-1 - scored : -1]
    top = logits.max(-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -logs[np.arange(scored), window[-scored:]]


if __name__ == "__main__":
    main()
