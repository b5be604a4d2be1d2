"""Memory in large pages: asked for where the system has them, and memory as any other."""

import re
import sys
from pathlib import Path

import pytest
import torch

from refollama.fast.prepared import LINE, room
from refollama.weights.pages import LARGE, copy_on_write, fresh

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
has_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not HUGE.exists(), reason="needs Linux with large pages"
)


def is_advised(address: int) -> bool:
    """Has the system been asked to put this into large pages?  `man 5 proc_pid_smaps`: hg"""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("nothing is mapped there")


def bytes_of(memory) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def test_what_is_written_into_a_mapped_file_stays_ours(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("rb") as file:
        mapped = bytes_of(copy_on_write(file))
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
    with path.open("rb") as file:
        mapped = bytes_of(copy_on_write(file))
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
