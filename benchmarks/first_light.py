"""How fast is the plain path? Load, first token, prefill and decode, for each way of packing.

    python -m benchmarks.first_light [--layers 8] [--width 512] [--repeat 5] [--types F32 Q8_0 Q4_0]

Builds a Llama of this shape with random weights in a temporary folder, runs it through the public
API, and prints medians with their spread, as a Markdown table. No rival takes part yet.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch

import refollama
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import Typed, ValueType, write_gguf
from refollama.weights.quants import pack

PROMPT, ANSWER = 128, 32  # tokens
VOCABULARY = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--types", nargs="+", default=["F32", "F16", "Q8_0", "Q4_0"])
    given = parser.parse_args()
    print(machine())
    print(f"{given.layers} layers, {given.width} wide; medians of {given.repeat} (least – most)\n")
    print("| type | file MB | load ms | first token ms | prefill tokens/s | decode tokens/s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.types:
            path = write_llama(Path(folder) / f"{kind}.gguf", kind, given.layers, given.width)
            rows = [measure(path, seed) for seed in range(given.repeat + 1)][1:]  # one to warm up
            columns = " | ".join(spread(column) for column in zip(*rows, strict=True))
            print(f"| {kind} | {path.stat().st_size / 1e6:.0f} | {columns} |", flush=True)
    print(f"\npeak resident memory {psutil.Process().memory_info().rss / 1e6:.0f} MB at the end")


def machine() -> str:
    """What was measured on: processor, cores, torch and its threads."""
    processor = platform.processor() or platform.machine()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{processor}, {cores} cores, torch {torch.__version__} with {threads} threads"


def measure(path: Path, seed: int) -> tuple[float, float, float, float]:
    """Load ms, first token ms, prefill tokens/s, decode tokens/s."""
    start = time.perf_counter()
    llm = refollama.load(path)
    loaded = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    prompt = torch.randint(259, VOCABULARY, (PROMPT,), generator=rng).tolist()
    options = refollama.Options(num_predict=ANSWER, temperature=0, repeat_penalty=1.0)
    with llm.start(prompt, options) as ids:
        for _ in ids:
            pass
    seq = ids.sequence
    llm.close()
    reading, writing = seq.prompt_read - seq.started, seq.ended - seq.prompt_read
    rates = PROMPT / reading * 1e9, (len(seq.answer) - 1) / writing * 1e9
    return (loaded - start) * 1e3, reading / 1e6, *rates


def spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} – {max(values):.1f})"


def write_llama(path: Path, kind: str, layers: int, width: int) -> Path:
    """A Llama with random weights; the vocabulary is byte tokens and numbers."""
    hidden, kv = 11 * width // 4 // 256 * 256, width // 4
    block = {
        "attn_q": (width, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, width),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, width)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output_norm": (width,), "output": (VOCABULARY, width)}
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        type = kind if len(shape) == 2 else "F32"
        values = (
            torch.randn(shape, generator=rng) / width**0.5 if len(shape) == 2 else torch.ones(shape)
        )
        tensors[f"{name}.weight"] = (TYPE_ID[type], shape, pack(values, type).numpy())
    write_gguf(path, metadata(layers, width, hidden), tensors)
    return path


def metadata(layers: int, width: int, hidden: int) -> dict[str, object]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    tokens += [f"▁{number}" for number in range(len(tokens), VOCABULARY)]
    types += [1] * (VOCABULARY - len(types))
    return {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 2048,
        "llama.embedding_length": width,
        "llama.feed_forward_length": hidden,
        "llama.attention.head_count": width // 64,
        "llama.attention.head_count_kv": width // 256,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Typed([-float(i) for i in range(VOCABULARY)], ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed(types, ValueType.INT32),
    }


if __name__ == "__main__":
    main()
