"""The shelf that the server keeps models on."""

import threading
import time

import pytest

from refollama.errors import Abandoned, FormatError, NotFound, Stopping
from refollama.options import Options
from refollama.shelf import LoadedModels
from tests.tiny import write_model

GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 20}


@pytest.fixture
def shelf():
    models = LoadedModels(limit=1)
    yield models
    models.close()


def test_a_model_is_loaded_once(shelf, tiny):
    with shelf.lease(tiny) as first, shelf.lease(tiny) as second:
        assert first is second
    with shelf.lease(tiny) as third:
        assert third is first


def test_many_at_once_load_it_once(shelf, tiny):
    seen, barrier = [], threading.Barrier(8)

    def lease():
        barrier.wait()
        with shelf.lease(tiny) as model:
            seen.append(model)

    threads = [threading.Thread(target=lease) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(map(id, seen))) == 1


def test_the_idle_one_makes_room(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    with shelf.lease(tiny) as first:
        pass
    with shelf.lease(other):
        assert len(shelf._entries) == 1
    with shelf.lease(tiny) as again:
        assert again is not first


def test_a_newcomer_waits_while_the_other_is_in_use(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    got = threading.Event()

    def second():
        with shelf.lease(other):
            got.set()

    with shelf.lease(tiny):
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.2)
    thread.join(5)
    assert got.is_set()


def test_a_file_that_was_replaced_is_loaded_anew(shelf, tmp_path):
    path = write_model(tmp_path / "m.gguf", seed=1)
    with shelf.lease(path) as model:
        before = model.generate("the", options=GREEDY).text
    write_model(path, seed=2)
    with shelf.lease(path) as model:
        assert model.generate("the", options=GREEDY).text != before


def test_a_model_that_fails_to_load_leaves_no_trace(shelf, tiny, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    for _ in range(2):
        with pytest.raises(FormatError), shelf.lease(bad):
            pass
        assert shelf._entries == {}
    with shelf.lease(tiny) as model:
        assert model.generate("the", options=GREEDY).text


def test_many_who_wait_for_a_load_that_fails_each_get_an_error_of_their_own(
    shelf, tiny, monkeypatch
):
    loads, entered, release = [], threading.Event(), threading.Event()

    def fails(path, options, **how):
        loads.append(path)
        entered.set()
        release.wait(5)
        raise MemoryError

    monkeypatch.setattr("refollama.shelf.load_file", fails)
    errors = []

    def ask():
        try:
            with shelf.lease(tiny):
                pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(5)
    time.sleep(0.2)
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(loads) == 1 and len(set(map(id, errors))) == 4
    assert shelf._entries == {}


def test_a_file_that_has_gone_is_said(shelf, tmp_path):
    with pytest.raises(NotFound, match=r"gone\.gguf"), shelf.lease(tmp_path / "gone.gguf"):
        pass


def test_the_longest_idle_goes_and_its_engine_with_it(tmp_path):
    paths = [write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3)]
    shelf = LoadedModels(limit=2)
    models = []
    for path in (paths[0], paths[1], paths[0]):
        with shelf.lease(path) as model:
            model.generate("the", options=GREEDY)
            models.append(model)
    with shelf.lease(paths[2]):
        assert models[1]._engines == {}  # 1 was idle longest: closed
        assert models[0]._engines != {}
    shelf.close()


def test_waiting_for_a_model_ends_when_whoever_asked_is_gone(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    with shelf.lease(tiny), pytest.raises(Abandoned), shelf.lease(other, gone=lambda: True):
        pass
    with shelf.lease(other) as model:
        assert model.generate("the", options=GREEDY).text


def test_a_newcomer_is_not_starved_by_those_who_come_after_it(shelf, tiny, tmp_path):
    """Two clients that always overlap on one model; a third wants another."""
    other = write_model(tmp_path / "other.gguf", seed=2)
    stop, served = threading.Event(), threading.Event()

    def busy():
        while not stop.is_set():
            with shelf.lease(tiny):
                stop.wait(0.05)

    def newcomer():
        with shelf.lease(other):
            served.set()

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    late = threading.Thread(target=newcomer)
    late.start()
    assert served.wait(5)
    stop.set()
    for thread in (*threads, late):
        thread.join()


def test_making_room_does_not_hold_up_the_others(tmp_path):
    """Closing an engine waits for its step; who leases another model must not wait for that."""
    warm, slow, new = (write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3))
    shelf = LoadedModels(limit=2)
    entered, release = threading.Event(), threading.Event()

    def wait_in_the_middle(*_):
        entered.set()
        release.wait(10)

    def newcomer():
        with shelf.lease(new):
            pass

    with shelf.lease(warm):
        with shelf.lease(slow) as model:
            model.net.register_forward_pre_hook(wait_in_the_middle)
            stream = model.start([1], Options().updated(GREEDY))
            assert entered.wait(5)
        thread = threading.Thread(target=newcomer)
        thread.start()  # `slow` is idle, and must go; but its engine is in the middle of a step
        time.sleep(0.2)
        start = time.monotonic()
        with shelf.lease(warm):
            assert time.monotonic() - start < 1 and thread.is_alive()
        release.set()
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(Stopping):
        list(stream)
    shelf.close()


def test_a_closed_shelf_loads_nothing_more(tiny):
    shelf = LoadedModels()
    with shelf.lease(tiny) as model:
        shelf.close()
        with pytest.raises(Stopping):
            model.generate("the", options=GREEDY)
    with pytest.raises(Stopping), shelf.lease(tiny):
        pass
