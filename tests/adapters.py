"""Adapters written from a seed, in all three formats; and what they make of a model's weights.

An adapter here is a mapping: name of a matrix, in GGUF's words → (A, B), with ΔW = scale · B·A.
"""

import json
import struct
from typing import Any

import numpy as np

from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import write_gguf
from refollama.weights.safetensors import Made, encoded

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
LINEARS = tuple(f"blk.{layer}.{name}" for layer in (0, 1) for name in (*ATTENTION, *FEED_FORWARD))
HF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
HEADS = {"attn_q": 4, "attn_k": 2}  # of the small models


def halves(shapes, names=LINEARS, rank=4, seed=1):
    """Random ones for matrices of these shapes (name → shape); of experts a stack."""
    rng = np.random.RandomState(seed)
    found = {}
    for name in names:
        *stack, n_out, n_in = shapes[f"{name}.weight"]
        a = rng.randn(*stack, rank, n_in) / np.sqrt(n_in)
        b = rng.randn(*stack, n_out, rank)
        found[name] = (a.astype(np.float32), b.astype(np.float32))
    return found


def merged(weights, adapter, scale):
    """Weights, with W + scale · B·A for each that the adapter changes: the judge."""
    changed = dict(weights)
    for name, (a, b) in adapter.items():
        key = f"{name}.weight"
        changed[key] = changed[key] + scale * (b.astype(np.float64) @ a.astype(np.float64))
    return changed


def write_plain(path, adapter, alpha=8.0, type="F32", drop="", **says):
    """As GGUF."""
    keys: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora"}
    keys |= {"general.architecture": "llama"}
    keys |= {} if alpha is None else {"adapter.lora.alpha": float(alpha)}
    keys |= {key.replace("__", "."): value for key, value in says.items()}
    tensors = {}
    for name, (a, b) in adapter.items():
        a, b = (b, a.T) if name == "token_embd" else (a, b)
        for half, values in (("a", a), ("b", b)):
            values = np.ascontiguousarray(values, {"F32": "<f4", "F16": "<f2"}[type])
            tensors[f"{name}.weight.lora_{half}"] = (TYPE_ID[type], values.shape, values)
    tensors.pop(drop, None)
    write_gguf(path, {key: value for key, value in keys.items() if value}, tensors)
    return path


def write_ggla(path, adapter, alpha=8, rank=4, drop="", half=False, turn=True):
    """As the converter of 2023 did; `turn`: with the rows of Q and K as Hugging Face has them."""
    data = struct.pack("<IIii", 0x67676C61, 1, rank, alpha)
    for name, (a, b) in adapter.items():
        b = to_hf(name, b) if turn else b
        for letter, values in (("A", a.T), ("B", b)):
            if f"{name}.lora{letter}" != drop:
                raw = f"{name}.weight.lora{letter}".encode()
                n, r = values.shape
                data += struct.pack("<iiiii", 2, len(raw), int(half), r, n) + raw
                data += bytes(-len(data) % 32)
                data += np.ascontiguousarray(values, "<f2" if half else "<f4").tobytes()
    path.write_bytes(data)
    return path


def write_peft(folder, adapter, alpha=8, rank=4, dtype="F32", drop="", **choices):
    """As PEFT's `save_pretrained` does."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"} | choices
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, values in hf_tensors(adapter).items():
        if name != drop:
            tensors[name] = made(values, dtype)
    (folder / "adapter_model.safetensors").write_bytes(b"".join(encoded(tensors)))
    return folder


def made(values, dtype):
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        values = (values.view(np.uint32) >> 16).astype("<u2")
    elif dtype == "F16":
        values = values.astype("<f2")
    return Made(dtype, values.shape, [values])


def hf_tensors(adapter):
    """An adapter's tensors by the names that they have in PEFT's files."""
    found = {}
    for name, (a, b) in adapter.items():
        if name == "token_embd":
            found["base_model.model.model.embed_tokens.lora_embedding_A"] = b.T
            found["base_model.model.model.embed_tokens.lora_embedding_B"] = a.T
        elif name.endswith("_exps"):
            for expert in range(len(a)):
                found |= named(hf_expert(name, expert), a[expert], b[expert])
        else:
            found |= named(hf_name(name), a, to_hf(name, b))
    return found


def named(module, a, b):
    head = f"base_model.model.{module}"
    return {f"{head}.lora_A.weight": a, f"{head}.lora_B.weight": b}


def hf_name(name):
    if name == "output":
        return "lm_head"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{HF[part]}"


def hf_expert(name, expert):
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{EXPERTS[part]}"


def to_hf(name, b):
    """Rows of Q and K in Hugging Face's order: first the first of each pair, then the second."""
    heads = HEADS.get(name.split(".")[-1])
    if heads is None:
        return b
    width = len(b) // heads
    order = [h * width + i for h in range(heads) for s in (0, 1) for i in range(s, width, 2)]
    return b[order]
