"""Which type does each tensor get in a file of a type such as Q4_K_M?  (Without torch.)

Most matrices get the base type of the file's. Some are worth more bits: the output, `attn_v`,
`ffn_down`, in some layers or in all of them. What no K type can hold, because its rows are no
multiple of 256, gets an older type; what is a vector, or chooses experts, stays as it is.

Source: llama.cpp, whose choices are recorded in tests/golden/mixes.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refollama.errors import BadRequest
from refollama.weights.blocks import BLOCKS, TYPE_ID

PLAIN = ("F32", "F16", "BF16")
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

Layers = Callable[[int, int], bool]  # is it one of these? (number of the layer, how many there are)
Rule = tuple[Layers, str, str]  # these layers, their type, the type of all others

# ── rules ────────────────────────────────────────────────────────────────────────────────────────


def _all(i: int, n: int) -> bool:
    return True


def _first(count: int) -> Layers:
    return lambda i, n: i < count


def _first_part(share: int) -> Layers:
    """The first 1 / share of all."""
    return lambda i, n: i < n // share


def _outer_and_each_third(i: int, n: int) -> bool:
    """The first eighth, the last eighth, and every third one between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _everywhere(type: str) -> Rule:
    return _all, type, type


@dataclass(frozen=True, slots=True)
class Mix:
    """A file's type: its number in `general.file_type`, and what its tensors are packed as."""

    number: int
    base: str
    output: str = "Q6_K"
    rules: Mapping[str, Rule] = field(default_factory=dict)


MIXES: Mapping[str, Mix] = {
    "Q8_0": Mix(7, "Q8_0", "Q8_0"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(
        17,
        "Q5_K",
        rules=dict.fromkeys(("attn_v", "ffn_down"), (_outer_and_each_third, "Q6_K", "Q5_K")),
    ),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q5_0": Mix(8, "Q5_0"),
    "Q4_K_M": Mix(
        15,
        "Q4_K",
        rules=dict.fromkeys(("attn_v", "ffn_down"), (_outer_and_each_third, "Q6_K", "Q4_K")),
    ),
    "Q4_K_S": Mix(
        14,
        "Q4_K",
        rules={
            "attn_v": (_first(4), "Q5_K", "Q4_K"),
            "ffn_down": (_first_part(8), "Q5_K", "Q4_K"),
        },
    ),
    "Q4_1": Mix(3, "Q4_1"),
    "Q4_0": Mix(2, "Q4_0"),
    "Q3_K_L": Mix(
        13,
        "Q3_K",
        rules=dict.fromkeys(("attn_v", "attn_output", "ffn_down"), _everywhere("Q5_K")),
    ),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        rules={
            "attn_v": (_first(2), "Q5_K", "Q4_K"),
            "attn_output": _everywhere("Q4_K"),
            "ffn_down": (_first_part(16), "Q5_K", "Q4_K"),
        },
    ),
    "Q3_K_S": Mix(11, "Q3_K"),
    "Q2_K": Mix(
        10,
        "Q2_K",
        rules=dict.fromkeys(("attn_v", "attn_output", "ffn_down"), _everywhere("Q3_K")),
    ),
    "F16": Mix(1, "F16", "F16"),
    "BF16": Mix(32, "BF16", "BF16"),
    "F32": Mix(0, "F32", "F32"),
}

# Eight experts share their attention, so that it is worth more.
EXPERTS = 8
EXPERTS_ATTENTION = "Q8_0"  # of attn_k and attn_v
EXPERTS_OUTPUT = dict.fromkeys(("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"), "Q5_K")

# A matrix of values that many heads share is small, and worth more, too.
SHARED_BY_MANY = 4  # heads; then Q2_K packs attn_v as Q4_K
LARGE = 80  # layers, those of Llama 2 70B; then attn_v is never less than Q5_K

# For rows that are no multiple of 256; where they are no multiple of 32 either, F16.
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAST_RESORT = "F16"

