"""A model, packed as another type: the values it then has, the file, and what is refused."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import refollama
from refollama import quantize
from refollama.cli import cli
from refollama.create import create
from refollama.errors import BadRequest, FormatError, RefollamaError, UnsupportedModel
from refollama.messages import Create
from refollama.quantize import plan
from refollama.store import Store
from refollama.store.name import Name
from refollama.weights import open_gguf, open_weights, write_gguf
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import ValueType
from refollama.weights.importance import Importance, Sums
from refollama.weights.mixes import MIXES
from refollama.weights.quants import pack
from tests.golden.mixed_models import SIZES
from tests.tiny import write_model

QUICK = ["Q8_0", "Q4_K_M"]
SLOW = pytest.mark.slow
EVERY = pytest.mark.parametrize(
    "type", [t if t in QUICK else pytest.param(t, marks=SLOW) for t in MIXES]
)
ONE_LAYER: dict[str, Any] = SIZES | {"block_count": 1}
MIXTURE: dict[str, Any] = ONE_LAYER | {"expert_count": 2, "expert_used_count": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """The least model that K types can pack."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide.gguf", **ONE_LAYER)


@pytest.fixture(scope="module")
def packed(wide) -> Callable[[str], tuple[quantize.Quantising, Path]]:
    """It, as another type: what was done, and the file."""

    @functools.cache
    def make(type: str) -> tuple[quantize.Quantising, Path]:
        target = wide.with_name(f"{type}.gguf")
        return written(wide, target, type), target

    return make


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixture") / "mixture.gguf", **MIXTURE)


def written(source: Path, target: Path, type: str, **given) -> quantize.Quantising:
    with open_gguf(source) as file:
        work = plan(file, type, **given)
        work.write(target)
    return work


def refuse(source: Path, target: Path, error: type[RefollamaError], said: str, type: str = "Q4_0"):
    with pytest.raises(error, match=said) as raised:
        written(source, target, type)
    assert "\n" not in str(raised.value)
    assert not [path for path in target.parent.iterdir() if path != source]


# ── what is written ───────────────────────────────────────────────────────────────────────────


@EVERY
def test_every_tensor_is_there_packed_as_planned(wide, packed, type):
    work, path = packed(type)
    old, new = open_weights(wide), open_weights(path)
    assert list(new) == list(old) == [change.name for change in work.changes]
    for change in work.changes:
        tensor = new[change.name]
        assert (tensor.type, tensor.shape) == (change.new, change.shape)
        assert torch.equal(tensor.data, pack(old[change.name].unpack(), change.new))


@EVERY
def test_errors_are_those_that_the_judge_finds(wide, packed, type):
    work, path = packed(type)
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in gguf.GGUFReader(wide).tensors:
        found = ours[tensor.name]
        values = gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float64)
        error = float(np.square(values - tensor.data.reshape(values.shape)).mean())
        assert work.errors[tensor.name] == pytest.approx(error, rel=1e-4, abs=1e-15)


def test_the_metadata_stay_and_say_the_type(wide, packed):
    with open_gguf(wide) as old, open_gguf(packed("Q4_K_M")[1]) as new:
        said = {key: new.typed(key) for key in new.metadata}
        assert said.pop("general.file_type") == (15, ValueType.UINT32)
        assert said.pop("general.quantization_version") == (2, ValueType.UINT32)
        assert list(said) == list(old.metadata)
        for key, (value, type) in said.items():
            assert type == old.typed(key).type and np.array_equal(value, old.metadata[key])


def test_how_many_rows_are_packed_at_once_makes_no_difference(wide, packed, tmp_path, monkeypatch):
    """To the last bit, whatever is beside a row: so the number of threads makes none, either."""
    monkeypatch.setattr(quantize, "AT_ONCE", 101 * 256)
    written(wide, tmp_path / "x.gguf", "Q4_K_M")
    assert (tmp_path / "x.gguf").read_bytes() == packed("Q4_K_M")[1].read_bytes()


@pytest.mark.parametrize("type", QUICK)
def test_the_size_is_known_before(wide, packed, type):
    with open_gguf(wide) as file:
        assert plan(file, type).nbytes == packed(type)[1].stat().st_size


def test_what_is_done_is_told_and_ends_with_all(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "AT_ONCE", 1 << 12)
    told: list[int] = []
    with open_gguf(mixture) as file:
        work = plan(file, "Q8_0")
        work.write(tmp_path / "x.gguf", told.append)
    assert told == sorted(set(told)) and len(told) > 50 and told[-1] == work.weights


