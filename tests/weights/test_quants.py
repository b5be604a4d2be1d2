"""Unpacking is exact: every value equals that of the format's own tools, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from refollama.weights import codebooks, grids, open_gguf, open_weights, write_gguf
from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.quants import LAYOUTS, Layout, pack
from tests import oracles

EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
BLOCKWISE = pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS.values() if layout.block.values > 1],
    ids=lambda layout: layout.name,
)
PACKED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


# Where floats stand, in types that have other words too: (last byte, bit of a great exponent).
FLOATS = {
    "F32": [(3, 0x40)],
    "F64": [(7, 0x40)],
    "BF16": [(1, 0x40)],
    "I16": [],
    "Q8_K": [(3, 0x40)],
    "IQ2_XS": [(1, 0x04)],
    "IQ1_S": [(1, 0x04)],
    "IQ4_XS": [(1, 0x04)],
    "IQ1_M": [(53, 0x40)],  # its d stands in quarters
}


def random_blocks(layout: Layout, n: int, seed: int = 0) -> np.ndarray:
    """(n, nbytes) uint8, every byte value anywhere; only infinite and undefined floats are not."""
    block = np.random.default_rng(seed).integers(0, 256, (n, layout.block.nbytes), np.uint8)
    halves = [(start + 1, 0x04) for start, width in layout.words if width == 2]
    for last, bit in FLOATS.get(layout.name, halves):  # one bit of the exponent off
        block[:, last] &= 255 - bit
    return block


# What the judge does not know: these are computed slowly.
SLOW = ["F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"]


def judged(blocks: np.ndarray, number: int) -> np.ndarray:
    if BLOCKS[number].name not in SLOW:
        with np.errstate(over="ignore"):  # the greatest exponents of MXFP4 make infinities
            return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number))
    slow = getattr(oracles, BLOCKS[number].name.lower())
    flat = blocks.reshape(-1, BLOCKS[number].nbytes)
    return np.array([slow(block.tobytes()) for block in flat]).reshape(*blocks.shape[:-1], -1)


def judge_of(name: str) -> str:
    return "byte map" if name in SLOW else "gguf"


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Equal to the last bit, the sign of zero included."""
    theirs = theirs.astype(np.float32)
    return np.array_equal(ours.numpy().view(np.uint32).ravel(), theirs.view(np.uint32).ravel())


# ── unpacking ────────────────────────────────────────────────────────────────────────────────────


def test_the_sizes_of_blocks_are_those_of_the_format():
    theirs = {int(type): size for type, size in gguf.GGML_QUANT_SIZES.items()}
    theirs.pop(TYPE_ID["Q8_1"])  # the judge keeps the size of 2023; the type is never in files
    ours = {number: (block.values, block.nbytes) for number, block in BLOCKS.items()}
    assert {number: ours.get(number) for number in theirs} == theirs
    assert all(BLOCKS[int(t)].name == t.name for t in gguf.GGML_QUANT_SIZES)


def test_every_type_that_a_file_may_name_is_unpacked():
    assert LAYOUTS.keys() == BLOCKS.keys()
    assert all(layout.block is BLOCKS[number] for number, layout in LAYOUTS.items())


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_the_grids_are_those_of_the_judge(name):
    ours = getattr(grids, name.removesuffix("_S") if name == "IQ1_S" else name)
    assert np.array_equal(ours.numpy(), oracles.grid(name))


def test_signs_and_levels_are_those_of_the_judge():
    signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    assert np.array_equal(codebooks.SIGNS.numpy(), 1 - 2 * signs.astype(int))
    even = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    assert torch.equal(codebooks.EVEN_SIGNS, codebooks.SIGNS[even.tolist()])
    for ours, judge in (("IQ4", gguf.quants.IQ4_NL), ("FP4", gguf.quants.MXFP4)):
        pairs = [(judge.kvalues[byte & 15], judge.kvalues[byte >> 4]) for byte in range(256)]
        assert getattr(codebooks, f"{ours}_LEVELS").tolist() == [list(pair) for pair in pairs]


@EVERY
@pytest.mark.parametrize("n", [1, 2, 7, 3000])
def test_unpacking_equals_the_judge_in_every_bit(layout, n, measured):
    blocks = random_blocks(layout, n, seed=n)
    ours = layout.unpack(torch.from_numpy(blocks.copy()))
    assert ours.shape == (n, layout.block.values)
    assert ours.dtype == torch.float32
    assert same_bits(ours, judged(blocks, TYPE_ID[layout.name]))
    measured("unpacking", layout.name, judge_of(layout.name), "bit for bit", n)


