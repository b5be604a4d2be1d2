"""A folder goes into the store: by its path, by its files, to a server elsewhere; or not at all."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from refollama import transfer
from refollama.create import create
from refollama.errors import BadRequest, FormatError, NotFound, StoreError, UnsupportedModel
from refollama.loaded import load_file
from refollama.messages import Create
from refollama.store import Store
from refollama.store.name import Name
from refollama.upload import with_blobs
from refollama.weights.gguf import open_gguf
from tests.convert.checkpoints import write_folder, write_llava
from tests.golden.small_models import MODELS
from tests.models.test_recorded import recorded
from tests.store.helpers import snapshot
from tests.test_upload import Remote

LIMIT = 1e-4


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "small", MODELS["mixtral"], shards=2)


def made(store, local_files=True, **fields):
    return list(create(store, Create("x", **fields), local_files=local_files))


def right(store):
    """Is the model in the store the one that Hugging Face's recorded?"""
    golden = recorded("mixtral")
    with load_file(store.resolve(Name.parse("x")).weights) as llm:
        found = llm.logits(golden["tokens"]).numpy()
    return np.abs(found - np.array(golden["logits"])).max() < LIMIT


def test_from_a_folder(store, folder, tmp_path):
    steps = made(store, modelfile="FROM ./small\nSYSTEM hi", directory=str(tmp_path))
    at = [step for step in steps if step.status == "converting model"]
    files = store.resolve(Name.parse("x"))
    assert at[-1].completed == at[-1].total == files.weights.stat().st_size
    assert steps[-1].status == "success" and files.system == "hi"
    assert right(store)
    config = store.config(store.manifests.read(Name.parse("x")))
    assert (config.family, config.quantization_level) == ("llama", "F32")


def test_from_the_files_of_a_folder(store, folder):
    """As Ollama's client sends them: each as a blob, and their names."""
    files = {path.name: store.blobs.add(path.read_bytes()) for path in folder.iterdir()}
    made(store, local_files=False, files=files)
    assert right(store)
    assert "general.name" not in open_gguf(store.resolve(Name.parse("x")).weights).metadata


def test_a_llava_is_two_blobs(store, tmp_path):
    write_llava(tmp_path / "eyes")
    made(store, modelfile="FROM ./eyes", directory=str(tmp_path))
    files = store.resolve(Name.parse("x"))
    with load_file(files.weights, projector=files.projectors[0]) as llm:
        assert len([*llm.net.get_submodule("v.blk").children()]) == 2


def test_a_second_folder_is_refused(store, folder, tmp_path):
    with pytest.raises(BadRequest, match="a second language model"):
        made(store, modelfile="FROM ./small\nFROM ./small", directory=str(tmp_path))


def test_a_server_elsewhere_is_sent_what_the_folder_becomes(folder, tmp_path):
    remote = Remote()
    text = with_blobs(remote, "FROM ./small\nSYSTEM hi", tmp_path)
    ((digest, data),) = remote.blobs.items()
    assert text == f"FROM @{digest}\nSYSTEM hi"
    assert data.startswith(b"GGUF") and digest.endswith(hashlib.sha256(data).hexdigest())


def test_a_folder_needs_no_modelfile(folder):
    found = transfer.to_create("x", folder / "nothing", folder)
    assert found == transfer.OnDisk("x", "FROM .", folder)


# ── nothing is left behind ────────────────────────────────────────────────────────────────────


def shorten(folder):
    """As if somebody wrote a file anew while it is converted."""
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def test_whoever_stops_it_finds_the_store_as_it_was(store, folder, tmp_path):
    before = snapshot(store.root)
    ask = Create("x", "FROM ./small", str(tmp_path))
    steps = create(store, ask, local_files=True)
    assert next(steps).status == "converting model" and next(steps).total
    steps.close()
    assert snapshot(store.root).keys() - before.keys() <= {"blobs"}


def test_a_file_that_changes_on_the_way_leaves_nothing(store, folder, tmp_path):
    steps = create(store, Create("x", "FROM ./small", str(tmp_path)), local_files=True)
    shorten(folder)
    with pytest.raises(StoreError, match="was changed while it was read"):
        list(steps)
    assert not [path for path in store.root.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_broken_folder_leaves_nothing_and_is_named(store, folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(MODELS["mixtral"] | {"num_hidden_layers": 3}))
    before = snapshot(store.root)
    with pytest.raises(FormatError, match=r"FROM './small': tensor .*layers.2.* is missing"):
        made(store, modelfile="FROM ./small", directory=str(tmp_path))
    assert snapshot(store.root) == before


def test_only_who_sits_at_the_server_may_name_its_folders(store, folder):
    with pytest.raises(BadRequest, match="only allowed from the machine"):
        made(store, local_files=False, modelfile=f"FROM {folder}")


@pytest.mark.parametrize(
    ("names", "kind", "sentence"),
    [
        (["config.json", "../x.safetensors"], BadRequest, "file path must be relative"),
        (["config.json", "x.gguf"], BadRequest, "are two models"),
        (["pytorch_model.bin", "config.json"], UnsupportedModel, "is a pickle, which may run"),
        (["config.json"], FormatError, "no file"),
    ],
)
def test_files_that_are_refused(store, folder, names, kind, sentence):
    config = store.blobs.add((folder / "config.json").read_bytes())
    with pytest.raises(kind, match=sentence):
        made(store, local_files=False, files=dict.fromkeys(names, config))
    with pytest.raises(NotFound, match="upload it first"):
        made(store, local_files=False, files={"config.json": f"sha256:{'0' * 64}"})


# ── memory ────────────────────────────────────────────────────────────────────────────────────

LIMITED = """
import json, resource, sys
from pathlib import Path
from refollama.convert import Folder, convert

(part,) = convert(Folder.at(Path(sys.argv[1])), "F32")
allowed = int(sys.argv[2])
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowed,) * 2)
print(sum(len(piece) for piece in part.pieces()) == part.size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_memory_is_that_of_a_few_pieces_whatever_the_model_has(tmp_path):
    """1.3 GB in ten sparse files, of which no tensor has more than 90 MB."""
    settings = MODELS["mistral"] | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 3,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    folder = write_folder(tmp_path / "large", settings, {})
    (folder / "model.safetensors").unlink()
    largest = sparse(folder, settings, 10)
    command = [sys.executable, "-c", LIMITED, str(folder), str(3 * largest + 300 * 2**20)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr


def sparse(folder, settings, count):
    """All tensors as zeros in BF16, in files that take no room; the bytes of the largest one."""
    from refollama.convert.config import language
    from refollama.convert.folder import Folder
    from refollama.convert.names import language_slots

    model = language("mistral", Folder.at(folder).settings("config.json"))
    slots = [slot for slot in language_slots(model) if not slot.optional]
    places: dict[str, str] = {}
    sizes = []
    for shard in range(count):
        header, at = {}, 0
        for slot in slots[shard::count]:
            sizes.append(2 * int(np.prod(slot.shape)))
            offsets = [at, at := at + sizes[-1]]
            header[slot.sources[0]] = {
                "dtype": "BF16", "shape": slot.shape, "data_offsets": offsets,
            }  # fmt: skip
        raw, name = json.dumps(header).encode(), f"model-{shard}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
        places |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return max(sizes)
