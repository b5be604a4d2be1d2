"""The importance matrix: what is collected, and the files in which it lies."""

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import refollama
from refollama.cli import cli
from refollama.errors import BadRequest, FormatError, NotFound, RefollamaError
from refollama.imatrix import collect
from refollama.perplexity import Cut, perplexity, windows
from refollama.quantize import plan
from refollama.weights.gguf import open_gguf, write_gguf
from refollama.weights.importance import Importance, Sums, read_importance, write_importance
from tests import oracle_llama
from tests.tiny import write_model

TEXT = "the rest is on the sand and then it is in the water near a tree " * 3
GOLDEN = Path(__file__).parent / "golden"
MIXTURE = {"llama.expert_count": 4, "llama.expert_used_count": 2}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "mixture.gguf", keys=MIXTURE)


@pytest.fixture
def llm(tiny):
    with refollama.load(tiny) as model:
        yield model


def judged(path, parts, monkeypatch):
    """What the slow forward multiplies: {(tensor, expert): [Σx², rows]}, told apart by address."""
    weights, config = oracle_llama.read(path)
    where = {
        address(matrix): (name, e)
        for name, values in weights.items()
        for e, matrix in enumerate(values.reshape(-1, *values.shape[-2:]))
    }
    heard: dict[tuple[str, int], list[Any]] = defaultdict(lambda: [0.0, 0])
    plain = oracle_llama.linear

    def listening(x, part, name):
        found = heard[where[address(part[name])]]
        found[0] = found[0] + (np.atleast_2d(x) ** 2).sum(0)
        found[1] += len(np.atleast_2d(x))
        return plain(x, part, name)

    with monkeypatch.context() as patch:
        patch.setattr(oracle_llama, "linear", listening)
        for part in parts:
            oracle_llama.forward(weights, config, np.array(part))
    return heard


def address(values):
    return values.__array_interface__["data"][0]


# ── what is collected ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["tiny", "mixture"])
def test_sums_are_those_of_what_a_slow_forward_multiplies(model, request, monkeypatch):
    """All matrices of all blocks, expert by expert, and nothing else."""
    path = request.getfixturevalue(model)
    with refollama.load(path) as llm:
        found = collect(llm, TEXT, 16, chunks=2)
        parts = windows(llm.tokenizer, TEXT, Cut.checked(16, 0, 128), fewest=16)[:2]
    heard = judged(path, parts, monkeypatch)
    assert set(found.sums) == {name for name, _ in heard}
    assert (found.chunks, found.chunk_size) == (2, 16)
    for name, sums in found.sums.items():
        for e, (squares, count) in enumerate(zip(sums.squares, sums.counts, strict=True)):
            expected = heard[name, e]
            assert count == expected[1]
            np.testing.assert_allclose(squares, expected[0], rtol=1e-4, atol=1e-6)


def test_the_output_matrix_is_listened_to_if_asked(llm):
    found = collect(llm, TEXT, 16, chunks=1, output=True)
    words = llm.tokenizer.encode(TEXT, bos=True)[:16]
    squares = llm.hidden(words).square().sum(0)
    np.testing.assert_allclose(found.sums["output.weight"].squares[0], squares, rtol=1e-5)
    assert found.sums["output.weight"].counts == 16


def test_listening_leaves_no_trace_even_if_it_fails(llm):
    before = llm.logits([1, 260, 261])
    collect(llm, TEXT, 16, chunks=1)
    part = llm.net.get_submodule("blk.1.ffn_up")
    hook = part.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(RefollamaError, match=r"into blk\.1\.ffn_down is not finite"):
        collect(llm, TEXT, 16, chunks=1)
    hook.remove()
    assert not any(module._forward_pre_hooks for module in llm.net.modules())
    assert torch.equal(llm.logits([1, 260, 261]), before)


def test_how_far_it_is_is_told(llm):
    told = []
    collect(llm, TEXT, 16, chunks=3, told=lambda *numbers: told.append(numbers))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_text_of_less_than_a_window_is_refused(llm):
    with pytest.raises(BadRequest, match="windows of 128 need 128"):
        collect(llm, "the sand", 128)


# ── files ─────────────────────────────────────────────────────────────────────────────────────

DENSE = Sums(np.array([[2.0, 8.0, 0.0]], np.float32), np.array([4.0], np.float32))
PAIR = Sums(np.array([[6.0, 3.0], [0.0, 0.0]], np.float32), np.array([3.0, 0.0], np.float32))
SUMS = {"blk.0.ffn_up_exps.weight": PAIR, "blk.0.attn_q.weight": DENSE}
WHOLE = Importance(SUMS, ("wiki.txt",), 7, 512)


