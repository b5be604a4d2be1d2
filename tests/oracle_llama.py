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
        heads = config["heads"][layer], config["kv_heads"][layer]
        x = x + attention(norm(x, part["attn_norm"], config["eps"]), part, heads, config)
        h = norm(x, part["ffn_norm"], config["eps"])
        x = x + (experts(h, part, config) if "ffn_gate_inp" in part else feed_forward(h, part))
    x = norm(x, weights["output_norm.weight"], config["eps"])
    logits = x @ weights.get("output.weight", weights["token_embd.weight"]).T
    return logits + weights.get("output.bias", 0)


def feed_forward(h, part):
    gate, up = linear(h, part, "ffn_gate"), linear(h, part, "ffn_up")
    return linear(gate / (1 + np.exp(-gate)) * up, part, "ffn_down")


def linear(x, part, name):
    return x @ part[name].T + part.get(f"{name}.bias", 0)


def experts(h, part, config):
    """Token by token, expert by expert."""
    out = np.zeros_like(h)
    for t, x in enumerate(h):
        scores = linear(x, part, "ffn_gate_inp")
        best = np.argsort(-scores)[: config["experts_used"]]
        shares = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for share, e in zip(shares, best, strict=True):
            one = {f"ffn_{name}": part[f"ffn_{name}_exps"][e] for name in ("gate", "up", "down")}
            out[t] += share * feed_forward(x, one)
    return out


def norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def attention(x, part, heads, config):
    T, (H, Hk) = len(x), heads
    q, k, v = (linear(x, part, name) for name in ("attn_q", "attn_k", "attn_v"))
    D, Dv = q.shape[1] // H, v.shape[1] // Hk
    out = np.zeros((T, H * Dv))
    for head in range(H):
        shared = head * Hk // H
        qs = rotated(q[:, head * D : (head + 1) * D], config)
        ks = rotated(k[:, shared * D : (shared + 1) * D], config)
        vs = v[:, shared * Dv : (shared + 1) * Dv]
        for t in range(T):
            near = slice(max(0, t + 1 - config["window"]), t + 1)
            scores = ks[near] @ qs[t] / np.sqrt(D)
            p = np.exp(scores - scores.max())
            out[t, head * Dv : (head + 1) * Dv] = p / p.sum() @ vs[near]
    return linear(out, part, "attn_output")


def rotated(x, config):
    """Each pair of neighbours is a complex number, turned by position · frequency.

    Only the first dimensions, if the model says how many.
    """
    R = config["rotated"] or x.shape[1]
    pairs = x[:, 0:R:2] + 1j * x[:, 1:R:2]
    omegas = [omega(i, R, config) for i in range(R // 2)]
    turned = pairs * np.exp(1j * np.outer(np.arange(len(x)), omegas)) * gain(config)
    out = x.copy()
    out[:, 0:R:2], out[:, 1:R:2] = turned.real, turned.imag
    return out


def gain(config):
    """g(factor, 1) / g(factor, log multiplier) where YaRN's blend is on; and what the file adds."""

    def g(factor, share):
        return 1.0 if factor <= 1 else 0.1 * share * np.log(factor) + 1

    if config["blend"] == 0:
        return config["attn_factor"]
    factor = 1 / config["scale"]
    return config["attn_factor"] * g(factor, 1) / g(factor, config["log_multiplier"])


def omega(i, R, config):
    """Pair i of R/2, by the definitions, one number at a time."""
    fast = config["base"] ** (-2 * i / R) / config["divisors"][i]

    def pair_that_turns(times):
        return R * np.log(config["trained_on"] / (2 * np.pi * times)) / (2 * np.log(config["base"]))

    low = max(0, np.floor(pair_that_turns(config["beta_fast"])))
    high = min(R - 1, np.ceil(pair_that_turns(config["beta_slow"])))
    mix = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
    mix *= config["blend"]
    return fast * mix + fast * config["scale"] * (1 - mix)


def from_file(path, tokens):
    """The same for a GGUF file, unpacked by the `gguf` package: nothing of ours takes part."""
    weights, config = read(path)
    return forward(weights, config, tokens)


def read(path):
    """A GGUF file → weights and config, as `forward` takes them."""
    import gguf

    reader = gguf.GGUFReader(path)
    weights = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }

    def key(name, default=None):
        field = reader.get_field(f"llama.{name}")
        return default if field is None else field.contents()

    def each(name, default=None):
        """One number for all layers, or one for each."""
        value = key(name, default)
        return value if isinstance(value, list) else [value] * key("block_count")

    kind = key("rope.scaling.type", "linear")
    trained_on = key("rope.scaling.original_context_length", key("context_length"))
    chosen = "long" if key("context_length") > trained_on else "short"
    blend = key("rope.scaling.yarn_ext_factor", -1)
    divisors = f"rope_factors_{chosen}" if kind == "longrope" else "rope_freqs"
    config = {
        "layers": key("block_count"),
        "heads": each("attention.head_count"),
        "kv_heads": each("attention.head_count_kv", key("attention.head_count")),
        "eps": key("attention.layer_norm_rms_epsilon"),
        "window": key("attention.sliding_window") or 10**9,
        "rotated": key("rope.dimension_count"),
        "base": key("rope.freq_base", 10000.0),
        "scale": 1 if kind == "none" else 1 / key("rope.scaling.factor", 1.0),
        "blend": (kind == "yarn") if blend < 0 else blend,
        "trained_on": trained_on,
        "attn_factor": key("rope.scaling.attn_factor", 1.0)
        * key("rope.scaling.yarn_attn_factor", 1.0),
        "log_multiplier": key("rope.scaling.yarn_log_multiplier", 0.0),
        "beta_fast": key("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": key("rope.scaling.yarn_beta_slow", 1.0),
        "divisors": weights.get(f"{divisors}.weight", np.ones(10_000)),
        "experts_used": key("expert_used_count", 0),
    }
    return weights, config
