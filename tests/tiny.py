"""Small real models, written as GGUF files from a seed: what most tests run on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import Typed, ValueType, open_gguf, write_gguf
from refollama.weights.quants import pack

MERGED = ["▁t", "he", "▁the", "in", "er", "an", "▁a", "re", "on", "▁s", "▁w", "nd", "at", "is"]
TOKENS = (
    ["<unk>", "<s>", "</s>"]
    + [f"<0x{byte:02X}>" for byte in range(256)]
    + MERGED
    + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
)
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(TOKENS) - 259)
SCORES = [0.0] * 259 + [-float(i) for i in range(len(TOKENS) - 259)]

SIZES = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def metadata(**changes: Any) -> dict[str, Any]:
    """Keys of a small llama; `changes` by key without `llama.`, None takes one away."""
    keys = {f"llama.{key}": value for key, value in (SIZES | changes).items() if value is not None}
    return {"general.architecture": "llama", "general.name": "tiny", **keys, **tokenizer()}


def tokenizer() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": Typed(SCORES, ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed(TYPES, ValueType.INT32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def shapes(keys: Mapping[str, Any], *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a llama of these sizes, outermost dimension first."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), keys["llama.embedding_length"])
    }
    for layer in range(keys["llama.block_count"]):
        found |= {f"blk.{layer}.{name}.weight": s for name, s in block_shapes(keys, layer).items()}
    found |= {"output_norm.weight": (keys["llama.embedding_length"],)}
    output = {} if tied else {"output.weight": found["token_embd.weight"]}
    return found | output


def block_shapes(keys: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Of one layer; what may differ from layer to layer is one number, or a list of as many."""

    def here(key: str) -> int:
        return int(value[layer] if isinstance(value := keys[f"llama.{key}"], list) else value)

    M, F = here("embedding_length"), here("feed_forward_length")
    H, Hk = here("attention.head_count"), here("attention.head_count_kv")
    D = keys.get("llama.attention.key_length", M // H)
    Dv = keys.get("llama.attention.value_length", M // H)
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (M,),
        "attn_q": (H * D, M),
        "attn_k": (Hk * D, M),
        "attn_v": (Hk * Dv, M),
        "attn_output": (M, H * Dv),
        "ffn_norm": (M,),
        "ffn_gate": (F, M),
        "ffn_up": (F, M),
        "ffn_down": (M, F),
    }
    if E := keys.get("llama.expert_count"):
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            block[f"{name}_exps"] = (E, *block.pop(name))
        block["ffn_gate_inp"] = (E, M)
    return block


def write_model(
    path: Path,
    *,
    seed: int = 0,
    type: str = "F32",
    tied: bool = False,
    keys: Mapping[str, Any] | None = None,
    claims: Mapping[str, Any] | None = None,
    drop: str = "",
    extra: Mapping[str, tuple[int, ...]] | None = None,
    **changes: Any,
) -> Path:
    """A model with random weights, matrices packed as `type`, norms near one.

    `keys` join the metadata; `claims` do too, but the tensors do not follow them.
    """
    keys = metadata(**changes) | dict(keys or {})
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in (shapes(keys, tied=tied) | dict(extra or {})).items():
        if name == drop:
            continue
        if len(shape) == 1:
            kind, values = "F32", 1 + 0.1 * torch.randn(shape, generator=rng)
        else:
            kind, values = type, torch.randn(shape, generator=rng) / shape[-1] ** 0.5
        tensors[name] = (TYPE_ID[kind], shape, pack(values, kind).numpy())
    write_gguf(path, keys | dict(claims or {}), tensors)
    return path


def apart(stacked: Path, path: Path, count: int) -> Path:
    """A mixture of experts as it was written in 2023: a tensor for each."""
    file = open_gguf(stacked)
    tensors: dict[str, Any] = {}
    for name, info in file.tensors.items():
        data = file.bytes_of(name)
        if "_exps" not in name:
            tensors[name] = (info.type, info.shape, data)
            continue
        for e, part in enumerate(data.reshape(count, -1)):
            tensors[name.replace("_exps", f".{e}")] = (info.type, info.shape[1:], part)
    write_gguf(path, {key: file.typed(key) for key in file.metadata}, tensors)
    return path
