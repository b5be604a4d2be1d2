"""How is fable-vision made?  `python -m refollama.fable.train vision`

    drawing ── pixels ──► v (the tower) ── mm (the projector) ──► rows ─┐
    questions and answers about it ── tokens ───────────────────────────┴─► the net ──► loss

Tower, projector and language model begin with nothing and learn together: the same `Llava` that
runs, as `net` does it for text. It becomes two files, in the layout that all LLaVAs have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import refollama
from refollama.fable.drawings import MEAN, PLACES, SHAPES, SIDE, STD, Drawing, pixels
from refollama.fable.evaluate import Case, Model, cases_of_pictures
from refollama.fable.net import SHARED, Learner, NewParts, begin_by_copying, packed, sizes
from refollama.fable.seeing import Viewing, plural, viewing
from refollama.fable.train import (
    MODELFILE,
    NO_TARGET,
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

ROW = 320  # tokens of a row: one drawing or two, and some dozen questions
PATCH = 12  # pixels of a side
PATCHES = (SIDE // PATCH) ** 2  # rows that a drawing becomes
WIDTH = 128  # of tower and language model
PIECES = 1536
SAMPLE = 1500  # conversations that are counted for the vocabulary
COPIED = (*SHAPES, *map(plural, SHAPES), *COLOURS, *NUMBERS[:5], *" ".join(PLACES).split())
DECISIVE = (*SHAPES, *map(plural, SHAPES), *COLOURS, *NUMBERS[:5], "no", "yes")
DECISIVE += ("top", "bottom", "left", "right", "middle", "big", "small", "bigger", "smaller")
POSITION_SPREAD = 0.3  # where a patch is should count beside what is in it

LANGUAGE: Mapping[str, int] = {
    "block_count": 4,
    "context_length": ROW,
    "embedding_length": WIDTH,
    "feed_forward_length": 352,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 32,
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

    def _filled(self, value: float, width: int) -> Tensor:
        return torch.full((width,), value, device=self.device).requires_grad_()


class Beheld(Embedding):
    """Ids of the vocabulary → rows of the table; ids behind them → rows of a batch's drawings.

    As `PictureEmbedding`, for rows through which one can go backwards.
    """

    rows: Tensor  # (drawings · PATCHES, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        V = len(self.weight)
        seen = tokens >= V
        x = super().forward(tokens.masked_fill(seen, 0))
        x[seen] = self.rows[tokens[seen] - V]
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


def views(plan: Plan, tokenizer: SpmTokenizer, step: int) -> Views:
    """The batch of this step: a conversation for each row, as much of it as the row holds."""
    drawings: list[Drawing] = []
    rows = [
        row(viewing(plan.seed, step * 1_000_000 + index), tokenizer, drawings)
        for index in range(plan.rows)
    ]
    text = Batch(*(torch.stack(part) for part in zip(*rows, strict=True)))
    return Views(text, torch.from_numpy(stacked(drawings)))


def stacked(drawings: Sequence[Drawing]) -> Pixels:
    """(drawings, 3, S, S)"""
    return np.stack([pixels(one) for one in drawings])


def row(
    talk: Viewing, tokenizer: SpmTokenizer, drawings: list[Drawing]
) -> tuple[Tensor, Tensor, Tensor]:
    """As much of a conversation as a row holds, as the template writes it: tokens, whose they are,
    and targets.  Drawings that it shows are added to the others."""
    ids, numbers = tokenizer.encode("", bos=True), [SHARED if talk.apart else 0]
    for turn, said in enumerate(talk.turns):
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
    return _filled(ids, 0), _filled(numbers, -1), _filled(targets, NO_TARGET)


def _filled(values: list[int], empty: int) -> Tensor:
    """(ROW,)"""
    return torch.tensor((values + [empty] * ROW)[:ROW])


# ── learning ──────────────────────────────────────────────────────────────────────────────────


class Seeing(Training):
    """A run of fable-vision."""

    name = "fable-vision"
    usual = Plan(steps=3500, rows=16, rate=8e-3)
    row = ROW
    decisive = DECISIVE

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
        """Look at the drawings of a step, then answer what is asked about them."""
        given = views(self.plan, self.tokenizer, step)
        net, words = self.net, self.net.token_embd
        assert isinstance(net, Llava)
        assert isinstance(words, Beheld)
        words.rows = net.mm(net.v(given.pixels.to(self.device))).flatten(0, 1)
        return self.loss(given.text)

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
        text = MODELFILE.format(file="\nFROM ".join(f"./{file}" for file in files), row=ROW)
        (folder / "Modelfile").write_text(text)
