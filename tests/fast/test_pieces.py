"""Pieces: what lies in them is what was put there, and it is put there once."""

import pytest
import torch

from refollama.fast.pieces import apart, gathered
from refollama.fast.prepared import Form

FORMS: list[Form] = [
    [(torch.int32, (3, 4)), (torch.float16, (5,))],
    [(torch.int32, (2, 1, 3))],
    [(torch.float16, (2, 2)), (torch.int32, (7,))],
]


def some(form):
    return [torch.randint(-9, 9, shape).to(dtype) for dtype, shape in form]


def test_apart_gives_what_was_gathered():
    made = [some(form) for form in FORMS]
    pieces = gathered(made)
    assert [(piece.dtype, piece.shape) for piece in pieces] == [
        (torch.int32, (12 + 6 + 7,)),
        (torch.float16, (5 + 4,)),
    ]
    for its, others in zip(apart(pieces, FORMS), made, strict=True):
        assert all(map(torch.equal, its, others))


def test_what_follows_each_other_is_not_copied():
    pieces = gathered([some(form) for form in FORMS])
    again = gathered(apart(pieces, FORMS))
    assert [piece.data_ptr() for piece in again] == [piece.data_ptr() for piece in pieces]


@pytest.mark.parametrize("gap", [[0, 2], [1, 0]])
def test_what_has_a_gap_or_another_order_is_copied(gap):
    whole = torch.arange(12).view(3, 4)
    made = [[whole[at]] for at in gap]
    [piece] = gathered(made)
    assert piece.tolist() == [number for at in gap for number in whole[at].tolist()]
    assert piece.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_nothing_has_no_pieces():
    assert gathered([]) == []
    assert apart([], []) == []
