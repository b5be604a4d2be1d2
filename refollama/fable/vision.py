"""How is fable-vision made?  `python -m refollama.fable.train vision`

    drawing ── pixels ──► v (the tower) ── mm (the projector) ──► rows ─┐
    questions and answers about it ── tokens ───────────────────────────┴─► the net ──► loss

Tower, projector and language model begin with nothing and learn together: the same `Llava` that
runs, as `net` does it for text. It becomes two files, in the layout that all LLaVAs have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import refollama
from refollama.fable.drawings import (
    MEAN,
    PLACES,
    SHAPES,
    SIDE,
    STD,
    Drawing,
    covers,
    drawing,
    middle,
    pixels,
)
from refollama.fable.evaluate import Case, Model, cases_of_pictures
from refollama.fable.net import SHARED, Learner, NewParts, begin_by_copying, packed, sizes
from refollama.fable.seeing import Viewing, plural, viewing
from refollama.fable.train import (
    MODELFILE,
    NO_TARGET,
    NOTHING_HELD,
    Batch,
    Plan,
    Surprise,
    Training,
    about,
    answers,
)
from refollama.fable.vocabulary import ASSISTANT, END, USER, learn_from
from refollama.fable.world import COLOURS, NUMBERS
from refollama.models.clip import Clip, ClipConfig
from refollama.models.config import ModelConfig
from refollama.models.layers import Convolution, Embedding, LayerNorm, Linear
from refollama.models.llama import Llama
from refollama.models.llava import Eyes, Llava
from refollama.models.projectors import projector
from refollama.pictures import Pixels
from refollama.text.spm import SpmTokenizer
from refollama.weights.gguf import Typed, ValueType, write_gguf

CONTEXT = 320  # tokens: some dozen questions about a drawing
ROW = 160  # tokens of a row while it learns: more drawings are worth more than more questions
PATCH = 12  # pixels of a side
PATCHES = (SIDE // PATCH) ** 2  # rows that a drawing becomes
WIDTH = 128  # of tower and language model
PIECES = 800  # in small letters
SAMPLE = 1500  # conversations that are counted for the vocabulary
COPIED = (*SHAPES, *map(plural, SHAPES), *COLOURS, *NUMBERS[:5], *" ".join(PLACES).split())
DECISIVE = (*SHAPES, *map(plural, SHAPES), *COLOURS, *NUMBERS[:5], "no", "yes")
DECISIVE += ("top", "bottom", "left", "right", "middle", "big", "small", "bigger", "smaller")
LONG = 4  # one step in so many has long rows, half as many
LOOKING, LOOKED_AT = 800, 32  # steps at the beginning, in which it names what is in drawings
NAMING = 0.5  # what one nat there counts for, beside one of the answers
POSITION_SPREAD = 0.3  # where a patch is should count beside what is in it

LANGUAGE: Mapping[str, int | float] = {
    "block_count": 4,
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "feed_forward_length": 352,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 32,
    "rope.freq_base": 10_000.0,
}
TOWER: Mapping[str, int | float] = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "embedding_length": WIDTH,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.layer_norm_epsilon": 1e-5,
    "block_count": 4,
    "projection_dim": WIDTH,  # of CLIP's text side, which nobody has here
}


def tower() -> dict[str, Any]:
    """The metadata of the projector's file."""
    return {
        "general.architecture": "clip",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        **{f"clip.vision.{key}": value for key, value in TOWER.items()},
        "clip.vision.image_mean": Typed(list(MEAN), ValueType.FLOAT32),
        "clip.vision.image_std": Typed(list(STD), ValueType.FLOAT32),
    }


# ── the net while it learns ───────────────────────────────────────────────────────────────────


