"""A Modelfile becomes a model, whole; whatever goes wrong, the store is as it was."""

import errno
import hashlib
import os
import tempfile
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refollama import create as module
from refollama.create import create, parameter_size
from refollama.errors import (
    BadName,
    BadRequest,
    FormatError,
    ModelfileError,
    ModelNotFound,
    NotFound,
    RefollamaError,
    StoreError,
    TemplateError,
    UnsupportedModel,
)
from refollama.messages import Create, Message, Progress
from refollama.store import Store
from refollama.store.name import Name
from tests import adapters
from tests.store.helpers import gguf, snapshot
from tests.tiny import metadata, shapes

X = Name.parse("x")
LORA = adapters.halves(shapes(metadata()), ["blk.0.attn_q"])
FULL = (
    'FROM ./a.gguf\nTEMPLATE """{{ .System }} {{ .Prompt }}"""\nSYSTEM """You are <Mario>."""\n'
    "LICENSE MIT\nPARAMETER temperature 1\nPARAMETER stop <|im_end|>\nPARAMETER num_ctx 4096\n"
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def folder(tmp_path):
    """Where the Modelfile lies, with some files beside it."""
    here = tmp_path / "work"
    here.mkdir()
    (here / "a.gguf").write_bytes(gguf())
    (here / "b.gguf").write_bytes(gguf("mistral", 15, 128))
    return here


def steps(store, modelfile, folder=None, model="x", local_files=True):
    ask = Create(model, modelfile, str(folder) if folder else None)
    return create(store, ask, local_files=local_files)


def made(*args, **kwargs):
    """The statuses of a create that runs to its end."""
    return [progress.status for progress in steps(*args, **kwargs)]


def sha(data):
    return hashlib.sha256(data).hexdigest()


# -------------------------------------------------------------------- what is made


def test_the_whole_walk(store, folder):
    statuses = made(store, FULL, folder)
    weights, template = gguf(), b"{{ .System }} {{ .Prompt }}"
    system, params = (
        b"You are <Mario>.",
        (b'{"num_ctx":4096,"stop":["\\u003c|im_end|\\u003e"],"temperature":1}\n'),
    )
    datas = [weights, template, system, b"MIT", params]
    config = (
        '{"model_format":"gguf","model_family":"llama","model_families":["llama"],'
        '"model_type":"64","file_type":"Q4_0","architecture":"amd64","os":"linux",'
        '"rootfs":{"type":"layers","diff_ids":['
        + ",".join(f'"sha256:{sha(data)}"' for data in datas)
        + "]}}\n"
    ).encode()
    assert statuses == [
        *("creating model layer", "creating model layer", "creating template layer"),
        *("creating system layer", "creating license layer", "creating parameters layer"),
        "creating config layer",
        *(f"writing layer sha256:{sha(data)}" for data in (*datas, config)),
        *("writing manifest", "success"),
    ]
    types = ["model", "template", "system", "license", "params"]
    layers = ",".join(
        f'{{"mediaType":"application/vnd.ollama.image.{kind}","digest":"sha256:{sha(data)}",'
        f'"size":{len(data)}}}'
        for kind, data in zip(types, datas, strict=True)
    )
    manifest = (
        '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
        '"config":{"mediaType":"application/vnd.docker.container.image.v1+json",'
        f'"digest":"sha256:{sha(config)}","size":{len(config)}}},"layers":[{layers}]}}\n'
    ).encode()
    path = store.root / "manifests/registry.ollama.ai/library/x/latest"
    assert path.read_bytes() == manifest
    assert sorted(os.listdir(store.blobs.folder)) == sorted(
        f"sha256-{sha(data)}" for data in (*datas, config)
    )
    files = store.resolve(X)
    assert files.weights.read_bytes() == weights and files.digest == sha(manifest)
    assert files.parameters == {"num_ctx": 4096, "stop": ["<|im_end|>"], "temperature": 1}


def test_making_it_again_changes_nothing(store, folder):
    made(store, FULL, folder)
    before = snapshot(store.root)
    statuses = made(store, FULL, folder)
    assert snapshot(store.root) == before
    assert sum(status.startswith("using already created layer") for status in statuses) == 6


@pytest.mark.parametrize(
    "text", ["a.gguf", "./a.gguf", "../work/a.gguf", "{folder}/a.gguf", "~/a.gguf"]
)
def test_a_file_is_found(store, folder, monkeypatch, text):
    monkeypatch.setenv("HOME", str(folder))
    made(store, f"FROM {text.format(folder=folder)}", folder)
    assert store.resolve(X).weights.read_bytes() == gguf()


@pytest.mark.parametrize("local_files", [True, False])
def test_a_blob_that_was_sent_before(store, local_files):
    digest = store.blobs.add(gguf())
    statuses = made(store, f"FROM @{digest}", local_files=local_files)
    assert f"using already created layer {digest}" in statuses
    assert store.resolve(X).weights == store.blobs.path(digest)


def test_a_child_inherits(store, folder):
    made(store, FULL, folder, "Base:1")
    child = (
        'FROM base:1\nSYSTEM """New."""\nLICENSE Apache\nPARAMETER temperature 0.7\n'
        "PARAMETER stop b\nPARAMETER stop c\n"
    )
    statuses = made(store, child, local_files=False)
    assert statuses[0] == "reading model metadata"
    files = store.resolve(X)
    assert files.parent == "Base:1"
    assert files.weights == store.resolve(Name.parse("base:1")).weights
    assert (files.template, files.system) == ("{{ .System }} {{ .Prompt }}", "New.")
    assert files.licenses == ("MIT", "Apache")
    assert files.parameters == {"num_ctx": 4096, "stop": ["b", "c"], "temperature": 0.7}
    assert files.config == store.resolve(Name.parse("base:1")).config
    layers = store.manifests.read(X).manifest.layers
    assert [layer.media_type.rpartition(".")[2] for layer in layers] == [
        *("model", "template", "license", "system", "license", "params")
    ]
    assert [layer.from_ for layer in layers] == ["Base:1"] * 3 + [""] * 3
    params = store.blobs.read(layers[-1].digest, 1000)
    assert params == b'{"num_ctx":4096,"stop":["b","c"],"temperature":0.7}\n'


def test_a_child_without_parameters_keeps_the_parents_blob(store, folder):
    made(store, FULL, folder, "base")
    made(store, "FROM base\nSYSTEM\nTEMPLATE \n")
    old, new = (store.manifests.read(Name.parse(text)).manifest for text in ("base", "x"))
    assert [layer.digest for layer in old.layers] == [layer.digest for layer in new.layers]
    assert old.config.digest == new.config.digest


def test_what_is_said_replaces_what_is_inherited_wherever_from_stands(store, folder):
    made(store, FULL, folder, "base")
    made(store, "SYSTEM mine\nPARAMETER num_ctx 5\nFROM base")
    assert store.resolve(X).system == "mine"
    assert store.resolve(X).parameters["num_ctx"] == 5


def test_a_model_may_be_made_from_itself(store, folder):
    made(store, FULL, folder)
    made(store, "FROM X\nSYSTEM again")
    assert store.resolve(X).system == "again"
    assert store.resolve(X).parent == "x:latest"
    assert not store.blobs.has(f"sha256:{sha(b'You are <Mario>.')}")


def test_replacing_keeps_what_others_name(store, folder):
    made(store, FULL, folder)
    made(store, "FROM x\nSYSTEM child", model="child")
    made(store, "FROM ./b.gguf", folder)
    assert store.resolve(Name.parse("child")).weights.read_bytes() == gguf()
    store.remove(Name.parse("child"))
    assert len(os.listdir(store.blobs.folder)) == 2


def test_numbers_are_32_bits_wide(store, folder):
    made(store, "FROM a.gguf\nPARAMETER top_p 0.123456789\nPARAMETER temperature 1e-7", folder)
    digest = store.manifests.read(X).manifest.layers[-1].digest
    assert store.blobs.read(digest, 100) == b'{"temperature":1e-7,"top_p":0.12345679}\n'


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [
        *((0, "F32"), (1, "F16"), (7, "Q8_0"), (15, "Q4_K_M"), (18, "Q6_K")),
        *((5, "unknown"), (None, "unknown"), (2**32 - 1, "unknown")),
    ],
)
def test_quantization_levels(store, file_type, expected):
    digest = store.blobs.add(gguf("falcon", file_type))
    made(store, f"FROM @{digest}")
    (entry,) = store.list()
    assert entry.details["quantization_level"] == expected
    assert entry.details["family"] == "falcon" and entry.details["families"] == ["falcon"]


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        *((6_740_000_000, "7B"), (1_100_000_000, "1B"), (15_200_000, "15M"), (10**9, "1000M")),
        *((10**9 + 1, "1B"), (10**6, "1000K"), (1000, "1000"), (1001, "1K"), (0, "unknown")),
    ],
)
def test_parameter_sizes(elements, text):
    assert parameter_size(elements) == text


