"""A folder of safetensors becomes the model that it was, by Hugging Face's own recorded logits."""

import errno
import json
import re

import numpy as np
import pytest
import torch

from refollama import load
from refollama.convert import Converted, Folder, as_files, convert
from refollama.convert.names import neighbours
from refollama.convert.numbers import changed
from refollama.convert.vocabulary import PROBE
from refollama.errors import FormatError, StoreError, UnsupportedModel
from refollama.models.layers import Linear
from refollama.models.llava import Llava
from refollama.models.load import load_eyes, load_net
from refollama.text import tokenizer_from
from refollama.text.bpe import PATTERNS
from refollama.text.tokenizer import TokenType
from refollama.weights.gguf import open_gguf, write_gguf
from tests.convert.checkpoints import (
    byte_level,
    merging,
    sentencepiece_model,
    small,
    write_folder,
    write_llava,
)
from tests.golden import small_llava
from tests.golden.small_models import MODELS
from tests.models.test_llava import GOLDEN as LLAVA
from tests.models.test_recorded import logits_of, recorded

LIMIT = 1e-4
TEXTS = ["the then", "in  an era 12345", "é 中文 🙂 \n\n x", "I'm you'RE camelCase</s>", "<s>a"]


def converted(folder, path, dtype=None):
    """The folder's files: a model, or a model and its eyes."""
    parts = convert(Folder.at(folder), dtype)
    for part in parts:
        write_gguf(path / f"{part.kind}.gguf", part.metadata, part.tensors)
    assert [(path / f"{part.kind}.gguf").stat().st_size for part in parts] == [
        part.size for part in parts
    ]
    return [path / f"{part.kind}.gguf" for part in parts]


# ── the same model ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_recorded(name, shards, tmp_path):
    golden = recorded(name)
    folder = write_folder(tmp_path / name, MODELS[name], shards=shards)
    (path,) = converted(folder, tmp_path)
    found = logits_of(load_net(path), golden["tokens"], 40)
    assert np.abs(found - np.array(golden["logits"])).max() < LIMIT


def test_settings_are_read_in_the_spelling_of_2025(tmp_path):
    golden, (settings, tensors) = recorded("llama3"), small("llama3")
    scaling = settings.pop("rope_scaling")
    settings["rope_parameters"] = scaling | {"rope_theta": settings.pop("rope_theta")}
    (path,) = converted(write_folder(tmp_path / "f", settings, tensors), tmp_path)
    found = logits_of(load_net(path), golden["tokens"], 40)
    assert np.abs(found - np.array(golden["logits"])).max() < LIMIT


def test_a_setting_that_is_left_out_has_the_default_of_its_kind(tmp_path):
    """A mistral that does not speak of its window has one of 4096; null says that there is none."""
    settings, tensors = small("mistral")
    del settings["sliding_window"]
    for key in ("rms_norm_eps", "rope_theta"):
        del settings[key]
    (path,) = converted(write_folder(tmp_path / "f", settings, tensors), tmp_path)
    found = open_gguf(path).metadata
    assert found["llama.attention.sliding_window"] == 4096
    assert found["llama.rope.freq_base"] == 10000.0
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 4])
def test_llava_is_told_apart_and_sees_what_the_recorded_one_saw(shards, tmp_path):
    model, eyes = converted(write_llava(tmp_path / "llava", shards=shards), tmp_path)
    net = load_net(model, eyes=load_eyes(eyes))
    assert isinstance(net, Llava)
    pixels = torch.from_numpy(small_llava.some_pixels())[None]
    seen = np.abs(net.v(pixels)[0].numpy() - np.array(LLAVA["towers"]["quick_gelu"]))
    assert seen.max() < LIMIT
    rows = net.mm(net.v(pixels))[0]
    seeing = WithRows(net.token_embd, small_llava.PICTURE, torch.cat((rows, rows)))
    net.add_module("token_embd", seeing)
    found = logits_of(net, small_llava.some_prompt(), 100)
    assert np.abs(found - np.array(LLAVA["logits"])).max() < LIMIT


@pytest.mark.parametrize(("layer", "has_norm"), [(-2, True), (-1, False), (3, False)])
def test_what_the_last_block_gives_has_no_norm_behind_it(layer, has_norm, tmp_path):
    """A file that held it would be read with it; the checkpoint's own model leaves it out."""
    folder = write_llava(tmp_path / "llava")
    settings = json.loads((folder / "config.json").read_text()) | {"vision_feature_layer": layer}
    (folder / "config.json").write_text(json.dumps(settings))
    _, eyes = convert(Folder.at(folder))
    assert any(name.startswith("v.post_ln.") for name in eyes.tensors) is has_norm