_KEPT = re.compile(r"(.*\.)?(ffn_gate_inp|position_embd|token_types)\.weight")
# Layer and part; experts lie in one tensor, or, in files of 2023, one by one.
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(.+?)(?:_exps|\.\d+)?\.weight")

# ── from the rules to a type ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Traits:
    """What the choice depends on, besides names and shapes."""

    n_layers: int = 0
    shared_by: int = 1  # query heads that share one key
    n_experts: int = 0
    tied: bool = False  # is the embedding the output, too?

    @classmethod
    def of(cls, metadata: Mapping[str, Any], names: Sequence[str]) -> Traits:
        """Of a file's metadata and the names of its tensors."""
        family = word(metadata, "general.architecture")
        heads = _count(metadata.get(f"{family}.attention.head_count"))
        keys = _count(metadata.get(f"{family}.attention.head_count_kv")) or heads
        return cls(
            n_layers=_count(metadata.get(f"{family}.block_count")),
            shared_by=heads // keys if keys else 1,
            n_experts=_count(metadata.get(f"{family}.expert_count")),
            tied="output.weight" not in names,
        )


def word(metadata: Mapping[str, Any], key: str, missing: str = "") -> str:
    """A value that is to be a word; "" for a number or a list.  `missing`: where there is none."""
    found = metadata.get(key, missing)
    return found if isinstance(found, str) else ""


def _count(value: Any) -> int:
    """A number; of one for each layer, that of the first."""
    try:
        return int(value if isinstance(value, int) else value[0])
    except (TypeError, ValueError, IndexError):
        return 0


def file_type(given: str) -> str:
    """The name of a file's type as MIXES has it.  Example: q4_k → Q4_K_M

    Raises: BadRequest, with all that there are.
    """
    name = given.strip().upper()
    name = ALIASES.get(name, name)
    if name not in MIXES:
        raise BadRequest(f"unknown type {given[:80]!r}: quantise to one of {', '.join(MIXES)}")
    return name


def tensor_type(name: str, shape: Sequence[int], old: str, file_type: str, traits: Traits) -> str:
    """The type that a tensor gets in a file of this type.  `old`: the one that it has."""
    if len(shape) < 2 or not name.endswith(".weight") or _KEPT.fullmatch(name):
        return old
    return _fitting(_wanted(name, file_type, traits), shape[-1])


def _wanted(name: str, file_type: str, traits: Traits) -> str:
    mix, found = MIXES[file_type], _NAME.fullmatch(name)
    if found is None:  # no name at all, or one of several lines
        return mix.base
    layer, part = int(found[1] or 0), found[2]
    if part == "output" or (part == "token_embd" and traits.tied):
        return mix.output
    if mix.base in PLAIN:
        return mix.base
    if traits.n_experts == EXPERTS and part in ("attn_k", "attn_v"):
        return EXPERTS_ATTENTION
    if traits.n_experts == EXPERTS and part == "attn_output":
        return EXPERTS_OUTPUT.get(file_type, mix.base)
    these, theirs, others = mix.rules.get(part, _everywhere(mix.base))
    type = theirs if these(layer, traits.n_layers) else others
    return _shared(type, file_type, traits) if part == "attn_v" else type


def _shared(type: str, file_type: str, traits: Traits) -> str:
    """Of attn_v: more where many heads share it."""
    if traits.n_layers == LARGE and traits.shared_by > 1 and type in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return "Q4_K" if file_type == "Q2_K" and traits.shared_by >= SHARED_BY_MANY else type


def _fitting(type: str, columns: int) -> str:
    """The type itself if its blocks fill the rows, or the next one whose blocks do."""
    for fits in (type, NARROW.get(type, LAST_RESORT)):
        if columns % BLOCKS[TYPE_ID[fits]].values == 0:
            return fits
    return LAST_RESORT