def test_a_file_is_what_llama_cpp_reads(tmp_path):
    """Keys, names and sides, as the gguf package sees them; 1 matrix has no side of its own."""
    write_importance(tmp_path / "i.gguf", WHOLE)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.txt"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 512,
    }
    assert {key: field(reader, key) for key in keys} == keys
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("blk.0.attn_q.weight.in_sum2", "F32", [3]),
        ("blk.0.attn_q.weight.counts", "F32", [1]),
        ("blk.0.ffn_up_exps.weight.in_sum2", "F32", [2, 2]),
        ("blk.0.ffn_up_exps.weight.counts", "F32", [1, 2]),
    ]
    np.testing.assert_array_equal(reader.tensors[2].data, PAIR.squares)


def field(reader, key):
    found = reader.get_field(key)
    return None if found is None else found.contents()


def columns(found, name, shape):
    rows = found.of(name, shape)
    return None if rows is None else rows.tolist()


def test_what_is_written_is_read_again(tmp_path):
    write_importance(tmp_path / "i.gguf", WHOLE)
    found = read_importance(tmp_path / "i.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("wiki.txt",), 7, 512)
    assert set(found.sums) == set(SUMS)
    for name, sums in SUMS.items():
        np.testing.assert_array_equal(found.sums[name].squares, sums.squares)
        np.testing.assert_array_equal(found.sums[name].counts, sums.counts)


def dat(*entries, tail=b""):
    """The older form, put together by its description."""
    raw = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        raw += struct.pack(f"<{len(values)}f", *values)
    return raw + tail


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 7, 8) + b"wiki.txt"])
def test_the_older_form_is_read(tmp_path, tail):
    file = tmp_path / "i.dat"
    rows = [3.0, 6.0, 9.0, 12.0]
    file.write_bytes(dat(("blk.0.attn_q.weight", 3, rows), ("x_exps", 0, rows), tail=tail))
    found = read_importance(file)
    assert (found.chunks, found.datasets) == ((7, ("wiki.txt",)) if tail else (0, ()))
    assert columns(found, "blk.0.attn_q.weight", (9, 4)) == [1, 2, 3, 4]
    assert columns(found, "x_exps", (2, 9, 2)) == [[3, 6], [9, 12]]


def test_importance_is_the_mean_square_of_each_column():
    assert columns(WHOLE, "blk.0.attn_q.weight", (9, 3)) == [0.5, 2, 0]
    assert columns(WHOLE, "blk.0.ffn_up_exps.weight", (2, 9, 2)) == [[2, 1], [1, 1]]  # unmet
    assert columns(WHOLE, "blk.0.ffn_up.0.weight", (9, 2)) == [2, 1]  # a file of 2023
    assert columns(WHOLE, "blk.1.attn_q.weight", (9, 3)) is None
    assert columns(WHOLE, "blk.1.ffn_up.0.weight", (9, 2)) is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", (9, 4)),
        ("blk.0.ffn_up_exps.weight", (3, 9, 2)),
        ("blk.0.ffn_up_exps.weight", (9, 2)),
        ("blk.0.ffn_up.2.weight", (9, 2)),
    ],
)
def test_sums_of_another_model_are_refused(name, shape):
    with pytest.raises(FormatError, match=f"{name.split('.')[2].split('_')[0]}.*another model"):
        WHOLE.of(name, shape)


F32 = 0
ONES = np.ones(4, np.float32)
IMATRIX = {"general.type": "imatrix"}


@pytest.mark.parametrize(
    ("keys", "tensors", "sentence"),
    [
        ({}, {}, "general.type is 'model'; expected 'imatrix'"),
        ({"general.type": [1, 2]}, {}, "general.type is ''; expected 'imatrix'"),
        (IMATRIX, {}, "is empty"),
        (IMATRIX, {"a.in_sum2": ONES}, r"a\.counts is missing"),
        (IMATRIX, {"a.in_sum2": ONES, "a.counts": ONES[:3]}, "a has 4 sums for 3 counts"),
        (IMATRIX, {"a.in_sum2": -ONES, "a.counts": ONES[:1]}, "a has sums .* no sums of squares"),
        (IMATRIX, {"a.in_sum2": ONES, "a.counts": ONES[:1] * np.nan}, "no sums of squares"),
    ],
)
def test_a_broken_gguf_file_is_told(tmp_path, keys, tensors, sentence):
    path = tmp_path / "i.gguf"
    write_gguf(path, keys, {name: (F32, v.shape, v) for name, v in tensors.items()})
    with pytest.raises(FormatError, match=f"i.gguf: .*{sentence}"):
        read_importance(path)


