"""Tokens in whole numbers: what is lost, where each byte lies, and sums that are exact."""

import re
import shutil
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refollama.fast import fixed, instructions
from refollama.fast.dots import MOST, dots, in_bytes, most_of, pairs, rounded, whole_numbers
from refollama.fast.prepared import has_avx2
from refollama.fast.routines import compile_to, loaded

GROUP, LANES = 32, 16
SIZES = {"codes": (3, 1, 5, LANES), "numbers": (1, 2, 5, 2, 8)}  # tiles, tokens, groups


def compiles(test):
    """A test that compiles what wants vectors."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.timeout(600),
        pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
        pytest.mark.skipif(not has_avx2(), reason="needs AVX2"),
    ):
        test = mark(test)
    return test


def case(bits, seed=0):
    """start, eight words of codes, numbers of two bytes: the largest and smallest among them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, size=(8, *SIZES["codes"], 4)).astype(np.uint8)
    codes[0] = (1 << bits) - 1
    numbers = rng.integers(-128, 128, size=(*SIZES["numbers"], 4)).astype(np.int8)
    numbers[:, :, :2] = np.array([-128, 127])[:, None, None, None]
    start = rng.integers(-1000, 1000, size=(1, 2, 5, 1)).astype(np.int32)
    return start, codes, numbers


def slowly(start, codes, numbers):
    """What `dots` is, in float64: (3, 2, 5, 16)"""
    low, high = np.moveaxis(numbers.astype(float), 3, 0)
    n = (low + 256 * high)[:, :, :, None]  # (1, 2, 5, 1, 8, 4)
    return start + (np.moveaxis(codes.astype(float), 0, -2) * n).sum((-1, -2))


def words(bytes, each=4):
    """(…, each) → (…) int32"""
    assert bytes.shape[-1] == each
    return torch.from_numpy(np.ascontiguousarray(bytes).view(np.int32)[..., 0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_sum_is_that_of_all_bytes(bits):
    start, codes, numbers = case(bits)
    found = dots(torch.from_numpy(start), [*words(codes)], words(numbers), bits)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), slowly(start, codes, numbers))


@pytest.mark.parametrize("nbytes", [1, 2])
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=GROUP, max_size=GROUP))
def test_a_whole_number_is_off_by_half_a_unit(nbytes, values):
    x = torch.tensor(values).float()
    most = most_of(nbytes)
    n, unit = whole_numbers(x, most)
    assert n.abs().max() <= most
    assert (n * unit.double() - x.double()).abs().max() <= 0.51 * unit.double()
    assert x.abs().max() < 1e-25 or n.abs().max() == most


@pytest.mark.parametrize("count", [8, 16, GROUP])
def test_the_largest_of_a_row_has_all_bits(count):
    x = torch.randn(2, 3, 5, count)
    n, unit = whole_numbers(x, most_of(2))
    assert (n.abs().amax(-1) == MOST << 8).all()
    torch.testing.assert_close(unit * (MOST << 8), x.abs().amax(-1))