@EVERY
def test_every_byte_value_in_every_place(layout, measured):
    values = np.arange(256, dtype=np.uint8)
    blocks = np.repeat(values[:, None], layout.block.nbytes, axis=1)
    calm = random_blocks(layout, 256)  # its floats are finite
    for start, width in layout.words:
        blocks[:, start : start + width] = calm[:, start : start + width]
    ours = layout.unpack(torch.from_numpy(blocks.copy()))
    assert same_bits(ours, judged(blocks, TYPE_ID[layout.name]))
    measured("unpacking", layout.name, judge_of(layout.name), "bit for bit", len(blocks))


@pytest.mark.parametrize("name", ["Q5_0", "Q3_K", "Q4_K", "Q6_K", "IQ2_XS", "IQ1_M"])
def test_unpacking_equals_the_specification_computed_slowly(name, measured):
    layout, slow = LAYOUTS[TYPE_ID[name]], getattr(oracles, name.lower())
    blocks = random_blocks(layout, 20, seed=5)
    ours = layout.unpack(torch.from_numpy(blocks.copy()))
    assert same_bits(ours, np.array([slow(block.tobytes()) for block in blocks]))
    measured("unpacking", name, "byte map", "bit for bit", len(blocks))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_all_65536_half_floats(name, measured):
    every = np.arange(65536, dtype="<u2")
    layout = LAYOUTS[TYPE_ID[name]]
    ours = layout.unpack(torch.from_numpy(every.view(np.uint8).reshape(-1, 2).copy())).numpy()
    theirs = judged(every.view(np.uint8).reshape(-1, 2), TYPE_ID[name]).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here; infinities count
    measured("unpacking", name, judge_of(name), "bit for bit", len(every))


@EVERY
def test_rows_in_any_number_of_axes(layout):
    blocks = torch.from_numpy(random_blocks(layout, 24))
    flat = layout.unpack(blocks)
    rows = layout.unpack_rows(blocks.view(2, 3, 4 * layout.block.nbytes))
    assert rows.shape == (2, 3, 4 * layout.block.values)
    assert torch.equal(rows.view(flat.shape), flat)
    assert layout.unpack_rows(blocks[:0]).shape == (0, layout.block.values)


@EVERY
def test_a_slice_of_rows_unpacks_as_the_same_rows_of_the_whole(layout):
    rows = torch.from_numpy(random_blocks(layout, 40)).view(10, -1)
    whole = layout.unpack_rows(rows)
    assert torch.equal(layout.unpack_rows(rows[3:4]), whole[3:4])
    assert torch.equal(layout.unpack_rows(rows[::3]), whole[::3])
    assert torch.equal(layout.unpack_rows(rows[torch.tensor([7, 0])]), whole[[7, 0]])


@BLOCKWISE
def test_blocks_at_an_odd_address_unpack_the_same(layout):
    blocks = random_blocks(layout, 8)
    shifted = np.empty(blocks.size + 1, np.uint8)
    shifted[1:] = blocks.ravel()
    odd = torch.from_numpy(shifted[1:]).view(8, -1)
    also_odd = torch.from_numpy(shifted)[1:].view(8, -1)  # the same by storage offset
    expected = layout.unpack(torch.from_numpy(blocks))
    assert torch.equal(layout.unpack(odd), expected)
    assert torch.equal(layout.unpack(also_odd), expected)
    assert torch.equal(layout.unpack(also_odd[:1]), expected[:1])


@pytest.mark.slow
@EVERY
def test_unpacking_compiles_without_a_break(layout):
    """The fast path compiles a net as a whole: nothing here may ask for an address."""
    rows = torch.from_numpy(random_blocks(layout, 4)).view(2, -1)
    torch.compiler.reset()  # it remembers how often the method was compiled, and gives up
    compiled = torch.compile(layout.unpack_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), layout.unpack_rows(rows))


@EVERY
def test_unpacking_leaves_the_packed_bytes_alone(layout):
    blocks = torch.from_numpy(random_blocks(layout, 8))
    before = blocks.clone()
    layout.unpack_rows(blocks)
    layout.swapped(blocks)
    assert torch.equal(blocks, before)


