"""The shelf that the server keeps models on."""

import threading
import time

import pytest
import torch

from refollama.errors import Abandoned, FormatError, NotFound, Stopping
from refollama.loaded import load_file
from refollama.options import Options
from refollama.shelf import LoadedModels, _Entry
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
        assert models[1]._engines.closed  # 1 was idle longest: closed
        assert not models[0]._engines.closed
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


# ── how long models stay ──────────────────────────────────────────────────────────────────────


def gone(shelf, seconds=5.0):
    """Does the shelf become empty by itself within this time?"""
    end = time.monotonic() + seconds
    while shelf.running():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def timers():
    return [thread for thread in threading.enumerate() if thread.name == "keep_alive"]


def test_an_idle_model_goes_when_its_time_is_over_and_the_timer_with_it(shelf, tiny):
    with shelf.lease(tiny, keep=0.2) as model:
        assert not gone(shelf, 0.4)  # time does not run while it is in use
    start = time.monotonic()
    assert gone(shelf) and time.monotonic() - start > 0.15
    with pytest.raises(Stopping):
        model.generate("the", options=GREEDY)
    for thread in timers():
        thread.join(5)
    assert timers() == []
    with shelf.lease(tiny, keep=0.05) as again:  # and it can begin again
        assert again is not model
    assert gone(shelf)


def test_each_use_sets_the_time_anew(shelf, tiny):
    with shelf.lease(tiny, keep=0.2) as model:
        pass
    with shelf.lease(tiny, keep=100):
        pass
    assert not gone(shelf, 0.4)
    with shelf.lease(tiny, keep=0.1) as again:
        assert again is model
    assert gone(shelf)


def test_no_time_at_all_means_gone_with_the_last_user(shelf, tiny):
    with shelf.lease(tiny, keep=0):
        with shelf.lease(tiny, keep=0):
            pass
        assert len(shelf.running()) == 1
    assert shelf.running() == [] and timers() == []


def test_without_a_time_a_model_stays_and_nothing_ticks(shelf, tiny):
    with shelf.lease(tiny):
        pass
    assert timers() == [] and shelf.running()[0].left == float("inf")


def test_unloading_waits_for_those_who_use_it(shelf, tiny):
    shelf.unload(tiny)  # nothing is there: nothing happens
    with shelf.lease(tiny) as model:
        shelf.unload(tiny)
        assert model.generate("the", options=GREEDY).text
    assert shelf.running() == []
    with shelf.lease(tiny):
        pass
    shelf.unload(tiny)
    assert shelf.running() == []


def by_release(shelf, tiny):
    with shelf.lease(tiny, keep=0):
        pass


def by_unload(shelf, tiny):
    with shelf.lease(tiny):
        pass
    shelf.unload(tiny)


def by_timer(shelf, tiny):
    with shelf.lease(tiny, keep=0.01):
        pass


@pytest.mark.parametrize("leave", [by_release, by_unload, by_timer])
@pytest.mark.parametrize("same", [True, False])
def test_nothing_is_loaded_beside_a_model_that_is_not_gone_yet(
    shelf, tiny, tmp_path, monkeypatch, leave, same
):
    """Its place is free when it is closed, not when it is taken off the shelf."""
    new = tiny if same else write_model(tmp_path / "new.gguf", seed=2)
    closing, release, loaded = (threading.Event() for _ in range(3))
    close = _Entry.close

    def slow_close(entry):
        closing.set()
        assert release.wait(10)
        close(entry)

    def loads(path, options, **how):
        loaded.set()
        return load_file(path, options, **how)

    def newcomer():
        with shelf.lease(new):
            pass

    monkeypatch.setattr(_Entry, "close", slow_close)
    leaving = threading.Thread(target=leave, args=(shelf, tiny))
    leaving.start()
    assert closing.wait(5)
    monkeypatch.setattr("refollama.shelf.load_file", loads)
    arriving = threading.Thread(target=newcomer)
    arriving.start()
    assert not loaded.wait(0.3)
    release.set()
    assert loaded.wait(5)
    for thread in (leaving, arriving):
        thread.join(5)
    assert not shelf._leaving