@pytest.mark.parametrize("nbytes", [1, 2])
@pytest.mark.parametrize("count", [8, 16, GROUP])
def test_each_byte_has_its_place(nbytes, count):
    most = most_of(nbytes)
    n = torch.from_numpy(np.random.default_rng(0).integers(-most, most + 1, (7, count)))
    n[0, :2] = torch.tensor([-most, most])
    found = in_bytes(n.int(), nbytes).numpy()
    assert found.shape == (7, nbytes, count // 4)
    signed = found[..., None].view(np.int8).astype(int)  # (7, nbytes, words, 4)
    back = sum(signed[:, byte] << 8 * byte for byte in range(nbytes))
    assert np.array_equal(np.swapaxes(back, 1, 2).reshape(7, count), n.numpy())


def test_what_is_not_a_number_stays_none():
    x = torch.randn(1, 3, 2 * GROUP)
    x[0, 1, 40] = torch.nan
    unit = rounded(x, 2).unit
    assert unit.isnan().tolist() == [[[False] * 3, [False, True, False]]]


def source(routine):
    """The C++ that it was compiled from."""
    with ZipFile(routine) as file:
        return b"".join(file.read(name) for name in file.namelist() if ".cpp" in name).decode()


class Sums(torch.nn.Module):
    """`dots` of codes of all sizes, as it is compiled."""

    def forward(self, start, numbers, codes):
        found = [
            dots(start, [*one.unbind()], numbers, bits + 1)
            for bits, one in enumerate(codes.unbind())
        ]
        return torch.stack(found)


@pytest.mark.parametrize(
    ("has", "names"),
    [
        ([], {256: "", 512: ""}),
        (["avx_vnni"], {256: "_mm256_dp{}_avx_epi32", 512: ""}),
        (["avx512_vnni"], {256: "_mm256_dp{}_epi32", 512: "_mm512_dp{}_epi32"}),
        (["avx512_vnni", "avx_vnni"], {256: "_mm256_dp{}_epi32", 512: "_mm512_dp{}_epi32"}),
    ],
)
@pytest.mark.parametrize("called", ["busd", "wssd"])
def test_each_processor_has_its_instruction(monkeypatch, has, names, called):
    monkeypatch.setattr(instructions, "_has", has.__contains__)
    for width, name in names.items():
        assert instructions._instruction(f"dp{called}", width) == name.format(called)


@pytest.mark.parametrize(("has", "parts"), [([], [[0, 1, 2]]), (["avx_vnni"], [[0], [1], [2]])])
def test_words_take_turns_where_there_is_an_instruction(monkeypatch, has, parts):
    monkeypatch.setattr(instructions, "_has", has.__contains__)
    assert instructions._parts(3) == parts


class Pairs(torch.nn.Module):
    """`pairs`, as it is compiled."""

    def forward(self, numbers, codes):
        return pairs([*codes.unbind()], numbers)


VECTORS = pytest.mark.parametrize(
    ("vectors", "has", "name"),
    [
        (256, [], ""),
        (256, ["avx_vnni"], "_mm256_dp{}_avx_epi32"),
        (256, ["avx512_vnni"], "vpdp{}"),
        (512, ["avx512_f"], ""),
        (512, ["avx512_vnni"], "vpdp{}"),
    ],
)


@compiles
@VECTORS
def test_instructions_compute_the_same(monkeypatch, vectors, has, name, tmp_path):
    """Those of all kinds that this processor has."""
    routine = compiled(tmp_path, monkeypatch, vectors, has, name, "busd")
    cases = [case(bits) for bits in range(1, 9)]
    start, _, numbers = cases[0]
    codes = torch.stack([words(one[1]) for one in cases])
    [found] = routine(Sums(), torch.from_numpy(start), words(numbers), codes)
    for one, (_, its_codes, _) in zip(found, cases, strict=True):
        assert np.array_equal(one.numpy(), slowly(start, its_codes, numbers))


@compiles
@VECTORS
def test_instructions_for_pairs_compute_the_same(monkeypatch, vectors, has, name, tmp_path):
    routine = compiled(tmp_path, monkeypatch, vectors, has, name, "wssd")
    most = fixed.MOST
    rng = np.random.default_rng(0)
    numbers = words(rng.integers(-most, most + 1, (1, 5, 16, 2)).astype(np.int16), 2)
    codes = words(rng.integers(-most, most + 1, (16, 3, 1, LANES, 2)).astype(np.int16), 2)
    [found] = routine(Pairs(), numbers, codes)
    assert torch.equal(found, pairs([*codes], numbers))


def compiled(folder, monkeypatch, vectors, has, name, called):
    """What compiles something for a processor with nothing but this, and runs it."""
    if not all(map(instructions._has, has)):
        pytest.skip(f"needs {has}")
    monkeypatch.setattr(instructions, "_has", has.__contains__)
    without = f"_mm{vectors}_" + ("maddubs_epi16" if called == "busd" else "madd_epi16")

    def run(made, *inputs):
        path = folder / "sums.pt2"
        with torch._inductor.config.patch({"cpp.simdlen": vectors}):
            compile_to(path, made, inputs, tuple(None for _ in inputs))
        names = {*re.findall(r"vpdp\w+|_mm\d+_(?:dp|maddubs)\w+", source(path))}
        names |= {*re.findall(r"_mm\d+_madd_epi16", source(path))} if called == "wssd" else set()
        assert names == {name.format(called) or without}
        routine = loaded(path)
        assert routine is not None
        return routine([*inputs])

    return run


class Steps(torch.nn.Module):
    """Two vectors of words, of 256 bits, beside one of float16."""

    def forward(self, words, d):
        return words.float() * d.float()


@compiles
def test_words_become_floats_a_vector_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(rng.integers(-(2**31), 2**31, (9, LANES)).astype(np.int32))
    inputs = whole, torch.randn(9, LANES).half()
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        compile_to(tmp_path / "steps.pt2", Steps(), inputs, (None, None))
    written = source(tmp_path / "steps.pt2")
    assert written.count("at::vec::convert<float>(") == 2
    assert "at::vec::convert<float,2,int32_t" not in written
    routine = loaded(tmp_path / "steps.pt2")
    assert routine is not None
    assert torch.equal(routine([*inputs])[0], Steps()(*inputs))


class Halves(torch.nn.Module):
    """Two vectors in turn of rows of 16 bits, and floats."""

    def forward(self, rows, x):
        one, other = rows.float().unbind(2)
        return (one * x + other).sum((1, 2))


@compiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vectors", [256, 512])
def test_numbers_of_16_bits_are_loaded_without_a_mask(tmp_path, dtype, vectors):
    if vectors == 512 and not instructions._has("avx512_f"):
        pytest.skip("needs AVX-512")
    inputs = (
        torch.randint(-9, 9, (7, 5, 2, LANES)).to(dtype),
        torch.randint(-9, 9, (LANES,)).float(),
    )
    with torch._inductor.config.patch({"cpp.simdlen": vectors}):
        compile_to(tmp_path / "halves.pt2", Halves(), inputs, (None, None))
    written = source(tmp_path / "halves.pt2")
    halves = len(re.findall("_mm256_loadu_si256", written))
    masks = len(re.findall(r"Vectorized<at::\w+>::loadu\(", written))
    assert (halves, masks) == ((2, 0) if vectors == 512 else (0, 2))
    assert written.count("__builtin_prefetch(") == 1  # for both: they lie in one line
    routine = loaded(tmp_path / "halves.pt2")
    assert routine is not None
    assert torch.equal(routine([*inputs])[0], Halves()(*inputs))