@EVERY
def test_swapping_twice_is_not_swapping(layout):
    rows = torch.from_numpy(random_blocks(layout, 8)).view(2, -1)
    swapped = layout.swapped(rows)
    assert torch.equal(swapped, rows) == (not layout.words)  # single bytes have no order
    assert torch.equal(layout.swapped(swapped), rows)


@pytest.mark.cuda
@EVERY
def test_cuda_equals_cpu(layout):
    blocks = torch.from_numpy(random_blocks(layout, 3000))
    assert same_bits(layout.unpack(blocks.cuda()).cpu(), layout.unpack(blocks).numpy())


# ── packing ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_packing_equals_the_judge_in_every_byte(name, scale, measured):
    values = scale * torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(pack(values, name).numpy(), theirs.view(np.uint8))
    measured("packing", name, "gguf", "bit for bit", values.numel() // BLOCKS[TYPE_ID[name]].values)


@pytest.mark.parametrize("name", PACKED)
def test_packing_zeros_and_ties_equals_the_judge(name):
    values = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 127.0, 2.5, 3.5]).repeat(2, 8)
    values[0] = 0
    values[1, 32:] = -values[1, :32]
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(pack(values, name).numpy(), theirs.view(np.uint8))


@pytest.mark.parametrize(
    ("name", "steps"), [("Q4_0", 8), ("Q4_1", 15), ("Q5_0", 16), ("Q5_1", 31), ("Q8_0", 127)]
)
def test_a_packed_value_is_off_by_one_step_at_most(name, steps):
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    back = LAYOUTS[TYPE_ID[name]].unpack_rows(pack(values, name))
    blocks = values.view(-1, 32)
    reach = blocks.amax(1) - blocks.amin(1) if name.endswith("1") else blocks.abs().amax(1)
    off = (back.view(-1, 32) - blocks).abs().amax(1)
    assert bool((off <= reach / steps * 1.01).all())


# The mean squared errors of ggml's own packer without an importance matrix (that of llama.cpp in
# llama-cpp-python 0.2.44) on the rows of `rows`: normal, heavy-tailed, and off zero.
REFERENCE = {
    "Q2_K": (0.088353, 1.0363, 0.087637),
    "Q3_K": (0.022792, 0.27093, 0.050193),
    "Q4_K": (0.0051304, 0.084696, 0.0050944),
    "Q5_K": (0.0013039, 0.026843, 0.0012816),
    "Q6_K": (0.00031622, 0.0085289, 0.00072821),
}
K_TYPES = pytest.mark.parametrize("name", list(REFERENCE))


def rows() -> list[torch.Tensor]:
    draw = np.random.RandomState(1)  # its numbers are frozen for good, as the errors above are
    normal = draw.standard_normal((64, 1024)).astype(np.float32)
    heavy = draw.standard_t(2, (64, 1024)).astype(np.float32)
    return [torch.from_numpy(values) for values in (normal, heavy, normal + np.float32(1.5))]


def packed_and_back(values: torch.Tensor, name: str) -> torch.Tensor:
    return LAYOUTS[TYPE_ID[name]].unpack_rows(pack(values, name))


@K_TYPES
def test_packing_is_as_exact_as_the_reference(name, measured):
    """Within 2 %: which of two good roundings a rare great value meets is chance."""
    ratios = []
    for values, reference in zip(rows(), REFERENCE[name], strict=True):
        error = (packed_and_back(values, name).double() - values.double()).square().mean().item()
        ratios.append(error / reference)
    assert max(ratios) <= 1.02
    blocks = sum(values.numel() for values in rows()) // 256
    measured("packing", name, "ggml's packer", f"{max(ratios):.3f} × its squared error", blocks)


@K_TYPES
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-12, -1e-39, 1e-45, 5e4, -5e4])
def test_packing_equal_values_gives_nearly_these(name, value):
    """Halves of three digits hold the scales; what is too small for them becomes zero."""
    back = packed_and_back(torch.full((1, 256), value), name)
    assert torch.allclose(back, torch.tensor(value), rtol=2e-3, atol=1e-7)


@K_TYPES
def test_a_block_of_zeros_beside_others_stays_zero(name):
    values = rows()[0].clone()
    values[:, 256:512] = 0
    assert not packed_and_back(values, name)[:, 256:512].any()


@K_TYPES
def test_a_block_packs_the_same_alone_and_among_others(name):
    values = rows()[1]
    whole = pack(values, name)
    assert torch.equal(pack(values[5:6, 256:512], name), whole.view(64, 4, -1)[5:6, 1])


