"""Copies that were kept: the same bits, taken only where they belong, whole or not there."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import refollama
from refollama import workshop
from refollama.cli import cli
from refollama.errors import RefollamaError
from refollama.fast import hasten, keep
from refollama.fast.copies import SOURCES, are_kept, copied, folder, kept, path_of, prune
from refollama.fast.laned import LaneLinear
from refollama.fast.pieces import gathered
from refollama.fast.prepared import PreparedLinear
from refollama.models.load import load_net
from refollama.weights.safetensors import encoded, open_safetensors
from tests.fast.test_lanes import eager
from tests.models.test_llama import all_logits, some_tokens
from tests.tiny import write_model

WIDE: Any = {"embedding_length": 256, "feed_forward_length": 256}
MIXTURE: Any = {**WIDE, "expert_count": 4, "expert_used_count": 2}
SIZES = {"Q4_0": WIDE, "Q8_0": WIDE, "Q6_K": MIXTURE, "Q2_K": WIDE}


@pytest.fixture(autouse=True)
def large(monkeypatch, tmp_path):
    """All nets count as large; what is kept lies in a place of its own."""
    monkeypatch.setattr("refollama.fast.choice.SMALL", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=[*SIZES, "Q4_0 in lanes", "Q6_K in lanes"])
def path(request, monkeypatch, tmp_path):
    type, in_lanes, _ = request.param.partition(" in lanes")
    if in_lanes:
        monkeypatch.setattr("refollama.fast.choice.is_there", lambda kind: kind == type)
        monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: eager(type))
    return write_model(tmp_path / "m.gguf", type=type, **SIZES[type])


@pytest.fixture
def one(tmp_path):
    """Of one type."""
    return write_model(tmp_path / "m.gguf", type="Q8_0", **WIDE)


def loaded(path) -> Any:
    net = load_net(path)
    hasten(net, sources=[path])
    return net


def made_anew(monkeypatch):
    """Which parts were prepared from now on."""
    found: list[PreparedLinear] = []
    for kind in PreparedLinear.__subclasses__():

        def prepare(part, do=kind.prepare):
            found.append(part)
            return do(part)

        monkeypatch.setattr(kind, "prepare", prepare)
    return found


def test_what_was_kept_is_mapped_and_no_bit_changes(path, monkeypatch):
    first, ids = loaded(path), some_tokens(9)
    size = keep(first, [path])
    assert [file.stat().st_size for file in folder().iterdir()] == [size]
    again = made_anew(monkeypatch)
    second = loaded(path)
    assert torch.equal(all_logits(second, ids), all_logits(first, ids))
    assert not again
    assert copied(first).keys() == copied(second).keys() == kept([path]).keys()
    assert are_kept(second, [path])
    assert size > sum(part.more_bytes for part in copied(second).values()) > 100_000


def test_what_is_written_into_a_weight_is_seen(one):
    keep(loaded(one), [one])
    net = loaded(one)
    part = net.blk[0].attn_q
    assert part(torch.ones(1, 256)).abs().max() > 0
    part.weight.zero_()
    assert part(torch.ones(1, 256)).abs().max() == 0


def test_what_is_written_into_a_copy_stays_in_this_process(one):
    keep(loaded(one), [one])
    loaded(one).blk[0].attn_q.prepared()[0].zero_()
    assert loaded(one).blk[0].attn_q(torch.ones(1, 256)).abs().max() > 0


def test_a_file_that_was_changed_loses_its_copies(one):
    keep(loaded(one), [one])
    os.utime(one, ns=(1, 1))
    assert kept([one]) == {}
    assert not list(folder().iterdir())


def test_a_file_that_is_gone_loses_its_copies_with_the_next_load(one, tmp_path):
    other = write_model(tmp_path / "other.gguf", type="Q4_0", **WIDE)
    for path in (one, other):
        keep(loaded(path), [path])
    assert len(list(folder().iterdir())) == 2
    one.unlink()
    loaded(other)
    assert list(folder().iterdir()) == [path_of([other])]


def test_copies_of_another_torch_are_not_taken(one, monkeypatch):
    from refollama.fast import copies

    keep(loaded(one), [one])
    monkeypatch.setattr(torch, "__version__", "9.9")
    copies._maker.cache_clear()
    assert kept([one]) == {}
    monkeypatch.undo()
    copies._maker.cache_clear()


@pytest.mark.parametrize("length", [0, 7, 5000])
def test_a_file_that_was_cut_is_told_of_and_all_is_made_anew(one, length, caplog):
    first = loaded(one)
    keep(first, [one])
    os.truncate(path_of([one]), length)
    second = loaded(one)
    assert "copies are made anew" in caplog.text
    assert torch.equal(all_logits(second, some_tokens(3)), all_logits(first, some_tokens(3)))


def test_a_copy_of_another_size_is_made_anew(one, monkeypatch):
    """Whoever multiplied by it would read past its end."""
    first = loaded(one)
    keep(first, [one])
    stored = open_safetensors(path_of([one]))
    whole = {name: _part_of(row, 1 if name == SOURCES else 2) for name, row in stored.items()}
    path_of([one]).write_bytes(b"".join(encoded(whole)))
    assert kept([one])
    again = made_anew(monkeypatch)
    second = loaded(one)
    assert len(again) == len(copied(second))
    assert torch.equal(all_logits(second, some_tokens(3)), all_logits(first, some_tokens(3)))


def _part_of(row, divisor):
    from refollama.weights.safetensors import Made

    [piece] = row.pieces()
    some = piece[: len(piece) // divisor]
    return Made(row.dtype, some.shape, [some])


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="knows owners of files")
def test_a_file_that_others_may_write_is_not_taken(one, caplog):
    keep(loaded(one), [one])
    path_of([one]).chmod(0o666)
    assert kept([one]) == {}
    assert "others than its user" in caplog.text


def test_on_a_full_disk_nothing_is_left(one, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RefollamaError, match="copies could not be kept: No space left"):
        keep(loaded(one), [one])
    assert not list(folder().iterdir())


def test_what_has_no_copies_keeps_none(tmp_path, monkeypatch):
    plain = write_model(tmp_path / "f16.gguf", type="F16")
    assert keep(loaded(plain), [plain]) == 0
    monkeypatch.setattr("refollama.fast.choice.SMALL", 1 << 26)
    small = write_model(tmp_path / "small.gguf", type="Q4_0")
    assert keep(loaded(small), [small]) == 0
    assert not folder().exists()


def test_files_of_other_names_are_left_alone(one):
    folder().mkdir(parents=True)
    stranger = folder() / "mine.safetensors"
    stranger.write_bytes(b"mine")
    prune()
    assert stranger.read_bytes() == b"mine"
    loaded(one)


def test_the_command_keeps_them_once(one, monkeypatch):
    monkeypatch.setattr(workshop, "_compile", lambda *given: None)
    said = CliRunner().invoke(cli, ["warm", str(one)])
    assert said.exit_code == 0, said.output
    assert "made of its matrices are kept" in said.output
    again = CliRunner().invoke(cli, ["warm", str(one)])
    assert "kept" not in again.output
    llm = refollama.load(one)
    assert list(llm.sources) == [Path(one)]
    assert kept(llm.sources)
    llm.close()


@pytest.mark.parametrize("path", ["Q4_0 in lanes", "Q6_K in lanes"], indirect=True)
def test_what_blocks_are_given_in_pieces_lies_so_in_the_file(path):
    """So no process copies it again."""
    keep(loaded(path), [path])
    net = loaded(path)
    for block in net.blk:
        parts = [one for one in block.children() if isinstance(one, LaneLinear)]
        made = [one.prepared() for one in parts]
        pieces = gathered(made)
        first = min(one.data_ptr() for its in made for one in its)
        assert {piece.dtype for piece in pieces} == {torch.int32, torch.float16}
        assert min(piece.data_ptr() for piece in pieces) == first
        assert {one.untyped_storage().data_ptr() for one in pieces} == {
            one.untyped_storage().data_ptr() for its in made for one in its
        }
