"""What was imported goes back as it came; the judges are the libraries that wrote it."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from refollama import load, workshop
from refollama.convert import Folder, convert
from refollama.convert.names import halves, neighbours
from refollama.create import create
from refollama.errors import BadRequest, StoreError, UnsupportedModel
from refollama.export import Exported, export, words
from refollama.messages import Create
from refollama.models.load import load_eyes
from refollama.store import Name, Store
from refollama.text import tokenizer_from
from refollama.text.bpe import LETTERS
from refollama.weights import open_weights
from refollama.weights.gguf import open_gguf, write_gguf
from tests import tiny
from tests.adapters import write_plain
from tests.convert.checkpoints import (
    byte_level,
    sentencepiece_model,
    small,
    write_folder,
    write_llava,
)
from tests.convert.test_import import TEXTS, converted
from tests.golden.small_models import MODELS
from tests.tiny_llava import write_eyes

# Without a window it computes what a Llama does, and its file calls it one.
PLAIN_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def there_and_back(folder, place, dtype=None, **more):
    """→ the folder that is made of the folder's GGUF files"""
    model, *eyes = converted(folder, place, dtype)
    export(Exported(model, *eyes), place / "back", **more)
    return place / "back"


def tensors_of(folder):
    return {n: x for path in folder.glob("*.safetensors") for n, x in load_file(path).items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (values.dtype, values.shape)
        assert ours[name].tobytes() == values.tobytes(), name


# ── there and back ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    folder = write_folder(tmp_path / name, MODELS[name])
    back = there_and_back(folder, tmp_path)
    same(tensors_of(back), tensors_of(folder))
    again = json.loads((back / "config.json").read_text())
    again |= PLAIN_MISTRAL if name == "mistral" else {}
    known = again.keys() & MODELS[name].keys()
    assert len(known) >= 11
    assert {key: again[key] for key in known} == {key: MODELS[name][key] for key in known}
    [before], [after] = convert(Folder.at(folder)), convert(Folder.at(back))
    assert {**after.metadata, "general.name": ""} == {**before.metadata, "general.name": ""}


def test_so_does_a_llava(tmp_path):
    folder = write_llava(tmp_path / "llava")
    back = there_and_back(folder, tmp_path)
    ours, theirs = tensors_of(back), tensors_of(folder)
    vocabulary = {n for n in theirs if n.endswith(("embed_tokens.weight", "lm_head.weight"))}
    for name in vocabulary:  # `<image>` was nobody's token: it has a row now
        assert not ours[name][-1].any()
        ours[name] = ours[name][:-1]
    same(ours, theirs)
    config = json.loads((back / "config.json").read_text())
    assert config["image_token_index"] == len(ours["language_model.model.embed_tokens.weight"])
    _, before = convert(Folder.at(folder))
    _, after = convert(Folder.at(back))
    assert plain(after.metadata) == plain(before.metadata)


def plain(metadata):
    """Numbers as float32 has them."""
    values = {key: getattr(value, "value", value) for key, value in metadata.items()}
    return {
        key: str(np.array(value, np.float32 if is_fraction(value) else None))
        for key, value in values.items()
    }


def is_fraction(value):
    return any(isinstance(one, float) for one in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_folder_keeps_its_type(dtype, tmp_path):
    """Norms are F32 in a GGUF file; they come from the narrower type, and go back to it."""
    settings, tensors = small()
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    tensors = {n: torch.from_numpy(x).to(narrow) for n, x in tensors.items()}
    folder = write_folder(tmp_path / "a", settings)
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    back = there_and_back(folder, tmp_path)
    found = load_torch(back / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    named = {"F16": "float16", "BF16": "bfloat16"}[dtype]
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == named


def test_rows_go_back_to_their_halves():
    rows = np.arange(24).reshape(12, 2)
    assert np.array_equal(halves(neighbours(rows, 6), 6), rows)
    assert np.array_equal(neighbours(halves(rows, 6), 6), rows)


def test_shards_are_no_larger_than_asked_for(tmp_path):
    folder = write_folder(tmp_path / "a", MODELS["mixtral"])
    back = there_and_back(folder, tmp_path, shard=30_000)
    sizes = [path.stat().st_size for path in back.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 34_000
    same(tensors_of(back), tensors_of(folder))
    [before], [after] = convert(Folder.at(folder)), convert(Folder.at(back))
    assert after.tensors.keys() == before.tensors.keys()


# ── words ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pre", ["llama3", "qwen2", "gpt-2", "deepseek-coder"])
def test_a_byte_level_tokenizer_gives_the_ids_that_the_file_gave(pre, tmp_path):
    settings = MODELS["mistral"] | {"vocab_size": 300}
    tensors = small_of(300)
    folder = write_folder(tmp_path / "a", settings, tensors)
    theirs = byte_level(300, pre, bos="<s>")
    (folder / "tokenizer.json").write_text(theirs.to_str())
    back = there_and_back(folder, tmp_path)
    ours = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def small_of(rows):
    tensors = small()[1]
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    return {n: np.resize(x, (rows, *x.shape[1:])) if n in tables else x for n, x in tensors.items()}


def test_a_sentencepiece_model_comes_back_and_as_merges_too(tmp_path):
    data, library = sentencepiece_model()
    rows = library.vocab_size()
    folder = write_folder(tmp_path / "a", MODELS["mistral"] | {"vocab_size": rows}, small_of(rows))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(data)
    back = there_and_back(folder, tmp_path)
    assert (back / "tokenizer.model").read_bytes() == data
    merges = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in TEXTS[:3]:
        assert merges.encode(text, add_special_tokens=False).ids == library.encode(text)
        assert merges.encode(text).ids == [library.bos_id(), *library.encode(text)]
    assert merges.decode(library.encode(TEXTS[0])) == TEXTS[0]


def test_the_vocabularies_of_large_models_come_back_as_merges(oracles):
    """SentencePiece's own order of merging is kept: by score, the leftmost first."""
    metadata = open_gguf(oracles / "stories260K.gguf").metadata
    ours = tokenizer_from(metadata)
    spec = words.files(metadata, {"max_position_embeddings": 512})["tokenizer.json"]
    merges = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in TEXTS[:3]:
        assert merges.encode(text).ids == ours.encode(text, bos=True)


def test_of_one_token_for_both_ends_only_that_is_put_which_the_file_asks_for():
    for ends in ({"add_bos": True}, {"add_eos": True}, {"add_bos": True, "add_eos": True}, {}):
        asked = {f"tokenizer.ggml.{end}_token": end in ends for end in ("add_bos", "add_eos")}
        metadata = tiny.tokenizer() | asked | {"tokenizer.ggml.eos_token_id": 1}
        metadata = {key: getattr(value, "value", value) for key, value in metadata.items()}
        merges, about = written(metadata)
        assert merges.encode("the then").ids == tokenizer_from(metadata).encode(
            "the then", bos=True
        )
        assert (about["add_bos_token"], about["add_eos_token"]) == tuple(asked.values())


def written(metadata):
    """→ the exported tokenizer in the library, and tokenizer_config.json"""
    found = words.files(metadata, {"max_position_embeddings": 512})
    return tokenizers.Tokenizer.from_str(json.dumps(found["tokenizer.json"])), found[
        "tokenizer_config.json"
    ]


def merged_by(tokens, merges):
    """The metadata of a byte-level tokenizer."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*LETTERS, *tokens],
        "tokenizer.ggml.merges": merges,
    }


def test_a_merge_through_what_is_no_token_is_refused():
    """It cannot be left out: the library would merge b and c, which ours never does here."""
    metadata = merged_by(["bc"], ["a b", "b c"])
    spelled = [LETTERS.index(letter) for letter in "abc"]
    assert tokenizer_from(metadata).encode("abc") == spelled
    left_out, _ = written(merged_by(["bc"], ["b c"]))
    assert left_out.encode("abc").ids != spelled
    with pytest.raises(UnsupportedModel, match=r"'a b' goes through 'ab', which is no token"):
        written(metadata)


def test_of_a_merge_that_comes_twice_the_first_counts():
    metadata = merged_by(["ab", "bc"], ["a b", "b c", "a b"])
    ours, (theirs, _) = tokenizer_from(metadata), written(metadata)
    assert theirs.encode("abc").ids == ours.encode("abc") == [256, LETTERS.index("c")]


def test_a_token_that_is_not_utf_8_is_refused_by_its_number():
    metadata = merged_by(["\udcff"], [])
    with pytest.raises(UnsupportedModel, match="entry 256 is no valid UTF-8"):
        written(metadata)


# ── other models than those that came in ──────────────────────────────────────────────────────


def packed(path, type="Q8_0", **changes):
    """A file of tests/tiny.py."""
    return tiny.write_model(path, type=type, **changes)


def test_packed_weights_are_unpacked_to_the_last_bit(tmp_path):
    model = packed(tmp_path / "a.gguf")
    export(Exported(model), tmp_path / "b", dtype="F32")
    found = tensors_of(tmp_path / "b")
    weights = open_weights(model)
    down = weights["blk.1.ffn_down.weight"].unpack().numpy()
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"], down)
    [again] = converted(tmp_path / "b", tmp_path)
    ids = [1, 5, 9, 12]
    assert torch.equal(load(again).logits(ids), load(model).logits(ids))


def test_an_adapter_is_added_to_the_weights(tmp_path):
    model = packed(tmp_path / "a.gguf", type="F32")
    weights = open_weights(model)
    shape = weights["blk.0.attn_q.weight"].shape
    a, b = torch.randn(2, shape[1]) * 0.1, torch.randn(shape[0], 2) * 0.1
    adapter = tmp_path / "lora.gguf"
    write_plain(adapter, {"blk.0.attn_q": (a.numpy(), b.numpy())})
    export(Exported(model, adapters=[adapter]), tmp_path / "b")
    [merged] = converted(tmp_path / "b", tmp_path)
    branch = load(model, adapter=adapter).logits([1, 5, 9, 12])
    assert torch.allclose(load(merged).logits([1, 5, 9, 12]), branch, atol=1e-4)
    assert not torch.allclose(load(model).logits([1, 5, 9, 12]), branch, atol=1e-2)


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_gguf_files_are_the_model_itself_or_unpacked(dtype, tmp_path):
    model = packed(tmp_path / "a.gguf", type="Q4_0")
    export(Exported(model, name="a"), tmp_path / "b", "gguf", dtype)
    found, before = open_gguf(tmp_path / "b" / "a.gguf"), open_gguf(model)
    assert {**plain(found.metadata), "general.file_type": ""} == {
        **plain(before.metadata),
        "general.file_type": "",
    }
    ours, theirs = open_weights(found), open_weights(before)
    for name, tensor in theirs.items():
        matrix = len(tensor.shape) > 1
        assert ours[name].type == (dtype if dtype and matrix else tensor.type)
        exact = tensor.unpack().to(torch.float16 if dtype and matrix else torch.float32).float()
        assert torch.equal(ours[name].unpack(), exact)
    assert (tmp_path / "b" / "Modelfile").read_text() == "FROM ./a.gguf\n"


def test_the_command_writes_a_folder_of_which_the_same_model_is_made(tmp_path, monkeypatch):
    """With its template and parameters."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    store = Store.default()
    lines = "FROM ./a.gguf", "TEMPLATE {{ .Prompt }}!", "PARAMETER top_k 3", "SYSTEM hi"
    packed(tmp_path / "a.gguf")
    for _ in create(
        store, Create("mine", "\n".join(lines), directory=str(tmp_path)), local_files=True
    ):
        pass
    ran = CliRunner().invoke(workshop.export, ["mine", str(tmp_path / "b"), "--dtype", "F32"])
    assert ran.exit_code == 0, ran.output
    assert "wrote" in ran.output
    recipe = Create("back", path=str(tmp_path / "b" / "Modelfile"))
    for _ in create(store, recipe, local_files=True):
        pass
    mine, back = (store.resolve(Name.parse(name)) for name in ("mine", "back"))
    assert (back.template, back.system, back.parameters) == (
        mine.template,
        mine.system,
        mine.parameters,
    )
    ids = [1, 5, 9, 12]
    assert torch.equal(load("back").logits(ids), load("mine").logits(ids))
    assert CliRunner().invoke(workshop.export, ["mine", str(tmp_path / "b")]).exit_code != 0


# ── what cannot be ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"rope.dimension_count": 8}, "d_rotated"),
        ({"feed_forward_length": [96, 64]}, "layers"),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.yarn_ext_factor": 0.5,
            },
            "ext_factor",
        ),
    ],
)
def test_what_transformers_has_no_setting_for_is_refused(changes, lost, tmp_path):
    model = packed(tmp_path / "a.gguf", type="F32", **changes)
    with pytest.raises(UnsupportedModel, match=lost):
        export(Exported(model), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


@pytest.mark.parametrize("kind", ["linear", "mlp_norm", "ldp", "ldpv2"])
def test_eyes_that_are_none_of_llavas_are_refused(kind, tmp_path):
    model, eyes = packed(tmp_path / "a.gguf"), write_eyes(tmp_path / "eyes.gguf", kind)
    with pytest.raises(UnsupportedModel, match=f"of the kind '{kind}'"):
        export(Exported(model, eyes), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_norm_behind_the_last_block_is_refused(tmp_path):
    extra = {"v.post_ln.weight": (32,), "v.post_ln.bias": (32,)}
    eyes = write_eyes(tmp_path / "eyes.gguf", extra=extra)
    with pytest.raises(UnsupportedModel, match="norm follows"):
        export(Exported(packed(tmp_path / "a.gguf"), eyes), tmp_path / "b")


@pytest.mark.parametrize("swapped", [True, False])
def test_a_tower_of_2023_sees_the_same_afterwards(swapped, tmp_path):
    """Its "up" and "down" may have changed places."""
    model = packed(tmp_path / "a.gguf", type="F32")
    sides = {"mm.0.weight": (64, 32), "mm.0.bias": (64,), "mm.2.weight": (64, 64)}
    eyes = write_eyes(tmp_path / "eyes.gguf", swapped=swapped, extra=sides)
    export(Exported(model, eyes), tmp_path / "b")
    _, again = converted(tmp_path / "b", tmp_path)
    picture = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    before, after = (one.mm(one.v(picture)) for one in map(load_eyes, (eyes, again)))
    assert torch.allclose(before, after, atol=1e-6)


def test_other_divisors_than_llama_3s_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a", MODELS["llama3"])
    [model] = converted(folder, tmp_path)
    file = open_gguf(model)
    tensors = {n: (t.type, t.shape, file.bytes_of(n)) for n, t in file.tensors.items()}
    type, shape, _ = tensors["rope_freqs.weight"]
    tensors["rope_freqs.weight"] = (type, shape, np.linspace(1, 3, shape[0], dtype=np.float32))
    write_gguf(tmp_path / "b.gguf", {k: file.typed(k) for k in file.metadata}, tensors)
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        export(Exported(tmp_path / "b.gguf"), tmp_path / "c")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_so_are_divisors_beside_another_scaling(kind, tmp_path):
    keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 2.0}
    extra = {"rope_freqs.weight": (8,)}
    model = packed(tmp_path / "a.gguf", type="F32", keys=keys, extra=extra)
    load(model)
    with pytest.raises(UnsupportedModel, match=f"rope_freqs.weight stands beside .* {kind}"):
        export(Exported(model), tmp_path / "b")


def test_a_tensor_that_nobody_reads_is_left_out(tmp_path):
    extra = {"blk.0.attn_rot_embd.weight": (8,)}
    model = packed(tmp_path / "a.gguf", type="F32", extra=extra)
    export(Exported(model), tmp_path / "b")
    assert torch.equal(load(tmp_path / "b").logits([1, 5]), load(model).logits([1, 5]))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    model = packed(tmp_path / "a.gguf")
    place = tmp_path / "b"
    place.mkdir()
    export(Exported(model), place)  # empty
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    for target in (place, model):
        with pytest.raises(BadRequest, match="exists already"):
            export(Exported(model), target)
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before


@pytest.mark.parametrize(("format", "dtype"), [("onnx", None), ("gguf", "Q4_0")])
def test_the_allowed_values_are_named(format, dtype, tmp_path):
    model = packed(tmp_path / "a.gguf")
    with pytest.raises(BadRequest, match=r"supported: (safetensors, gguf|F32, F16, BF16)"):
        export(Exported(model), tmp_path / "b", format, dtype)


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_damaged_model_leaves_nothing(format, tmp_path, monkeypatch):
    model = packed(tmp_path / "a.gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        export(Exported(model), tmp_path / "b", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_a_number_too_large_for_the_type_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a", *large())
    [model] = converted(folder, tmp_path)
    said = r"model.gguf: tensor output_norm.weight: a number is too large for F16"
    with pytest.raises(UnsupportedModel, match=said):
        export(Exported(model), tmp_path / "b", dtype="F16")
    assert not (tmp_path / "b").exists()


def large():
    settings, tensors = small()
    tensors["model.norm.weight"][0] = 1e6
    return settings, tensors
