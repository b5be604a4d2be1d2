"""What lies in a checkpoint's folder?  Its settings, and its tensors by name, over all shards.

    config.json                        what the model is
    model.safetensors                  its tensors; or, in several files,
    model-00001-of-00002.safetensors   …
    model.safetensors.index.json       which tensor is in which file
    tokenizer.model, tokenizer.json …  see vocabulary.py

The files are a mapping of names to paths, so that they may lie anywhere: in one folder, or as blobs
in a store, under other names. Nothing outside of it is ever opened.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refollama.errors import FormatError, NotFound, StoreError, UnsupportedModel
from refollama.weights.safetensors import Stored, open_safetensors

CONFIG = "config.json"
WHOLE = "model.safetensors"  # if it is there, an index beside it is of other days
INDEX = "model.safetensors.index.json"
ENDING = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_TEXT = 128 << 20  # bytes; tokenizers of a quarter million words have 35 MB
LARGEST_NUMBER = 2**31 - 1
LARGEST_FLOAT = sys.float_info.max  # JSON has whole numbers of any length

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a checkpoint, by the names that they have in it."""

    files: Mapping[str, Path]
    name: str = ""  # of the model, for people; may be unknown

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The folder of this path.  Raises: NotFound, StoreError."""
        try:
            files = {each.name: each for each in sorted(path.iterdir()) if each.is_file()}
            return cls(files, path.resolve().name)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise NotFound(f"{path}: there is no such folder") from None
        except OSError as problem:
            raise StoreError(f"{path}: {problem.strerror}") from problem

    def text(self, name: str) -> str:
        """A small file as text; "" if it is not there.  Raises: FormatError, StoreError."""
        data = self.read(name)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FormatError(f"{name} is no text in UTF-8") from None

    def read(self, name: str) -> bytes:
        """The bytes of a small file; none if it is not there."""
        if name not in self.files:
            return b""
        try:
            with self.files[name].open("rb") as file:
                data = file.read(LARGEST_TEXT + 1)
        except OSError as problem:
            raise StoreError(f"{name}: {problem.strerror}") from problem
        if len(data) > LARGEST_TEXT:
            raise FormatError(f"{name} is longer than {LARGEST_TEXT >> 20} MiB")
        return data

    def settings(self, name: str) -> Settings:
        """The object in a JSON file; an empty one if the file is not there.

        Raises: FormatError if it is no JSON object.
        """
        text = self.text(name)
        try:
            values = json.loads(text) if text else {}
        except (ValueError, RecursionError) as problem:
            raise FormatError(f"{name} is no JSON that can be read: {problem}") from None
        if not isinstance(values, dict):
            raise FormatError(f"{name} must hold a JSON object")
        if _has_half_a_character(text, values):
            raise FormatError(f"{name} has half a character (\\ud800 to \\udfff alone)")
        return Settings(values, name)

    def tensors(self) -> Mapping[str, Stored]:
        """All tensors by name; only their headers are read.

        Raises: FormatError (a file or tensor that is missing, a header that lies), UnsupportedModel
        for a checkpoint in pickles.
        """
        if INDEX in self.files and WHOLE not in self.files:
            return self._indexed()
        names = self._shards()
        found: dict[str, Stored] = {}
        for name in names:
            part = open_safetensors(self.files[name], name)
            twice = found.keys() & part.keys()
            if twice:
                raise FormatError(f"tensor {min(twice)!r} is in {name} and in another file, too")
            found |= part
        return found

    def _shards(self) -> list[str]:
        """The files of a checkpoint without an index: one, or all of a numbered series."""
        found = [name for name in self.files if name.endswith(ENDING)]
        if WHOLE in found:
            return ["model.safetensors"]
        if not found:
            raise self._nothing()
        numbered = [match for name in found if (match := _SHARD.fullmatch(name))]
        if len(found) == 1 and not numbered:
            return found
        if not numbered or len({(match[1], match[3]) for match in numbered}) > 1:
            raise FormatError(
                f"{', '.join(found[:3])} …: {INDEX} is missing, which tells them apart"
            )
        first = numbered[0]
        count = int(first[3])
        if count > len(numbered):
            here = {int(match[2]) for match in numbered}
            lost = next(n for n in range(1, count + 1) if n not in here)
            raise FormatError(f"{first[1]}-{lost:05}-of-{count:05}{ENDING} is missing")
        return [match[0] for match in numbered]

    def _nothing(self) -> FormatError | UnsupportedModel:
        pickle = next((name for name in self.files if name.endswith(PICKLES)), None)
        if pickle is None:
            return FormatError(f"there is no file *{ENDING}")
        return UnsupportedModel(
            f"{pickle} is a pickle, which may run code when it is opened: only safetensors files "
            "are read; save the model as such first"
        )

    def _indexed(self) -> Mapping[str, Stored]:
        """The tensors that the index lists, each from the file that it says."""
        places = self.settings(INDEX).values.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise FormatError(f"{INDEX}: weight_map must say a file for each tensor")
        missing = sorted(set(places.values()) - self.files.keys())
        if missing:
            raise FormatError(f"{missing[0][:80]} is missing, which {INDEX} names")
        shards = {
            name: open_safetensors(self.files[name], name) for name in sorted(set(places.values()))
        }
        for tensor, name in places.items():
            if tensor not in shards[name]:
                raise FormatError(f"{INDEX} says that {tensor[:80]!r} is in {name}, but it is not")
        return {tensor: shards[name][tensor] for tensor, name in places.items()}


def is_checkpoint(path: Path) -> bool:
    """Is it a folder with a `config.json`?"""
    try:
        return path.is_dir() and (path / CONFIG).is_file()
    except (OSError, ValueError):
        return False


def _has_half_a_character(text: str, values: object) -> bool:
    """JSON may spell what no text in UTF-8 can hold; only a backslash leads there."""
    if "\\ud" not in text.lower():
        return False
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Settings:
    """A JSON object; each value is checked as it is taken.

    Raises: FormatError, with the place of what makes no sense.
    """

    values: Mapping[str, Any]
    place: str  # what messages call it
    defaults: Mapping[str, Any] | None = None  # where the file is silent, or says null

    def get(self, key: str) -> Any:
        """As it stands, or else its default, or None."""
        value = self.values.get(key)
        return (self.defaults or {}).get(key) if value is None else value

    def size(self, key: str, *, least: int = 1) -> int:
        """A whole number from `least` on."""
        value = self.get(key)
        if type(value) is not int or not least <= value <= LARGEST_NUMBER:
            raise self.fault(key, f"must be a whole number from {least} to 2^31 - 1")
        return value

    def number(self, key: str) -> float:
        """A finite number that is not negative."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 <= value <= LARGEST_FLOAT:
            raise self.fault(key, "must be a number that is not negative")
        return float(value)

    def word(self, key: str) -> str:
        """A text; "" if it is not given."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, "must be a text")
        return value or ""

    def part(self, key: str, defaults: Mapping[str, Any] | None = None) -> Settings:
        """An object within; an empty one if it is not given."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(key, "must be an object")
        return Settings(value or {}, f"{self.place}: {key}", defaults)

    def numbers(self, key: str, count: int) -> list[float]:
        """So many numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(key, f"must be a list of {count} numbers")
        return [Settings({key: each}, self.place).number(key) for each in value]

    def fault(self, key: str, problem: str) -> FormatError:
        return FormatError(f"{self.place}: {key} {problem}, not {shown(self.get(key))}")

    def refused(self, key: str, supported: str) -> UnsupportedModel:
        found = shown(self.get(key))
        return UnsupportedModel(f"{self.place}: {key} is {found}; supported: {supported}")


def shown(value: object) -> str:
    """A value as a message may repeat it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
