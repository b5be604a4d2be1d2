"""A net of twenty lines: what comes next is a fixed function of everything that came before.

It keeps its past in the real cache, as any model does, so a wrong slot or position shows at once.
"""

import torch

from refollama.kvcache import KVCache

V = 97


class FakeNet:
    device = torch.device("cpu")

    def __init__(self, before_step=lambda tokens: None, n_ctx=512):
        self.before_step = before_step
        self.n_ctx = n_ctx
        self.steps = []

    def __call__(self, tokens, positions, cache):
        self.before_step(tokens)
        self.steps.append(tuple(tokens.shape))
        k = tokens[..., None, None].float()  # (B, T, 1, 1)
        keys, _ = cache.append(0, positions, k, k)  # (B, 1, S, 1)
        past = keys[:, 0, :, 0]
        seen = torch.arange(cache.length) <= positions[:, -1:]
        mixed = (past * seen * (torch.arange(cache.length) + 1)).sum(-1)
        return torch.nn.functional.one_hot((mixed.long() * 31 + 7) % V, V).float() * 50

    def new_cache(self, slots=1, dtype=torch.float32, device=None):
        self.cache = KVCache([(1, 1, 1)], slots=slots, dtype=dtype)
        return self.cache

    def shift(self, cache, slot, start, stop, end):
        for tensor in (*cache.keys, *cache.values):
            tensor[slot, :, start : start + end - stop] = tensor[slot, :, stop:end].clone()
            tensor[slot, :, start + end - stop :] = 0


def expected(prompt, n):
    """The same function in plain Python."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


def following(tokens):
    return (sum(t * (i + 1) for i, t in enumerate(tokens)) * 31 + 7) % V
