"""NAMES → FILES: the models on this machine, in Ollama's own layout.

<root>/manifests/<host>/<namespace>/<model>/<tag>      which blobs make up a model
<root>/blobs/sha256-<hex>                              the blobs

store = Store.default()
store.resolve(Name.parse("llama2")).weights            → the path of a GGUF file
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from refollama.errors import FormatError, ModelNotFound, StoreError, UnsupportedModel
from refollama.messages import Message
from refollama.store import manifest as kinds
from refollama.store.blobs import Blobs, log
from refollama.store.draft import Draft, digests_of, prune
from refollama.store.manifest import (
    Config,
    Layer,
    Manifests,
    Stored,
    messages_from_bytes,
    params_from_bytes,
)
from refollama.store.name import Name

__all__ = ["Blobs", "Config", "Manifests", "ModelEntry", "ModelFiles", "Name", "Store"]

TEXT_LIMIT = 4 << 20  # bytes of a template, system text, licence, config or parameters


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Everything that the store knows of one model."""

    name: Name
    digest: str  # hex SHA-256 of the manifest's bytes: the model's id
    size: int  # of all blobs, in bytes
    modified_at: datetime  # local time
    config: Config
    weights: Path
    parent: str  # short name of the model that the weights came from, or empty
    template: str | None
    system: str | None
    parameters: dict[str, Any]  # unchecked: Options does that
    licenses: tuple[str, ...]
    messages: tuple[Message, ...]  # the turns that begin every chat
    projectors: tuple[Path, ...]
    adapters: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the list of models."""

    name: Name
    modified_at: datetime  # local time
    size: int  # of all blobs, in bytes
    digest: str  # hex, as in ModelFiles
    details: dict[str, Any]
    capabilities: tuple[str, ...] = ()  # if its file was looked into


class Store:
    """The models under one root; nothing is written before something is added."""

    def __init__(self, root: Path, *, prune: bool = True) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self.manifests = Manifests(root)
        self._prune = prune

    @classmethod
    def default(cls) -> Store:
        """Where Ollama looks: OLLAMA_MODELS, else ~/.ollama/models."""
        chosen = os.environ.get("OLLAMA_MODELS")
        root = Path(chosen) if chosen else Path.home() / ".ollama" / "models"
        return cls(root, prune=not os.environ.get("OLLAMA_NOPRUNE"))

    @property
    def prunes(self) -> bool:
        """Are blobs removed that no model names any more?"""
        return self._prune

    def resolve(self, name: Name) -> ModelFiles:
        """The files and texts of a model.

        Raises: ModelNotFound without manifest or weights; UnsupportedModel if it never
        had any weights; StoreError for other missing blobs; FormatError for broken ones.
        """
        with self.blobs.lock:  # no half of an old model with half of a new one
            return self._files(self.manifests.read(name))

    def list(self) -> Sequence[ModelEntry]:
        """All models, in the order of a lexical walk; unreadable ones are warned about."""
        with self.blobs.lock:
            entries = [self._entry(stored) for stored in self.manifests.read_all()]
        return [entry for entry in entries if entry is not None]

    def draft(self) -> Draft:
        """Begin a new model."""
        return Draft(self.blobs, self.manifests, self._prune)

    def copy(self, source: Name, target: Name) -> None:
        """Give a model a second name; it keeps its id.  Raises: ModelNotFound, StoreError.

        A model that had this name is replaced, and its blobs go if nobody else names them.
        """
        with self.blobs.lock:
            stored = self.manifests.read(source)
            target = self.manifests.match(target)
            if target == stored.name:
                return
            replaced = digests_of(self.manifests, target)
            self.manifests.write(target, self.manifests.read_bytes(stored.name))
            if self._prune:
                prune(self.blobs, self.manifests, replaced)

    def remove(self, name: Name) -> None:
        """Take a model away, with the blobs that only it named.  Raises: ModelNotFound."""
        with self.blobs.lock:
            removed = self.manifests.remove(name)
            prune(self.blobs, self.manifests, removed.manifest.digests)

    # ---------------------------------------------------------------- reading

    def _files(self, stored: Stored) -> ModelFiles:
        layers = stored.manifest.layers
        weights = self._weights(stored)
        return ModelFiles(
            name=stored.name,
            digest=stored.digest,
            size=stored.manifest.size,
            modified_at=_local(stored.modified),
            config=self.config(stored),
            weights=self.blobs.path(weights.digest),
            parent=weights.from_,
            template=self._last_text(layers, kinds.TEMPLATE, kinds.PROMPT),
            system=self._last_text(layers, kinds.SYSTEM),
            parameters=self.parameters(stored),
            licenses=tuple(self._text(layer) for layer in _of(layers, kinds.LICENSE)),
            messages=self._messages(layers),
            projectors=self._paths(layers, kinds.PROJECTOR),
            adapters=self._paths(layers, kinds.ADAPTER),
        )

    def config(self, stored: Stored) -> Config:
        return Config.parse(self.blobs.read(stored.manifest.config.digest, TEXT_LIMIT))

    def parameters(self, stored: Stored) -> dict[str, Any]:
        """Of all its parameter layers; later ones win."""
        merged: dict[str, Any] = {}
        for layer in _of(stored.manifest.layers, kinds.PARAMS):
            merged |= params_from_bytes(self.blobs.read(layer.digest, TEXT_LIMIT))
        return merged

    def _weights(self, stored: Stored) -> Layer:
        models = _of(stored.manifest.layers, kinds.MODEL)
        if not models:
            raise UnsupportedModel(f"model '{stored.name}' has no weights that could be run here")
        if not self.blobs.has(models[-1].digest):
            raise ModelNotFound(stored.name)
        return models[-1]

    def _messages(self, layers: Iterable[Layer]) -> tuple[Message, ...]:
        found = _of(layers, kinds.MESSAGES)
        return messages_from_bytes(self.blobs.read(found[-1].digest, TEXT_LIMIT)) if found else ()

    def _last_text(self, layers: Iterable[Layer], *media_types: str) -> str | None:
        found = _of(layers, *media_types)
        return self._text(found[-1]) if found else None

    def _text(self, layer: Layer) -> str:
        try:
            return self.blobs.read(layer.digest, TEXT_LIMIT).decode()
        except UnicodeDecodeError:
            raise FormatError(f"{layer.media_type} {layer.digest}: not UTF-8") from None

    def _paths(self, layers: Iterable[Layer], media_type: str) -> tuple[Path, ...]:
        return tuple(self.blobs.path(layer.digest) for layer in _of(layers, media_type))

    def _entry(self, stored: Stored) -> ModelEntry | None:
        try:
            details = self.config(stored).details()
        except (FormatError, StoreError) as error:
            log.warning("model %s is not listed: %s", stored.name, error)
            return None
        size = stored.manifest.size
        return ModelEntry(stored.name, _local(stored.modified), size, stored.digest, details)


def _of(layers: Iterable[Layer], *media_types: str) -> Sequence[Layer]:
    return [layer for layer in layers if layer.media_type in media_types]


def _local(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()
