"""Small checkpoints, written as folders by the `safetensors` library: what the importer is fed."""

import json

import numpy as np
import sentencepiece
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from refollama.text.bpe import PATTERNS, cutter
from refollama.text.pieces import Pieces, write
from tests.golden.small_llava import TEXT as LLAVA_TEXT
from tests.golden.small_llava import TOWERS, text_weights, vision_weights
from tests.golden.small_models import MODELS, weights
from tests.tiny import SCORES, TOKENS, TYPES

WORDS = ("th", "he", "in", "er", "an", "the", "▁the", "▁a", "ing", "▁w", "ed", "▁an", "and", "▁and")


def write_folder(path, settings, tensors=None, *, shards=1, tokenizer=True):
    """A checkpoint: config.json, one file of tensors or several with an index, a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    tensors = weights(settings) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(path, tensors, shards)
    if tokenizer:
        count = settings.get("text_config", settings)["vocab_size"]
        (path / "tokenizer.json").write_text(byte_level(count).to_str())
    return path


def write_shards(path, tensors, count):
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    places = {name: names[at % count] for at, name in enumerate(tensors)}
    for shard in names:
        save_file({n: tensors[n] for n in tensors if places[n] == shard}, path / shard)
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_llava(path, activation="quick_gelu", **more):
    """The LLaVA of `tests/golden`."""
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 47,
        "text_config": LLAVA_TEXT,
        "vision_config": TOWERS[activation] | {"model_type": "clip_vision_model"},
    }
    tensors = {f"vision_tower.vision_model.{n}": x for n, x in vision_weights().items()}
    tensors = {n.replace("vision_tower.vision_model.multi", "multi"): x for n, x in tensors.items()}
    for name, values in text_weights().items():
        inner = name.replace("language_model.", "model.")
        tensors[f"language_model.{inner}"] = values
    return write_folder(path, settings, tensors, **more)


def byte_level(count, pre="llama3", *, bos=None):
    """A byte-level tokenizer of so many tokens or, if there is room, 256 bytes and some merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:count]
    merges = [(a, b) for a, b in (("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("1", "2"))]
    merges = merges if count > 270 else []
    vocab = {letter: id for id, letter in enumerate([*letters, *map("".join, merges)])}
    cut = PATTERNS[pre]
    found = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=cut.whole_words))
    found.pre_tokenizer = cutter(cut)
    found.decoder = decoders.ByteLevel()
    if bos:
        found.add_special_tokens([bos])
        id = found.token_to_id(bos)
        found.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, id)]
        )
    return found


def merging():
    """A SentencePiece vocabulary in the form of merges, as folders have it since 2023."""
    alphabet = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *alphabet, *WORDS]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [
        (word[:at], word[at:])
        for word in WORDS
        for at in range(1, len(word))
        if word[:at] in vocab and word[at:] in vocab
    ]
    found = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    found.add_special_tokens(["<unk>", "<s>", "</s>"])
    return found


def sentencepiece_model():
    """The vocabulary of `tests/tiny.py` as a file, and the library's own reading of it."""
    data = write(Pieces(list(zip(TOKENS, SCORES, TYPES, strict=True))))
    return data, sentencepiece.SentencePieceProcessor(model_proto=data)


def small(name="mistral"):
    """Settings and tensors that a test may change."""
    return dict(MODELS[name]), {k: np.array(v) for k, v in weights(MODELS[name]).items()}