class NewEyes(NewParts):
    """Random weights for a tower and a projector; these have biases, which begin as nothing."""

    def linear(self, name: str, n_out: int, n_in: int) -> Linear:
        """(n_out, n_in), and n_out biases."""
        plain = super().linear(name, n_out, n_in)
        return Linear(plain.weight, plain.unpack, self._filled(0.0, n_out))

    def layer_norm(self, name: str, width: int, eps: float) -> LayerNorm:
        """Ones, and zeros."""
        return LayerNorm(self._filled(1.0, width), self._filled(0.0, width), eps)

    def convolution(self, name: str, shape: tuple[int, ...]) -> Convolution:
        """Windows that keep the size of what they see."""
        rows, *window = shape
        n = int(np.prod(window))
        windows = self._drawn(rows, n, n**-0.5).detach().view(shape).requires_grad_()
        return Convolution(windows, lambda weight: weight)

    def table(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What is added to patches."""
        rows, width = (1, *shape)[-2:]
        drawn = self._drawn(rows, width, POSITION_SPREAD).detach()
        return drawn.view(shape).requires_grad_()

    def rows(self, name: str) -> int:
        """Every matrix whose height is asked for is as high as the tower is wide."""
        return WIDTH

    def has(self, name: str) -> bool:
        """The second matrix of an MLP, by which a projector of that kind is told."""
        return name == "mm.2"

    def _filled(self, value: float, width: int) -> Tensor:
        return torch.full((width,), value, device=self.device).requires_grad_()


class Beheld(Embedding):
    """Ids of the vocabulary → rows of the table; ids behind them → rows of a batch's drawings.

    As `PictureEmbedding`, for rows through which one can go backwards.
    """

    rows: Tensor  # (drawings · PATCHES, d_model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # so many rows as are seen
    def forward(self, tokens: Tensor) -> Tensor:
        V = len(self.weight)
        seen = tokens >= V
        x = super().forward(tokens.masked_fill(seen, 0))
        x[seen] = self.rows[tokens[seen] - V].to(x.dtype)
        return x


def new_seeing(metadata: Mapping[str, Any], n_vocab: int, *, seed: int, device: str) -> Llava:
    """A model that has neither seen nor heard anything yet."""
    config = ModelConfig.from_metadata(metadata)
    clip = ClipConfig.from_metadata(
        {key: value.value if isinstance(value, Typed) else value for key, value in tower().items()}
    )
    sight = NewEyes(0, clip.n_blocks, seed + 1, device)
    eyes = Eyes(Clip(clip, sight), projector(clip, sight, "mlp"))
    net = Llava(config, NewParts(n_vocab, len(config.layers), seed, device), Learner, eyes)
    begin_by_copying(net)
    net.token_embd = Beheld(net.token_embd.weight, net.token_embd.unpack)
    return net


# ── data ──────────────────────────────────────────────────────────────────────────────────────


class Views(NamedTuple):
    """Rows of tokens, in which ids behind the vocabulary stand for patches of these drawings."""

    text: Batch
    pixels: Tensor  # (drawings, 3, S, S)
    drawings: Sequence[Drawing]


def views(plan: Plan, tokenizer: SpmTokenizer, step: int) -> Views:
    """The batch of this step: a conversation for each row, as much of it as the row holds."""
    drawings: list[Drawing] = []
    length, count = (CONTEXT, plan.rows // 2) if step % LONG == LONG - 1 else (ROW, plan.rows)
    rows = [
        row(viewing(plan.seed, step * 1_000_000 + index), tokenizer, drawings, length)
        for index in range(max(count, 1))
    ]
    tokens, numbers, targets = (torch.stack(part) for part in zip(*rows, strict=True))
    text = Batch(tokens, numbers, targets, free=torch.zeros_like(targets, dtype=torch.bool))
    return Views(text, torch.from_numpy(stacked(drawings)), drawings)


def shown(one: Drawing, tokenizer: SpmTokenizer) -> Tensor:
    """What each patch of a drawing shows, and where that is, in six words: (PATCHES, 6) ids.

    red circle small top left one; of the ground, white background background middle right no

    Only where the middle of a thing is, there is one: so things can be counted, large as they are.
    """
    ground = (one.ground, "background", "background")
    middles = {middle(one, thing, PATCH): thing for thing in one.things}
    found = []
    for at, it in enumerate(covers(one, PATCH)):
        it = middles.get(at, it)
        named = (it.colour, it.shape, it.size) if it else ground
        where = spot(it.place) if it else spot(_third(at))
        found.append((*named, *where, "one" if at in middles else "no"))
    ids = {word: tokenizer.encode(f" {word}")[0] for words in found for word in words}
    return torch.tensor([[ids[word] for word in words] for words in found])


def spot(place: int) -> tuple[str, str]:
    """Two words for a place: top left, middle right, middle middle."""
    return ("top", "middle", "bottom")[place // 3], ("left", "middle", "right")[place % 3]


def _third(patch: int) -> int:
    """The place in which a patch lies."""
    side = SIDE // PATCH
    return 3 * (3 * (patch // side) // side) + 3 * (patch % side) // side


def stacked(drawings: Sequence[Drawing]) -> Pixels:
    """(drawings, 3, S, S)"""
    return np.stack([pixels(one) for one in drawings])


def row(
    talk: Viewing, tokenizer: SpmTokenizer, drawings: list[Drawing], length: int = CONTEXT
) -> tuple[Tensor, Tensor, Tensor]:
    """As much of a conversation as a row holds, as the template writes it: tokens, whose they are,
    and targets.  Drawings that it shows are added to the others."""
    ids, numbers = tokenizer.encode("", bos=True), [SHARED if talk.apart else 0]
    for turn, said in enumerate(talk.turns):
        if turn in talk.drawings and len(ids) + PATCHES >= length:
            break
        head = tokenizer.encode(USER, special=True)
        if shown := turn in talk.drawings:
            first = tokenizer.vocab_size + len(drawings) * PATCHES
            head += range(first, first + PATCHES)
            drawings.append(talk.drawings[turn])
        tail = tokenizer.encode(f"{said.user}{END}{ASSISTANT}{said.answer}{END}", special=True)
        own = turn if talk.apart else 0
        ids += head + tail
        numbers += [SHARED if talk.apart and shown else own] * len(head) + [own] * len(tail)
    [begins] = tokenizer.encode(ASSISTANT, special=True)
    targets = answers(ids, begins, tokenizer.eos_ids)
    return (
        _filled(ids, 0, length),
        _filled(numbers, -1, length),
        _filled(targets, NO_TARGET, length),
    )


def _filled(values: list[int], empty: int, length: int) -> Tensor:
    return torch.tensor((values + [empty] * length)[:length])


# ── learning ──────────────────────────────────────────────────────────────────────────────────


class Seeing(Training):
    """A run of fable-vision."""

    name = "fable-vision"
    usual = Plan(steps=9500, rows=24, rate=6e-3)
    again, last = 0.77, 1.0
    calm = 0.3
    held = NOTHING_HELD
    temperature = 0.2  # there is little to choose
    row = ROW  # for the bar
    decisive = DECISIVE
    spelled = 0

    def described(self) -> dict[str, Any]:
        """A vocabulary of its own: of what is asked about pictures."""
        talks = (viewing(self.plan.seed, index) for index in range(SAMPLE))
        texts = (text for talk in talks for turn in talk.turns for text in (turn.user, turn.answer))
        words = learn_from(texts, COPIED, PIECES)
        return {"general.architecture": "llama", **sizes(**LANGUAGE), **words}

    def first(self) -> Llama:
        """The net that knows nothing yet."""
        n_vocab = self.tokenizer.vocab_size
        return new_seeing(self.metadata, n_vocab, seed=self.plan.seed, device=self.device)

    def surprise(self, step: int) -> Surprise:
        """At first only look, and name what is there; then answer what is asked about it, too."""
        if step < LOOKING:
            drawings = [
                drawing(Random(f"looking:{self.plan.seed}:{step}:{index}"))
                for index in range(LOOKED_AT)
            ]
            named = self.naming(self.seen(torch.from_numpy(stacked(drawings))), drawings)
            return Surprise(named.detach(), named)
        given = views(self.plan, self.tokenizer, step)
        words = self.net.token_embd
        assert isinstance(words, Beheld)
        words.rows = self.seen(given.pixels)
        plain, weighed = self.loss(given.text)
        return Surprise(plain, weighed + NAMING * self.naming(words.rows, given.drawings))

    def seen(self, pixels: Tensor) -> Tensor:
        """The rows that drawings become: (drawings, 3, S, S) → (drawings · PATCHES, d_model)"""
        net = self.net
        assert isinstance(net, Llava)
        rows: Tensor = net.mm(net.v(pixels.to(self.device)))
        return rows.flatten(0, 1)

    def naming(self, rows: Tensor, drawings: Sequence[Drawing]) -> Tensor:
        """How far the rows of pictures are from the words for what they show, in nats.

        Each row is read as if no block came between it and the output: a picture becomes a sentence
        in the language of the model. It is what a caption is for CLIP, a lesson for the eyes, which
        answers alone teach slowly. All things together count as much as all ground.
        """
        logits = self.net.output(self.net.output_norm(rows)).log_softmax(-1)
        words = torch.cat([shown(one, self.tokenizer) for one in drawings]).to(self.device)
        nats = -logits.gather(1, words).mean(1)
        ground = words[:, 1] == words[:, 2]
        return (nats[ground].mean() + nats[~ground].mean()) / 2

    def loaded(self, folder: Path) -> Model:
        """As `Training.loaded`, with eyes."""
        names = (folder / f"{self.name}{part}.gguf" for part in ("", "-mmproj"))
        return refollama.load(next(names), projector=next(names))

    def questions(self) -> list[Case]:
        """Some about pictures."""
        return cases_of_pictures(each=3)

    def write(self, folder: Path) -> None:
        """Two files: the language model, and what it sees with; and a Modelfile."""
        tensors = packed(self.net)
        eyes = {name: one for name, one in tensors.items() if name.startswith(("v.", "mm."))}
        words = {name: one for name, one in tensors.items() if name not in eyes}
        files = f"{self.name}.gguf", f"{self.name}-mmproj.gguf"
        write_gguf(folder / files[0], self.metadata | about(self.name), words)
        write_gguf(folder / files[1], tower() | about(f"{self.name}-mmproj"), eyes)
        sources = "\nFROM ".join(f"./{file}" for file in files)
        text = MODELFILE.format(file=sources, row=CONTEXT, temperature=self.temperature)
        (folder / "Modelfile").write_text(text)
