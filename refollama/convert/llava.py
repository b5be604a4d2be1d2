"""LLaVA's checkpoint is two models in one: a language model, and eyes. Here they are told apart.

    language_model.model.layers.0 …   or model.language_model.layers.0 …   → the language model
    vision_tower.vision_model …       or model.vision_tower …              ┐
    multi_modal_projector …           or model.multi_modal_projector …     ┴→ the projector's file

The tower goes over whole; `clip.vision.feature_layer` says how many of its blocks are run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refollama.convert.config import DEFAULTS
from refollama.convert.folder import Folder, Settings
from refollama.convert.names import Slot, vision_slots
from refollama.errors import FormatError, UnsupportedModel
from refollama.weights.gguf import Typed, ValueType
from refollama.weights.safetensors import Stored

# Where a file is silent.  Source: the classes LlavaConfig and CLIPVisionConfig of transformers.
_WHOLE = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "model_type": "clip_vision_model",
}
_LLAVAS_OWN = _VISION | {  # if nothing at all is said of the tower
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

_NAMES = (
    (re.compile(r"(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(model\.)?language_model\.(model\.)?"), "model."),
    (re.compile(r"(model\.)?vision_tower\.(vision_model\.)?"), ""),
    (re.compile(r"(model\.)?multi_modal_projector\."), ""),
)


@dataclass(frozen=True, slots=True)
class Parted:
    """The two models, each with the names that it would have alone."""

    text_kind: str
    text: Settings
    tensors: Mapping[str, Stored]
    metadata: dict[str, Any]  # of the eyes
    slots: list[Slot]
    eyes: Mapping[str, Stored]


def parted(config: Settings, folder: Folder) -> Parted:
    """Raises: FormatError, UnsupportedModel for a LLaVA of another build."""
    whole = Settings(config.values, config.place, _WHOLE)
    given = whole.part("vision_config")
    vision = Settings(given.values, given.place, _VISION if given.values else _LLAVAS_OWN)
    _check_supported(whole, vision)
    text = whole.part("text_config")
    kind = text.word("model_type") or "llama"
    if kind not in DEFAULTS:
        raise text.refused("model_type", ", ".join(DEFAULTS))
    # What is said outside counts where the language model's own part is silent.
    tied = {"tie_word_embeddings": whole.get("tie_word_embeddings") or False}
    text = Settings({**tied, **text.values}, text.place)
    tensors, eyes = _apart(folder.tensors())
    width = Settings(text.values, text.place, DEFAULTS[kind]).size("hidden_size")
    slots = list(vision_slots(vision, width))
    slots = slots if whole.get("multimodal_projector_bias") else _without_bias(slots)
    if _blocks(whole, vision) == vision.size("num_hidden_layers"):
        slots, eyes = _without_last_norm(slots, eyes)
    return Parted(kind, text, tensors, _metadata(whole, vision, folder, width), slots, eyes)


def _apart(stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The language model's tensors, and those of the eyes."""
    tensors: dict[str, Stored] = {}
    eyes: dict[str, Stored] = {}
    for name, one in stored.items():
        for pattern, beginning in _NAMES:
            if match := pattern.match(name):
                target = tensors if beginning else eyes
                target[beginning + name[match.end() :]] = one
                break
        else:
            tensors[name] = one
    return tensors, eyes


def _without_bias(slots: list[Slot]) -> list[Slot]:
    return [slot for slot in slots if slot.name not in ("mm.0.bias", "mm.2.bias")]


def _without_last_norm(
    slots: list[Slot], eyes: Mapping[str, Stored]
) -> tuple[list[Slot], dict[str, Stored]]:
    """LLaVA takes what the last block gives; a file that holds the norm behind it would use it."""
    kept = [slot for slot in slots if not slot.name.startswith("v.post_ln.")]
    return kept, {n: one for n, one in eyes.items() if not n.startswith("post_layernorm.")}


def _check_supported(whole: Settings, vision: Settings) -> None:
    wanted = (
        (whole, "projector_hidden_act", ("gelu",)),
        (whole, "vision_feature_select_strategy", ("default",)),
        (vision, "model_type", ("clip_vision_model",)),
        (vision, "hidden_act", ("quick_gelu", "gelu")),
        (vision, "num_channels", (3,)),
    )
    for settings, key, supported in wanted:
        if settings.get(key) not in supported:
            raise settings.refused(key, ", ".join(map(str, supported)))


def _metadata(whole: Settings, vision: Settings, folder: Folder, width: int) -> dict[str, Any]:
    mean, std = _colours(folder)
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.has_text_encoder": False,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.get("hidden_act") == "gelu",
        "clip.vision.image_size": vision.size("image_size"),
        "clip.vision.patch_size": vision.size("patch_size"),
        "clip.vision.embedding_length": vision.size("hidden_size"),
        "clip.vision.feed_forward_length": vision.size("intermediate_size"),
        "clip.vision.attention.head_count": vision.size("num_attention_heads"),
        "clip.vision.attention.layer_norm_epsilon": vision.number("layer_norm_eps"),
        "clip.vision.block_count": vision.size("num_hidden_layers"),
        "clip.vision.projection_dim": width,
        "clip.vision.feature_layer": Typed([_blocks(whole, vision)], ValueType.INT32),
        "clip.vision.image_mean": Typed(mean, ValueType.FLOAT32),
        "clip.vision.image_std": Typed(std, ValueType.FLOAT32),
    }


def _blocks(whole: Settings, vision: Settings) -> int:
    """How many blocks of the tower are run: state 0 is what goes in, −1 what the last one gives."""
    layer, count = whole.get("vision_feature_layer"), vision.size("num_hidden_layers")
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if type(layer) is not int:
        raise whole.refused("vision_feature_layer", "one number")
    found = layer + count + 1 if layer < 0 else layer
    if not 1 <= found <= count:
        raise UnsupportedModel(
            f"{whole.place}: vision_feature_layer is {layer}, but the tower has {count} layers"
        )
    return found


def _colours(folder: Folder) -> tuple[list[float], list[float]]:
    """Mean and spread of each colour in the pictures that it was trained on."""
    known = folder.settings("preprocessor_config.json")
    if not known.values:
        known = folder.settings("processor_config.json").part("image_processor")
    known = Settings(known.values, known.place, {"image_mean": CLIP_MEAN, "image_std": CLIP_STD})
    mean, std = known.numbers("image_mean", 3), known.numbers("image_std", 3)
    if min(std) <= 0:
        raise FormatError(f"{known.place}: image_std must be above 0")
    return mean, std
