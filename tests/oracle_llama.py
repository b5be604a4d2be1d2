"""A slow llama in float64 and plain numpy, written from the papers: the judge of the model.

No cache, no batches, one loop per head; positions are 0, 1, 2, …
"""

import numpy as np


def forward(weights, config, tokens):
    """Logits after each token, (T, V) float64.  `weights`: name → array; `config`: see below."""
    x = weights["token_embd.weight"][tokens]
    for layer in range(config["layers"]):
        part = {
            name.split(".", 2)[2].removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        x = x + attention(norm(x, part["attn_norm"], config["eps"]), part, config)
        h = norm(x, part["ffn_norm"], config["eps"])
        x = x + (experts(h, part, config) if "ffn_gate_inp" in part else feed_forward(h, part))
    x = norm(x, weights["output_norm.weight"], config["eps"])
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T


def feed_forward(h, part):
    gate, up = linear(h, part, "ffn_gate"), linear(h, part, "ffn_up")
    return linear(gate / (1 + np.exp(-gate)) * up, part, "ffn_down")


def linear(x, part, name):
    return x @ part[name].T + part.get(f"{name}.bias", 0)


def experts(h, part, config):
    """Token by token, expert by expert."""
    out = np.zeros_like(h)
    for t, x in enumerate(h):
        scores = part["ffn_gate_inp"] @ x
        best = np.argsort(-scores)[: config["experts_used"]]
        shares = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for share, e in zip(shares, best, strict=True):
            one = {f"ffn_{name}": part[f"ffn_{name}_exps"][e] for name in ("gate", "up", "down")}
            out[t] += share * feed_forward(x, one)
    return out


def norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def attention(x, part, config):
    T, H, Hk = len(x), config["heads"], config["kv_heads"]
    q, k, v = (linear(x, part, name) for name in ("attn_q", "attn_k", "attn_v"))
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
    return linear(out, part, "attn_output")


def rotated(x, config):
    """Each pair of neighbours is a complex number, turned by position · frequency."""
    T, D = x.shape
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    turned = pairs * np.exp(
        1j * np.outer(np.arange(T), [omega(i, D, config) for i in range(D // 2)])
    )
    if config["yarn"]:
        turned *= 0.1 * np.log(1 / config["scale"]) + 1
    return np.stack([turned.real, turned.imag], -1).reshape(T, D)


def omega(i, D, config):
    """Pair i of D/2, by the definitions, one number at a time."""
    fast = config["base"] ** (-2 * i / D) / config["divisors"][i]
    if not config["yarn"]:
        return fast * config["scale"]

    def pair_that_turns(times):
        return D * np.log(config["trained_on"] / (2 * np.pi * times)) / (2 * np.log(config["base"]))

    low = max(0, np.floor(pair_that_turns(32)))
    high = min(D - 1, np.ceil(pair_that_turns(1)))
    mix = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
    return fast * mix + fast * config["scale"] * (1 - mix)


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
        "yarn": key("rope.scaling.type", "linear") == "yarn",
        "trained_on": key("rope.scaling.original_context_length", key("context_length")),
        "divisors": weights.pop("rope_freqs.weight", np.ones(10_000)),
        "experts_used": key("expert_used_count", 0),
    }
    return forward(weights, config, tokens)
