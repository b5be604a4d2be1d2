"""Routines as files: what is loaded works, and leaves nothing behind."""

import os
import re
import tempfile
import zipfile

import torch

from refollama.fast.routines import compile_to, loaded
from tests.fast.test_dots import compiles


class Twice(torch.nn.Module):
    def forward(self, x):
        return (x + x,)


@compiles
def test_what_is_loaded_leaves_no_file_behind(monkeypatch, tmp_path):
    """A server ends at once: nobody would tidy up after it."""
    path, place = tmp_path / "twice.pt2", tmp_path / "temporary"
    x = torch.randn(40)
    compile_to(path, Twice(), (x,), (None,))
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    routine = loaded(path)
    assert routine is not None
    assert not [*place.iterdir()]
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(place)
    assert torch.equal(routine([x])[0], 2 * x)


class Shares(torch.nn.Module):
    """Hands on shares between its loops, and writes into a place."""

    def forward(self, x, place):
        place.copy_((x.softmax(-1)[:, None] * x).sum(-1))


@compiles
def test_what_lies_on_the_stack_begins_with_a_line_of_memory(tmp_path):
    """Where torch puts it, vectors of 512 bits lie in two lines each, or not, by chance."""
    path, x = tmp_path / "shares.pt2", torch.randn(48, 48)
    place = torch.empty_like(x)
    compile_to(path, Shares(), (x, place), (None, None), on_stack=True)
    with zipfile.ZipFile(path) as file:
        (name,) = [name for name in file.namelist() if name.endswith("wrapper.cpp")]
        written = file.read(name).decode()
    found = re.findall(r"^(.*) \w+_storage\[\d+\];$", written, re.MULTILINE)
    assert found
    assert {kind.split()[0] for kind in found} == {"alignas(64)"}
    routine = loaded(path)
    assert routine is not None
    routine([x, place])
    assert torch.allclose(place, x.softmax(-1) @ x.T, atol=1e-5)
