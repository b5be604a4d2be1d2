"""Record which type llama.cpp gives to each tensor when it quantises a model.

Run it from the project's root, in any environment that has torch and these:

    pip install llama-cpp-python gguf
    python -m tests.golden.record_mixes

It writes `mixes.json`: for each small model and each type of file the types of its tensors, layer
by layer. Tensors that are no matrices all stay F32, and are left out.
"""

import ctypes
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp  # type: ignore[import-not-found, unused-ignore]

from refollama.weights.mixes import MIXES
from tests import tiny
from tests.golden.mixed_models import MODELS, Types, by_types, settings

VERSIONS = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}"


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            source = tiny.write_model(Path(folder, "source.gguf"), **settings(name))
            found[name] = {
                type: chosen(source, Path(folder, "packed.gguf"), mix.number)
                for type, mix in MIXES.items()
            }
            print(name)
    Path(__file__).with_name("mixes.json").write_text(as_json(found))


def as_json(found: dict[str, dict[str, Types]]) -> str:
    """One line for each model and type of file."""
    models = []
    for name, types in found.items():
        lines = [f'"{type}": {json.dumps(parts)}' for type, parts in types.items()]
        models.append(f'"{name}": {{\n' + ",\n".join(lines) + "}")
    return f'{{"recorded_by": "{VERSIONS}",\n' + ",\n".join(models) + "}\n"


def chosen(source: Path, target: Path, number: int) -> Types:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = number, 1
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    assert not failed
    tensors = [t for t in gguf.GGUFReader(target).tensors if len(t.shape) > 1]
    return by_types({tensor.name: tensor.tensor_type.name for tensor in tensors})


if __name__ == "__main__":
    main()
