"""What does everything around the products cost?

    python -m benchmarks.around [MODEL] [--rounds 7]        fable, unless another is named

Of a small model most of a token's time passes outside its matrices. So the same model writes in
turn: the net alone, through the engine with its sampler, as text in this process, and as a stream
over HTTP, which a client on the same cores reads. Then what else a token or a prompt may cost:
`format`, all filters over a large vocabulary, a long text to tokenise, and a prompt whose beginning
is known already. Prints medians and their spread as a Markdown table. `refollama warm MODEL` first
shows what compiled blocks do to all of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from time import perf_counter

import torch
from rich.progress import track

import refollama
from benchmarks.first_light import machine, spread
from refollama.bench import rate
from refollama.client import Client
from refollama.loaded import LoadedModel
from refollama.options import Options
from refollama.private_server import private_server
from refollama.sampling.chain import Sampler

STORY = "Tell me a story about a brave mouse."
OBJECT = "Give me JSON about a fox with the keys name, animal, colour and place."
WRITTEN = 100  # tokens, at most
WORDS = 128_000  # of a large vocabulary
FILTERS = {"top_k": 100, "tfs_z": 0.99, "typical_p": 0.99, "top_p": 0.95, "min_p": 0.01}
PENALTIES = {"repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
MEGABYTE = 1_000_000
LONG = 2000  # tokens of a prompt, or as many as the model looks back on

Measured = Iterator[tuple[str, float]]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="fable", help="a name, or a file (fable)")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    found: dict[str, list[float]] = defaultdict(list)
    with refollama.load(given.model) as llm, private_server() as url, Client(url) as client:
        measures = speeds(llm, client, given.model), costs(llm), waits(llm)
        for turn in track(range(given.rounds + 1), "measuring", transient=True):
            for measure in measures:
                for name, value in measure(turn):
                    if turn:  # the first round is not counted
                        found[name].append(value)
    print(machine())
    print(f"{given.model}; medians of {given.rounds} (least – most)\n")
    print("| what | |")
    print("|---|---|")
    for name, values in found.items():
        print(f"| {name} | {spread(tuple(values))} |")


def speeds(llm: LoadedModel, client: Client, model: str) -> Callable[[int], Measured]:
    """Tokens a second, from the first token of an answer to its last."""

    def measure(turn: int) -> Measured:
        options = {"num_predict": WRITTEN, "seed": turn, "temperature": 1}
        messages = [{"role": "user", "content": STORY}]
        yield "the net alone, tokens/s", rate(llm.net, 64, 64, 1, turn)
        ids = llm.tokens(STORY)
        with llm.start(ids, llm.defaults.updated(options)) as stream:
            yield "through engine and sampler, tokens/s", _rate(stream)
        yield "as text, tokens/s", _rate(llm.chat(messages, options, stream=True))
        with closing(client.chat(model, messages, options=options)) as records:
            yield "as a stream over HTTP, tokens/s", _rate(r for r in records if not r["done"])

    return measure


def _rate(pieces: Iterator[object]) -> float:
    """Pieces a second; what comes before the first is another matter."""
    next(pieces, None)
    start, count = perf_counter(), 0
    for _ in pieces:
        count += 1
    return count / (perf_counter() - start) if count else 0.0


def costs(llm: LoadedModel) -> Callable[[int], Measured]:
    """What a token may cost besides."""

    def measure(turn: int) -> Measured:
        options = {"num_predict": WRITTEN, "seed": turn}
        for name, form in (("as it likes", None), ("with format json", "json")):
            end = llm.chat([{"role": "user", "content": OBJECT}], options, format=form).record
            assert end.stats is not None
            each = end.stats.eval_duration / 1e6 / max(end.stats.eval_count, 1)
            yield f"an object {name}, ms a token", each
        rng = torch.Generator().manual_seed(turn)
        logits = torch.randn(WORDS, generator=rng) * 3
        sampler = Sampler(Options().updated({**FILTERS, **PENALTIES, "seed": turn}), range(64))
        sampler(logits)
        start = perf_counter()
        sampler(logits)
        yield f"all filters over {WORDS:,} words, ms", (perf_counter() - start) * 1e3

    return measure


def waits(llm: LoadedModel) -> Callable[[int], Measured]:
    """What a prompt may cost before it is read, and when most of it is known."""
    line = f"{STORY} {OBJECT}\n"
    text = (line * (MEGABYTE // len(line) + 1))[:MEGABYTE]
    most = min(LONG, llm.net.n_ctx - 8)

    def measure(turn: int) -> Measured:
        start = perf_counter()
        llm.tokenizer.encode(text)
        yield "a megabyte of text to tokens, s", perf_counter() - start
        rng = torch.Generator().manual_seed(turn)
        ids = torch.randint(300, llm.net.n_vocab, (most,), generator=rng).tolist()
        llm.forget()
        fresh = _first(llm, ids)
        yield f"first token after {most}, ms", fresh * 1e3
        again = _first(llm, [*ids[:-1], ids[0]])
        yield "… all but one of which are known, ms", again * 1e3
        yield "… how many times sooner", fresh / again

    return measure


def _first(llm: LoadedModel, ids: list[int]) -> float:
    """Seconds until a first token is drawn."""
    options = llm.defaults.updated({"num_predict": 1, "num_ctx": len(ids) + 8})
    start = perf_counter()
    with llm.start(ids, options) as stream:
        next(stream, None)
    return perf_counter() - start


if __name__ == "__main__":
    main()
