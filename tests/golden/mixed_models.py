"""Small models on which the choice of a type for each tensor shows: sizes by name.

Recorder and test both take the shapes from here. The widths are the least that K types can pack.
"""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from tests import tiny

Types = dict[str, str]  # types, layer by layer → the parts of the model that have them

SIZES = {
    "embedding_length": 256,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"block_count": 18},
    "tied": {"block_count": 9, "tied": True},
    "grouped": {"block_count": 9, "attention.head_count": 8},  # 4 heads share a key
    "eighty": {"block_count": 80},
    "experts": {"block_count": 9, "expert_count": 8, "expert_used_count": 2},
    "odd-feed-forward": {"block_count": 9, "feed_forward_length": 288},
    "odd-width": {"block_count": 9, "embedding_length": 288},
    "odder": {"block_count": 9, "feed_forward_length": 200},
}


def by_types(types: Mapping[str, str]) -> Types:
    """Types by tensor → parts by types, with runs of the same type counted.

    Example: {"2 Q6_K, 6 Q4_K": "attn_v ffn_down"}
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(types, key=_place):
        parts.setdefault(_place(name)[1], []).append(types[name])
    found: dict[str, list[str]] = {}
    for part, layers in sorted(parts.items()):
        runs = ", ".join(f"{len(list(run))} {type}" for type, run in groupby(layers))
        found.setdefault(runs, []).append(part)
    return {runs: " ".join(same) for runs, same in found.items()}


def _place(name: str) -> tuple[int, str]:
    """Layer and part."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", name)
    assert found is not None
    return int(found[1] or 0), found[2]


def settings(name: str) -> dict[str, Any]:
    """What `tiny.write_model` takes."""
    return SIZES | MODELS[name]


def shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and tensors, without writing a file."""
    given = settings(name)
    tied = given.pop("tied", False)
    keys = tiny.metadata(**given)
    return keys, tiny.shapes(keys, tied=tied)
