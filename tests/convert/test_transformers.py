"""Folders that `transformers` and `peft` themselves save: the same ids, logits and answers there.

The recorded numbers of `tests/golden` were made from folders that we write. Here the libraries
write weights, shards, settings and tokenizers of small random models, and are asked again. Neither
belongs to the project's tools, so without them the tests are skipped:

    pip install transformers peft
    pytest -m slow tests/convert/test_transformers.py
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, trainers

import refollama
from refollama.convert import as_files
from refollama.errors import UnsupportedModel
from refollama.export import Exported, export
from refollama.models.llava import Llava
from refollama.text.bpe import PATTERNS, cutter
from tests.golden.small_llava import VISION, picture
from tests.models.test_recorded import logits_of
from tests.text.vocabularies import train_pieces

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of other people's code

LIMIT = 1e-3
TEXT = json.loads((Path(__file__).parents[1] / "golden" / "perplexity.json").read_text())["text"]
# None begins with a space: there the library leaves out the space that SentencePiece puts in front.
TEXTS = [TEXT, "in  an era 12345", "é 中文 🙂 \n\n x", "I'm you'RE camelCase", "", "\n a  "]
PROMPT = "Once upon a time there was a dog"
GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 12}

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {  # family, its settings, its kind of words
    "llama": ("Llama", {"rms_norm_eps": 1e-5}, "pieces"),
    "llama-3": ("Llama", {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}, "bytes"),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "attention_bias": True}, "merges"),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 24}, "pieces"),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "merges"),
    "llava": ("Llava", {}, "merges"),
}


@pytest.fixture(scope="module")
def hf():
    """The library; it is imported when a test runs, as that takes seconds."""
    return pytest.importorskip("transformers")


# ── what the library saves ────────────────────────────────────────────────────────────────────


def of_pieces(hf, folder):
    """Its form of merges, which the library runs; `folder` gets the vocabulary itself."""
    data = train_pieces(TEXT.split(". "), 420)  # as that of Llama 2 was made
    found = sentencepiece.SentencePieceProcessor(model_proto=data)
    vocab = {found.id_to_piece(id): id for id in range(found.vocab_size())}
    merges = [
        (-found.get_score(id), (piece[:at], piece[at:]))
        for piece, id in vocab.items()
        for at in range(1, len(piece))
        if not found.is_byte(id) and piece[:at] in vocab and piece[at:] in vocab
    ]
    if folder is not None:
        (folder / "tokenizer.model").write_bytes(data)
    pairs = [pair for _, pair in sorted(merges)]
    return hf.LlamaTokenizer(vocab=vocab, merges=pairs, add_bos_token=True)


def of_bytes(hf):
    """A vocabulary of bytes and their merges, with the words of Llama 3."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = cutter(PATTERNS["llama3"]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    found.train_from_iterator([TEXT], trainer)
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    found.add_special_tokens([begin, end])
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, found.token_to_id(begin))]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, bos_token=begin, eos_token=end)


def saved_words(hf, folder, kind):
    """The tokenizer in the folder, and as the library has it."""
    beside = folder if kind == "pieces" else None
    words = of_bytes(hf) if kind == "bytes" else of_pieces(hf, beside)
    words.save_pretrained(folder)
    return words


def random_model(hf, family, settings, words):
    """Norms near 1, biases small, rows of matrices of length 1."""
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    settings = SIZES | {"vocab_size": len(words)} | ids | settings
    if family == "Llava":
        settings = {
            "text_config": hf.LlamaConfig(**settings | {"vocab_size": len(words) + 1}),
            "vision_config": hf.CLIPVisionConfig(**VISION),
            "image_token_index": len(words),
        }
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**settings))
    else:
        config = getattr(hf, f"{family}Config")(**settings)
        model = getattr(hf, f"{family}ForCausalLM")(config)
    torch.manual_seed(5)
    for name, values in model.named_parameters():
        matrix = values.dim() > 1
        values.data.normal_(std=values.shape[-1] ** -0.5 if matrix else 0.1)
        if "norm" in name and name.endswith("weight"):
            values.data += 1
    return model.eval()


def saved(hf, folder, name, shard="1GB"):
    """A model and its words, of which the folder is full."""
    family, settings, kind = MODELS[name]
    folder.mkdir()
    words = saved_words(hf, folder, kind)
    model = random_model(hf, family, settings, words)
    model.save_pretrained(folder, max_shard_size=shard)
    return model, words


