"""A slow llama in float64 and plain numpy, written from the papers: the judge of the model.

No cache, no batches, one loop per head; positions are 0, 1, 2, …
"""

import numpy as np


def forward(weights, config, tokens):
    """Logits after each token, (T, V) float64.  `weights`: name → array; `config`: see below."""
    x = weights["token_embd.weight"][tokens]
    for layer in range(config["layers"]):
        part = {
            name.split(".")[2]: value
            for name, value in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        x = x + attention(norm(x, part["attn_norm"], config["eps"]), part, config)
        h = norm(x, part["ffn_norm"], config["eps"])
        gate, up = h @ part["ffn_gate"].T, h @ part["ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["ffn_down"].T
    x = norm(x, weights["output_norm.weight"], config["eps"])
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T


def norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def attention(x, part, config):
    T, H, Hk = len(x), config["heads"], config["kv_heads"]
    q, k, v = (x @ part[name].T for name in ("attn_q", "attn_k", "attn_v"))
    D = q.shape[1] // H
    out = np.zeros_like(q)
    for head in range(H):
        shared = head * Hk // H
        qs = rotated(q[:, head * D : (head + 1) * D], config)
        ks = rotated(k[:, shared * D : (shared + 1) * D], config)
        vs = v[:, shared * D : (shared + 1) * D]
        for t in range(T):
            scores = ks[: t + 1] @ qs[t] / np.sqrt(D)
            p = np.exp(scores - scores.max())
            out[t, head * D : (head + 1) * D] = p / p.sum() @ vs[: t + 1]
    return out @ part["attn_output"].T


def rotated(x, config):
    """Each pair of neighbours is a complex number, turned by position · scale · base^(−2i/D)."""
    T, D = x.shape
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    angles = np.arange(T)[:, None] * config["scale"] * config["base"] ** (-np.arange(0, D, 2) / D)
    turned = pairs * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(T, D)


def from_file(path, tokens):
    """The same for a GGUF file, unpacked by the `gguf` package: nothing of ours takes part."""
    import gguf

    reader = gguf.GGUFReader(path)
    weights = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }

    def key(name, default=None):
        field = reader.get_field(f"llama.{name}")
        return default if field is None else field.contents()

    config = {
        "layers": key("block_count"),
        "heads": key("attention.head_count"),
        "kv_heads": key("attention.head_count_kv", key("attention.head_count")),
        "eps": key("attention.layer_norm_rms_epsilon"),
        "base": key("rope.freq_base", 10000.0),
        "scale": 1 / key("rope.scaling.factor", 1.0),
    }
    return forward(weights, config, tokens)
