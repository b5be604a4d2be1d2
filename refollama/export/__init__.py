"""GGUF → CHECKPOINTS: folders with safetensors, as researchers have them; the way back from
`convert`.

    metadata ─► settings.py ─► config.json, generation_config.json
             ─► words.py    ─► tokenizer.json, tokenizer.model, chat template
    tensors  ─► tensors.py  ─► model.safetensors, or several with an index

All is checked before a byte is written: the settings are read back by `convert`, and must say the
same model. The folder appears entirely or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refollama.convert.folder import CONFIG, INDEX
from refollama.convert.names import language_slots
from refollama.convert.numbers import FLOATS
from refollama.errors import BadRequest, StoreError
from refollama.export import llava, settings, words
from refollama.export.tensors import Source, majority, unpacked
from refollama.models.meter import Told, unheard
from refollama.weights import write_gguf
from refollama.weights.safetensors import Made, encoded

FORMATS = ("safetensors", "gguf")
SHARD = 5_000_000_000  # bytes of a file, at most; Hugging Face's own limit


@dataclass(frozen=True, slots=True)
class Exported:
    """What a model is made of."""

    model: Path
    projector: Path | None = None
    adapters: Sequence[Path] = ()  # what they change is written into the weights
    modelfile: str = ""  # all but FROM: template, parameters and so on
    name: str = "model"


def export(
    given: Exported,
    folder: Path,
    format: str = "safetensors",
    dtype: str | None = None,
    *,
    shard: int = SHARD,
    told: Told = unheard,
) -> None:
    """A model as a new folder: "safetensors" as transformers loads it, or "gguf".

    dtype: F32, F16 or BF16. None: what most weights are, or F16 if they are packed; a GGUF file
    stays what it is.
    told: is called with the bytes that are written, and those that there are.
    Raises: BadRequest for a folder that is there already, for another format or dtype;
    UnsupportedModel for what transformers has no settings for; FormatError, StoreError.
    """
    if format not in FORMATS:
        raise BadRequest(f"format is {format!r}; supported: {', '.join(FORMATS)}")
    if dtype not in (None, *FLOATS):
        raise BadRequest(f"dtype is {dtype!r}; supported: {', '.join(FLOATS)}")
    with _whole(folder) as place:
        if format == "gguf":
            _write_files(given, place, dtype, told)
        else:
            _write_checkpoint(given, place, dtype, shard, told)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A place to write to, which becomes the folder at the end."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} exists already: name a folder that is new, or empty")
    target = folder.resolve()
    place = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        place.mkdir(parents=True)
        yield place
        os.replace(place, target)  # an empty folder gives way
    except OSError as problem:
        raise StoreError(f"{folder}: {problem.strerror}") from problem
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ── a checkpoint ─────────────────────────────────────────────────────────────────────────────────


def _write_checkpoint(
    given: Exported, place: Path, dtype: str | None, shard: int, told: Told
) -> None:
    source = Source.of(given.model, given.adapters)
    dtype = dtype or majority(source.file)
    config, language = settings.language_model(source.file)
    config["torch_dtype"] = settings.TORCH_NAMES[dtype]
    tensors = source.made(language_slots(language), dtype)
    vocabulary = words.files(source.file.metadata, config)
    if given.projector is not None:
        eyes = Source.of(given.projector)
        config, tensors = llava.joined(config, tensors, eyes, vocabulary, dtype)
        vocabulary["preprocessor_config.json"] = llava.preprocessor(eyes.file)
    for name, values in {CONFIG: config, **vocabulary}.items():
        _write_small(place / name, values)
    if given.modelfile:
        (place / "Modelfile").write_text(f"FROM .\n{given.modelfile}", encoding="utf-8")
    _write_tensors(place, tensors, shard, told)


def _write_small(path: Path, values: bytes | str | Mapping[str, Any]) -> None:
    if isinstance(values, Mapping):
        values = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(values.encode() if isinstance(values, str) else values)


def _write_tensors(place: Path, tensors: Mapping[str, Made], shard: int, told: Told) -> None:
    total, done = sum(one.nbytes for one in tensors.values()), 0
    parts = _shards(tensors, shard)
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for name, part in zip(names, parts, strict=True):
        with (place / name).open("xb") as file:
            for piece in encoded(part):
                file.write(piece)
                told(min(done := done + len(piece), total), total)
            file.flush()
            os.fsync(file.fileno())
    if len(parts) > 1:
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_small(place / INDEX, index)


def _shards(tensors: Mapping[str, Made], shard: int) -> list[dict[str, Made]]:
    """The tensors in files of so many bytes at most, unless one alone is larger."""
    parts: list[dict[str, Made]] = [{}]
    size = 0
    for name, one in tensors.items():
        if parts[-1] and size + one.nbytes > shard:
            parts.append({})
            size = 0
        parts[-1][name] = one
        size += one.nbytes
    return parts


# ── GGUF files ───────────────────────────────────────────────────────────────────────────────────


def _write_files(given: Exported, place: Path, dtype: str | None, told: Told) -> None:
    paths = [path for path in (given.model, given.projector) if path is not None]
    sources = [Source.of(path, given.adapters if path == given.model else ()) for path in paths]
    names = [f"{given.name}.gguf", f"{given.name}-mmproj.gguf"][: len(paths)]
    total, before = sum(source.nbytes for source in sources), 0
    for name, source in zip(names, sources, strict=True):
        write_gguf(place / name, *unpacked(source, dtype, partial(_moved, told, total, before)))
        before += source.nbytes
    lines = "".join(f"FROM ./{name}\n" for name in names)
    (place / "Modelfile").write_text(lines + given.modelfile, encoding="utf-8")


def _moved(told: Told, total: int, before: int, done: int) -> None:
    told(before + done, total)
