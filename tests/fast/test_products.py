"""Prompts in fewer bits: how far off they are, of which numbers they are made, who is spared."""

import pytest
import torch

import refollama
from refollama.fable.bundled import FOLDER
from refollama.fable.lessons import conversation
from refollama.fable.vocabulary import written
from refollama.fast import exactly, products, reading
from refollama.fast.prepared import bits_for
from refollama.fast.products import as_int8, product
from refollama.models.layers import Linear
from refollama.quantize import plan
from refollama.weights import open_gguf
from tests.fast.test_fast import large, off, part, replaced, tokens
from tests.models.test_llama import all_logits, some_tokens
from tests.tiny import write_model

__all__ = ["large"]  # all nets count as large
FAR = {16: 0.006, 8: 0.02}  # relative: half of what bfloat16 keeps; two steps of a byte


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K", "Q8_0", "Q6_K", "F16", "BF16", "F32"])
@pytest.mark.parametrize("bits", FAR)
def test_a_prompt_is_multiplied_as_well_as_its_bits_allow(type, bits, measured):
    plain = part(type, bias=True)
    fast, x = replaced(plain), tokens(40)
    with reading(bits):
        ours = fast(x[None])[0]
    assert 0 < off(ours, plain(x)) < FAR[bits]
    measured("fast parts", f"{type}, prompt_bits {bits}", "plain path", off(ours, plain(x)), 40)


@pytest.mark.parametrize("bits", FAR)
def test_it_is_by_slabs(monkeypatch, bits):
    fast, x = replaced(part("Q4_0")), tokens(40)
    with reading(bits):
        whole = fast(x)
        monkeypatch.setattr("refollama.fast.slabs.SLAB", 48 * 512)  # 128 rows: three slabs
        torch.testing.assert_close(fast(x), whole, atol=1e-4, rtol=1e-2)


def test_a_product_of_bytes_is_one_of_whole_numbers():
    """Computed slowly: steps from the largest of each row, sums of integers, then the steps."""
    x, matrix = tokens(5), part("F32", rows=64).dense()
    with reading(8):
        ours = product(x)(matrix, None)
    for i, token in enumerate(x.tolist()):
        for j, row in enumerate(matrix.tolist()):
            (a, left), (b, right) = map(_rounded, (token, row))
            slow = sum(map(int.__mul__, left, right)) * a * b
            assert ours[i, j].item() == pytest.approx(slow, rel=1e-5, abs=2e-2)


def _rounded(values):
    step = max(map(abs, values)) / 127
    return step, [round(value / step) for value in values]


def test_bytes_are_those_of_the_largest_of_each_row():
    rows, steps = as_int8(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert rows.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert steps.flatten().tolist() == pytest.approx([2 / 127, 0])


def test_in_bytes_a_token_is_the_same_beside_others_to_the_last_bit():
    fast, x = replaced(part("Q8_0")), tokens(40)
    with reading(8):
        together = fast(x)
        for count in (1, 7, 33):
            assert torch.equal(fast(x[:count]), together[:count])


def test_no_tokens_and_one_have_outputs():
    fast = replaced(part("Q4_0"))
    for bits in (8, 16):
        with reading(bits):
            assert fast(torch.zeros(0, 512)).shape == (0, 128)
            assert fast(tokens(1)[0]).shape == (128,)


def test_whoever_goes_backwards_goes_through_exact_products():
    plain = part("Q4_0")
    x = tokens(40).requires_grad_()
    with reading(8):
        torch.testing.assert_close(replaced(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


def test_exactly_means_exactly_within_it():
    plain, x = part("F16"), tokens(40)
    fast = replaced(plain)
    with reading(8), exactly():
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("type", ["Q4_0", "F16"])
@pytest.mark.parametrize("bits", FAR)
def test_the_option_is_for_prompts_and_for_nothing_else(
    tmp_path, monkeypatch, type, bits, measured
):
    seen = []

    def watched(x):
        seen.append(bits_for(x))
        return product(x)

    monkeypatch.setattr("refollama.fast.slabs.product", watched)
    path = write_model(tmp_path / "m.gguf", type=type)
    ids = some_tokens(30).tolist()
    with refollama.load(path, {"prompt_bits": bits}) as llm:
        llm.logits(ids)
        assert set(seen) == {32}
        seen.clear()
        with llm.start(ids, llm.defaults.updated({"temperature": 0, "num_predict": 3})) as written:
            assert len(list(written)) == 3
    assert set(seen) == {bits}
    measured("options", "prompt_bits", "definition", "equal")


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize(("bits", "most"), [(16, 5e-4), (8, 2.5e-3)])
def test_talks_are_as_likely_to_who_read_them_in_fewer_bits(tmp_path, type, bits, most, measured):
    """fable itself, packed as this type: mean KL of the next token's distribution, over what it was
    made to read, of combinations that it never saw."""
    path = tmp_path / "fable.gguf"
    with open_gguf(FOLDER / "fable" / "fable.gguf") as file:
        plan(file, type, again=True).write(path)
    talks = [written(conversation(1, index, held=True)) for index in range(12)]
    found = []
    with refollama.load(path) as llm, torch.no_grad():
        for ids in (llm.tokenizer.encode(talk, bos=True, special=True) for talk in talks):
            both = []
            for each in (32, bits):
                with reading(each):
                    both.append(all_logits(llm.net, ids).double().log_softmax(-1))
            plain, ours = both
            found.append((plain.exp() * (plain - ours)).sum(-1))
    nats = torch.cat(found)
    kl = nats.mean().item()
    assert len(nats) > 1500
    assert 0 < kl < most
    measured("fast parts", f"fable as {type}, prompt_bits {bits}", "plain path, KL", kl, len(nats))


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch was built without oneDNN")
@pytest.mark.parametrize("count", [1, 40])
def test_both_libraries_add_up_the_same(monkeypatch, count):
    """Float32 by MKL and by oneDNN."""
    plain, x = part("Q4_0", bias=True), tokens(count)
    for there in (True, False):
        monkeypatch.setattr(products, "by_onednn", lambda there=there: there)
        with exactly():
            assert off(replaced(plain)(x), plain(x)) < 1e-6


@pytest.mark.skipif(not products.by_onednn(), reason="MKL is as good on this processor")
@pytest.mark.parametrize("type", ["Q4_0", "F16", "F32"])
def test_by_either_a_token_is_the_same_beside_others_to_the_last_bit(type):
    fast, x = replaced(part(type, bias=True)), tokens(40)
    with exactly():
        together = fast(x)
        for count in (1, 2, 3, 7, 33):
            assert torch.equal(fast(x[:count]), together[:count])


def test_a_part_without_a_fast_one_is_exact():
    plain, x = part("Q4_0"), tokens(40)
    with reading(8):
        inside = plain(x)
    assert isinstance(plain, Linear)
    assert torch.equal(inside, plain(x))
