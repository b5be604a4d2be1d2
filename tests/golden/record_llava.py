"""Record what Hugging Face's own LLaVA sees and says, as the judge of ours.

Run it from the project's root, in any environment that has numpy and these:

    pip install torch transformers pillow
    python -m tests.golden.record_llava

It writes `llava.json`, in float32 with the plain ("eager") attention.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers  # type: ignore[import-not-found, unused-ignore]
from PIL import Image

from tests.golden.small_llava import (
    MEAN,
    PICTURE,
    STD,
    TEXT,
    TOWERS,
    VISION,
    picture,
    some_pixels,
    some_prompt,
    text_weights,
    vision_weights,
)

HERE = Path(__file__).parent
DIGITS = 5  # after the point; the test allows ten times what is rounded away
VERSIONS = (
    f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
)
SHAPES = [(30, 50), (50, 30), (20, 12), (24, 24)]  # of pictures: height, width


def main() -> None:
    print(VERSIONS)
    found: dict[str, Any] = {"recorded_by": VERSIONS}
    found["towers"] = {name: rounded(tower(settings)) for name, settings in TOWERS.items()}
    found["logits"] = rounded(llava())
    found["pixels"] = {f"{h} x {w}": rounded(preprocessed(h, w)) for h, w in SHAPES}
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in found.items())
    (HERE / "llava.json").write_text(f"{{\n{lines}\n}}\n")


@torch.no_grad()
def tower(settings: dict[str, Any]) -> torch.Tensor:
    """What the last block but one gives for each patch: (patches, d_model)."""
    config = transformers.CLIPVisionConfig(**settings, attn_implementation="eager")
    model = transformers.CLIPVisionModel(config).eval()
    fill(model, vision_weights())
    pixels = torch.from_numpy(some_pixels())[None]
    states = model(pixels, output_hidden_states=True).hidden_states
    return states[-2][0, 1:]


@torch.no_grad()
def llava() -> torch.Tensor:
    """Logits after each place of the prompt: (T, V)."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWERS["quick_gelu"]),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=PICTURE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    fill(model, vision_weights() | text_weights())
    ids = torch.tensor(some_prompt())[None]
    pixels = torch.from_numpy(some_pixels())[None].repeat(2, 1, 1, 1)
    logits: torch.Tensor = model(ids, pixel_values=pixels).logits[0]
    return logits


def fill(model: torch.nn.Module, given: dict[str, Any]) -> None:
    """Each tensor of the model gets the one of its name's ending; nothing may be left without."""
    for name, tensor in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        (found,) = (v for e, v in given.items() if name == e or name.endswith(f".{e}"))
        assert tensor.shape == found.shape, name
        tensor.copy_(torch.from_numpy(found))


def preprocessed(height: int, width: int) -> torch.Tensor:
    """As the published preprocessing does it: (3, S, S)."""
    size = VISION["image_size"]
    processor = transformers.LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    image = Image.fromarray(picture(height, width))
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))


def rounded(tensor: torch.Tensor) -> Any:
    return np.round(np.asarray(tensor, np.float64), DIGITS).tolist()


if __name__ == "__main__":
    main()