@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_bytes_in_the_other_order_are_read(wide, packed, tmp_path, type):
    big = tmp_path / "big.gguf"
    with open_gguf(wide) as file:
        tensors = {
            name: (tensor.type, tensor.shape, file.bytes_of(name).view("u4").byteswap())
            for name, tensor in file.tensors.items()
        }
        keys = {key: file.typed(key) for key in file.metadata}
    write_gguf(big, keys, tensors, byteorder=">")
    written(big, tmp_path / "x.gguf", type)
    assert (tmp_path / "x.gguf").read_bytes() == packed(type)[1].read_bytes()


def test_what_is_packed_can_be_unpacked(packed, tmp_path):
    _, source = packed("Q8_0")
    work = written(source, tmp_path / "plain.gguf", "F32")
    old, plain = open_weights(source), open_weights(tmp_path / "plain.gguf")
    assert work.source == "Q8_0" and set(work.errors.values()) == {0.0}
    for name, tensor in old.items():
        assert torch.equal(tensor.unpack(), plain[name].unpack())


def test_columns_that_matter_are_spared_each_experts_own(mixture, tmp_path):
    """The weighed error falls, for each expert by its own columns."""
    name = "blk.0.ffn_up_exps.weight"
    squares = np.exp(3 * np.random.default_rng(1).standard_normal((2, 256))).astype(np.float32)
    importance = Importance({name: Sums(squares, np.ones(2, np.float32))})
    written(mixture, tmp_path / "plain.gguf", "Q4_0")
    written(mixture, tmp_path / "spared.gguf", "Q4_0", importance=importance)
    old = open_weights(mixture)[name].unpack()
    plain, spared = (
        (open_weights(tmp_path / file)[name].unpack() - old).square()
        * torch.tensor(squares)[:, None]
        for file in ("plain.gguf", "spared.gguf")
    )
    assert bool((spared.sum((1, 2)) < 0.8 * plain.sum((1, 2))).all())


def test_a_tied_embedding_is_spared_as_the_output_that_it_is(tmp_path):
    """What `imatrix --process-output` notes of it stands under the output's name."""
    source = write_model(tmp_path / "tied.gguf", tied=True, **ONE_LAYER)
    columns = np.exp(3 * np.random.default_rng(1).standard_normal((1, 256))).astype(np.float32)
    importance = Importance({"output.weight": Sums(columns, np.ones(1, np.float32))})
    old, off = open_weights(source)["token_embd.weight"].unpack(), []
    for file, given in (("plain.gguf", None), ("spared.gguf", importance)):
        written(source, tmp_path / file, "Q4_K_M", importance=given)
        new = open_weights(tmp_path / file)["token_embd.weight"]
        off.append(((new.unpack() - old).square() * torch.tensor(columns)).sum())
    assert new.type == "Q6_K" and off[1] < 0.8 * off[0]


def test_an_embedding_is_not_spared_as_the_output_that_it_is_not(wide, packed, tmp_path):
    columns = np.exp(3 * np.random.default_rng(1).standard_normal((1, 256))).astype(np.float32)
    importance = Importance({"output.weight": Sums(columns, np.ones(1, np.float32))})
    written(wide, tmp_path / "x.gguf", "Q4_K_M", importance=importance)
    ours, plain = open_weights(tmp_path / "x.gguf"), open_weights(packed("Q4_K_M")[1])
    assert torch.equal(ours["token_embd.weight"].data, plain["token_embd.weight"].data)
    assert not torch.equal(ours["output.weight"].data, plain["output.weight"].data)


# ── what a packed model says ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("type", "off"),
    [
        ("Q8_0", 0.02),
        ("Q4_K_M", 0.25),
        pytest.param("F16", 0.002, marks=SLOW),
        pytest.param("Q6_K", 0.06, marks=SLOW),
        pytest.param("Q5_K_M", 0.12, marks=SLOW),
    ],
)
def test_logits_stay_close_the_closer_the_more_bits(wide, packed, type, off):
    """In parts of their standard deviation, over a prompt."""
    found = []
    for path in (wide, packed(type)[1]):
        with refollama.load(path) as llm:
            found.append(llm.logits([1, 270, 265, 280, 275, 290, 261, 288]))
    error = (found[0] - found[1]).square().mean().sqrt() / found[0].std()
    assert off / 20 < error < off


# ── what is refused ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "F16"])
def test_values_that_are_not_finite_are_refused(tmp_path, type, value):
    values = torch.ones(4, 256)
    values[2, 77] = value
    tensors = {"blk.0.ffn_up.weight": (TYPE_ID["F32"], (4, 256), values.numpy())}
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    said = "tensor 'blk.0.ffn_up.weight' has values that are not finite"
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", FormatError, said, type)


@pytest.mark.parametrize("type", ["F16", "Q4_0", "Q3_K_S"])
def test_values_that_are_too_large_are_refused(tmp_path, type):
    tensors = {"a.weight": (TYPE_ID["F32"], (1, 256), np.full((1, 256), 1e9, np.float32))}
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", FormatError, "or too large for", type)


