"""Places of the cache: who gets which, and what is found there."""

from hypothesis import given
from hypothesis import strategies as st

from refollama.engine.slots import Slots, common

tokens = st.lists(st.integers(0, 2), max_size=8)


def test_the_slot_that_holds_most_of_the_prompt_is_taken():
    slots = Slots(3)
    for held in ([1, 2, 3], [1, 2, 3, 4, 5], [9]):
        slots.give_back(slots.take([0])[0], held)
    assert slots.take([1, 2, 3, 4, 9]) == (1, 4)
    assert slots.take([1, 2, 3, 4, 9]) == (0, 3)


def test_one_token_is_always_left_to_read():
    slots = Slots(1)
    slots.give_back(slots.take([0])[0], [1, 2, 3])
    assert slots.take([1, 2, 3]) == (0, 2)


def test_the_one_left_longest_ago_goes_first_when_nothing_is_shared():
    slots = Slots(3)
    taken = [slots.take([0])[0] for _ in range(3)]
    assert not slots
    for slot in (taken[1], taken[2], taken[0]):
        slots.give_back(slot, [slot])
    assert [slots.take([7, 7])[0] for _ in range(3)] == [taken[1], taken[2], taken[0]]


def test_another_net_shares_nothing():
    slots = Slots(1)
    slots.trust("a")
    slots.give_back(slots.take([1])[0], [1, 2])
    slots.trust("a")
    assert slots.take([1, 2, 3]) == (0, 2)
    slots.give_back(0, [1, 2])
    slots.trust("b")
    assert slots.take([1, 2, 3]) == (0, 0)
    slots.give_back(0, [1, 2])
    slots.trust(None)  # unknown: twice unknown is not the same either
    assert slots.take([1, 2, 3]) == (0, 0)
    slots.give_back(0, [1, 2])
    slots.trust(None)
    assert slots.take([1, 2, 3]) == (0, 0)


def test_what_was_begun_before_an_end_is_of_no_use_after_it():
    slots = Slots(1)
    slots.trust("a")
    slot, _ = slots.take([1])
    slots.trust("b")  # the net changed while the sequence ran
    slots.give_back(slot, [1, 2])
    assert slots.take([1, 2, 3]) == (0, 0)
    slots.forget()
    slots.give_back(0, [1, 2])
    assert slots.take([1, 2, 3]) == (0, 0)


@given(tokens, tokens)
def test_what_is_common_is_the_longest_shared_beginning(a, b):
    n = common(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
