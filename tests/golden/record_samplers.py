"""Record what the sampler functions of llama.cpp make of logits made by hand; no model is needed.

Run it from the project's root, in any environment that has numpy and this, which is compiled for
some minutes:

    pip install llama-cpp-python
    python -m tests.golden.record_samplers

It writes `samplers.json`.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from refollama.options import Options
from tests.golden import hand_made
from tests.golden.hand_made import Array

VERSIONS = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}, numpy {np.__version__}"
DIGITS = 6  # significant ones, of a probability
NUDGES = (1 - 1e-5, 1 + 1e-5)
SEED = 2  # with which no step of mirostat stands on an edge
ESTIMATED_FROM = 100  # candidates that mirostat 1 looks at, in llama.cpp as in the paper's code
MOST = 500  # candidates of any case
FILTERS: dict[str, Callable[[float], Any]] = {
    "top_k": lambda k: llama_cpp.llama_sampler_init_top_k(int(k)),
    "typical_p": lambda p: llama_cpp.llama_sampler_init_typical(p, 1),
    "top_p": lambda p: llama_cpp.llama_sampler_init_top_p(p, 1),
    "min_p": lambda p: llama_cpp.llama_sampler_init_min_p(p, 1),
    "temperature": llama_cpp.llama_sampler_init_temp,
}  # in the order of the chain

Record = dict[str, Any]


def main() -> None:
    print(VERSIONS)
    recorded = {
        "filters": each_alone(),
        "penalties": penalties_alone(),
        "greedy": greedy(),
        "chains": chains(),
        "mirostats": [mirostat(**settings) for settings in hand_made.MIROSTATS],
    }
    lines = [f'"recorded_by": {json.dumps(VERSIONS)}']
    for name, records in recorded.items():
        rows = ",\n".join(json.dumps(record) for record in records)
        lines.append(f'"{name}": [\n{rows}\n]')
        print(f"{name}: {len(records)}")
    path = Path(__file__).parent / "samplers.json"
    path.write_text("{" + ",\n".join(lines) + "}\n")


def each_alone() -> list[Record]:
    return [
        {"logits": shape, "filter": name, "value": value} | filtered(shape, {name: value})
        for shape in hand_made.SHAPES
        for name, values in hand_made.FILTERS.items()
        for value in values
    ]


def penalties_alone() -> list[Record]:
    off = {"repeat_penalty": 1.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    return [
        {"logits": shape, "options": off | changes} | chained(shape, off | changes)
        for shape in ("plain", "flat")
        for changes in hand_made.PENALTIES
    ]


def greedy() -> list[Record]:
    """Penalties, then temperature 0: one survives."""
    off = {"top_k": 0, "top_p": 1.0, "temperature": 0.0}
    return [
        {"logits": shape, "options": off | changes} | chained(shape, off | changes)
        for shape in hand_made.SHAPES
        for changes in hand_made.PENALTIES
    ]


def chains() -> list[Record]:
    return [
        {"logits": shape, "options": changes} | chained(shape, changes)
        for shape in hand_made.SHAPES
        for changes in hand_made.CHAINS
    ]


def filtered(shape: str, values: dict[str, float]) -> Record:
    return steady(lambda nudged: survivors(shape, the_filters(nudged)), values)


def chained(shape: str, changes: dict[str, Any]) -> Record:
    """Penalties over the window, then every filter in the order of the chain."""
    options = Options().updated(changes)
    values = {name: getattr(options, name) for name in FILTERS}
    return steady(
        lambda nudged: survivors(shape, [penalties(shape, options), *the_filters(nudged)]), values
    )


def steady(run: Callable[[dict[str, float]], Record], values: dict[str, float]) -> Record:
    """The record, after a look at whether rounding could have made another."""
    found = run(values)
    for nudge in NUDGES:
        near = {name: v * nudge if is_edge(name, v) else v for name, v in values.items()}
        assert run(near)["ids"] == found["ids"], f"on an edge: {values}"
    return found


def is_edge(name: str, value: float) -> bool:
    """Does it cut at a probability?  At 0 and at 1 these filters are off."""
    return name.endswith("_p") and 0 < value < 1


def the_filters(values: dict[str, float]) -> list[Any]:
    return [make(values[name]) for name, make in FILTERS.items() if name in values]


def penalties(shape: str, options: Options) -> Any:
    sampler = llama_cpp.llama_sampler_init_penalties(
        MOST,
        options.repeat_last_n,
        options.repeat_penalty,
        options.frequency_penalty,
        options.presence_penalty,
    )
    for token in hand_made.window(shape):
        llama_cpp.llama_sampler_accept(sampler, token)
    return sampler


def survivors(shape: str, samplers: Sequence[Any]) -> Record:
    """Who is left after all of them, by id, and with which probabilities."""
    candidates = Candidates(hand_made.logits(shape))
    for sampler in [*samplers, llama_cpp.llama_sampler_init_dist(SEED)]:
        candidates.apply(sampler)
        llama_cpp.llama_sampler_free(sampler)
    probs = {token: p for token, _, p in candidates.left() if p > 0}
    return {"ids": sorted(probs), "probs": [shortened(probs[token]) for token in sorted(probs)]}


def mirostat(version: int, tau: float, eta: float, temperature: float) -> Record:
    """Steps of temperature and mirostat: how many survive each, and who is drawn."""
    kept, tokens = mirostat_steps(version, tau, eta, temperature)
    for nudge in NUDGES:
        assert mirostat_steps(version, tau * nudge, eta, temperature) == (kept, tokens), "an edge"
    settings = {"version": version, "tau": tau, "eta": eta, "temperature": temperature}
    return settings | {"kept": kept, "tokens": tokens}


def mirostat_steps(
    version: int, tau: float, eta: float, temperature: float
) -> tuple[list[int], list[int]]:
    size = len(hand_made.logits_of_step(0))
    sampler = (
        llama_cpp.llama_sampler_init_mirostat(size, SEED, tau, eta, ESTIMATED_FROM)
        if version == 1
        else llama_cpp.llama_sampler_init_mirostat_v2(SEED, tau, eta)
    )
    kept, tokens = [], []
    for step in range(hand_made.STEPS):
        logits = hand_made.logits_of_step(step)
        candidates = Candidates(logits)
        candidates.apply(llama_cpp.llama_sampler_init_temp(temperature))
        candidates.apply(sampler)
        ids = [token for token, _, _ in candidates.left()]
        assert set(ids) == set(np.argsort(-logits)[: len(ids)].tolist())  # so a count says all
        kept.append(len(ids))
        tokens.append(candidates.selected())
    return kept, tokens


class Candidates:
    """llama.cpp's array of candidates."""

    def __init__(self, logits: Array) -> None:
        rows = [(token, float(logit), 0.0) for token, logit in enumerate(logits)]
        self.data = (llama_cpp.llama_token_data * len(rows))(*rows)
        self.array = llama_cpp.llama_token_data_array(self.data, len(rows), -1, False)

    def apply(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self.array))

    def left(self) -> list[tuple[int, float, float]]:
        """Id, logit and probability of those that are left."""
        rows = (self.array.data[i] for i in range(self.array.size))
        return [(row.id, row.logit, row.p) for row in rows]

    def selected(self) -> int:
        return int(self.array.data[self.array.selected].id)


def shortened(p: float) -> float:
    return float(f"{p:.{DIGITS}g}")


if __name__ == "__main__":
    main()