def test_a_vector_that_stays_is_looked_at_too(tmp_path):
    tensors = {"a_norm.weight": (TYPE_ID["F32"], (2,), np.array([1, np.nan], np.float32))}
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", FormatError, "not finite")


def test_packing_once_more_has_to_be_asked_for(packed, tmp_path):
    _, source = packed("Q8_0")
    with open_gguf(source) as file, pytest.raises(BadRequest, match="is Q8_0 already"):
        plan(file, "Q4_0")
    work = written(source, tmp_path / "again.gguf", "Q4_0", again=True)
    assert work.source == "Q8_0" and max(work.errors.values()) > 0


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"general.architecture": "clip"}, "projector"),
        ({"general.architecture": "llama", "general.type": "adapter"}, "adapter"),
        ({"general.architecture": "llama", "general.type": [1, 2]}, ""),
    ],
)
def test_only_language_models_are_packed(tmp_path, keys, kind):
    tensors = {"a.weight": (TYPE_ID["F32"], (1, 256), np.ones((1, 256), np.float32))}
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", UnsupportedModel, f"of the kind '{kind}'")


@pytest.mark.parametrize("tensors", [0, 1])
def test_a_part_of_a_model_is_refused(tmp_path, tensors):
    """Also the first of some splits, which has no tensors."""
    keys = {"general.architecture": "llama", "split.no": 0, "split.count": 3}
    all = {"a.weight": (TYPE_ID["F32"], (1, 256), np.ones((1, 256), np.float32))}
    write_gguf(tmp_path / "m.gguf", keys, all if tensors else {})
    said = "m.gguf is one of 3 parts: put them together first"
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", UnsupportedModel, said)


@pytest.mark.parametrize("count", [0, 1])  # 0: what was put together again
def test_a_model_in_one_part_is_packed(tmp_path, count):
    source = write_model(tmp_path / "m.gguf", keys={"split.count": count}, **ONE_LAYER)
    with open_gguf(source) as file:
        assert plan(file, "Q8_0").weights


@pytest.mark.parametrize("named", ["mamba", "", None, [1, 2], ["llama"]])
def test_a_model_that_does_not_run_here_is_refused(tmp_path, named):
    tensors = {"a.weight": (TYPE_ID["F32"], (1, 256), np.ones((1, 256), np.float32))}
    keys = {"general.name": "x"} | ({} if named is None else {"general.architecture": named})
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    shown = named if isinstance(named, str) else ""
    said = f"m.gguf: general.architecture is '{shown}'; .* runs here: llama"
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", UnsupportedModel, said)


def test_a_file_without_tensors_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, {})
    refuse(tmp_path / "m.gguf", tmp_path / "x.gguf", FormatError, "no tensors")


def test_an_importance_matrix_of_another_model_is_refused(wide):
    sums = Sums(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    importance = Importance({"blk.0.ffn_up.weight": sums})
    with open_gguf(wide) as file, pytest.raises(FormatError, match="of another model"):
        plan(file, "Q4_K_M", importance=importance)


# ── the command ───────────────────────────────────────────────────────────────────────────────


def run(*arguments: object):
    return CliRunner().invoke(cli, ["quantize", *map(str, arguments)])


def test_the_command_tells_what_became_of_each_tensor(wide, tmp_path):
    result = run(wide, tmp_path / "x.gguf", "q4_k_m", "--verbose")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines[:-1]]
    assert rows[0] == ["TENSOR", "SHAPE", "WAS", "IS", "MEAN SQUARED ERROR"]
    assert ["output_norm.weight", "256", "F32", "F32", "0"] in rows
    (down,) = (row for row in rows if row[0] == "blk.0.ffn_down.weight")
    assert down[1:4] == ["256 × 256", "F32", "Q6_K"] and 0 < float(down[4]) < 1e-5
    assert len(rows) == 1 + len(open_weights(wide))
    assert "Q4_K_M, " in lines[-1] and " bits for each weight; was " in lines[-1]
    assert result.stderr == "quantising\n"


