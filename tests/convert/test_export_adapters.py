"""The exported folder, loaded again, gives the logits of the running model with its adapter."""

from typing import Any

import pytest
import torch

from refollama import load
from refollama.errors import UnsupportedModel
from refollama.export import Exported, export
from refollama.export.tensors import Source
from tests import tiny
from tests.adapters import halves, write_plain

IDS = [1, 5, 9, 12]
EXPERTS: dict[str, Any] = {"expert_count": 3, "expert_used_count": 2}


def adapter_for(path, names, **changes):
    shapes = tiny.shapes(tiny.metadata(**changes))
    shapes = {"output.weight": shapes["token_embd.weight"]} | shapes
    return write_plain(path, halves(shapes, names, rank=2))


def exported(model, adapters, place, format):
    """→ the exported model, as `load` takes it"""
    export(Exported(model, adapters=adapters), place, format)
    return place if format == "safetensors" else place / "model.gguf"


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
@pytest.mark.parametrize("names", [["output"], ["token_embd"], ["output", "token_embd"]])
def test_of_a_tied_table_the_use_is_changed_that_the_adapter_names(names, format, tmp_path):
    model = tiny.write_model(tmp_path / "a.gguf", tied=True)
    lora = adapter_for(tmp_path / "lora.gguf", names)
    running = load(model, adapter=lora).logits(IDS)
    again = load(exported(model, [lora], tmp_path / "b", format)).logits(IDS)
    assert torch.allclose(again, running, atol=1e-3)
    assert not torch.allclose(load(model).logits(IDS), running, atol=1e-1)


def test_a_tied_table_stays_one_if_the_adapter_changes_other_tensors(tmp_path):
    model = tiny.write_model(tmp_path / "a.gguf", tied=True)
    lora = adapter_for(tmp_path / "lora.gguf", ["blk.0.attn_q"])
    assert Source.of(model, [lora]).tied
    assert not Source.of(model, [adapter_for(tmp_path / "lora2.gguf", ["output"])]).tied


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
@pytest.mark.parametrize("are_apart", [True, False])
def test_each_expert_gets_its_change_however_they_lie(are_apart, format, tmp_path):
    model = tiny.write_model(tmp_path / "a.gguf", **EXPERTS)
    model = tiny.apart(model, tmp_path / "old.gguf", 3) if are_apart else model
    names = ["blk.0.ffn_down_exps", "blk.1.ffn_gate_exps"]
    lora = adapter_for(tmp_path / "lora.gguf", names, **EXPERTS)
    running = load(model, adapter=lora).logits(IDS)
    again = load(exported(model, [lora], tmp_path / "b", format)).logits(IDS)
    assert torch.allclose(again, running, atol=1e-3)
    assert not torch.allclose(load(model).logits(IDS), running, atol=1e-1)


def test_a_change_that_would_get_lost_is_refused(tmp_path):
    """An adapter of one expert alone, which no net has a part for: it does not run either."""
    model = tiny.apart(tiny.write_model(tmp_path / "a.gguf", **EXPERTS), tmp_path / "old.gguf", 3)
    a, b = torch.ones(2, 96).numpy(), torch.ones(64, 2).numpy()
    lora = write_plain(tmp_path / "lora.gguf", {"blk.0.ffn_down.1": (a, b)})
    for format in ("safetensors", "gguf"):
        with pytest.raises(UnsupportedModel, match=r"lora.gguf: .*blk.0.ffn_down.1"):
            export(Exported(model, adapters=[lora]), tmp_path / "b", format)
    with pytest.raises(UnsupportedModel, match=r"lora.gguf: .*blk.0.ffn_down.1"):
        load(model, adapter=lora)
