"""Where weights lie changes nothing of what they are."""

import ctypes
import ctypes.util
import gc
import logging
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from refollama.loaded import LoadedModel
from refollama.models import memory
from refollama.models.load import load_eyes, load_net
from refollama.models.memory import Placement, fitting, place, to_gpu
from refollama.options import Options
from refollama.text import tokenizer_from
from refollama.weights.gguf import open_gguf
from tests.models.test_llama import all_logits, some_tokens
from tests.tiny import write_model
from tests.tiny_llava import write_eyes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def placed(path, **options):
    net = load_net(path)
    place(net, path, Placement.of(Options(**options)))
    return net


def maps(path):
    """Does this process map the file still?"""
    return str(path) in Path("/proc/self/maps").read_text()


def locked():
    """Bytes that this process has locked."""
    found = re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize(
    "options", [{"use_mmap": False}, {"use_mlock": True}, {"use_mmap": False, "use_mlock": True}]
)
def test_the_same_logits_from_everywhere(tmp_path, options):
    path = write_model(tmp_path / "m.gguf", type="Q8_0")
    tokens = some_tokens(9)
    assert torch.equal(
        all_logits(placed(path, **options), tokens), all_logits(load_net(path), tokens)
    )


@linux
def test_without_mmap_the_file_is_let_go_of(tmp_path, measured):
    path = write_model(tmp_path / "m.gguf")
    mapped = placed(path)
    assert maps(path)
    del mapped
    net = placed(path, use_mmap=False)
    gc.collect()
    assert not maps(path)
    assert all_logits(net, some_tokens(3)).isfinite().all()
    measured("options", "use_mmap", "definition", "equal")


def test_a_table_that_is_used_twice_is_read_once(tmp_path):
    net = placed(write_model(tmp_path / "m.gguf", tied=True), use_mmap=False)
    assert net.output.weight.data_ptr() == net.token_embd.weight.data_ptr()


@linux
@pytest.mark.parametrize("use_mmap", [True, False])
def test_locked_pages_stay_as_long_as_the_net(tmp_path, use_mmap, measured):
    path = write_model(tmp_path / "m.gguf")
    before = locked()
    net = placed(path, use_mlock=True, use_mmap=use_mmap)
    if locked() == before:
        pytest.skip("this system lets nobody lock memory")
    assert locked() - before >= sum(tensor.nbytes for tensor in net.buffers()) * 0.9
    del net
    gc.collect()
    assert locked() == before
    measured("options", "use_mlock", "definition", "equal")


@linux
def test_eyes_are_locked_too(tmp_path):
    path, eyes = write_model(tmp_path / "m.gguf"), write_eyes(tmp_path / "eyes.gguf")
    before = locked()
    net = load_net(path, eyes=load_eyes(eyes))
    place(net, path, Placement.of(Options(use_mlock=True)), projector=eyes)
    if locked() == before:
        pytest.skip("this system lets nobody lock memory")
    assert locked() - before >= path.stat().st_size + eyes.stat().st_size


def test_a_system_that_forbids_locking_is_told_about(tmp_path, monkeypatch, caplog):
    refuses = types.SimpleNamespace(mlock=lambda address, size: -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: refuses)
    monkeypatch.setattr(ctypes, "get_errno", lambda: 12)
    with caplog.at_level(logging.WARNING):
        net = placed(write_model(tmp_path / "m.gguf"), use_mlock=True)
    (record,) = caplog.records
    assert "not locked" in record.getMessage() and "ulimit -l" in record.getMessage()
    assert all_logits(net, some_tokens(3)).isfinite().all()


def test_numa_reads_the_weights_while_memory_is_spread(tmp_path, monkeypatch, measured):
    """The library as numa(3) describes it; the weights are copied between the two calls."""
    calls = []

    class Library:
        def numa_set_interleave_mask(self, mask):
            calls.append(mask)

    monkeypatch.setattr(memory, "_libnuma", Library)
    monkeypatch.setattr(ctypes.c_void_p, "in_dll", lambda lib, name: name, raising=False)
    real = memory.read_in

    def read_in(net, count):
        calls.append("read")
        real(net)

    monkeypatch.setattr(memory, "read_in", read_in)
    placed(write_model(tmp_path / "m.gguf"), numa=True)
    assert calls == ["numa_all_nodes_ptr", "read", "numa_no_nodes_ptr"]
    measured("options", "numa", "definition", "equal")


def test_without_the_library_numa_is_told_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with caplog.at_level(logging.WARNING):
        placed(write_model(tmp_path / "m.gguf"), numa=True)
    assert "needs the library libnuma" in caplog.text


@pytest.mark.parametrize(
    ("free", "layers"), [(0, 0), (9, 0), (10, 1), (25, 2), (30, 3), (34, 3), (35, 4), (100, 4)]
)
def test_as_many_layers_as_fit_from_the_last_on(free, layers, measured):
    """Three blocks of ten bytes and an output of five."""
    assert fitting([10, 10, 10], 5, free) == layers
    measured("options", "num_gpu", "definition", "equal")


def test_a_large_layer_ends_the_count():
    assert fitting([1, 50, 10, 10], 5, 30) == 2


def test_without_a_gpu_nothing_moves(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    net = placed(write_model(tmp_path / "m.gguf"), num_gpu=99, main_gpu=7)
    assert {tensor.device.type for tensor in net.buffers()} == {"cpu"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("layers", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("low_vram", [False, True])
def test_layers_on_another_device_compute_the_same(tmp_path, device, layers, low_vram):
    """Split anywhere, with a context that shifts; on the CPU it proves the arithmetic alone."""
    path = write_model(tmp_path / "m.gguf", type="Q8_0", seed=4)
    net, tokens = load_net(path), some_tokens(20)
    expected = all_logits(net, tokens)
    if layers >= 0 or device == "cuda":
        to_gpu(net, torch.device(device), layers)
    torch.testing.assert_close(all_logits(net, tokens).cpu(), expected, atol=1e-3, rtol=0)
    asked = {"temperature": 0, "num_predict": 50, "num_ctx": 32, "low_vram": low_vram}
    with LoadedModel(net, tokenizer_from(open_gguf(path).metadata)) as llm:
        assert len(llm.generate("the rest", options=asked).record.context) > 50


@pytest.mark.cuda
@pytest.mark.parametrize("layers", [1, 3])
def test_that_many_layers_are_on_the_gpu(tmp_path, layers, measured):
    net = placed(write_model(tmp_path / "m.gguf"), num_gpu=layers)
    assert [device.type for device in net.devices] == ["cpu"] * (2 - layers) + ["cuda"] * layers
    measured("options", "num_gpu", "on a GPU", "equal")