def test_one_that_leaves_is_awaited_and_the_idle_one_stays(tmp_path, monkeypatch):
    warm, going, new = (write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3))
    shelf = LoadedModels(limit=2)
    closing, release = threading.Event(), threading.Event()
    close = _Entry.close

    def slow_close(entry):
        closing.set()
        assert release.wait(10)
        close(entry)

    for path in (warm, going):
        with shelf.lease(path, name=path.stem):
            pass
    monkeypatch.setattr(_Entry, "close", slow_close)
    leaving = threading.Thread(target=shelf.unload, args=(going,))
    leaving.start()
    assert closing.wait(5)
    threading.Timer(0.3, release.set).start()
    with shelf.lease(new, name=new.stem):
        assert release.is_set() and {one.use.name for one in shelf.running()} == {"0", "2"}
    leaving.join(5)
    shelf.close()


def test_a_model_that_cannot_be_closed_frees_its_place_all_the_same(shelf, tiny, monkeypatch):
    close, failures = _Entry.close, [MemoryError()]

    def fails(entry):
        close(entry)
        if failures:
            raise failures.pop()

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(_Entry, "close", fails)
        by_release(shelf, tiny)
    with shelf.lease(tiny) as model:
        assert model.generate("the", options=GREEDY).text


def test_the_soonest_goes_first_and_is_listed_last(tmp_path):
    paths = [write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3)]
    shelf = LoadedModels(limit=3)
    for path, keep in zip(paths, (0.15, 1000, 500), strict=True):
        with shelf.lease(path, keep=keep, name=path.stem):
            pass
    assert [one.use.name for one in shelf.running()] == ["1", "2", "0"]
    end = time.monotonic() + 5
    while len(shelf.running()) == 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert [one.use.name for one in shelf.running()] == ["1", "2"]
    shelf.close()
    assert timers() == []  # though it still had a long time to sleep


def test_the_timer_sleeps(shelf, tiny, monkeypatch):
    """It looks when something changes or is due, never now and then."""
    looks = []

    def pause(seconds):
        looks.append(seconds)
        return seconds

    monkeypatch.setattr("refollama.shelf._pause", pause)
    with shelf.lease(tiny, keep=0.5):
        pass
    assert gone(shelf)
    assert 1 <= len(looks) <= 3  # `gone` asks a hundred times, the timer does not


def test_what_a_model_takes(shelf, tiny):
    """Judge: the bytes of its file; what is not weights there is its header."""
    options = Options().updated({"num_ctx": 32})
    with shelf.lease(tiny, options, name="me") as model:
        (before,) = shelf.running()
        model.generate("the", options=GREEDY)
        (after,) = shelf.running()
    assert 0.8 * tiny.stat().st_size < before.nbytes <= tiny.stat().st_size
    assert after.nbytes > before.nbytes  # the cache of the answer
    assert (before.nbytes_gpu, before.n_ctx, before.use.name) == (0, 32, "me")


def test_many_uses_with_short_times_lose_nothing(tiny):
    """Leases, timers and unloads that cross each other: every lease gets a model that answers."""
    shelf = LoadedModels(limit=1)
    errors = []

    def use(number):
        try:
            for turn in range(15):
                with shelf.lease(tiny, keep=0.001 * (turn % 3)) as model:
                    assert model.generate("the", options=GREEDY | {"num_predict": 1}).text
                if number == 0:
                    shelf.unload(tiny)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    shelf.close()
    assert timers() == []


def test_what_lies_elsewhere_is_another_model_and_what_makes_no_difference_is_not(tiny):
    shelf = LoadedModels(limit=1)
    with shelf.lease(tiny) as mapped:
        pass
    with shelf.lease(tiny, Options(use_mmap=False)) as read:
        assert read is not mapped
    if not torch.cuda.is_available():
        with shelf.lease(tiny, Options(use_mmap=False, num_gpu=7, main_gpu=3)) as same:
            assert same is read
    shelf.close()
