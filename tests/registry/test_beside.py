"""Work beside: what it gives comes back, and whoever leaves ends it first."""

import threading
import time

import pytest

from refollama.errors import Abandoned, RegistryError
from refollama.store.registry.beside import beside, waited


def never():
    return False


def test_what_the_work_gives_or_raises_comes_back():
    assert waited(lambda: 7, pytest.fail, never) == 7
    with pytest.raises(RegistryError, match="no"):
        waited(fail, pytest.fail, never)


def fail():
    raise RegistryError("no")


@pytest.mark.parametrize("how", ["closed", "gone"])
def test_whoever_leaves_ends_the_work_and_waits_for_its_end(how):
    left, ended = threading.Event(), threading.Event()

    def work():
        assert left.wait(10)
        time.sleep(0.05)
        ended.set()

    steps = beside(work, left.set, never if how == "closed" else started(2))
    next(steps)
    if how == "closed":
        steps.close()
    else:
        with pytest.raises(Abandoned):
            list(steps)
    assert ended.is_set()


def started(times):
    """Gone when it is asked so often."""
    asked = iter([False] * (times - 1))
    return lambda: next(asked, True)


def test_work_that_does_not_end_is_left_to_end_alone():
    over = threading.Event()
    steps = beside(lambda: over.wait(10), lambda: None, never)
    next(steps)
    start = time.monotonic()
    steps.close()
    assert time.monotonic() - start < 5
    over.set()
