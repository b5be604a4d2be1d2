"""A language model and its eyes as one LLaVA checkpoint: `convert.llava`, the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.nn import functional

from refollama.convert.folder import Settings
from refollama.convert.names import Slot, vision_slots
from refollama.errors import UnsupportedModel
from refollama.export.settings import short
from refollama.export.tensors import Source, filled, with_rows
from refollama.export.words import Files, found_first
from refollama.models.clip import ClipConfig, quick_gelu
from refollama.weights.gguf import GGUF
from refollama.weights.safetensors import Made

IMAGE = "<image>"  # the token that stands where a picture does
MLP = ("mlp",)  # kinds of projectors that transformers' LLaVA has
TURNED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
OPTIONAL = ("v.post_ln.", "mm.0.bias", "mm.2.bias")  # which some files leave out


def joined(
    config: dict[str, Any],
    tensors: Mapping[str, Made],
    eyes: Source,
    vocabulary: Files,
    dtype: str,
) -> tuple[dict[str, Any], dict[str, Made]]:
    """Settings and tensors of both.  A vocabulary without `<image>` gets it in place of a token
    that nobody uses, or behind its last one.

    Raises: UnsupportedModel for eyes that are none of LLaVA's, FormatError.
    """
    clip = ClipConfig.from_metadata(eyes.file.metadata)
    _check_supported(eyes.file, clip)
    image, is_new = _image_token(vocabulary, config["vocab_size"])
    if is_new:
        config = config | {"vocab_size": config["vocab_size"] + 1}
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = {n: with_rows(t, 1) if n in tables else t for n, t in tensors.items()}
    whole = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "mm.0.bias" in eyes.weights,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": clip.n_blocks - clip.n_stored - 1,
        "image_seq_length": clip.grid**2,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["torch_dtype"],
        "text_config": config,
        "vision_config": _tower(clip, config["hidden_size"]),
    }
    seen = {_vision_name(n): t for n, t in _seen(eyes, clip, config["hidden_size"], dtype).items()}
    return whole, {f"language_model.{name}": one for name, one in tensors.items()} | seen


def _check_supported(file: GGUF, clip: ClipConfig) -> None:
    """The tensors tell kinds apart, as files say "mlp" for three of them."""
    kind = str(file.metadata.get("clip.projector_type", "mlp"))
    if kind == "mlp" and "mm.2.weight" not in file.tensors:
        kind = "mlp_norm" if "mm.3.weight" in file.tensors else "linear"
    if kind not in MLP:
        raise UnsupportedModel(
            f"{file.path.name}: transformers' LLaVA has no projector of the kind {kind[:40]!r}; "
            f"supported: {', '.join(MLP)}"
        )
    if clip.activation not in (quick_gelu, functional.gelu):
        raise UnsupportedModel(f"{file.path.name}: transformers' CLIP has no SiLU in its tower")
    if clip.n_blocks == clip.n_stored and "v.post_ln.weight" in file.tensors:
        raise UnsupportedModel(
            f"{file.path.name}: a norm follows the tower's last block; transformers' LLaVA reads "
            "what is before it"
        )


def _tower(clip: ClipConfig, width: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": clip.d_model,
        "intermediate_size": clip.d_ff,
        "num_hidden_layers": clip.n_stored,
        "num_attention_heads": clip.n_heads,
        "image_size": clip.image_size,
        "patch_size": clip.patch_size,
        "projection_dim": width,
        "layer_norm_eps": short(clip.norm_eps),
        "hidden_act": "quick_gelu" if clip.activation is quick_gelu else "gelu",
    }


def _seen(eyes: Source, clip: ClipConfig, width: int, dtype: str) -> dict[str, Made]:
    """The tensors of tower and projector."""
    slots = vision_slots(Settings(_tower(clip, width), "the tower"), width)
    found = eyes.made([_as_stored(slot, eyes) for slot in slots], dtype)
    # Nothing that runs is behind this norm; but the class has it.
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        found.setdefault(f"post_layernorm.{name}", filled(value, (clip.d_model,), dtype))
    return found


def _as_stored(slot: Slot, eyes: Source) -> Slot:
    """Files of 2023 call "down" what goes up, and the other way round; and may leave some out."""
    slot = replace(slot, optional=slot.name.startswith(OPTIONAL))
    part, _, kind = slot.name.rpartition(".")
    stored = eyes.weights.get(f"{part}.weight")
    if stored is None or stored.shape[0] == slot.shape[0] or not part.endswith(tuple(TURNED)):
        return slot
    layer, _, name = part.rpartition(".")
    return replace(slot, name=f"{layer}.{TURNED[name]}.{kind}")


def _vision_name(name: str) -> str:
    is_projector = name.startswith("linear_")
    return f"{'multi_modal_projector' if is_projector else 'vision_tower.vision_model'}.{name}"


# ── words and pictures ───────────────────────────────────────────────────────────────────────────


def _image_token(vocabulary: Files, size: int) -> tuple[int, bool]:
    """The id of `<image>`, and whether it is new: it is put into the tokenizer's files then."""
    spec, about = vocabulary["tokenizer.json"], vocabulary["tokenizer_config.json"]
    assert isinstance(spec, dict) and isinstance(about, dict)
    about["image_token"] = IMAGE
    known: dict[str, int] = spec["model"]["vocab"]
    if IMAGE in known:
        return known[IMAGE], False
    spare = [id for token, id in known.items() if token == f"[PAD{id}]"]
    image = max(spare, default=size)
    known.pop(f"[PAD{image}]", None)
    row = found_first(IMAGE, special=True)
    known[IMAGE] = image
    spec["added_tokens"].append({"id": image, **row})
    about["added_tokens_decoder"][str(image)] = row
    return image, not spare


def preprocessor(file: GGUF) -> dict[str, Any]:
    """What is done to pictures: preprocessor_config.json"""
    clip = ClipConfig.from_metadata(file.metadata)
    side = {"height": clip.image_size, "width": clip.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": clip.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [short(x) for x in clip.mean],
        "image_std": [short(x) for x in clip.std],
        "patch_size": clip.patch_size,
    }