def test_a_file_that_is_there_is_written_over_only_if_that_is_said(wide, tmp_path):
    target = tmp_path / "x.gguf"
    target.write_text("dear")
    result = run(wide, target, "Q4_0")
    assert (result.exit_code, target.read_text()) == (1, "dear") and "use --force" in result.stderr
    assert run(wide, target, "Q4_0", "--force").exit_code == 0
    assert open_weights(target)["blk.0.attn_q.weight"].type == "Q4_0"


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RefollamaError("no"), OSError(28, "full")])
def test_who_breaks_off_leaves_nothing(wide, tmp_path, monkeypatch, problem):
    """In the middle of a tensor, with a part of the file on the disk."""
    done = []

    def breaks(*arguments):
        done.append(1)
        if len(done) > 4:
            raise problem
        return original(*arguments)

    original = quantize.repacked
    monkeypatch.setattr(quantize, "repacked", breaks)
    result = run(wide, tmp_path / "x.gguf", "Q4_0")
    assert result.exit_code == (130 if problem is KeyboardInterrupt else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gone.gguf", "x.gguf", "Q4_0"), "no such file"),
        (("{wide}", "gone/x.gguf", "Q4_0"), "no such folder"),
        (("{wide}", ".", "Q4_0", "-f"), ". is a folder or a device: OUT must be the name of"),
        (("{wide}", "x.gguf", "Q9"), "unknown type 'Q9'"),
        (("{wide}", "x.gguf", "Q4_0", "--imatrix", "gone"), "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(wide, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(wide=wide) for argument in arguments))
    assert result.exit_code == 1 and said in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_never_replaced(wide, tmp_path):
    """A pipe stands for all that is neither file nor folder, /dev/null among it."""
    os.mkfifo(tmp_path / "pipe")
    result = run(wide, tmp_path / "pipe", "Q4_0", "-f")
    assert result.exit_code == 1 and "is a folder or a device" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_in_which_nothing_may_be_written_is_told(wide, tmp_path, monkeypatch):
    """Before the work; asked of the system, since root may write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(quantize.Quantising, "write", lambda *arguments: pytest.fail("too late"))
    result = run(wide, tmp_path / "x.gguf", "Q4_0", "-f")
    assert result.exit_code == 1
    assert f"{tmp_path}: no file may be written in this folder" in result.stderr


# ── in the store ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


def made(store: Store, source: str, **given) -> list[str]:
    ask = Create("x", f"FROM {source}\nSYSTEM brief", **given)
    return [progress.status for progress in create(store, ask, local_files=True)]


def test_a_model_is_packed_while_it_is_made(store, wide, packed):
    statuses = made(store, str(wide), quantize="q4_k")
    assert "quantizing F32 model to Q4_K_M" in statuses and statuses[-1] == "success"
    (entry,) = store.list()
    assert entry.details["quantization_level"] == "Q4_K_M"
    files = store.resolve(Name.parse("x"))
    assert files.weights.read_bytes() == packed("Q4_K_M")[1].read_bytes()
    assert files.system == "brief"
    assert wide.read_bytes() not in [path.read_bytes() for path in store.blobs.folder.iterdir()]


def test_a_model_of_the_store_is_packed_and_stays_as_it_was(store, wide):
    made(store, str(wide))
    store.copy(Name.parse("x"), Name.parse("whole"))
    statuses = made(store, "whole", quantize="Q8_0")
    assert "quantizing F32 model to Q8_0" in statuses
    levels = {str(entry.name): entry.details["quantization_level"] for entry in store.list()}
    assert levels == {"x:latest": "Q8_0", "whole:latest": "unknown"}
    assert store.resolve(Name.parse("whole")).weights.read_bytes() == wide.read_bytes()


def test_progress_counts_the_bytes_of_the_new_blob(store, wide):
    ask = Create("x", f"FROM {wide}", quantize="Q8_0")
    told = [step for step in create(store, ask, local_files=True) if "quantizing" in step.status]
    size = store.resolve(Name.parse("x")).weights.stat().st_size
    assert (told[-1].total, told[-1].completed) == (size, size) and told[-1].digest


@pytest.mark.parametrize(
    ("source", "type", "said"),
    [
        ("{wide}", "q9", "unknown type 'q9': quantise to one of Q8_0, "),
        ("{packed}", "Q4_0", "only supported for F16, BF16 and F32 models, and this one is Q8_0"),
        ("{packed}", "F16", "only supported for F16, BF16 and F32 models, and this one is Q8_0"),
    ],
)
def test_what_cannot_be_packed_is_refused_at_once(store, wide, packed, source, type, said):
    source = source.format(wide=wide, packed=packed("Q8_0")[1])
    with pytest.raises(BadRequest, match=said):
        create(store, Create("x", f"FROM {source}", quantize=type), local_files=True)
    assert not store.blobs.folder.exists()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_who_leaves_while_it_is_packed_leaves_nothing(store, wide, monkeypatch, steps):
    monkeypatch.setattr("refollama.create.PROGRESS_EVERY", 0)
    work = create(store, Create("x", f"FROM {wide}", quantize="Q8_0"), local_files=True)
    seen = 0
    for progress in work:
        seen += "quantizing" in progress.status
        if seen == steps:
            break
    work.close()
    assert seen == steps and not store.list()
    assert not list(store.blobs.folder.glob("sha256*"))