def test_an_independent_writer_is_understood(store, tmp_path):
    gguf_package = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf_package.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_file_type(1)
    writer.add_tensor("a", numpy.zeros((40, 50), numpy.float16))
    writer.add_tensor("b", numpy.zeros(7, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made(store, "FROM w.gguf", tmp_path)
    config = store.resolve(X).config
    assert (config.family, config.parameter_size, config.quantization_level) == (
        "llama",
        "2K",
        "F16",
    )


# -------------------------------------------------------------------- progress


def test_a_long_copy_is_told_of(store, folder, monkeypatch):
    big = gguf(elements=2 << 20)
    (folder / "a.gguf").write_bytes(big)
    monkeypatch.setattr(module, "PROGRESS_EVERY", 0.0)
    copies = [step for step in steps(store, FULL, folder) if step.total]
    assert {(step.status, step.total) for step in copies} == {("creating model layer", len(big))}
    done = [step.completed for step in copies]
    assert done == sorted(done) and done[-1] == len(big) and len(done) > 8


def test_a_quick_copy_is_told_of_once(store, folder):
    (folder / "a.gguf").write_bytes(gguf(elements=1 << 16))
    copies = [step for step in steps(store, FULL, folder) if step.total]
    assert [step.completed for step in copies] == [(folder / "a.gguf").stat().st_size]


def test_a_slow_disk_is_told_of_as_often_as_promised(monkeypatch):
    now = iter(range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) * 0.01)
    slow = (done for done in range(1, 101))
    told = list(module._now_and_then(slow, Progress("copying", total=100)))
    assert 10 <= len(told) <= 25


# -------------------------------------------------------------------- what is refused


def refused(store, *args, **kwargs):
    """The error of a create, after which the store is as it was."""
    before = snapshot(store.root)
    with pytest.raises(RefollamaError) as problem:
        made(store, *args, **kwargs)
    assert snapshot(store.root) == before
    return problem.value


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", b"FROM x\nthis is a text\n" * 50, b"GGML" + bytes(100), gguf()[:-1]]
    + [gguf()[:at] for at in range(5, 150, 9)],
)
@pytest.mark.parametrize("sent", [True, False])
def test_what_is_no_whole_gguf_is_refused(store, folder, data, sent):
    made(store, FULL, folder)
    (folder / "bad.gguf").write_bytes(data)
    source = f"@{store.blobs.add(data)}" if sent else "./bad.gguf"
    problem = refused(store, f"SYSTEM before\nFROM {source}", folder)
    told = sent or data.startswith(b"GGUF")  # of other files nobody learns what they are
    assert type(problem) is (FormatError if told else BadRequest) and problem.status == 400


