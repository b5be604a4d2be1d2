"""GGUF → CHECKPOINTS: folders with safetensors, as researchers have them; the way back from
`convert`.

    metadata ─► settings.py ─► config.json, generation_config.json
             ─► words.py    ─► tokenizer.json, tokenizer.model, chat template
    tensors  ─► tensors.py  ─► model.safetensors, or several with an index

All is checked before a byte is written: the settings are read back by `convert`, and must say the
same model. A new folder appears entirely or not at all; in one that is there already, what makes it
a model appears last.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refollama.convert.folder import CONFIG, INDEX
from refollama.convert.names import language_slots
from refollama.convert.numbers import FLOATS
from refollama.errors import BadRequest, FormatError, StoreError, UnsupportedModel
from refollama.export import llava, settings, words
from refollama.export.tensors import Source, majority, unpacked
from refollama.models.meter import Told, unheard
from refollama.weights import write_gguf
from refollama.weights.gguf import GGUF, Tensors
from refollama.weights.safetensors import Made, encoded

FORMATS = ("safetensors", "gguf")
Plan = dict[str, Callable[[Path], None]]  # name of a file → what writes it; the order counts
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
    _check_free(folder)
    if format == "gguf":
        files = _gguf_files(given, dtype, told)
    else:
        files = _checkpoint(given, dtype, shard, told)
    _write(files, folder)


def _check_free(folder: Path) -> None:
    """Raises: BadRequest for a folder with something in it, and for what is no folder."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as problem:
        raise StoreError(f"{folder}: {problem.strerror}") from problem
    if taken:
        raise BadRequest(f"{folder} exists already: name a folder that is new, or empty")


def _write(files: Plan, folder: Path) -> None:
    """The files in the folder. What fails while it is written leaves nothing behind.

    A folder that is there is kept: somebody may stand in it, and a disk may begin there.
    """
    target, unfinished = folder.resolve(), f".{uuid.uuid4().hex}.partial"
    is_there = target.exists()
    place = target / unfinished if is_there else target.with_name(unfinished)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        place.mkdir(parents=True)
        for name, write in files.items():
            write(place / name)
        if is_there:
            for name in files:
                os.replace(place / name, target / name)
        else:
            os.replace(place, target)
    except OSError as problem:
        raise StoreError(f"{folder}: {problem.strerror}") from problem
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # one that is filled now, with the model or by others, stays
            for parent in made:
                parent.rmdir()


# ── a checkpoint ─────────────────────────────────────────────────────────────────────────────────


def _checkpoint(given: Exported, dtype: str | None, shard: int, told: Told) -> Plan:
    """Its files; that with the settings comes last, as it makes a checkpoint of them."""
    source = Source.of(given.model, given.adapters)
    dtype = dtype or majority(source.file)
    config, language = settings.language_model(source.file, tied=source.tied)
    config["torch_dtype"] = settings.TORCH_NAMES[dtype]
    tensors = source.made(language_slots(language), dtype)
    vocabulary = _vocabulary(source.file, config)
    if given.projector is not None:
        eyes = Source.of(given.projector)
        config, tensors = llava.joined(config, tensors, eyes, vocabulary, dtype)
        vocabulary["preprocessor_config.json"] = llava.preprocessor(eyes.file)
    small = {**vocabulary, "Modelfile": f"FROM .\n{given.modelfile}", CONFIG: config}
    return _of_tensors(tensors, shard, told) | _of_values(small)


def _vocabulary(file: GGUF, config: Mapping[str, Any]) -> words.Files:
    """The tokenizer's files.  Raises: UnsupportedModel, FormatError; the file is named."""
    try:
        found = words.files(file.metadata, config)
    except (FormatError, UnsupportedModel) as error:
        raise type(error)(f"{file.path.name}: {error}") from None
    tokens, rows = file.metadata["tokenizer.ggml.tokens"], config["vocab_size"]
    assert isinstance(tokens, list)
    if len(tokens) != rows:
        raise FormatError(
            f"{file.path.name}: the tokenizer has {len(tokens)} tokens, "
            f"but token_embd.weight has {rows} rows; expected as many"
        )
    return found


def _of_values(files: Mapping[str, bytes | str | Mapping[str, Any]]) -> Plan:
    """Small files, of which the whole is known."""
    return {name: partial(_write_values, values) for name, values in files.items()}


def _write_values(values: bytes | str | Mapping[str, Any], path: Path) -> None:
    if isinstance(values, Mapping):
        values = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(values.encode() if isinstance(values, str) else values)


def _of_tensors(tensors: Mapping[str, Made], shard: int, told: Told) -> Plan:
    """Files of tensors and, if there are several, their index."""
    total, before = sum(one.nbytes for one in tensors.values()), 0
    parts = _shards(tensors, shard)
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    files: Plan = {}
    for name, part in zip(names, parts, strict=True):
        files[name] = partial(_write_tensors, part, partial(_moved, told, total, before))
        before += sum(one.nbytes for one in part.values())
    if len(parts) > 1:
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        files |= _of_values({INDEX: index})
    return files


def _write_tensors(tensors: Mapping[str, Made], told: Callable[[int], None], path: Path) -> None:
    done = 0
    with path.open("xb") as file:
        for piece in encoded(tensors):
            file.write(piece)
            told(done := done + len(piece))
        file.flush()
        os.fsync(file.fileno())


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


def _gguf_files(given: Exported, dtype: str | None, told: Told) -> Plan:
    """The model, its eyes if it has any, and a Modelfile that names them."""
    paths = [path for path in (given.model, given.projector) if path is not None]
    sources = [Source.of(path, given.adapters if path == given.model else ()) for path in paths]
    names = [f"{given.name}.gguf", f"{given.name}-mmproj.gguf"][: len(paths)]
    total, before = sum(source.nbytes for source in sources), 0
    files: Plan = {}
    for name, source in zip(names, sources, strict=True):
        file = unpacked(source, dtype, partial(_moved, told, total, before))
        files[name] = partial(_write_gguf, *file)
        before += source.nbytes
    lines = "".join(f"FROM ./{name}\n" for name in names)
    return files | _of_values({"Modelfile": lines + given.modelfile})


def _write_gguf(metadata: Mapping[str, Any], tensors: Tensors, path: Path) -> None:
    write_gguf(path, metadata, tensors)


def _moved(told: Told, total: int, before: int, done: int) -> None:
    told(min(before + done, total), total)
