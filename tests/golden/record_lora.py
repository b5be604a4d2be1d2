"""Record the logits of Hugging Face's model under an adapter, as PEFT applies it.

Run it from the project's root, in any environment that has numpy and these:

    pip install torch transformers peft safetensors
    python -m tests.golden.record_lora

It writes `logits-lora.json`: of the last few tokens, in float32.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft  # type: ignore[import-not-found, unused-ignore]
import safetensors.numpy  # type: ignore[import-not-found, unused-ignore]
import torch
import transformers  # type: ignore[import-not-found, unused-ignore]

from tests import adapters
from tests.golden.small_models import MODELS, some_tokens, weights

HERE = Path(__file__).parent
LAST, DIGITS = 6, 5
MODEL = "mistral"
NAMES = (*adapters.LINEARS, "output")
CHOICES: dict[str, Any] = {"alpha": 6, "use_rslora": True, "alpha_pattern": {"k_proj": 3}}
SHAPES = {
    "output.weight": (48, 64),
    **{f"blk.{n}.attn_{part}.weight": (64, 64) for n in (0, 1) for part in ("q", "output")},
    **{f"blk.{n}.attn_{part}.weight": (32, 64) for n in (0, 1) for part in ("k", "v")},
    **{f"blk.{n}.ffn_{part}.weight": (72, 64) for n in (0, 1) for part in ("gate", "up")},
    **{f"blk.{n}.ffn_down.weight": (64, 72) for n in (0, 1)},
}


def main() -> None:
    settings = MODELS[MODEL]
    tokens = torch.tensor(some_tokens(settings))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(settings))
        tensors = folder / "model.safetensors"
        safetensors.numpy.save_file(weights(settings), tensors, metadata={"format": "pt"})
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        targets = [*(module.split(".")[-1] for module in adapters.HF.values()), "lm_head"]
        more = {"target_modules": targets, "task_type": "CAUSAL_LM"}
        change = adapters.halves(SHAPES, NAMES)
        saved = adapters.write_peft(folder / "adapter", change, **CHOICES, **more)
        net = peft.PeftModel.from_pretrained(base, saved).eval()
    with torch.no_grad():
        logits = net(tokens[None]).logits[0, -LAST:]
    by = f"peft {peft.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    rows = ",\n".join(json.dumps([round(x, DIGITS) for x in row]) for row in logits.tolist())
    (HERE / "logits-lora.json").write_text(f'{{"recorded_by": "{by}",\n"logits": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
