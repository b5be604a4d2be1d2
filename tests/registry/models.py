"""Models to send about, and what a store holds, byte for byte."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from refollama.store import Store
from refollama.store import manifest as kinds
from refollama.store.manifest import Config, Layer, Manifest
from refollama.store.name import Name

CONFIG = Config("gguf", "llama", ("llama",), "7B", "Q4_0")
TEXTS = [(kinds.TEMPLATE, b"{{ .Prompt }}"), (kinds.SYSTEM, b"Be brief."), (kinds.PARAMS, b"{}\n")]


def fill(
    store: Store,
    name: str,
    *weights: bytes,
    texts: Sequence[tuple[str, bytes]] = TEXTS,
    parent: str = "",
) -> Manifest:
    """A model of these weights, perhaps those of a parent, and some texts: as create leaves it."""
    blobs = [*((kinds.MODEL, data, parent) for data in weights), *((*text, "") for text in texts)]
    with store.draft() as draft:
        layers = tuple(
            Layer(kind, draft.add(data), len(data), from_) for kind, data, from_ in blobs
        )
        config = CONFIG.to_bytes(layer.digest for layer in layers)
        made = Manifest(Layer(kinds.CONFIG, draft.add(config), len(config)), layers)
        draft.commit(Name.parse(name), made)
    return made


def some_bytes(size: int, seed: object = 0) -> bytes:
    """The same for the same seed; nothing that could be compressed or be equal by chance."""
    return random.Random(str(seed)).randbytes(size)


def some_file(path: Path, size: int, seed: object = 0) -> Path:
    """A file of such bytes, however large."""
    chance = random.Random(str(seed))
    with path.open("wb") as file:
        for at in range(0, size, 1 << 24):
            file.write(chance.randbytes(min(1 << 24, size - at)))
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store.  The newline that ends a manifest that was made here is left out."""
    found = {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
    return {
        name: data.rstrip(b"\n") if name.startswith("manifests/") else data
        for name, data in found.items()
    }


def is_sound(root: Path) -> bool:
    """Does every blob have the bytes of its name, and does no manifest name a missing one?"""
    blobs = {path.name: path for path in (root / "blobs").glob("sha256-*") if _is_whole(path)}
    named = [
        layer.digest.replace(":", "-")
        for path in (root / "manifests").rglob("*")
        if path.is_file()
        for manifest in [Manifest.parse(path.read_bytes())]
        for layer in (manifest.config, *manifest.layers)
    ]
    return set(named) <= blobs.keys() and all(_hash(path) == name for name, path in blobs.items())


def _is_whole(path: Path) -> bool:
    return "-partial" not in path.name


def _hash(path: Path) -> str:
    return f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}"
