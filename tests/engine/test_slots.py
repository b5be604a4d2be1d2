"""Places of the cache: who gets which, and what is found there."""

from hypothesis import given
from hypothesis import strategies as st

from refollama.engine.slots import Place, Slots, common

tokens = st.lists(st.integers(0, 2), max_size=8)


def test_the_slot_that_holds_most_of_the_prompt_is_taken():
    slots = Slots(3)
    for held in ([1, 2, 3], [1, 2, 3, 4, 5], [9]):
        slots.give_back(slots.take([0]).slot, held)
    assert slots.take([1, 2, 3, 4, 9]) == Place(1, 4, source=1)
    assert slots.take([1, 2, 3, 4, 9]) == Place(0, 3, source=0)


def test_one_token_is_always_left_to_read():
    slots = Slots(1)
    slots.give_back(slots.take([0]).slot, [1, 2, 3])
    assert slots.take([1, 2, 3]) == Place(0, 2, source=0)


def test_the_one_left_longest_ago_goes_first_when_nothing_is_shared():
    slots = Slots(3)
    taken = [slots.take([0]).slot for _ in range(3)]
    assert not slots
    for slot in (taken[1], taken[2], taken[0]):
        slots.give_back(slot, [slot])
    assert [slots.take([7, 7]).slot for _ in range(3)] == [taken[1], taken[2], taken[0]]


def test_what_a_slot_in_use_holds_is_copied_to_the_one_left_longest_ago():
    slots = Slots(3)
    busy, *taken = (slots.take([0]).slot for _ in range(3))
    for slot, held in zip(taken, ([1, 2, 8], [9]), strict=True):
        slots.give_back(slot, held)
    others = {busy: [1, 2, 3, 4]}
    assert slots.take([1, 2, 5], others) == Place(1, 2, source=1)  # a free one holds as much
    slots.give_back(1, [1, 2, 8])
    assert slots.take([1, 2, 3, 5], others) == Place(2, 3, source=busy)
    slots.forget()  # what the busy one holds belongs to the past now
    assert slots.take([1, 2, 3, 5], others) == Place(1, 0, source=1)


def test_another_net_shares_nothing():
    slots = Slots(1)
    slots.trust("a")
    slots.give_back(slots.take([1]).slot, [1, 2])
    slots.trust("a")
    assert slots.take([1, 2, 3]) == Place(0, 2, source=0)
    slots.give_back(0, [1, 2])
    slots.trust("b")
    assert slots.take([1, 2, 3]) == Place(0, 0, source=0)
    slots.give_back(0, [1, 2])
    slots.trust(None)  # unknown: twice unknown is not the same either
    assert slots.take([1, 2, 3]) == Place(0, 0, source=0)
    slots.give_back(0, [1, 2])
    slots.trust(None)
    assert slots.take([1, 2, 3]) == Place(0, 0, source=0)


def test_what_was_begun_before_an_end_is_of_no_use_after_it():
    slots = Slots(1)
    slots.trust("a")
    slot = slots.take([1]).slot
    slots.trust("b")  # the net changed while the sequence ran
    slots.give_back(slot, [1, 2])
    assert slots.take([1, 2, 3]) == Place(0, 0, source=0)
    slots.forget()
    slots.give_back(0, [1, 2])
    assert slots.take([1, 2, 3]) == Place(0, 0, source=0)


@given(tokens, tokens)
def test_what_is_common_is_the_longest_shared_beginning(a, b):
    n = common(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