def test_no_file_is_touched_for_a_stranger(store, folder, monkeypatch):
    """Whether a file exists or not, the answer is the same, letter by letter."""
    (folder / "there.gguf").write_bytes(gguf())
    paths = [
        "/{0}",
        "./{0}",
        "../work/{0}",
        "~/{0}",
        str(folder) + "/{0}",
        "./a b/{0}",
        "a/b/c/d/{0}",
    ]
    monkeypatch.setenv("HOME", str(folder))
    for path in paths:
        answers = set()
        for file in ("there.gguf", "gone!.gguf"):
            problem = refused(store, f"FROM {path.format(file)}", folder, local_files=False)
            assert type(problem) is BadRequest
            answers.add(str(problem).replace(file, "…"))
        assert len(answers) == 1
    for name in ("there.gguf", "gone.gguf"):
        assert type(refused(store, f"FROM {name}", folder, local_files=False)) is ModelNotFound


def test_only_regular_files_are_opened(store, folder):
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    sentences = set()
    for path in (
        "./pipe",
        "./sub",
        "./loop",
        "./gone",
        "/dev/zero",
        "/dev/random",
        "~nobody/x",
        ".",
    ):
        problem = refused(store, f"FROM {path}", folder)
        assert type(problem) is BadRequest
        sentences.add(str(problem).replace(path, "…"))
    assert len(sentences) == 1


