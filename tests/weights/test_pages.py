"""Memory in large pages: asked for where the system has them, and memory as any other."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from refollama.fast.half import HalfLinear
from refollama.fast.prepared import LINE, room
from refollama.fast.slabs import by_slabs
from refollama.models.layers import Linear
from refollama.weights.blocks import TYPE_ID
from refollama.weights.pages import LARGE, copy_on_write, fresh, let_go
from refollama.weights.quants import LAYOUTS

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
has_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not HUGE.exists(), reason="needs Linux with large pages"
)


def told_of(address: int, what: str) -> str:
    """What the system tells of the mapping that this lies in.  `man 5 proc_pid_smaps`"""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{what}:"):
            return line.removeprefix(f"{what}:")
    raise AssertionError("nothing is mapped there")


def is_advised(address: int) -> bool:
    """Has the system been asked to put this into large pages?"""
    return "hg" in told_of(address, "VmFlags").split()


def in_memory(address: int) -> int:
    """Bytes of the mapping there that this process has in memory."""
    return int(told_of(address, "Rss").split()[0]) * 1024


def bytes_of(memory) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def mapped_file(path) -> torch.Tensor:
    with path.open("rb") as file:
        return bytes_of(copy_on_write(file))


def test_what_is_written_into_a_mapped_file_stays_ours(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(bytes(range(256)) * 64)
    mapped = mapped_file(path)
    assert mapped.tolist() == list(range(256)) * 64
    mapped[:] = 0
    assert path.read_bytes() == bytes(range(256)) * 64


def test_fresh_memory_is_zeros_and_can_be_written():
    memory = bytes_of(fresh(LARGE + 1))
    assert len(memory) == LARGE + 1
    assert not memory.any()
    memory[-1] = 7
    assert memory[-1] == 7


@has_large_pages
def test_the_system_is_asked_for_large_pages(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(bytes(LARGE))
    mapped = mapped_file(path)
    assert is_advised(mapped.data_ptr())
    assert is_advised(bytes_of(fresh(LARGE)).data_ptr())
    assert is_advised(room([(torch.float16, (LARGE,))])[0].data_ptr())
    assert not is_advised(room([(torch.float16, (8,))])[0].data_ptr())


@pytest.mark.parametrize("height", [1, LARGE // 8])
def test_what_stands_side_by_side_has_its_own_place(height):
    form = [(torch.int32, (height, 3)), (torch.uint8, (height, 5)), (torch.float16, (7, height))]
    places = room(form)
    assert [(one.dtype, tuple(one.shape)) for one in places] == form
    for number, one in enumerate(places):
        assert one.is_contiguous()
        assert one.data_ptr() % LINE == 0
        one.fill_(number + 1)
    for number, one in enumerate(places):
        assert (one == number + 1).all()


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of its pages")


@linux
def test_pages_of_a_file_can_be_let_go_of_but_nothing_that_was_written(tmp_path):
    path, size = tmp_path / "some", 1 << 20
    path.write_bytes(bytes(range(256)) * (size // 256))
    mapped = mapped_file(path)
    whole, start = mapped.clone(), mapped.data_ptr()
    assert in_memory(start) == size
    let_go(start + 1, size // 2)  # whole pages only: not the first one
    assert in_memory(start) == size // 2 + mmap.PAGESIZE
    let_go(start, size)
    assert in_memory(start) == 0
    assert torch.equal(mapped, whole)  # it is read again
    mapped[size // 2] = 99
    let_go(start, size)
    assert in_memory(start) == size
    assert mapped[size // 2] == 99
    let_go(start, size // 2)
    assert in_memory(start) == size // 2


@linux
def test_where_the_system_tells_nothing_of_its_pages_they_stay(tmp_path, monkeypatch):
    path, size = tmp_path / "some", 1 << 20
    path.write_bytes(bytes(size))
    mapped = mapped_file(path)
    mapped[:] = 7
    for told in ("there is none", "zero"):
        monkeypatch.setattr("refollama.weights.pages.PAGES", Path("/dev") / told)
        let_go(mapped.data_ptr(), size)
        assert (mapped == 7).all()


def test_memory_of_our_own_is_not_let_go_of():
    memory = bytes_of(fresh(LARGE)).fill_(7)
    let_go(memory.data_ptr(), LARGE)
    assert (memory == 7).all()
    let_go(memory.data_ptr(), 0)


@linux
def test_a_matrix_that_was_copied_stays_in_its_file(tmp_path):
    """Its pages are read to copy it and for prompts, and let go of each time."""
    layout, path, rows = LAYOUTS[TYPE_ID["Q6_K"]], tmp_path / "some", 256
    path.write_bytes(bytes(rows * 8 * layout.block.nbytes))
    weight = mapped_file(path).view(rows, -1)
    part, most = HalfLinear(Linear(weight, layout.unpack_rows), "Q6_K"), mmap.PAGESIZE
    part.prepare_now()
    assert in_memory(weight.data_ptr()) <= most
    assert not by_slabs(part, torch.randn(40, 8 * layout.block.values)).any()
    assert in_memory(weight.data_ptr()) <= most
    weight[3] = 1  # from now on it is ours
    part.prepare_now()
    assert in_memory(weight.data_ptr()) >= weight.nbytes - most
    assert weight[3].all()
