"""Where an exported model lands: entirely or not at all, and nothing else is touched."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from refollama import load, workshop
from refollama.errors import FormatError, NotFound, StoreError, UnsupportedModel
from refollama.export import Exported, export
from refollama.weights.gguf import Typed, ValueType, write_gguf
from tests import tiny

FORMATS = pytest.mark.parametrize("format", ["safetensors", "gguf"])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@FORMATS
@pytest.mark.parametrize("is_there", [True, False])
def test_what_cannot_be_opened_leaves_no_folders(format, is_there, tmp_path):
    target = tmp_path / "new" / "deep" / "out"
    if is_there:
        target.mkdir(parents=True)
    with pytest.raises(NotFound):
        export(Exported(tmp_path / "nope.gguf"), target, format)
    assert names_in(tmp_path) == (["new"] if is_there else [])


@FORMATS
@pytest.mark.parametrize("is_there", [True, False])
def test_nor_does_a_full_disk(format, is_there, tmp_path, monkeypatch):
    model, target = tiny.write_model(tmp_path / "a.gguf"), tmp_path / "new" / "deep" / "out"
    if is_there:
        target.mkdir(parents=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        export(Exported(model), target, format)
    assert names_in(tmp_path) == ["a.gguf", *(["new"] if is_there else [])]
    assert not is_there or names_in(target) == []


def test_the_folder_that_one_stands_in_is_filled(tmp_path, monkeypatch):
    model, place = tiny.write_model(tmp_path / "a.gguf"), tmp_path / "b"
    place.mkdir()
    monkeypatch.chdir(place)
    ran = CliRunner().invoke(workshop.export, [str(model), "."])
    assert ran.exit_code == 0, ran.output
    assert "7 files" in ran.output and "0 B" not in ran.output
    assert names_in(Path.cwd()) == names_in(place)
    assert names_in(tmp_path) == ["a.gguf", "b"]


def test_a_folder_is_filled_where_its_parent_may_not_be_written(tmp_path, monkeypatch):
    """Nor is anything written beside it, where another disk may lie."""
    model, place = tiny.write_model(tmp_path / "a.gguf"), tmp_path / "mine"
    place.mkdir()
    made, mkdir = [], Path.mkdir

    def watched(self, *args, **more):
        made.append(self)
        mkdir(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", watched)
    before = place.stat().st_ino
    export(Exported(model), place)
    assert made and all(path.is_relative_to(place) for path in made)
    assert place.stat().st_ino == before


def test_in_a_folder_that_is_there_the_settings_come_last(tmp_path, monkeypatch):
    model, place = tiny.write_model(tmp_path / "a.gguf"), tmp_path / "b"
    moved, replace = [], os.replace

    def watched(source, target):
        moved.append(Path(target).name)
        replace(source, target)

    place.mkdir()
    monkeypatch.setattr("os.replace", watched)
    export(Exported(model), place)
    assert sorted(moved) == names_in(place)
    assert moved[-1] == "config.json"


@FORMATS
def test_a_modelfile_lies_beside_every_model(format, tmp_path):
    export(Exported(tiny.write_model(tmp_path / "a.gguf")), tmp_path / "b", format)
    first = (tmp_path / "b" / "Modelfile").read_text().split("\n")[0]
    assert first == {"safetensors": "FROM .", "gguf": "FROM ./model.gguf"}[format]


@FORMATS
def test_a_vocabulary_alone_is_no_model(format, tmp_path):
    write_gguf(tmp_path / "a.gguf", tiny.metadata(), {})
    with pytest.raises(FormatError, match=r"a.gguf: there are no tensors"):
        export(Exported(tmp_path / "a.gguf"), tmp_path / "b", format)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_vocabulary_of_another_size_is_refused_as_load_refuses_it(more, tmp_path):
    count = len(tiny.TOKENS) + more
    tokens, scores, types = (
        [*column, last][:count]
        for column, last in ((tiny.TOKENS, "zz"), (tiny.SCORES, -99.0), (tiny.TYPES, 1))
    )
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Typed(scores, ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed(types, ValueType.INT32),
    }
    model = tiny.write_model(tmp_path / "a.gguf", keys=keys)
    refusals = []
    for refused in (load, lambda path: export(Exported(path), tmp_path / "b")):
        with pytest.raises(FormatError, match=f"the tokenizer has {count} tokens") as caught:
            refused(model)
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]


def test_a_refusal_of_the_vocabulary_names_the_file(tmp_path):
    keys = {"tokenizer.ggml.tokens": ["\udcff", *tiny.TOKENS[1:]]}
    model = tiny.write_model(tmp_path / "a.gguf", keys=keys)
    load(model)
    with pytest.raises(UnsupportedModel, match="a.gguf: .* entry 0 is no valid UTF-8"):
        export(Exported(model), tmp_path / "b")