def test_a_folder_or_pipe_with_the_name_of_a_model_is_no_file(store, folder):
    made(store, FULL, folder, "base")
    (folder / "base").mkdir()
    made(store, "FROM base", folder)
    assert store.resolve(X).parent == "base:latest"
    os.mkfifo(folder / "pipe")
    assert type(refused(store, "FROM pipe", folder)) is ModelNotFound


def test_a_relative_path_needs_a_folder_to_start_from(store, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert type(refused(store, "FROM ./a.gguf")) is BadRequest
    assert type(refused(store, "FROM a.gguf")) is ModelNotFound


@pytest.mark.parametrize(
    ("modelfile", "kind", "sentence"),
    [
        ("FROM nobody", ModelNotFound, "model 'nobody:latest' not found"),
        ("FROM a b", BadRequest, "neither a file nor a model name"),
        ("FROM @sha256:123", BadRequest, "invalid digest format"),
        ("FROM @../../etc/passwd", BadRequest, "invalid digest format"),
        ("FROM @sha256:" + "0" * 64, NotFound, "not found: upload it first"),
        ("FROM a.gguf\nFROM b.gguf", ModelfileError, "line 2: a second language model"),
        ("FROM a.gguf\nADAPTER x", BadRequest, "ADAPTER 'x': there is no"),
        ("FROM a.gguf\nADAPTER b.gguf", ModelfileError, "line 2: this is no adapter"),
        ("FROM a.gguf\nADAPTER /dev/zero", BadRequest, "ADAPTER '/dev/zero': there is no"),
        ("FROM a.gguf\nMESSAGE robot x", ModelfileError, "line 2: message role must be one of"),
        ("FROM a.gguf\n" + f"MESSAGE user {'<' * (1 << 20)}\n", BadRequest, "messages of a model"),
        ("FROM a.gguf\nTEMPLATE {{ if .System }}", TemplateError, "template: line 1"),
        ("FROM a.gguf\nPARAMETER bad 1", ModelfileError, "line 2: unknown parameter"),
        ("FROM a.gguf\nPARAMETER temperature 1e39", BadRequest, "too large"),
        ("FROM a.gguf\nSYSTEM \ud800", ModelfileError, "half a surrogate pair"),
        ("FROM a.gguf\nPARAMETER stop \ud800", BadRequest, "'stop': half a surrogate pair"),
        ("FROM a.gguf\nSYSTEM " + "x" * (4 << 20) + "x", ModelfileError, "longer than 4 MiB"),
        ("SYSTEM x", ModelfileError, "no FROM line"),
    ],
)
def test_what_is_refused_at_once(store, folder, modelfile, kind, sentence):
    before = snapshot(store.root)
    with pytest.raises(kind, match=sentence):
        steps(store, modelfile, folder)  # before the first status: an HTTP status can still say so
    assert snapshot(store.root) == before


@pytest.mark.parametrize("model", ["", "../x", "a b", "x:y:z", "/etc/passwd"])
def test_bad_names(store, folder, model):
    assert type(refused(store, FULL, folder, model)) is BadName


@pytest.mark.parametrize("part", [gguf("clip"), gguf(type="adapter"), b"algg" + bytes(50)])
def test_a_projector_or_an_adapter_alone_is_refused(store, part):
    digest = store.blobs.add(part)
    assert type(refused(store, f"FROM @{digest}")) is UnsupportedModel


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (gguf("clip"), "projector"),
        (gguf(type="mmproj"), "projector"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_second_from_is_stored_as_what_it_is(store, folder, part, kind, first):
    (folder / "p.gguf").write_bytes(part)
    lines = ["FROM ./p.gguf", "FROM ./a.gguf"] if first else ["FROM ./a.gguf", "FROM ./p.gguf"]
    made(store, "\n".join([*lines, "FROM ./p.gguf"]), folder)  # once more is the same
    files = store.resolve(X)
    assert files.weights.read_bytes() == gguf()
    assert [path.read_bytes() for path in getattr(files, f"{kind}s")] == [part]
    assert files.config.family == "llama"
    families = dict.fromkeys(["llama", "clip"] if b"clip" in part else ["llama"])
    assert files.config.families == tuple(families)


def test_an_adapter_that_from_names_is_stored_as_one(store, folder, tiny):
    adapters.write_plain(folder / "p.gguf", LORA)
    for lines in (f"FROM ./p.gguf\nFROM {tiny}", f"FROM {tiny}\nFROM ./p.gguf"):
        made(store, lines, folder)
        (path,) = store.resolve(X).adapters
        assert path.read_bytes() == (folder / "p.gguf").read_bytes()


@pytest.mark.parametrize("write", [adapters.write_plain, adapters.write_ggla])
@pytest.mark.parametrize("sent", [True, False])
def test_an_adapter_is_stored_and_inherited(store, folder, tiny, write, sent):
    adapter = write(folder / "lora.bin", LORA).read_bytes()
    what = f"@{store.blobs.add(adapter)}" if sent else "./lora.bin"
    statuses = made(store, f"ADAPTER {what}\nFROM {tiny}\nSYSTEM s", folder)
    assert "creating adapter layer" in statuses
    made(store, "FROM x\nSYSTEM t", model="child")
    for name in ("x", "child"):
        (path,) = store.resolve(Name.parse(name)).adapters
        assert path.read_bytes() == adapter


def test_no_file_is_made_an_adapter_for_a_stranger(store, folder):
    (folder / "lora").write_bytes(gguf(type="adapter"))
    digest = store.blobs.add(gguf())
    for what in (f"{folder}/lora", f"{folder}/gone", "lora"):
        problem = refused(store, f"FROM @{digest}\nADAPTER {what}", folder, local_files=False)
        assert str(problem).startswith("ADAPTER a file of the server is only allowed")


def test_messages_are_stored_as_ollama_stores_them(store, folder):
    """Bytes as Go's encoder writes them; a child's own replace the parent's."""
    text = 'FROM a.gguf\nMESSAGE user <hi>\nMESSAGE assistant """a\nb"""\n'
    assert "creating messages layer" in made(store, text, folder)
    layer = store.manifests.read(X).manifest.layers[-1]
    assert layer.media_type == "application/vnd.ollama.image.messages"
    assert store.blobs.read(layer.digest, 1000) == (
        b'[{"role":"user","content":"\\u003chi\\u003e"},{"role":"assistant","content":"a\\nb"}]\n'
    )
    made(store, "FROM x\nSYSTEM s", model="same")
    made(store, "FROM x\nMESSAGE system be brief", model="other")
    said = [("user", "<hi>"), ("assistant", "a\nb")]
    for model, turns in {"x": said, "same": said, "other": [("system", "be brief")]}.items():
        messages = store.resolve(Name.parse(model)).messages
        assert [(message.role, message.content) for message in messages] == turns


def test_a_licence_that_is_inherited_is_not_stored_twice(store, folder):
    made(store, FULL, folder)
    made(store, "FROM x\nLICENSE MIT\nLICENSE other\nLICENSE other", model="child")
    assert store.resolve(Name.parse("child")).licenses == ("MIT", "other")


def test_the_path_of_a_blob_is_that_blob_for_everybody(store, folder):
    """It is what `show` prints; whether it exists, a stranger may ask by its digest anyway."""
    digest = store.blobs.add(gguf())
    made(store, f"FROM {store.blobs.path(digest)}", local_files=False)
    assert store.resolve(X).weights == store.blobs.path(digest)
    gone = store.blobs.folder / ("sha256-" + "0" * 64)
    assert type(refused(store, f"FROM {gone}", local_files=False)) is NotFound


# -------------------------------------------------------------------- today's form


def parts(store, **fields):
    """The statuses of a create out of parts."""
    return [step.status for step in create(store, Create("x", **fields), local_files=False)]


def test_parts_make_the_same_model_as_a_modelfile(store, folder, tiny):
    """To the byte: the manifest names every blob by its hash."""
    adapter = adapters.write_plain(folder / "lora.gguf", LORA).read_bytes()
    digest, lora = store.blobs.add(tiny.read_bytes()), store.blobs.add(adapter)
    made(
        store,
        f"FROM @{digest}\nADAPTER @{lora}\nTEMPLATE {{{{ .Prompt }}}}!\nSYSTEM s\nLICENSE a\n"
        "LICENSE b\nPARAMETER stop x\nPARAMETER stop y\nPARAMETER temperature 0.7\n"
        "PARAMETER num_ctx 64\nMESSAGE user hi\nMESSAGE assistant ho\n",
    )
    before = store.resolve(X)
    store.remove(X)
    digest, lora = store.blobs.add(tiny.read_bytes()), store.blobs.add(adapter)
    parts(
        store,
        files={"a/model.gguf": digest},
        adapters={"lora.gguf": lora},
        template="{{ .Prompt }}!",
        system="s",
        licenses=("a", "b"),
        parameters={"num_ctx": 64, "stop": ["x", "y"], "temperature": 0.7, "seed": None},
        messages=(Message("user", "hi"), Message("assistant", "ho")),
    )
    assert store.resolve(X).digest == before.digest


def test_a_child_by_parts(store, folder):
    made(store, FULL, folder, "base")
    parts(store, from_="Base", parameters={"stop": ["b", "c"], "top_k": 3}, system="")
    files = store.resolve(X)
    assert files.parameters == {"num_ctx": 4096, "stop": ["b", "c"], "temperature": 1, "top_k": 3}
    assert files.system == "You are <Mario>." and files.parent == "base:latest"


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("fields", "kind", "sentence"),
    [
        ({}, BadRequest, "neither 'from' or 'files' was specified"),
        ({"system": "s"}, BadRequest, "neither 'from' or 'files' was specified"),
        ({"from_": "x", "modelfile": "FROM y"}, BadRequest, "but not both"),
        ({"modelfile": "FROM y", "parameters": {"top_k": 1}}, BadRequest, "but not both"),
        ({"from_": "nobody"}, ModelNotFound, "model 'nobody:latest' not found, try pulling"),
        ({"from_": "/etc/passwd"}, BadRequest, "only allowed from the machine"),
        ({"files": {"a.gguf": ""}}, BadRequest, "invalid digest format"),
        ({"files": {"a.gguf": "sha256:12"}}, BadRequest, "invalid digest format"),
        ({"files": {"a.gguf": "sha256:" + "z" * 64}}, BadRequest, "invalid digest format"),
        ({"files": {"a.gguf": DIGEST}}, NotFound, "not found: upload it first"),
        ({"files": {"../a.gguf": DIGEST}}, BadRequest, "file path must be relative"),
        ({"files": {"/a.gguf": DIGEST}}, BadRequest, "file path must be relative"),
        ({"files": {"C:\\a.gguf": DIGEST}}, BadRequest, "file path must be relative"),
        ({"files": {"model.safetensors": DIGEST}}, NotFound, "not found: upload it first"),
        ({"from_": "base", "adapters": {"a": DIGEST, "b": DIGEST}}, NotFound, "upload it first"),
        ({"from_": "base", "adapters": {"../a": DIGEST}}, BadRequest, "path must be relative"),
        ({"from_": "base", "parameters": {"nope": 1}}, BadRequest, "unknown option 'nope'"),
        ({"from_": "base", "parameters": {"top_k": "x"}}, BadRequest, "'top_k' must be an integer"),
        ({"from_": "base", "parameters": {"top_p": 1e39}}, BadRequest, "'top_p' must be"),
        ({"from_": "base", "template": "{{ .Prompt"}, TemplateError, "line 1"),
        ({"from_": "base", "messages": (Message("robot", "x"),)}, BadRequest, "role must be one"),
        ({"path": "/etc/passwd"}, BadRequest, "path of a Modelfile is only allowed"),
        ({"from_": "base", "system": "\ud800"}, BadRequest, "half a surrogate pair"),
        ({"from_": "base", "parameters": {"stop": ["a", "\ud800"]}}, BadRequest, "'stop': half a"),
    ],
)
def test_parts_that_are_refused(store, folder, fields, kind, sentence):
    made(store, FULL, folder, "base")
    before = snapshot(store.root)
    with pytest.raises(kind, match=sentence):
        parts(store, **fields)
    assert snapshot(store.root) == before


@pytest.mark.parametrize("path", ["~no-such-user/x", "~no\0user/x", "~\ud800/x", "~/none"])
def test_a_modelfile_in_nobodys_home_is_not_there(store, path):
    with pytest.raises(BadRequest, match="is not a regular file that can be read"):
        create(store, Create("x", path=path), local_files=True)


def test_a_modelfile_by_its_path(store, folder):
    (folder / "Modelfile").write_text("FROM ./a.gguf\nSYSTEM s")
    list(create(store, Create("x", path=str(folder / "Modelfile")), local_files=True))
    assert store.resolve(X).system == "s"
    other = Create("x", "FROM ./b.gguf", path=str(folder / "Modelfile"))  # the text wins
    list(create(store, other, local_files=True))
    assert store.resolve(X).weights.read_bytes() == gguf("mistral", 15, 128)


@pytest.mark.parametrize("data", [b"\xff", b"# \n" * (2 << 20)])
def test_a_path_that_is_no_modelfile(store, folder, data):
    (folder / "Modelfile").write_bytes(data)
    for path in (folder / "Modelfile", folder / "gone", folder, "/dev/zero"):
        with pytest.raises(BadRequest):
            create(store, Create("x", path=str(path)), local_files=True)


def test_a_strange_family_is_refused(store):
    for family in ("a\nb", "x" * 81):
        digest = store.blobs.add(gguf(family))
        assert type(refused(store, f"FROM @{digest}")) is FormatError


def test_a_parent_without_weights(store, folder):
    made(store, FULL, folder, "base")
    store.resolve(Name.parse("base")).weights.unlink()
    assert type(refused(store, "FROM base")) is ModelNotFound


# -------------------------------------------------------------------- what fails on the way

MODELFILES = [FULL, "FROM base\nSYSTEM child\nPARAMETER top_k 3\n", "SYSTEM s\nFROM ./b.gguf\n"]


@pytest.mark.parametrize("modelfile", MODELFILES)
@pytest.mark.parametrize("existing", [True, False])
def test_closed_at_any_step(store, folder, monkeypatch, modelfile, existing):
    """Until `success` nothing has happened; from then on everything has."""
    monkeypatch.setattr(module, "PROGRESS_EVERY", 0.0)
    (folder / "a.gguf").write_bytes(gguf(elements=3 << 18))  # several steps of copying
    made(store, "FROM a.gguf\nSYSTEM base", folder, "base")
    if existing:
        made(store, "FROM ./b.gguf\nSYSTEM old", folder)
    before = snapshot(store.root)
    count = 0
    while True:
        work = steps(store, modelfile, folder)
        seen = [next(work).status for _ in range(count)]
        work.close()
        if seen and seen[-1] == "success":
            break
        assert snapshot(store.root) == before, seen
        count += 1
    assert store.resolve(X).system != "old"


class FullDisk:
    """Files that take so many bytes and no more: also when they are closed."""

    def __init__(self, monkeypatch, room):
        self.room = room
        make = tempfile.NamedTemporaryFile
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **how: self.limited(make(**how)))

    def limited(self, file):
        write = file.file.write

        def checked(data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)

        file.write = checked
        return file


