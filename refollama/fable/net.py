"""The model while it learns: the same `Llama` that runs, with weights that can change.

    metadata ── ModelConfig ──► Llama(config, NewParts) ── train.py ──► packed ──► a GGUF file

Nothing is written twice. `NewParts` deals out random dense weights where a file would deal out
packed ones; `Learner` is a block that computes the same as `Block`, but by routines that are made
for whole batches, and that know how to go backwards. A test holds the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from refollama.kvcache import KVCache, Rows
from refollama.models.config import ModelConfig, RopeConfig
from refollama.models.layers import Embedding, Experts, Linear, RMSNorm, Rope, rotate
from refollama.models.llama import Block, Llama, Step
from refollama.text.spm import SPACE
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import pack

SHARED = -2  # the number of tokens that all conversations of a row see: those of a picture
CONTEXT = 512  # tokens that the model learns to look back on
SIZES: Mapping[str, int | float] = {
    "block_count": 6,
    "context_length": CONTEXT,
    "embedding_length": 128,
    "feed_forward_length": 352,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,  # two query heads share a key head
    "rope.dimension_count": 32,
    "rope.freq_base": 1e6,  # two thirds of all pairs hardly turn: a word looks the same from afar
    "attention.layer_norm_rms_epsilon": 1e-5,
}

# Tables that are no module's: what a file calls them.  They are looked up, not multiplied by.
TABLES = {"v.position_embd": "v.position_embd.weight"}
WRITERS = ("attn_output", "attn_out", "ffn_down")  # matrices that write into the residual stream
QUERIES = 128  # at a time
ALIKE = 0.7  # how much of keys is queries at first, and of writing is reading
EMBEDDING_SPREAD = 0.04  # tied: as rows of the output they give logits of about ½ at first

SPELLED_ALIKE = 0.8  # how much of an embedding is that of the word in another spelling

# How heads look things up at first.  Tuned by what a net knows after 300 steps.
LOUDER = 7.5  # the residual stream, to which blocks add some tenths; the last norm takes it back
CONSTANT = 1.0  # the part that all embeddings share, by the size of what tells them apart
# The scores of heads that look so far back, for each pair that turns, the fastest first: the next
# token gets 6 less.  They are enough to tell near from far, over some 500 tokens.
SHARPNESS = (12.0, 8.0, 4.0, 3.0, 3.0)
TURNING = len(SHARPNESS)  # pairs
NOTED, LIKENESS, SAID = 0.5, 2.0, 0.5  # sizes of what they write, of queries and keys, of answers

# What the heads of the first block note: the tokens so far back.
BACK = (1, 2, 3, 4)
# What those of the next blocks look for, by block, group and head: (2, 0) is a place where stood
# what is two before this token; of several pairs each counts, so that what stood there with the
# same words before it counts most.  All heads of a group have the same second numbers to look at.
LOOKED_UP = (
    ((((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 3))), (((2, 0),), ((3, 0),))),
    ((((0, 1), (1, 2), (2, 3)), ((2, 2), (0, 1))), (((3, 0),), ((4, 0),))),
)
# What the heads of a group say of the place they found, by block and group: all that is there, but
# for these, that say what stood so far before it. "By the lake lives the", and further up stands
# "Emma the owl lives by the lake": two before the end is the lake, and four before that the owl.
SAID_BEFORE = {(0, 1): 4}


def sizes(**changes: int | float) -> dict[str, Any]:
    """The `llama.*` metadata of our model."""
    return {f"llama.{key}": value for key, value in {**SIZES, **changes}.items()}


def new_net(
    metadata: Mapping[str, Any], n_vocab: int, *, seed: int = 0, device: str = "cpu"
) -> Llama:
    """A model that has learned nothing yet, of the sizes that the metadata names."""
    config = ModelConfig.from_metadata(metadata)
    net = Llama(config, NewParts(n_vocab, len(config.layers), seed, device), Learner)
    begin_alike(net.token_embd.weight, metadata["tokenizer.ggml.tokens"])
    begin_by_copying(net)
    begin_by_looking_up(net, seed)
    return net


@torch.no_grad()
def begin_by_copying(net: Llama) -> None:
    """Heads begin by looking at what is like the token that asks, and by saying what they see.

    In part: keys are made as the queries of their group's first head, and what a head mixes is
    written back through the transpose of what it was read by. To find such heads by chance takes
    a small model hundreds of steps.
    Source: Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers".
    """
    config, damping = net.config, (2 * len(net.blk)) ** -0.5
    groups, D, M = config.n_kv_heads, config.d_head, config.d_model
    for block in net.blk:
        assert isinstance(block, Block)
        q = block.attn_q.weight.view(groups, -1, D, M)
        _nearer(block.attn_k.weight, q[:, 0].reshape(groups * D, M))
        v = block.attn_v.weight.view(groups, 1, D, M).expand_as(q).reshape(-1, M)
        _nearer(block.attn_output.weight, damping * v.T)


@torch.no_grad()
def begin_alike(table: Tensor, words: Sequence[str]) -> None:
    """tim, Tim and TIM begin as nearly the same word, so that heads find one by another.

    Shapes: table (V, d_model), a row for each token; words: the tokens as they are spelled.
    """
    first: dict[str, int] = {}
    like = [first.setdefault(word.strip(SPACE).lower(), id) for id, word in enumerate(words)]
    like = [id if id < len(table) else 0 for id in like[: len(table)]]
    some, size = table[: len(like)], table.norm(dim=1, keepdim=True)[: len(like)]
    mixed = (1 - SPELLED_ALIKE**2) ** 0.5 * some + SPELLED_ALIKE * some[like]
    some.copy_(mixed / mixed.norm(dim=1, keepdim=True) * size)


@torch.no_grad()
def begin_by_looking_up(net: Llama, seed: int) -> None:
    """The first blocks begin with heads that find again what was said with a word before.

        block 0   its heads look one, two, three and four tokens back, and note what stands there
        others    look where something stood that stands here, or did so many tokens ago

    Neither half of such a pair is of any use without the other, so that gradients find it late: a
    list of words that was said once is repeated after 60 steps, in more than half of its words; a
    net from random weights then repeats less than a tenth of them. In "Ann the owl is grey. Tim
    the fox is red. What is the fox called? The fox is called" a head that looks for what stands
    two before finds the fox; two before that, as was noted there, stands Tim.
    Source: Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895.
    """
    rng = torch.Generator().manual_seed(seed)
    D, M = net.config.d_head, net.config.d_model
    room = min(D, (M - 1) // (1 + len(BACK)))
    if room < 8:
        raise ValueError(f"a stream of {M} has no room for what {len(BACK)} heads note")
    directions = _orthogonal(M, rng)
    constant = directions[:1]
    # (room, M) each: a token itself, the one before it, the one before that, and so on
    spaces = [directions[1:][_part(back, room)] for back in range(1 + len(BACK))]
    table = net.token_embd.weight
    table.sub_(table @ constant.T @ constant).add_(CONSTANT * EMBEDDING_SPREAD * M**0.5 * constant)
    table.mul_(LOUDER)
    net.output_norm.weight.div_(LOUDER)
    first, *others = (block for block in net.blk if isinstance(block, Block))
    _look_back(first, net.rope, constant[0], spaces)
    for number, (block, groups) in enumerate(zip(others, LOOKED_UP, strict=False)):
        for group, heads in enumerate(groups):
            _match(block, group, heads, spaces, rng)
            seen = _orthogonal(M, rng)[:D]
            if back := SAID_BEFORE.get((number, group)):
                _say(block, group, len(heads), spaces[back], SAID * spaces[0])
            else:
                _say(block, group, len(heads), seen, SAID / len(heads) * seen)


def _look_back(block: Block, rope: Rope, constant: Tensor, spaces: Sequence[Tensor]) -> None:
    """Scores of a head depend on the distance alone, highest so many tokens back."""
    D, heads = block.config.d_head, block.config.n_heads // block.config.n_kv_heads
    strength = CONSTANT * block.config.d_model**0.5 / (1 + CONSTANT**2) ** 0.5  # after the norm
    key = torch.zeros(D)
    key[: 2 * TURNING : 2] = (torch.tensor(SHARPNESS) * D**0.5).sqrt() / strength
    for head, (back, space) in enumerate(zip(BACK, spaces[1:], strict=True)):
        its, group = _part(head, D), _part(head // heads, D)
        cos, sin = rope(torch.tensor(-back))
        block.attn_q.weight[its] = torch.outer(rotate(key, cos[0], sin[0]), constant)
        block.attn_k.weight[group] = torch.outer(key, constant)
        block.attn_v.weight[group] = _last(spaces[0], D)
        block.attn_output.weight[:, its] = NOTED * _last(space, D).T


def _match(
    block: Block,
    group: int,
    heads: Sequence[Sequence[tuple[int, int]]],
    spaces: Sequence[Tensor],
    rng: torch.Generator,
) -> None:
    """The heads of a group look where `there` is what `here` is now, for each of their pairs."""
    D = block.config.d_head
    room, still = len(spaces[0]), D - 2 * TURNING  # what turns is not alike from afar
    seen = sorted({there for pairs in heads for _, there in pairs})
    # All of it shares one key, each through directions of its own.
    turned = {there: _orthogonal(room, rng)[:still] for there in seen}
    key = torch.stack([turned[there] @ spaces[there] for there in seen]).sum(0)
    block.attn_k.weight[_part(group, D)] = LIKENESS * _last(key, D)
    for head, pairs in enumerate(heads, group * len(heads)):
        query = torch.stack([turned[there] @ spaces[here] for here, there in pairs]).sum(0)
        block.attn_q.weight[_part(head, D)] = LIKENESS * _last(query, D)


def _say(block: Block, group: int, heads: int, reads: Tensor, writes: Tensor) -> None:
    """What the heads of a group see in some directions where they look they write into others.

    Shapes: reads, writes (n ≤ D, d_model), row for row
    """
    D = block.config.d_head
    block.attn_v.weight[_part(group, D)] = _last(reads, D)
    for head in range(group * heads, (group + 1) * heads):
        block.attn_output.weight[:, _part(head, D)] = _last(writes, D).T


def _last(some: Tensor, rows: int) -> Tensor:
    """So many rows, of which these are the last, and all others nothing."""
    return functional.pad(some, (0, 0, rows - len(some), 0))


def _part(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)


def _orthogonal(width: int, rng: torch.Generator) -> Tensor:
    """(width, width): rows of length 1, at right angles."""
    return torch.linalg.qr(torch.randn(width, width, generator=rng))[0].T


def _nearer(weight: Tensor, other: Tensor) -> None:
    """A mixture that is as large as either."""
    weight.mul_((1 - ALIKE**2) ** 0.5).add_(other, alpha=ALIKE)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """What learns, by the names that a GGUF file uses.  A tied output is no weight of its own."""
    return {name: w for name, w in net.named_buffers() if w is not None and w.requires_grad}


class NewParts:
    """Random weights, dealt out by name; each keeps the size of what passes through it.

    The two matrices of a block that write into the residual stream begin smaller, since the
    stream is a sum over all blocks.  Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def __init__(self, n_vocab: int, layers: int, seed: int, device: str) -> None:
        self.n_vocab = n_vocab
        self.damping = (2 * layers) ** -0.5
        self.device = device
        self.rng = torch.Generator().manual_seed(seed)  # of the CPU: the same weights everywhere

    def linear(self, name: str, n_out: int, n_in: int) -> Linear:
        """(n_out, n_in), float32."""
        spread = n_in**-0.5 * (self.damping if name.endswith(WRITERS) else 1)
        return Linear(self._drawn(n_out, n_in, spread), _dense)

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        """(width,), ones."""
        return RMSNorm(torch.ones(width, device=self.device).requires_grad_(), eps)

    def embedding(self, name: str, width: int) -> Embedding:
        """(V, width); it is the output's matrix as well."""
        return Embedding(self._drawn(self.n_vocab, width, EMBEDDING_SPREAD), _dense)

    def rope(self, name: str, config: RopeConfig, width: int) -> Rope:
        """Nothing in it learns."""
        return Rope(config, width)

    def experts(self, name: str, n_experts: int, n_out: int, n_in: int) -> Experts:
        """Our model is no mixture."""
        raise ValueError(f"{name}: a model that learns here has no experts")

    def has(self, name: str) -> bool:
        """No matrix for the output: the table of embeddings serves twice."""
        return False

    def _drawn(self, rows: int, width: int, spread: float) -> Tensor:
        drawn = torch.randn(rows, width, generator=self.rng) * spread
        return drawn.to(self.device).requires_grad_()