class WithRows(torch.nn.Module):
    """An embedding in which one id stands for rows of a picture, one after another."""

    def __init__(self, embedding, id, rows):
        super().__init__()
        self.embedding, self.id, self.rows = embedding, id, rows

    def forward(self, tokens):
        x = self.embedding(tokens)
        x[tokens == self.id] = self.rows
        return x


def test_a_folder_is_loaded_where_it_lies(tmp_path):
    folder = write_folder(tmp_path / "small", MODELS["mistral"])
    golden = recorded("mistral")
    with load(folder) as llm:
        assert not list(tmp_path.glob("*.gguf"))
        found = llm.logits(golden["tokens"]).numpy()
    assert np.abs(found - np.array(golden["logits"])).max() < LIMIT
    with load(str(write_llava(tmp_path / "llava"))) as llm:
        assert len([*llm.net.get_submodule("v.blk").children()]) == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "BF16"])
def test_numbers_stay_what_they_are(dtype, tmp_path):
    """Matrices keep their type (F64, which nobody needs, becomes F32); norms are F32."""
    settings, tensors = small()
    if dtype == "BF16":
        tensors = {k: torch.from_numpy(v).bfloat16() for k, v in tensors.items()}
        from safetensors.torch import save_file

        folder = write_folder(tmp_path / "f", settings, {})
        save_file(tensors, folder / "model.safetensors")
        tensors = {k: v.float().numpy() for k, v in tensors.items()}
    else:
        tensors = {k: v.astype(dtype) for k, v in tensors.items()}
        folder = write_folder(tmp_path / "f", settings, tensors)
    (path,) = converted(folder, tmp_path)
    net, file = load_net(path), open_gguf(path)
    types = {"BF16": (30, 32), np.float16: (1, 1), np.float64: (0, 0)}[dtype]
    assert (file.tensors["token_embd.weight"].type, file.metadata["general.file_type"]) == types
    assert {t.type for name, t in file.tensors.items() if "norm" in name} == {0}
    down = net.get_submodule("blk.1.ffn_down")
    assert isinstance(down, Linear)
    expected = tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    assert np.array_equal(down.unpack(down.weight).numpy(), expected)


