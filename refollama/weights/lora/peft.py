"""Adapters as the library PEFT saves them: a folder with two files.

    adapter_config.json           the rank r, lora_alpha, and what else was chosen
    adapter_model.safetensors     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  A
                                  base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  B
                                  base_model.model.model.embed_tokens.lora_embedding_A  (r, V)

What a choice would change and we cannot follow is refused by its name; so is a tensor that is no
half of a change. Source: PEFT, `LoraConfig` and the layers of `tuners/lora`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refollama.errors import FormatError, NotFound, StoreError, UnsupportedModel
from refollama.weights.lora.record import Adapter, Base, Pair, text, turned
from refollama.weights.safetensors import Stored, open_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
LARGEST_CONFIG = 1 << 20  # bytes

# Choices that make another sum of it.
OTHERS = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication"),
    *("alora_invocation_tokens", "trainable_token_indices", "use_qalora", "use_bdlora"),
    *("arrow_config", "ensure_weight_tying"),
)
# Ways to begin that take from the base weights what A and B begin with: the change is of those.
MOVED = re.compile(r"pissa(_niter_.*)?|corda|olora|lora_ga", re.IGNORECASE)
ROUNDED = "loftq"  # A and B begin with what rounding the base weights loses
HALVES = re.compile(r"(.*?)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
COPIES = re.compile(r".*(?:embed_tokens|lm_head)\.base_layer\.weight")  # PEFT's, of the model's own
PLAIN = re.compile(r"\^?[A-Za-z0-9_.]+\$?")

OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output"}
INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d{1,4})\.(w[123])")


class Place(NamedTuple):
    """Which of the model's matrices, and of a stack of experts which one."""

    name: str
    expert: int | None = None


def folder_at(path: Path) -> Path | None:
    """The folder of an adapter of PEFT, if a path leads to it or to the weights in it."""
    folder = path.parent if path.suffix == ".safetensors" else path
    return folder if (folder / CONFIG).is_file() else None


def files(folder: Path) -> tuple[Path, Path]:
    """Weights and configuration of such a folder.  Raises: NotFound, UnsupportedModel."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
        if pickle is not None:
            raise UnsupportedModel(
                f"{pickle} is a pickle, which may run code when it is opened: save the adapter as "
                f"{WEIGHTS} (save_pretrained does)"
            )
        raise NotFound(f"{folder.name}: {WEIGHTS} is missing")
    return weights, folder / CONFIG


def read(weights: Path, config: Path, base: Base) -> Adapter:
    """The adapter in these two files.  Raises: FormatError, UnsupportedModel, StoreError."""
    try:
        choices = _choices(config)
        stored = open_safetensors(weights, WEIGHTS)
        return Adapter(weights.name, _stacked(_pairs(stored, choices, base), base))
    except (FormatError, UnsupportedModel) as error:
        raise type(error)(f"PEFT adapter: {error}") from None


# ── what was chosen ───────────────────────────────────────────────────────────────────────────────


def _choices(path: Path) -> Mapping[str, Any]:
    """The configuration, if all that it says can be followed."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST_CONFIG))
    except OSError as problem:
        raise StoreError(f"{CONFIG}: {problem.strerror}") from problem
    except (ValueError, RecursionError):
        raise FormatError(f"{CONFIG} is not JSON") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else None
        raise UnsupportedModel(f"{CONFIG}: peft_type is {kind!r}; expected 'LORA'")
    other = [name for name in OTHERS if found.get(name)]
    other += ["bias"] if found.get("bias", "none") != "none" else []
    if other:
        raise UnsupportedModel(f"{CONFIG}: {other[0]} is chosen, which is not built")
    _check_start(found)
    return found


def _check_start(choices: Mapping[str, Any]) -> None:
    """Raises: UnsupportedModel if the change is of other weights than those of the base."""
    start = str(choices.get("init_lora_weights"))[:80]
    if MOVED.fullmatch(start):
        better = "save it converted (save_pretrained's path_initial_model_for_weight_conversion)"
    elif start.lower() == ROUNDED:
        better = "merge it with its own base (merge_and_unload), and take what comes of it"
    else:
        return
    raise UnsupportedModel(
        f"{CONFIG}: init_lora_weights is {start!r}, which changes the base weights, too: {better}"
    )


def _scale(choices: Mapping[str, Any], module: str, rank: int) -> float:
    """What B·A is multiplied by: alpha / r, or alpha / √r."""
    wanted = _chosen(choices, "r", "rank_pattern", module)
    if wanted != rank:
        raise FormatError(f"{module} has rank {rank}, but {CONFIG} says {wanted}")
    alpha = _chosen(choices, "lora_alpha", "alpha_pattern", module)
    return alpha / (math.sqrt(rank) if choices.get("use_rslora") else rank)