GOOD = dat(("blk.0.attn_q.weight", 3, [1.0, 2.0]))


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "number of entries at byte 0 needs 4 bytes, and 0 are left"),
        (b"\xff\xff\xff\xff", "number of entries is -1"),
        (b"\xff\xff\xff\x7f", "number of entries is 2147483647"),
        (b"\0\0\0\0", "is empty"),
        (GOOD[:8] + b"\xff\xff\xff\x7f", "name of a tensor at byte"),
        (GOOD[:-1], "values of blk.0.attn_q.weight at byte 35 needs 8 bytes, and 7 are left"),
        (GOOD[:-4] + struct.pack("<f", np.inf), "no sums of squares"),
        (GOOD[:-4] + struct.pack("<f", -1), "no sums of squares"),
    ],
)
def test_a_broken_dat_file_is_told(tmp_path, raw, sentence):
    (tmp_path / "i.dat").write_bytes(raw)
    with pytest.raises(FormatError, match=f"i.dat: .*{sentence}"):
        read_importance(tmp_path / "i.dat")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        read_importance(tmp_path / "i.dat")


# ── the command ───────────────────────────────────────────────────────────────────────────────


def command(*arguments):
    return CliRunner().invoke(cli, ["imatrix", *map(str, arguments)])


def test_the_command_writes_what_python_finds(llm, tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "i.gguf"
    shown = command(tiny, tmp_path / "text", "-o", out, "--num-ctx", 16, "--chunks", 2)
    assert (shown.exit_code, shown.stderr) == (0, "reading\n")
    assert shown.stdout == f"wrote {out}: 14 tensors from 2 windows\n"
    found, expected = read_importance(out), collect(llm, TEXT, 16, chunks=2)
    assert found.datasets == (str(tmp_path / "text"),)
    assert all((found.sums[n].squares == s.squares).all() for n, s in expected.sums.items())
    with_output = command(tiny, tmp_path / "text", "-o", out, "--num-ctx", 16, "--process-output")
    assert with_output.exit_code == 1 and "exists" in with_output.stderr
    again = ["--num-ctx", 16, "--process-output", "--force"]
    assert command(tiny, tmp_path / "text", "-o", out, *again).exit_code == 0
    assert "output.weight" in read_importance(out).sums
    assert "Examples:" in command("--help").stdout


def test_what_fails_leaves_no_file(tiny, tmp_path):
    (tmp_path / "text").write_text("the sand")
    out = tmp_path / "out" / "i.gguf"
    short = command(tiny, tmp_path / "text", "-o", tmp_path / "i.gguf", "--num-ctx", 64)
    assert short.exit_code == 1 and "too short" in short.stderr
    (tmp_path / "text").write_text(TEXT)
    nowhere = command(tiny, tmp_path / "text", "-o", out, "--num-ctx", 16)
    assert nowhere.exit_code == 1 and len(nowhere.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_a_folder_is_refused_before_anything_is_read(tmp_path):
    folder = command("none", "no-text", "-o", tmp_path, "-f")
    assert folder.exit_code == 1 and f"{tmp_path} is a folder or a device" in folder.stderr
    assert len(folder.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_output_of_a_tied_model_is_found_again(tmp_path):
    """Listened to, and then known of the embedding, which is the same matrix."""
    path = write_model(tmp_path / "tied.gguf", tied=True)
    with refollama.load(path) as llm:
        found = collect(llm, TEXT, 16, chunks=1, output=True)
    with open_gguf(path) as file:
        shape = file.tensors["token_embd.weight"].shape
    known = found.of("token_embd.weight", shape, tied=True)
    np.testing.assert_array_equal(known, found.sums["output.weight"].means()[0])
    assert found.of("token_embd.weight", shape) is None


# ── what it is good for ───────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q4_0", "Q4_1"])
def test_a_real_model_keeps_more_of_what_it_knew(oracles, tmp_path, type):
    """Calibrated on one story, judged on others: its distributions stay nearer to the truth.

    Its perplexity does not get worse by more than what so few tokens leave to chance, 1 %.
    """
    path = oracles / "stories260K.gguf"
    text = json.loads((GOLDEN / "perplexity.json").read_text())["text"]
    with refollama.load(path) as llm:
        found = collect(llm, (oracles / "stories260K.txt").read_text(), 64)
        window = llm.tokenizer.encode(text, bos=True)[:512]
        truth = llm.logits(window).log_softmax(-1)
    lost, surprise = [], []
    for given in (None, found):
        plan(open_gguf(path), type, importance=given).write(tmp_path / "small.gguf")
        with refollama.load(tmp_path / "small.gguf") as llm:
            kept = llm.logits(window).log_softmax(-1)
            *_, last = perplexity(llm, text, 128, stride=64)
        lost.append((truth.exp() * (truth - kept)).sum(-1).mean())
        surprise.append(last.so_far.perplexity)
    assert lost[1] < lost[0] and surprise[1] < 1.01 * surprise[0]