def _dense(weight: Tensor) -> Tensor:
    return weight


class Learner(Block):
    """A block for whole batches: the same sums as `Block`, and the way back through them."""

    def attention(self, x: Tensor, step: Step) -> Tensor:
        B, T, _ = x.shape
        D = self.config.d_head
        q = rotate(self.attn_q(x).view(B, T, -1, D), step.cos, step.sin)
        k = rotate(self.attn_k(x).view(B, T, -1, D), step.cos, step.sin)
        v = self.attn_v(x).view(B, T, -1, D)
        k, v = step.cache.append(self.layer, step.positions, k, v)  # (B, Hk, T, D)
        assert isinstance(step.cache, Lesson)
        mixed = attend_in_chunks(q.transpose(1, 2), k, v, step.cache.veil)  # (B, H, T, D)
        return self.attn_output(mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_down(functional.silu(self.ffn_gate(x)) * self.ffn_up(x))


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, veil: Tensor) -> Tensor:
    """softmax(q·kᵀ / √D + veil)·v, for some queries at a time: nearly half of all keys come later
    than all of these, and are left out.

    Shapes: q (B, H, T, D); k, v (B, Hk, T, D); veil (B, 1, 1, T, T) → (B, H, T, D).
    In bfloat16 this takes less than half the time of `scaled_dot_product_attention` on a CPU.
    """
    B, H, T, D = q.shape
    q = q.view(B, k.shape[1], -1, T, D) * D**-0.5  # those that share a key head: G
    found = []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        some = q[..., start:end, :].flatten(2, 3)  # (B, Hk, G·C, D)
        scores = (some @ k[:, :, :end].mT).view(B, -1, H // k.shape[1], end - start, end)
        seen = (scores + veil[..., start:end, :end]).softmax(-1).to(v.dtype)
        mixed = seen.flatten(2, 3) @ v[:, :, :end]
        found.append(mixed.view(B, -1, H // k.shape[1], end - start, D))
    return torch.cat(found, 3).view(B, H, T, D)


class Lesson(Rows):
    """What tokens of a batch see while the model learns: those before them in their conversation.

    It stands where the cache stands when the model runs, and remembers nothing: all keys are new.
    Shapes: `conversations` (B, T) numbers the conversation of each token; SHARED is seen by all.
    """

    veil: Tensor  # (B, 1, 1, T, T), in the type of products: 0 where a token sees, else −∞

    def __init__(self, conversations: Tensor) -> None:
        T = conversations.shape[1]
        super().__init__(KVCache([(1, 1, 1)]), conversations.new_zeros(0), T)
        ago = torch.ones(T, T, dtype=torch.bool, device=conversations.device).tril()
        same = conversations[:, :, None] == conversations[:, None, :]
        shared = (conversations == SHARED)[:, None, :]
        hidden = ~((same | shared) & ago)[:, None, None]
        veil = torch.zeros(hidden.shape, dtype=_of_products(conversations.device.type))
        object.__setattr__(self, "veil", veil.to(hidden.device).masked_fill_(hidden, -math.inf))

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, Hk, D) → (B, Hk, T, D)"""
        return k.transpose(1, 2), v.transpose(1, 2)


def _of_products(device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def read(net: Llama, tokens: Tensor, conversations: Tensor) -> Tensor:
    """What the model makes of every token of a batch: (B, T) ids → (B, T, d_model).

    All rows share one set of positions: rotation shows distances only.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return net.hidden(tokens, positions, Lesson(conversations))


def packed(net: Llama, type: str = "Q8_0") -> dict[str, tuple[int, tuple[int, ...], Any]]:
    """The weights as `write_gguf` takes them: matrices packed, norms as they are."""
    found = {}
    for name, weight in weights(net).items():
        name = TABLES.get(name, name)
        kind = type if weight.dim() == 2 and name not in TABLES.values() else "F32"
        blocks = pack(weight.detach().cpu(), kind).numpy()
        found[name] = (TYPE_ID[kind], tuple(weight.shape), blocks)
    return found