def _chosen(choices: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """A number, or what stands in its place for modules of this name."""
    special = choices.get(pattern) or {}
    if not isinstance(special, dict) or not all(map(PLAIN.fullmatch, special)):
        raise UnsupportedModel(f"{CONFIG}: {pattern} must name modules plainly, without wildcards")
    ends = (value for name, value in special.items() if _names(name, module))
    value: Any = next(ends, choices.get(key))
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value):
        raise FormatError(f"{CONFIG}: {key} is {value!r}; expected a number")
    return float(value)


def _names(name: str, module: str) -> bool:
    plain = name.strip("^$")
    return module == plain or (not name.startswith("^") and module.endswith(f".{plain}"))


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────


def _pairs(
    stored: Mapping[str, Stored], choices: Mapping[str, Any], base: Base
) -> dict[Place, Pair]:
    pairs = {}
    for module, halves in _modules(stored, base).items():
        missing = [half for half in "AB" if half not in halves]
        if missing:
            raise FormatError(f"{WEIGHTS}: {module}.lora_{missing[0]} is missing")
        place = _place(module)
        pairs[place] = _pair(place, halves, _scale(choices, module, len(halves["A"])), base)
    return pairs


def _modules(stored: Mapping[str, Stored], base: Base) -> dict[str, dict[str, Tensor]]:
    """Hugging Face's names of the modules that are changed → the halves of each change."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        if _is_copy(tensor, base):
            continue
        half = HALVES.fullmatch(name)
        if half is None:
            raise UnsupportedModel(f"{WEIGHTS}: {name[:120]!r} is no half of a change of LoRA's")
        module = half[1].removeprefix("base_model.model.")
        modules.setdefault(module, {})[half[3]] = _values(tensor)
    return modules


def _is_copy(tensor: Stored, base: Base) -> bool:
    """PEFT saves an embedding that it changes along with the change; it is the model's own."""
    if not COPIES.fullmatch(tensor.name):
        return False
    if tensor.shape != base.shape("token_embd"):
        raise UnsupportedModel(
            f"{tensor.name} has shape {text(tensor.shape)}, but the model's token_embd.weight has "
            f"{text(base.shape('token_embd') or ())}: they do not belong together"
        )
    return True


def _place(module: str) -> Place:
    """Where a module of Hugging Face's stands in GGUF.  Raises: UnsupportedModel."""
    name = re.sub(r"^(?:language_model\.|model\.language_model\.)", "", module)
    name = name if name.startswith(("model.", "lm_head")) else f"model.{name}"
    if name in OUTER:
        return Place(OUTER[name])
    if layer := LAYER.fullmatch(name):
        if layer[2] in INNER:
            return Place(f"blk.{int(layer[1])}.{INNER[layer[2]]}")
        if expert := EXPERT.fullmatch(layer[2]):
            return Place(f"blk.{int(layer[1])}.{EXPERTS[expert[2]]}", int(expert[1]))
    raise UnsupportedModel(
        f"it changes {module[:120]!r}; what can be changed are {', '.join((*OUTER, *INNER))}, "
        "and experts"
    )


def _pair(place: Place, halves: Mapping[str, Tensor], scale: float, base: Base) -> Pair:
    a, b = halves["A"], halves["B"]
    if place.name == "token_embd":
        return Pair(b.mT.contiguous(), a.mT.contiguous(), scale)
    return turned(place.name, Pair(a, b, scale), base)


def _stacked(pairs: Mapping[Place, Pair], base: Base) -> dict[str, Pair]:
    """Experts' pairs, put together as the model's experts are; one without a pair stays."""
    found = {place.name: pair for place, pair in pairs.items() if place.expert is None}
    stacks: dict[str, dict[int, Pair]] = {}
    for place, pair in pairs.items():
        if place.expert is not None:
            stacks.setdefault(place.name, {})[place.expert] = pair
    return found | {name: _stack(name, stack, base) for name, stack in stacks.items()}


def _stack(name: str, stack: Mapping[int, Pair], base: Base) -> Pair:
    one, count = next(iter(stack.values())), (base.shape(name) or (0,))[0]
    alike = {(pair.a.shape, pair.b.shape, pair.scale) for pair in stack.values()}
    if len(alike) > 1 or max(stack) >= count:
        raise UnsupportedModel(
            f"{name}: changes of its experts are of different shapes or scales, or of more experts "
            f"than the model has ({count})"
        )
    nothing = Pair(torch.zeros_like(one.a), torch.zeros_like(one.b), one.scale)
    each = [stack.get(expert, nothing) for expert in range(count)]
    return Pair(
        torch.stack([pair.a for pair in each]), torch.stack([pair.b for pair in each]), one.scale
    )


def _values(stored: Stored) -> Tensor:
    """A matrix as float32."""
    if stored.dtype not in ("F32", "F16", "BF16", "F64") or len(stored.shape) != 2:
        raise FormatError(
            f"{WEIGHTS}: {stored.name} is {stored.dtype} of shape {text(stored.shape)}; "
            "expected a matrix of floats"
        )
    if not min(stored.shape):
        raise FormatError(f"{WEIGHTS}: {stored.name} has shape {text(stored.shape)}: it is empty")
    values = np.concatenate(list(stored.pieces()))
    if stored.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(values.astype(np.float32))
