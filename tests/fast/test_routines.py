"""Routines as files: what is loaded works, and leaves nothing behind."""

import os
import tempfile

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
