"""Adapters: small changes of a model's matrices, in three formats, checked against their model."""

from __future__ import annotations

from pathlib import Path

from refollama.errors import FormatError, NotFound, StoreError
from refollama.weights.gguf import GGUF, is_gguf
from refollama.weights.lora import ggla, gguf, peft
from refollama.weights.lora.record import Adapter, Base, Pair

__all__ = ["Adapter", "Base", "Pair", "open_adapter", "save_adapter"]


def open_adapter(path: Path, model: GGUF, config: Path | None = None) -> Adapter:
    """The adapter at this path, which must fit the model: a GGUF file, a "ggla" file of 2023, or
    an adapter of PEFT: its folder, or its weights (`config` tells where its configuration is, if
    that does not lie beside them).

    Raises: NotFound, StoreError; FormatError, UnsupportedModel, with the tensor and both shapes.
    """
    try:
        return _opened(path, Base(model), config)
    except OSError as problem:
        raise StoreError(f"{path.name}: {problem.strerror}") from problem


def _opened(path: Path, base: Base, config: Path | None) -> Adapter:
    folder = peft.folder_at(path) if config is None else None
    if folder is not None:
        path, config = peft.files(folder)
    if not path.is_file():
        raise NotFound(f"{path.name}: there is no adapter that can be read")
    if config is not None:
        return peft.read(path, config, base).checked(base)
    if is_gguf(path):
        return gguf.read(path, base).checked(base)
    with path.open("rb") as file:
        if file.read(len(ggla.MAGIC)) == ggla.MAGIC:
            return ggla.read(path, base).checked(base)
    raise FormatError(
        f"{path.name}: neither a GGUF file nor a ggla file, and no adapter of PEFT "
        f"({peft.WEIGHTS}, with {peft.CONFIG} beside it)"
    )


def save_adapter(path: Path, adapter: Adapter, model: GGUF) -> None:
    """An adapter, wherever it came from, as a GGUF file for this model.  Raises: StoreError."""
    gguf.write(path, adapter, Base(model))
