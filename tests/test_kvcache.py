"""The cache gives back what was put in, slot by slot, and grows without forgetting."""

import pytest
import torch

from refollama.kvcache import PIECE, KVCache


def put(cache, slot, start, count, layer=0):
    k = torch.arange(start, start + count).float()[None, :, None, None].expand(1, count, 2, 3)
    positions = torch.arange(start, start + count)[None]
    return cache.rows([slot], start + count).append(layer, positions, k, -k)


def test_what_was_appended_is_read_back_in_order():
    cache = KVCache([(2, 3, 3)])
    put(cache, 0, 0, 5)
    keys, values = put(cache, 0, 5, 1)
    assert keys.shape == (1, 2, PIECE, 3)
    assert keys[0, 1, :6, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert not keys[:, :, 6:].any()
    assert torch.equal(values, -keys)


@pytest.mark.parametrize(
    ("length", "read"), [(1, PIECE), (PIECE, PIECE), (PIECE + 1, 2 * PIECE), (700, 3 * PIECE)]
)
def test_whole_pieces_are_read(length, read):
    cache = KVCache([(1, 1, 1)], slots=2)
    assert cache.rows([1], length).length == read <= cache.length


def test_growing_keeps_everything():
    cache = KVCache([(2, 3, 3)] * 2, slots=2)
    put(cache, 1, 0, PIECE, layer=1)
    keys, _ = put(cache, 1, PIECE, 3 * PIECE, layer=1)
    assert keys[0, 0, :, 0].tolist() == list(range(4 * PIECE))
    assert cache.length == 4 * PIECE


def test_memory_follows_the_longest_sequence():
    cache = KVCache([(1, 1, 1)])
    assert cache.length == 0
    cache.rows([0], 1)
    assert cache.length == PIECE


def test_running_out_of_memory_while_growing_leaves_the_cache_as_it_was(monkeypatch):
    cache = KVCache([(2, 3, 3)] * 3)
    put(cache, 0, 0, PIECE, layer=2)
    real, calls = torch.Tensor.new_zeros, []

    def scarce(self, *shape):
        calls.append(shape)
        if len(calls) == 4:
            raise MemoryError
        return real(self, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
    with pytest.raises(MemoryError):
        cache.rows([0], PIECE + 1)
    monkeypatch.undo()
    keys, _ = put(cache, 0, PIECE, 1, layer=2)
    assert keys[0, 0, : PIECE + 1, 0].tolist() == list(range(PIECE + 1))


def test_slots_are_apart_and_a_column_reads_each_row_its_own():
    cache = KVCache([(1, 1, 1)], slots=3)
    for slot in (0, 2):
        k = torch.full((1, 2, 1, 1), float(slot + 1))
        cache.rows([slot], 2).append(0, torch.tensor([[0, 1]]), k, k)
    new = torch.tensor([7.0, 9.0])[:, None, None, None]  # (2, 1, 1, 1)
    keys, _ = cache.rows([2, 0], 3).append(0, torch.tensor([[2], [1]]), new, new)
    assert keys[0, 0, :3, 0].tolist() == [3, 3, 7]
    assert keys[1, 0, :3, 0].tolist() == [1, 9, 0]


def test_clear_forgets_one_slot_only():
    cache = KVCache([(1, 1, 1)], slots=2)
    for slot in (0, 1):
        put_one = torch.ones(1, 1, 1, 1)
        cache.rows([slot], 1).append(0, torch.tensor([[0]]), put_one, put_one)
    cache.clear(0)
    assert cache.keys[0][:, 0, 0, 0].tolist() == [0, 1]


def test_clear_forgets_what_is_behind_a_place():
    cache = KVCache([(2, 3, 3)] * 2, slots=2)
    for slot, layer in [(0, 0), (0, 1), (1, 0)]:
        put(cache, slot, 0, 6, layer)
    cache.clear(0, 4)
    for layer in (0, 1):
        assert cache.keys[layer][0, 0, :7, 0].tolist() == [0, 1, 2, 3, 0, 0, 0]
        assert cache.values[layer][0, 1, :7, 2].tolist() == [0, -1, -2, -3, 0, 0, 0]
    assert cache.keys[0][1, 0, :7, 0].tolist() == [0, 1, 2, 3, 4, 5, 0]


def test_a_slot_begins_as_another_one_does():
    cache = KVCache([(2, 3, 3)] * 2, slots=2, dtype=torch.float16)
    for slot, layer in [(0, 0), (0, 1), (1, 0)]:
        put(cache, slot, 0, 6, layer)
    cache.clear(1)
    cache.copy(0, 1, 4)
    for layer in (0, 1):
        for tensor in (cache.keys[layer], cache.values[layer]):
            assert torch.equal(tensor[1, :, :4], tensor[0, :, :4])
            assert not tensor[1, :, 4:].any() and tensor[0, 1, 5].any()
    cache.clear(1)
    assert not cache.keys[0][1].any() and cache.keys[0][0].any()


def test_each_layer_has_sizes_of_its_own():
    cache = KVCache([(2, 3, 5), (1, 4, 2)])
    for layer, (heads, key, value) in enumerate([(2, 3, 5), (1, 4, 2)]):
        k, v = torch.ones(1, 1, heads, key), torch.ones(1, 1, heads, value)
        keys, values = cache.rows([0], 1).append(layer, torch.tensor([[0]]), k, v)
        assert keys.shape == (1, heads, PIECE, key)
        assert values.shape == (1, heads, PIECE, value)
        assert keys.sum() == heads * key


def test_shift_moves_what_is_kept_and_turns_keys_only():
    cache = KVCache([(2, 3, 3)] * 2, slots=2, dtype=torch.float16)
    for layer in (0, 1):
        put(cache, 1, 0, 9, layer)
    seen = []

    def turn(keys):
        seen.append((keys.dtype, *keys.shape))
        return keys + 0.5

    cache.shift(1, 2, 5, 9, turn)
    assert seen == [(torch.float32, 2, 4, 3)] * 2
    for layer in (0, 1):
        assert cache.keys[layer][1, 0, :10, 0].tolist() == [0, 1, 5.5, 6.5, 7.5, 8.5, 0, 0, 0, 0]
        assert cache.values[layer][1, 1, :8, 2].tolist() == [0, -1, -5, -6, -7, -8, 0, 0]


def test_float16_rounds_on_the_way_in_and_comes_back_as_asked():
    cache = KVCache([(1, 1, 1)], dtype=torch.float16)
    third = torch.full((1, 1, 1, 1), 1 / 3)
    keys, _ = cache.rows([0], 1).append(0, torch.tensor([[0]]), third, third)
    assert keys.dtype == torch.float32
    assert keys[0, 0, 0, 0].item() == third.half().float().item()