# ── the same model ────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_logits_and_answers_are_those_of_the_library(hf, name, shards, tmp_path):
    folder = tmp_path / "saved"
    model, words = saved(hf, folder, name, "1GB" if shards == "one" else "40KB")
    files = len(list(folder.glob("*.safetensors")))
    assert files == 1 if shards == "one" else files > 3
    with refollama.load(folder) as llm:
        for text in TEXTS:
            assert llm.tokenizer.encode(text, bos=True) == words(text).input_ids
        ids = words(PROMPT, return_tensors="pt").input_ids
        wanted = model(ids).logits[0]
        assert wanted.std() > 0.3  # else a limit would say nothing
        assert (llm.logits(ids[0].tolist()) - wanted).abs().max() < LIMIT
        answer = model.generate(ids, do_sample=False, max_new_tokens=GREEDY["num_predict"])
        assert list(llm.generate(PROMPT, GREEDY).record.context) == answer[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_library_loads_what_is_exported(hf, name, tmp_path):
    """There, to our files, and back again: the same logits and ids, to the last bit."""
    model, words = saved(hf, tmp_path / "saved", name)
    with as_files(tmp_path / "saved") as files:
        eyes = next(iter(files[1:]), None)
        export(Exported(files[0], eyes), tmp_path / "back", shard=40_000)
    back = type(model).from_pretrained(tmp_path / "back").eval()
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in TEXTS:
        assert again(text).input_ids == words(text).input_ids
        assert again.decode(again(text).input_ids) == words.decode(words(text).input_ids)
    ids = words(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(back(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_half_the_size_are_what_they_were(hf, dtype, tmp_path):
    model, words = saved(hf, tmp_path / "whole", "mistral")
    model.to(dtype).save_pretrained(tmp_path / "half")
    words.save_pretrained(tmp_path / "half")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    ids = words(PROMPT, return_tensors="pt").input_ids
    with refollama.load(tmp_path / "half") as llm:
        assert (llm.logits(ids[0].tolist()) - again(ids).logits[0]).abs().max() < LIMIT


@torch.no_grad()
def test_a_picture_is_seen_as_the_library_sees_it(hf, tmp_path):
    """From its file to the logits; the colours' mean and spread are this model's own."""
    folder, side = tmp_path / "saved", VISION["image_size"]
    model, words = saved(hf, folder, "llava")
    images = hf.CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.2, 0.25],
    )
    hf.LlavaProcessor(images, words, patch_size=6, image_token="<unk>").save_pretrained(folder)
    image, file = Image.fromarray(picture(side, side)), io.BytesIO()
    image.save(file, "PNG")
    pixels = torch.as_tensor(np.asarray(images(image)["pixel_values"][0]))[None]
    before, after = words("Once upon").input_ids, words(" a time").input_ids[1:]
    shown = [model.config.image_token_index] * (side // 6) ** 2
    wanted = model(torch.tensor([[*before, *shown, *after]]), pixel_values=pixels).logits[0]
    with refollama.load(folder) as llm:
        assert isinstance(llm.net, Llava)
        found = llm.net.picture(file.getvalue())
        llm.net.look(found)
        ids = [*before, *found.ids, *after]
        off = np.abs(logits_of(llm.net, ids, len(ids)) - wanted.numpy())
    assert off.max() < LIMIT


# ── adapters ──────────────────────────────────────────────────────────────────────────────────

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"lora_alpha": 16, "target_modules": LINEARS}),
    "root of the rank": (
        "mistral",
        {"lora_alpha": 5, "target_modules": [*LINEARS, "lm_head"], "use_rslora": True},
    ),
    "each its own": (
        "llama-yarn",
        {
            "lora_alpha": 8,
            "target_modules": LINEARS,
            "rank_pattern": {"k_proj": 2, "model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 3, "^model.layers.0.self_attn.v_proj": 20},
        },
    ),
    "the embedding": ("llama", {"lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]}),
    "experts": ("mixtral", {"lora_alpha": 8, "target_modules": LINEARS[:4]}),
}


@pytest.fixture(scope="module")
def peft(hf):
    """The library of adapters."""
    return pytest.importorskip("peft")


def changed(peft, model, folder, choices):
    """The model under an adapter that is not a whisper, which the folder has."""
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **choices)
    net = peft.get_peft_model(model, config).eval()
    for name, values in net.named_parameters():
        if "lora_" in name:
            values.data.normal_(std=0.3)
    net.save_pretrained(folder)
    return net


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_changes_what_it_changes_in_its_library(hf, peft, name, tmp_path):
    base, choices = ADAPTERS[name]
    model, words = saved(hf, tmp_path / "base", base)
    ids = words(PROMPT, return_tensors="pt").input_ids
    before = model(ids).logits[0]
    wanted = changed(peft, model, tmp_path / "lora", choices)(ids).logits[0]
    assert (wanted - before).abs().max() > 100 * LIMIT
    with refollama.load(tmp_path / "base", adapter=tmp_path / "lora") as llm:
        assert (llm.logits(ids[0].tolist()) - wanted).abs().max() < LIMIT


def test_a_kind_of_adapter_that_is_not_known_is_refused(hf, peft, tmp_path):
    model, _ = saved(hf, tmp_path / "base", "llama")
    changed(peft, model, tmp_path / "lora", {"target_modules": LINEARS, "use_dora": True})
    with pytest.raises(UnsupportedModel, match="use_dora"):
        refollama.load(tmp_path / "base", adapter=tmp_path / "lora")
