"""LLaVA: Llama that reads pictures among its text.

    picture ─ v (the tower) ─ mm (the projector) ─► rows      one picture, n rows
                                                     │
    ids   1  3148  V+576  V+577  …  V+1151  825      ▼        V: the size of the vocabulary
          └────┴───── token_embd ────┴────────┴────────► Llama, as it is

A picture is a run of ids behind those of the vocabulary, one for each of its rows. So whatever
counts, cuts, compares or remembers tokens need not know that there are pictures: only the
embedding does, which looks these ids up elsewhere. A picture that is seen again has the same ids,
so what was read of it is found in the cache; nothing else ever has them.

Source: Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from refollama.models.clip import Clip
from refollama.models.config import ModelConfig
from refollama.models.layers import Embedding
from refollama.models.llama import Block, Llama, Parts
from refollama.models.projectors import Projector
from refollama.pictures import Pixels, pixels

MOST_BYTES = 256 << 20  # of pictures that nobody reads at the moment: rows, or what they come from


class Picture:
    """A picture that a model can read: its ids, and its rows as soon as they are needed."""

    def __init__(self, ids: range, pixels: Pixels) -> None:
        self.ids = ids
        self.pixels: Pixels | None = pixels  # (3, S, S); None once there are rows
        self.rows: Tensor | None = None  # (len(ids), d_model)


class Gallery:
    """The pictures that one model has seen, by content and by id.

    A picture lives as long as somebody holds it; the gallery itself holds those that were looked
    for last, as many as `most` says.
    """

    def __init__(self, first: int, rows: int, most: int) -> None:
        self.first, self.rows, self.most = first, rows, max(1, most)
        self._next = first
        self._by_content: weakref.WeakValueDictionary[bytes, Picture]
        self._by_content = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, Picture] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[bytes, Picture] = OrderedDict()  # the one used last comes last
        self._lock = threading.Lock()

    def find(self, content: bytes, read: Callable[[], Pixels]) -> Picture:
        """The picture of this content; a new one gets its pixels by `read`, and ids of its own."""
        with self._lock:
            picture = self._by_content.get(content)
        pixels = read() if picture is None else None
        with self._lock:
            picture = picture or self._by_content.get(content)  # somebody may have been faster
            if picture is None:
                assert pixels is not None
                picture = self._new(content, pixels)
            self._recent[content] = picture
            self._recent.move_to_end(content)
            while len(self._recent) > self.most:
                self._recent.popitem(last=False)
        return picture

    def _new(self, content: bytes, pixels: Pixels) -> Picture:
        picture = Picture(range(self._next, self._next + self.rows), pixels)
        self._by_content[content] = picture
        self._by_number[(self._next - self.first) // self.rows] = picture
        self._next += self.rows
        return picture

    def __getitem__(self, id: int) -> Tensor:
        """The row that an id stands for.  → (d_model,)"""
        number, row = divmod(id - self.first, self.rows)
        rows = self._by_number[number].rows
        assert rows is not None, "the picture has not been looked at"
        return rows[row]

    def forget(self) -> None:
        """What has been seen is to be looked at anew, and gets other ids."""
        with self._lock:
            self._recent.clear()
            self._by_content.clear()

    def memory(self) -> list[Tensor]:
        """The rows that are held for later."""
        with self._lock:
            held = list(self._recent.values())
        return [picture.rows for picture in held if picture.rows is not None]


class PictureEmbedding(Embedding):
    """Ids of the vocabulary → rows of the table; ids behind them → rows of pictures."""

    def __init__(self, words: Embedding, gallery: Gallery) -> None:
        super().__init__(words.weight, words.unpack)
        self.gallery = gallery

    def forward(self, tokens: Tensor) -> Tensor:
        seen = tokens >= len(self.weight)
        if not seen.any():
            return super().forward(tokens)
        x = super().forward(tokens.masked_fill(seen, 0))
        rows = torch.stack([self.gallery[id] for id in tokens[seen].tolist()])
        x[seen] = rows.to(x)
        return x


class Eyes(NamedTuple):
    """What a model sees with: a tower and a projector."""

    v: Clip
    mm: Projector


class Llava(Llama):
    """The model: `v` and `mm` make rows of a picture; all else is Llama's."""

    def __init__(self, config: ModelConfig, parts: Parts, block: type[Block], eyes: Eyes) -> None:
        super().__init__(config, parts, block)
        self.v, self.mm = eyes
        size, rows = self.v.config.image_size, self.mm.rows(self.v.config.grid)
        nbytes = 4 * max(rows * config.d_model, 3 * size * size)
        self.gallery = Gallery(self.n_vocab, rows, MOST_BYTES // nbytes)
        self.token_embd = PictureEmbedding(self.token_embd, self.gallery)
        self._looking = threading.Lock()

    def picture(self, file: bytes) -> Picture:
        """A picture's file → its ids; the same file has the same ones as long as it is remembered.

        Raises: BadRequest for what is no picture, is damaged, or is too large.
        """
        clip = self.v.config
        read = partial(pixels, file, clip.image_size, clip.mean, clip.std)
        return self.gallery.find(hashlib.sha256(file).digest(), read)

    @torch.no_grad()
    def look(self, picture: Picture) -> None:
        """Make the picture's rows, unless it has them: what its ids stand for from now on."""
        with self._looking:  # one at a time: each takes all cores
            if picture.rows is not None or picture.pixels is None:
                return
            x = torch.from_numpy(picture.pixels)[None].to(self.v.class_embd.device)
            picture.rows = self.mm(self.v(x))[0].to(self.device)
            picture.pixels = None