def test_what_is_asked_for_is_what_numbers_become(tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    for dtype, type in {"F16": 1, "BF16": 30, "F32": 0}.items():
        (path,) = converted(folder, tmp_path, dtype)
        assert open_gguf(path).tensors["blk.0.attn_q.weight"].type == type


def test_bfloat16_is_rounded_as_torch_rounds():
    bits = np.random.RandomState(0).randint(0, 2**32, 100_000, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)[np.abs(bits.view(np.float32)) < 1e38]
    ties = np.array([0x3F808000, 0x3F818000, 0x00008000, 0x00000001], np.uint32).view(np.float32)
    values = np.concatenate([values, ties, [np.inf, -np.inf, 0.0, -0.0]]).astype(np.float32)
    found = torch.from_numpy(changed(values, "F32", "BF16").view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found, torch.from_numpy(values).bfloat16())
    (nan,) = changed(np.array([np.nan], np.float32), "F32", "BF16")
    assert nan & 0x7F80 == 0x7F80 and nan & 0x7F
    for type in ("F16", "BF16"):
        with pytest.raises(UnsupportedModel, match=f"too large for {type}"):
            changed(np.array([1, 3.4e38], np.float32), "F32", type)


def test_rows_that_turn_together_lie_together():
    rows = np.arange(12)[:, None]
    assert neighbours(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# ── the same words ────────────────────────────────────────────────────────────────────────────


def words(folder, tmp_path):
    (path,) = converted(folder, tmp_path)
    return tokenizer_from(open_gguf(path).metadata), open_gguf(path).metadata


def with_vocabulary(tmp_path, count):
    settings, _ = small()
    settings["vocab_size"] = count
    return write_folder(tmp_path / "f", settings, tokenizer=False)


@pytest.mark.parametrize("pre", ["llama3", "gpt-2", "qwen2", "tekken", "deepseek-llm", "falcon"])
def test_byte_level_ids_equal_those_of_the_file_itself(pre, tmp_path):
    """The judge is the `tokenizers` library, running the very file that was imported."""
    judge = byte_level(300, pre, bos="<|begin|>")
    folder = with_vocabulary(tmp_path, 300)
    (folder / "tokenizer.json").write_text(judge.to_str())
    ours, metadata = words(folder, tmp_path)
    assert PATTERNS[metadata["tokenizer.ggml.pre"]] == PATTERNS[pre]
    assert ours.vocab_size == 300  # as many as the model has rows
    for text in [*TEXTS, PROBE]:
        assert ours.around(ours.encode(text, special=True)) == judge.encode(text).ids


def test_merges_give_the_ids_of_the_file_itself(tmp_path):
    judge = merging()
    folder = with_vocabulary(tmp_path, judge.get_vocab_size())
    (folder / "tokenizer.json").write_text(judge.to_str())
    ours, metadata = words(folder, tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama"
    for text in ["the then", "in  an era 12345", "é 中文 🙂 \n\n x", "ingandthewand"]:
        assert ours.encode(text) == judge.encode(text, add_special_tokens=False).ids


def test_a_sentencepiece_model_gives_the_ids_of_its_library(tmp_path):
    data, judge = sentencepiece_model()
    folder = with_vocabulary(tmp_path, judge.vocab_size() + 2)
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": judge.vocab_size()}))
    ours, metadata = words(folder, tmp_path)
    assert metadata["tokenizer.ggml.scores"].tolist() == pytest.approx(
        [judge.get_score(id) for id in range(judge.vocab_size())] + [-10000.0] * 2
    )
    for text in ["the then", "in  an era 12345", "é 中文 🙂 \n\n x", "thewin"]:
        assert ours.around(ours.encode(text)) == [1, *judge.encode(text)]
    assert ours.encode("a<|im_end|>", special=True)[-1] == judge.vocab_size()


def test_all_that_ends_an_answer_is_carried(tmp_path):
    """The name in tokenizer_config.json comes first; a default of the settings is no end."""
    judge = byte_level(280)
    judge.add_special_tokens(["<|begin|>", "<|stop|>", "<|turn|>"])
    begin, stop, turn = map(judge.token_to_id, ("<|begin|>", "<|stop|>", "<|turn|>"))
    folder = with_vocabulary(tmp_path, 300)
    (folder / "tokenizer.json").write_text(judge.to_str())
    about = {"bos_token": "<|begin|>", "eos_token": {"content": "<|turn|>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": "{{ x }}"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop, turn]}))
    ours, metadata = words(folder, tmp_path)
    assert ours.eos_ids == {stop, turn}
    assert (ours.bos_id, metadata["tokenizer.ggml.eos_token_id"]) == (begin, turn)
    assert ours.around([5]) == [begin, 5]
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


# ── broken folders ────────────────────────────────────────────────────────────────────────────


def edited(name, **changes):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def pickled(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(60))


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lying(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[48,64]', b'"shape":[49,64]'))


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def unknown_words(folder):
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[a-q]+|."}
    path.write_text(json.dumps(spec))


def gone(name):
    return lambda folder: (folder / name).unlink()


FOUND_OUT = {
    "another architecture": (
        edited("config.json", architectures=["GemmaForCausalLM"]),
        "'GemmaForCausalLM'.* LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Llava",
    ),
    "quantised": (
        edited("config.json", quantization_config={"quant_method": "gptq"}),
        "quantised by 'gptq'; supported: numbers as they are, in F32, F16 or BF16",
    ),
    "another activation": (edited("config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "another rope": (
        edited("config.json", rope_scaling={"rope_type": "spiral"}),
        "rope_type is 'spiral'; supported: default, linear, dynamic, yarn, longrope, llama3",
    ),
    "a rope that does not turn": (edited("config.json", rope_theta=1), "rope.freq_base is 1"),
    "a factor beyond reason": (
        edited("config.json", rope_scaling={"rope_type": "yarn", "factor": 5000.0}),
        "config.json: llama.rope.scaling.factor is 5000.0; expected 1/1000 to 1000",
    ),
    "a number of 400 digits": (
        edited("config.json", rope_theta=10**400),
        "rope_theta must be a number that is not negative",
    ),
    "half a character": (
        lambda folder: (folder / "added_tokens.json").write_text('{"\\ud800": 48}'),
        "added_tokens.json has half a character",
    ),
    "no config": (gone("config.json"), "config.json is missing"),
    "no json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is no JSON that can be read",
    ),
    "nonsense": (edited("config.json", hidden_size="64"), "hidden_size must be a whole number"),
    "heads": (edited("config.json", num_key_value_heads=3), "4 heads, 3 of them for keys"),
    "fewer layers": (
        edited("config.json", num_hidden_layers=1),
        "tensors that a model of these settings does not have: model.layers.1.* and 6 more",
    ),
    "more layers": (
        edited("config.json", num_hidden_layers=3),
        "tensor model.layers.2.input_layernorm.weight is missing; expected, of the shape 64",
    ),
    "another width": (
        edited("config.json", intermediate_size=80),
        "mlp.gate_proj.weight has the shape 72 × 64; config.json asks for 80 × 64",
    ),
    "too few rows": (
        edited("config.json", vocab_size=40),
        "embed_tokens.weight has the shape 48 × 64; config.json asks for 40 × 64",
    ),
    "no tensors": (gone("model.safetensors"), "there is no file \\*.safetensors"),
    "a pickle in disguise": (pickled, "model.safetensors is a pickle, which may run code"),
    "only pickles": (only_pickles, "pytorch_model.bin is a pickle, which may run code"),
    "lying shapes": (lying, "F32 of the shape 49 × 64 takes 12544 bytes, but its data has 12288"),
    "cut off": (cut_off, "would end at byte"),
    "no tokenizer": (gone("tokenizer.json"), "the tokenizer is missing"),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(byte_level(60).to_str()),
        "the tokenizer does not belong to this model: .* id 48, but vocab_size is 48",
    ),
    "another kind of words": (unknown_words, "cuts text into words in a way that is not known"),
}


def test_more_experts_are_asked_than_there_are(tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mixtral"])
    edited("config.json", num_experts_per_tok=9)(folder)
    with pytest.raises(FormatError, match="expert_used_count is 9, but llama.expert_count is"):
        convert(Folder.at(folder))


def test_one_expert_is_a_stack_of_one(tmp_path):
    """It runs: a model takes as many as its file has."""
    settings, tensors = small("mixtral")
    one = {name: value for name, value in tensors.items() if not re.search(r"experts\.[1-9]", name)}
    one = {n: v[:1] if n.endswith("gate.weight") else v for n, v in one.items()}
    settings |= {"num_local_experts": 1, "num_experts_per_tok": 1}
    (path,) = converted(write_folder(tmp_path / "f", settings, one), tmp_path)
    assert np.isfinite(logits_of(load_net(path), [1, 5, 7], 3)).all()


def test_a_whole_file_counts_and_not_an_index_of_other_days(tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    outside(folder)
    assert convert(Folder.at(folder))


def test_ids_that_a_vocabulary_leaves_out_are_never_drawn(tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    token = next(t for t, id in spec["model"]["vocab"].items() if id == 20)
    del spec["model"]["vocab"][token]
    spec["model"]["merges"] = []
    path.write_text(json.dumps(spec))
    _, metadata = words(folder, tmp_path)
    assert metadata["tokenizer.ggml.tokens"][20] == "[PAD20]"
    assert metadata["tokenizer.ggml.token_type"][20] == TokenType.UNUSED


def test_of_templates_without_a_name_none_is_the_default(tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    rows = [{"name": [], "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": rows}))
    assert words(folder, tmp_path)[1]["tokenizer.chat_template"] == "b"


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    def pieces(self):
        yield b"GGUF"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Converted, "pieces", pieces)
    monkeypatch.setattr(Converted, "size", 4)
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    with pytest.raises(StoreError, match=r"model.gguf: No space left"), as_files(folder):
        pass


@pytest.mark.parametrize("what", FOUND_OUT)
def test_a_broken_folder_is_found_out(what, tmp_path):
    folder = write_folder(tmp_path / "f", MODELS["mistral"])
    harm, sentence = FOUND_OUT[what]
    harm(folder)
    with pytest.raises((FormatError, UnsupportedModel), match=sentence):
        convert(Folder.at(folder))


def wrong_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    swap = {first: second, second: first}
    index["weight_map"] = {name: swap[file] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def outside(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))


IN_SHARDS = {
    "a missing shard": (gone("model-00002-of-00002.safetensors"), "00002-of-00002.* is missing"),
    "a wrong index": (wrong_index, r"index.json says that .* is in model-.*, but it is not"),
    "a way out": (outside, r"\.\./other.safetensors is missing"),
    "no index": (gone("model.safetensors.index.json"), None),  # the numbers tell that all are there
}


@pytest.mark.parametrize("what", IN_SHARDS)
def test_shards_that_do_not_belong_together_are_found_out(what, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    folder = write_folder(tmp_path / "f", MODELS["mistral"], shards=2)
    harm, sentence = IN_SHARDS[what]
    harm(folder)
    if sentence is None:
        assert convert(Folder.at(folder))
        (folder / "model-00001-of-00002.safetensors").unlink()
        sentence = "model-00001-of-00002.safetensors is missing"
    with pytest.raises(
        FormatError, match=sentence.replace("0000.,", r"0000.-of-00002.safetensors,")
    ):
        convert(Folder.at(folder))
