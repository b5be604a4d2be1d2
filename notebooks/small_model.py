"""A small Llama with random weights, for notebooks that run where no model is installed.

It has all the parts of a real one and has learned nothing, so what it writes is gibberish.
"""

from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from refollama.weights import write_gguf
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import Typed, Value, ValueType
from refollama.weights.quants import pack

WORDS = "Once upon a time there was little girl named Lily Tim She had loved to play with her toys"
# A tokenizer merges pairs, so every beginning of a word is a token too: ▁t, ▁ti, ▁tim, ▁time.
BEGINNINGS = dict.fromkeys(text for word in WORDS.split() for text in accumulate("▁" + word))
UNSPOKEN = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
TOKENS = [*UNSPOKEN, *BEGINNINGS, *"abcdefghijklmnopqrstuvwxyz", *".,"]
FOLDER = TemporaryDirectory()
PATH = Path(FOLDER.name, "random.gguf")
M, F, H, HK, LAYERS = 64, 128, 4, 2, 2  # d_model, d_ff, query heads, key heads, blocks


def write_model() -> Path:
    """Write the model, its matrices packed as Q8_0; it stays until Python ends.  → its path"""
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes().items():
        kind, values = "F32", torch.ones(shape)
        if len(shape) == 2:
            kind, values = "Q8_0", torch.randn(shape, generator=rng) * 3 / shape[1] ** 0.5
        if name == "output.weight":
            values[: len(UNSPOKEN)] = 0  # single bytes, and the end: never likely
        tensors[name] = (TYPE_ID[kind], shape, pack(values, kind).numpy())
    write_gguf(PATH, _metadata(), tensors)
    return PATH


def _shapes() -> dict[str, tuple[int, ...]]:
    q, kv, up, norm = (M, M), (HK * M // H, M), (F, M), (M,)
    block = {"attn_norm": norm, "attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": q}
    block |= {"ffn_norm": norm, "ffn_gate": up, "ffn_up": up, "ffn_down": (M, F)}
    names = {"token_embd": (len(TOKENS), M), "output_norm": norm, "output": (len(TOKENS), M)}
    names |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in names.items()}


def _metadata() -> dict[str, Value | Typed]:
    sizes = {"block_count": LAYERS, "embedding_length": M, "feed_forward_length": F}
    sizes |= {"attention.head_count": H, "attention.head_count_kv": HK, "context_length": 256}
    keys: dict[str, Value | Typed] = {f"llama.{key}": value for key, value in sizes.items()}
    keys |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": TOKENS}
    scores = [-float(id) for id in range(len(TOKENS))]  # earlier tokens are merged first
    types = [2, 3, 3] + [6] * 256 + [1] * (len(TOKENS) - len(UNSPOKEN))
    keys["tokenizer.ggml.scores"] = Typed(scores, ValueType.FLOAT32)
    return keys | {"tokenizer.ggml.token_type": Typed(types, ValueType.INT32)}
