"""Record the logits of Hugging Face's own models, as the judge of ours.

Run it from the project's root, in any environment that has numpy and these:

    pip install torch transformers safetensors
    python -m tests.golden.record_transformers

It writes one `logits-….json` for each small model, in float32 with the plain ("eager") attention.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy  # type: ignore[import-not-found, unused-ignore]
import torch
import transformers  # type: ignore[import-not-found, unused-ignore]

from tests.golden.small_models import MODELS, Settings, some_tokens, weights

HERE = Path(__file__).parent
DIGITS = 5  # after the point; the test allows ten times what is rounded away
VERSIONS = (
    f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
)


def main() -> None:
    print(VERSIONS)
    for name, settings in MODELS.items():
        tokens = some_tokens(settings)
        logits = record(settings, torch.tensor(tokens))
        path = HERE / f"logits-{name}.json"
        path.write_text(as_json(tokens.tolist(), logits.tolist()))
        print(f"{path.name}: {tuple(logits.shape)}, standard deviation {logits.std():.3f}")


def record(settings: Settings, tokens: torch.Tensor) -> torch.Tensor:
    """The model goes through files, as real ones do: (T,) → logits (T, V) after each token."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        tensors = Path(folder) / "model.safetensors"
        safetensors.numpy.save_file(weights(settings), tensors, metadata={"format": "pt"})
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    assert not any(report.values()), report  # nothing missing, nothing left over
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens[None]).logits[0]
    return logits


def as_json(tokens: list[int], logits: list[list[float]]) -> str:
    """One line for each token's logits."""
    rows = ",\n".join(json.dumps([round(x, DIGITS) for x in row]) for row in logits)
    return f'{{"recorded_by": "{VERSIONS}",\n"tokens": {tokens},\n"logits": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    main()