@K_TYPES
def test_packing_what_was_packed_changes_little(name):
    once = packed_and_back(rows()[0], name)
    again = packed_and_back(once, name)
    first = (once - rows()[0]).square().mean()
    assert (again - once).square().mean() < 0.1 * first


# ── tensors of a file ────────────────────────────────────────────────────────────────────────────


def write(path: Path, **keywords) -> dict[str, np.ndarray]:
    """A file with a tensor of two rows of each type; returns the packed rows, little-endian."""
    rows, tensors = {}, {}
    for number, layout in LAYOUTS.items():
        columns = 2 * layout.block.values
        packed = random_blocks(layout, 4, seed=number).reshape(2, -1)
        rows[layout.name] = packed
        raw = torch.from_numpy(packed)
        if keywords.get("byteorder") == ">":
            raw = layout.swapped(raw)
        tensors[layout.name] = (number, (2, columns), raw.numpy())
    write_gguf(path, {}, tensors, **keywords)
    return rows


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("alignment", [1, 32])
def test_a_file_gives_the_same_values_in_either_byte_order(tmp_path, byteorder, alignment):
    rows = write(tmp_path / "m.gguf", byteorder=byteorder, alignment=alignment)
    weights = open_weights(tmp_path / "m.gguf")
    assert list(weights) == list(rows)
    assert len(weights) == len(BLOCKS)
    for name, tensor in weights.items():
        number = TYPE_ID[name]
        assert (tensor.name, tensor.type) == (name, name)
        assert tensor.shape == (2, 2 * BLOCKS[number].values)
        assert tensor.data.shape == (2, 2 * BLOCKS[number].nbytes)
        assert tensor.unpack().shape == tensor.shape
        assert same_bits(tensor.unpack(), judged(rows[name], number))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("extra", range(4))
def test_plain_numbers_are_moved_to_an_address_of_their_own_width(tmp_path, name, extra):
    values = torch.tensor([[1.0, -2.5], [3.0, 0.0]])
    tensors = {"t" * (1 + extra): (TYPE_ID[name], (2, 2), pack(values, name).numpy())}
    write_gguf(tmp_path / "m.gguf", {}, tensors, alignment=1)
    (tensor,) = open_weights(tmp_path / "m.gguf").values()
    assert tensor.data.data_ptr() % BLOCKS[TYPE_ID[name]].nbytes == 0
    assert torch.equal(tensor.unpack(), values)


def test_values_come_in_the_type_asked_for(tmp_path):
    write(tmp_path / "m.gguf")
    tensor = open_weights(tmp_path / "m.gguf")["Q4_K"]
    assert tensor.unpack(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(tensor.unpack(torch.float16), tensor.unpack().half())


def test_data_is_a_view_on_the_file_and_writing_never_reaches_it(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    file = open_gguf(path)
    tensor, before = open_weights(file)["Q8_0"], path.read_bytes()
    assert tensor.data.data_ptr() == file.bytes_of("Q8_0").ctypes.data
    tensor.data.zero_()
    assert path.read_bytes() == before


def test_tensors_outlive_the_closed_file(tmp_path):
    rows = write(tmp_path / "m.gguf")
    with open_gguf(tmp_path / "m.gguf") as file:
        tensor = open_weights(file)["Q6_K"]
    del file
    assert same_bits(tensor.unpack(), judged(rows["Q6_K"], TYPE_ID["Q6_K"]))


def test_scalars_and_vectors(tmp_path):
    number = np.array([1.5], "<f4")
    vector = np.array([1, 2, 3], "<f4")
    tensors = {"scalar": (0, (), number.tobytes()), "vector": (0, (3,), vector.tobytes())}
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    weights = open_weights(tmp_path / "m.gguf")
    assert weights["scalar"].unpack().shape == ()
    assert weights["scalar"].unpack().item() == 1.5
    assert weights["vector"].unpack().tolist() == [1, 2, 3]


def test_the_mapping_is_read_only(tmp_path):
    write(tmp_path / "m.gguf")
    weights = open_weights(tmp_path / "m.gguf")
    assert "Q4_0" in weights
    assert "Q9_9" not in weights
    with pytest.raises(KeyError):
        weights["Q9_9"]
    with pytest.raises(TypeError):
        weights["Q4_0"] = weights["Q4_1"]  # type: ignore[index]
