"""The cache gives back what was put in, slot by slot, and grows without forgetting."""

import pytest
import torch

from refollama.kvcache import FIRST_LENGTH, KVCache


def put(cache, slot, start, count, layer=0):
    k = torch.arange(start, start + count).float()[None, :, None, None].expand(1, count, 2, 3)
    positions = torch.arange(start, start + count)[None]
    return cache.rows([slot], start + count).append(layer, positions, k, -k)


def test_what_was_appended_is_read_back_in_order():
    cache = KVCache(1, 2, 3)
    put(cache, 0, 0, 5)
    keys, values = put(cache, 0, 5, 1)
    assert keys.shape == (1, 2, 6, 3)
    assert keys[0, 1, :, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(values, -keys)


def test_growing_keeps_everything():
    cache = KVCache(2, 2, 3, slots=2)
    put(cache, 1, 0, FIRST_LENGTH, layer=1)
    keys, _ = put(cache, 1, FIRST_LENGTH, 3 * FIRST_LENGTH, layer=1)
    assert keys[0, 0, :, 0].tolist() == list(range(4 * FIRST_LENGTH))
    assert cache.length == 4 * FIRST_LENGTH


def test_memory_follows_the_longest_sequence():
    cache = KVCache(1, 1, 1)
    assert cache.length == 0
    cache.rows([0], 1)
    assert cache.length == FIRST_LENGTH


def test_running_out_of_memory_while_growing_leaves_the_cache_as_it_was(monkeypatch):
    cache = KVCache(3, 2, 3)
    put(cache, 0, 0, FIRST_LENGTH, layer=2)
    real, calls = torch.Tensor.new_zeros, []

    def scarce(self, *shape):
        calls.append(shape)
        if len(calls) == 4:
            raise MemoryError
        return real(self, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
    with pytest.raises(MemoryError):
        cache.rows([0], FIRST_LENGTH + 1)
    monkeypatch.undo()
    keys, _ = put(cache, 0, FIRST_LENGTH, 1, layer=2)
    assert keys[0, 0, :, 0].tolist() == list(range(FIRST_LENGTH + 1))


def test_slots_are_apart_and_a_column_reads_each_row_its_own():
    cache = KVCache(1, 1, 1, slots=3)
    for slot in (0, 2):
        k = torch.full((1, 2, 1, 1), float(slot + 1))
        cache.rows([slot], 2).append(0, torch.tensor([[0, 1]]), k, k)
    new = torch.tensor([7.0, 9.0])[:, None, None, None]  # (2, 1, 1, 1)
    keys, _ = cache.rows([2, 0], 3).append(0, torch.tensor([[2], [1]]), new, new)
    assert keys[0, 0, :, 0].tolist() == [3, 3, 7]
    assert keys[1, 0, :, 0].tolist() == [1, 9, 0]


def test_clear_forgets_one_slot_only():
    cache = KVCache(1, 1, 1, slots=2)
    for slot in (0, 1):
        put_one = torch.ones(1, 1, 1, 1)
        cache.rows([slot], 1).append(0, torch.tensor([[0]]), put_one, put_one)
    cache.clear(0)
    assert cache.keys[0][:, 0, 0, 0].tolist() == [0, 1]


def test_float16_rounds_on_the_way_in_and_comes_back_as_asked():
    cache = KVCache(1, 1, 1, dtype=torch.float16)
    third = torch.full((1, 1, 1, 1), 1 / 3)
    keys, _ = cache.rows([0], 1).append(0, torch.tensor([[0]]), third, third)
    assert keys.dtype == torch.float32
    assert keys.item() == third.half().float().item()