@pytest.mark.parametrize("modelfile", MODELFILES)
def test_a_disk_that_fills_up_at_any_byte(store, folder, modelfile):
    made(store, "FROM a.gguf\nSYSTEM base", folder, "base")
    made(store, "FROM ./a.gguf\nSYSTEM old", folder)
    before = snapshot(store.root)
    room, failures = 0, 0
    while True:
        with pytest.MonkeyPatch.context() as monkeypatch:
            FullDisk(monkeypatch, room)
            try:
                made(store, modelfile, folder)
                break
            except StoreError as problem:
                assert "the disk is full" in str(problem)
        assert snapshot(store.root) == before
        room, failures = room + 61, failures + 1
    assert failures > 5


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_any_call_of_the_system_may_fail(store, folder, monkeypatch, call):
    """The first, the second, … of its calls fails, until none does."""
    made(store, "FROM a.gguf\nSYSTEM old", folder)
    before = snapshot(store.root)
    real, failures = getattr(os, call), 0
    while True:
        left = [failures]

        def failing(*args, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                made(store, FULL.replace("a.gguf", "b.gguf"), folder)
                break
            except StoreError:
                assert snapshot(store.root) == before
        failures += 1
    assert failures >= 1
    assert store.resolve(X).system == "You are <Mario>."


def test_a_file_that_is_swapped_after_the_check(store, folder):
    """What counts is what lies in the store."""
    work = steps(store, "FROM ./a.gguf", folder)
    (folder / "a.gguf").write_bytes(b"something else entirely")
    with pytest.raises(FormatError):
        list(work)
    assert all(what == "folder" for what in snapshot(store.root).values())
    work = steps(store, "FROM ./b.gguf", folder)
    (folder / "b.gguf").unlink()
    with pytest.raises(RefollamaError):
        list(work)


def test_a_parent_that_is_removed_meanwhile(store, folder):
    """The child is made whole or not at all."""
    made(store, "FROM a.gguf\nSYSTEM base", folder, "base")
    work = steps(store, "FROM base\nSYSTEM child")
    store.remove(Name.parse("base"))
    with pytest.raises(StoreError, match="is missing"):
        list(work)
    assert all(what == "folder" for what in snapshot(store.root).values())

    made(store, "FROM a.gguf\nSYSTEM base", folder, "base")
    work = steps(store, "FROM base\nSYSTEM child")
    while next(work).status != "creating system layer":
        pass
    store.remove(Name.parse("base"))
    list(work)
    assert store.resolve(X).weights.read_bytes() == gguf()
    assert not store.blobs.has(f"sha256:{sha(b'base')}")


# -------------------------------------------------------------------- at the same time


def test_two_threads_make_the_same_model(store, folder):
    """One is last, and the model is wholly its; nothing of the other is left."""
    for number in range(10):
        threads = [
            threading.Thread(target=made, args=(store, FULL + f"LICENSE {number} {side}\n", folder))
            for side in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        files = store.resolve(X)
        assert files.licenses in [("MIT", f"{number} a"), ("MIT", f"{number} b")]
        named = {digest.replace(":", "-") for digest in store.manifests.named()}
        assert set(os.listdir(store.blobs.folder)) == named
        assert all(store.blobs.verify(digest) for digest in store.manifests.named())


def test_one_fails_while_the_other_needs_the_same_blobs(store, folder):
    failing, lasting = (steps(store, FULL, folder, model) for model in ("y", "x"))
    while next(failing).status != "writing manifest":
        pass
    while next(lasting).status != "writing manifest":
        pass
    failing.close()
    list(lasting)
    assert store.resolve(X).weights.read_bytes() == gguf()
    assert len(store.list()) == 1


# -------------------------------------------------------------------- anything


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(max_size=80) | st.text('FROMSYTE "\n@./{}', max_size=60))
def test_any_modelfile_is_made_or_refused(store, text):
    digest = store.blobs.add(gguf())
    before = snapshot(store.root)
    try:
        made(store, f"FROM @{digest}\n{text}")
    except RefollamaError:
        assert snapshot(store.root) == before
    else:
        assert store.resolve(X).weights.exists()
        store.remove(X)
