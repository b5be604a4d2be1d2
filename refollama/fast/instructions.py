"""What torch's compiler is taught: instructions for `dots` and `pairs`, and to leave vectors whole.

A compiler of tensors knows sums and products, and has no word for an instruction that multiplies
bytes four by four and adds them up, or numbers of 16 bits two by two. Here it gets one: both go
through it as any operation on each number does, and come out as

    dots     AVX-512 VNNI, AVX-VNNI    vpdpbusd               64 products, 32
             AVX-512, AVX2             vpmaddubsw, vpaddw     64, 32: sums of two, in 16 bits,
                                       vpmaddwd at the end    while these can hold them
    pairs    AVX-512 VNNI, AVX-VNNI    vpdpwssd               32, 16
             AVX-512, AVX2             vpmaddwd, vpaddd       32, 16

Sources: Intel's Intrinsics Guide; the lowering and the two sets of C++ expressions, for vectors
and for single numbers, are those of `torch._inductor`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, reduce
from typing import Any

import torch

from refollama.fast.dots import HALF, WORD

MOST_OF_16 = (1 << 15) - 1  # a sum that 16 bits hold
TILE_LOOPS = 3  # over tiles, their sixteen rows, and blocks: a matrix has no fewer
AHEAD = 2048  # words
LINE = 32  # numbers of 16 bits: 64 bytes, which memory brings at once
CHAINS = 2  # sums that take turns: each waits four cycles for what was added before
PLACE = "place"  # what torch's compiler loaded a number from, as an expression of C++
NIBBLE = 4  # bits: codes of 8 are multiplied by halves where sums have 16
PAIRS = "pairs_of_words"

Term = tuple[str, Any]  # what codes and numbers are called in C++


@cache
def teach() -> None:
    """torch's compiler what `dots` and `pairs` are."""
    from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
    from torch._inductor.lowering import register_lowering
    from torch._inductor.utils import register_op_dtype_propagation_rules
    from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND

    register_lowering(torch.ops.refollama.dots.default, type_promotion_kind=None)(_lowered)
    register_lowering(torch.ops.refollama.pairs.default, type_promotion_kind=None)(_lowered_pairs)
    named = {
        _name(bits): (partial(_one_by_one, _bytes), partial(_vectors, partial(_dots, bits)))
        for bits in range(1, 9)
    }
    named[PAIRS] = partial(_one_by_one, _halves), partial(_vectors, _pairs)
    for name, writers in named.items():
        kind = ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
        register_op_dtype_propagation_rules(name, kind, torch.int32)
        for overrides, write in zip((CppOverrides, CppVecOverrides), writers, strict=True):
            setattr(overrides, name, staticmethod(_expression(name, write)))


def _name(bits: int) -> str:
    """Of what adds up products of codes of so many bits, and numbers of one byte."""
    return f"dots_of_{bits}_bits"


def _lowered(start: Any, codes: Sequence[Any], numbers: Any, bits: int) -> Any:
    """`dots`, as each of its numbers is computed."""
    from torch._inductor.virtualized import ops

    *sizes, count, W = numbers.get_size()

    def one(index: Sequence[Any]) -> Any:
        words, place = [_at(index, code) for code in codes], _stretched(index, sizes)
        load, parts = numbers.make_loader(), _parts(W)
        chains = min(CHAINS, len(parts))
        sums = [chains * [ops.constant(0, torch.int32)] for _ in range(count)]  # of each byte
        sums[0][0] = _at(index, start)
        for turn, part in enumerate(parts):
            for byte, its in enumerate(sums):
                terms = *(words[at] for at in part), *(load([*place, byte, at]) for at in part)
                its[turn % chains] = getattr(ops, _name(bits))(its[turn % chains], *terms)
        found, *others = [reduce(ops.add, its) for its in sums]
        for byte, one in enumerate(others, 1):
            up = ops.constant(8 * byte, torch.int32)
            found = ops.add(found, ops.bitwise_left_shift(one, up))
        return found

    return _of_each(one, codes, sizes)


def _lowered_pairs(codes: Sequence[Any], numbers: Any) -> Any:
    """`pairs`, as each of its numbers is computed."""
    from torch._inductor.virtualized import ops

    sizes = numbers.get_size()[:-1]

    def one(index: Sequence[Any]) -> Any:
        place, load = _stretched(index, sizes), numbers.make_loader()
        sums = CHAINS * [ops.constant(0, torch.int32)]
        for at, code in enumerate(codes):
            word, number = _at(index, code), load([*place, at])
            sums[at % CHAINS] = getattr(ops, PAIRS)(sums[at % CHAINS], word, number)
        return reduce(ops.add, sums)

    return _of_each(one, codes, sizes)


def _of_each(one: Callable[[Sequence[Any]], Any], codes: Sequence[Any], sizes: list[Any]) -> Any:
    """What computes each sum of codes (…, L) and numbers of these sizes, which may stretch."""
    from torch._inductor.ir import Pointwise

    ranges = [
        other if size == 1 else size
        for size, other in zip(codes[0].get_size(), [*sizes, 1], strict=True)
    ]
    return Pointwise.create(
        device=codes[0].get_device(), dtype=torch.int32, inner_fn=one, ranges=ranges
    )


def _parts(count: int) -> list[list[int]]:
    """Which of a sum's words are added by one expression: where there is an instruction for it each
    by itself, so that sums take turns; else all, since sums in 16 bits are widened together."""
    each = range(count)
    return [[at] for at in each] if _has_instruction() else [[*each]]


def _at(index: Sequence[Any], tensor: Any) -> Any:
    sizes = tensor.get_size()
    return tensor.make_loader()(_stretched(index[len(index) - len(sizes) :], sizes))


def _stretched(index: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    return [0 if size == 1 else at for size, at in zip(sizes, index, strict=False)]


def _expression(name: str, write: Callable[[str, list[Term]], str]) -> Callable[..., str]:
    def expression(start: object, *others: object) -> str:
        half = len(others) // 2
        terms = zip(map(str, others[:half]), others[half:], strict=True)
        return write(str(start), list(terms))

    expression.__name__ = name
    return expression


def _one_by_one(products: Callable[[str, Any], list[str]], start: str, terms: list[Term]) -> str:
    each = [one for term in terms for one in products(*term)]
    return f"static_cast<int32_t>({' + '.join([start, *each])})"


def _bytes(code: str, number: Any) -> list[str]:
    return [
        f"({code} >> {up} & 255) * static_cast<int8_t>({number} >> {up})"
        for up in range(0, WORD, 8)
    ]


def _halves(code: str, number: Any) -> list[str]:
    return [
        f"static_cast<int16_t>({code} >> {up}) * static_cast<int16_t>({number} >> {up})"
        for up in (0, HALF)
    ]


def _vectors(
    write: Callable[[str, list[Term], list[str], int], str], start: str, terms: list[Term]
) -> str:
    """Of one vector of words, or of two where sixteen words fill as many."""
    from torch._inductor.virtualized import V

    width, count = V.kernel.vec_isa.bit_width(), V.kernel._get_num_vectors(torch.int32)
    places = [getattr(number, PLACE, "") for _, number in terms]
    found = []
    for part in [""] if count == 1 else [f"[{at}]" for at in range(count)]:
        its = [(code + part, f"{number}{part}") for code, number in terms]
        found.append(write(start + part, its, places, width))
    return f"{V.kernel._get_vec_type(torch.int32)}({', '.join(found)})"


def _dots(bits: int, start: str, terms: list[Term], places: list[str], width: int) -> str:
    if _instruction("dpbusd", width):
        return _by_instruction("dpbusd", start, terms, places, width)
    return _by_sixteen_bits(start, terms, bits, width)


def _pairs(start: str, terms: list[Term], places: list[str], width: int) -> str:
    if _instruction("dpwssd", width):
        return _by_instruction("dpwssd", start, terms, places, width)
    do = f"_mm{width}"
    for code, number in terms:
        start = f"{do}_add_epi32({start}, {do}_madd_epi16({code}, {number}))"
    return start


def _by_instruction(
    called: str, start: str, terms: list[Term], places: list[str], width: int
) -> str:
    """A number that stands for a whole vector is taken from where it lies, by the instruction
    itself: made into a vector before, it takes a load of its own, and those are what eight tokens
    wait for. g++ does not see that by itself."""
    vector = f"__m{width}i"  # some compilers have a macro for it, which casts by itself
    found = f"{vector}({start})"
    for (code, number), place in zip(terms, places, strict=True):
        if place and _takes_numbers():
            inputs = f'"v"({vector}({code})), "m"({place})'
            many = f"%2%{{1to{width // WORD}%}}"
            asm = f'asm("vp{called} {many}, %1, %0" : "+v"(sum) : {inputs})'
            found = f"[&]({vector} sum) {{ {asm}; return sum; }}({found})"
        else:
            do = _instruction(called, width)
            found = f"{do}({found}, {vector}({code}), {vector}({number}))"
    return found


def _has_instruction() -> bool:
    return _has("avx512_vnni") or _has("avx_vnni")


def _instruction(called: str, width: int) -> str:
    """What vpdpbusd, or vpdpwssd, is called in C++; "" where this processor has none."""
    if _has("avx512_vnni"):
        return f"_mm{width}_{called}_epi32"
    return f"_mm256_{called}_avx_epi32" if width == 256 and _has("avx_vnni") else ""


def _takes_numbers() -> bool:
    """Can the instruction take one number for all places, and does the compiler take assembly?"""
    return _has("avx512_vnni") and sys.platform != "win32"


def _has(capability: str) -> bool:
    if capability == "avx512_vnni":
        return bool(torch.cpu._is_vnni_supported())
    told = getattr(torch.cpu, "get_capabilities", None)  # an older torch does not tell
    return bool(told and told().get(capability))


def _by_sixteen_bits(start: str, terms: list[Term], bits: int, width: int) -> str:
    """As many sums of two products as 16 bits hold, before they are widened."""
    do, all_bits = f"_mm{width}", f"si{width}"
    if 2 * 128 * ((1 << bits) - 1) > MOST_OF_16:
        low = f"{do}_set1_epi8({(1 << NIBBLE) - 1})"
        lower = [(f"{do}_and_{all_bits}({code}, {low})", number) for code, number in terms]
        upper = [
            (f"{do}_and_{all_bits}({do}_srli_epi16({code}, {NIBBLE}), {low})", number)
            for code, number in terms
        ]
        found = _by_sixteen_bits(start, lower, NIBBLE, width)
        return _widened(found, upper, NIBBLE, width, 1 << NIBBLE)
    return _widened(start, terms, bits, width, 1)


def _widened(start: str, terms: list[Term], bits: int, width: int, times: int) -> str:
    do = f"_mm{width}"
    many = MOST_OF_16 // (2 * 128 * ((1 << bits) - 1))
    for at in range(0, len(terms), many):
        sums = [f"{do}_maddubs_epi16({code}, {number})" for code, number in terms[at : at + many]]
        found = sums[0]
        for one in sums[1:]:
            found = f"{do}_add_epi16({found}, {one})"
        start = f"{do}_add_epi32({start}, {do}_madd_epi16({found}, {do}_set1_epi16({times})))"
    return start


@contextmanager
def whole_vectors() -> Iterator[None]:
    """Numbers that fill vectors are loaded and converted at once, and what is wanted soon is asked
    for.  A torch that writes its C++ differently goes on doing so."""
    from torch._inductor.codegen.cpp import CppVecKernel

    kernel: Any = CppVecKernel
    changes = {
        "_get_vec_load_line": _load_line,
        "get_to_dtype_expr": _conversion,
        "load": _load,
        "broadcast": _broadcast,
    }
    before = {name: getattr(kernel, name) for name in changes if hasattr(kernel, name)}
    for name, written in before.items():
        setattr(kernel, name, changes[name](written))
    try:
        yield
    finally:
        for name, written in before.items():
            setattr(kernel, name, written)


def _load_line(before: Callable[..., str]) -> Callable[..., str]:
    """torch's compiler says of each load how many numbers it takes. Where vectors have 256 bits its
    header, told so, copies them to the stack, and waits for them there: three quarters of the time
    of a product. It does not, if it is told nothing.

    And words of a matrix are done with sooner than memory brings the next ones; so these are asked
    for. One token is a tenth sooner for it; eight, while whose products memory would rest, take
    half the time where no cache holds the matrix (Zen 5).
    """

    def line(self: Any, var: str, index: Any, dtype: torch.dtype, mask: Any = None) -> str:
        written = before(self, var, index, dtype, mask)
        load, _, rest = written.partition("loadu(")
        place = rest.removesuffix(f", static_cast<int64_t>({self.tiling_factor}))")
        if mask is not None or self.tail_size or place == rest:
            return written
        vectors = self._get_raw_num_vectors(dtype)
        if dtype in (torch.float16, torch.bfloat16):
            half = vectors == 1 / 2 and self.vec_isa.bit_width() == 512
            loaded = _half_a_vector(load, place) if half else written
            return f"({_next_turn(index, place, self.itervars[-1])}{loaded})"
        if dtype != torch.int32 or vectors != self._get_num_vectors(dtype):
            return written  # the last vector would reach past the end
        loops = [one for one in getattr(index, "free_symbols", ()) if str(one).startswith("x")]
        soon = f"__builtin_prefetch({place} + {AHEAD}), " if len(loops) >= TILE_LOOPS else ""
        return f"({soon}{load}loadu({place}))"

    return line


def _half_a_vector(load: str, place: str) -> str:
    """Numbers of 16 bits, of which half a vector is wanted: torch's header loads a whole one and
    masks half of it, and on Zen 5 that takes more than twice as long where the other half lies in
    the next line of memory, as every second does."""
    half = f"_mm256_loadu_si256(reinterpret_cast<const __m256i*>({place}))"
    return f"{load.removesuffix('::')}(_mm512_castsi256_si512({half}))"


def _next_turn(index: Any, place: str, innermost: Any) -> str:
    """Asks for what lies there in the next turn of the outermost loop: for the next rows, while
    several tokens pass by these and memory would rest."""
    from torch._inductor.codegen import cpp_utils

    write: Any = cpp_utils.cexpr_index
    symbols = getattr(index, "free_symbols", ())
    turn = next((one for one in symbols if str(one) == "x0"), None)
    if turn is None or innermost not in symbols or index.as_coeff_Add()[0] % LINE:
        return ""  # it is asked for already: by the turn before this, or by its neighbour
    return f"__builtin_prefetch({place} + {write(index.subs(turn, turn + 1) - index)}), "


def _load(before: Callable[..., Any]) -> Callable[..., Any]:
    """What is loaded knows where it lies: so far behind a place that its neighbours share."""

    def load(self: Any, name: str, index: Any) -> Any:
        from torch._inductor.codegen import cpp_utils

        write: Any = cpp_utils.cexpr_index
        found = before(self, name, index)
        if not found.is_vec:
            far, shared = self.rename_indexing(index).as_coeff_Add()
            place = f"({self.args.input(name)} + {write(shared)})[{write(far)}]"
            setattr(found, PLACE, place)
        return found

    return load


def _broadcast(before: Callable[..., Any]) -> Callable[..., Any]:
    """So does the vector that a number becomes."""

    def broadcast(self: Any, number: Any) -> Any:
        found = before(self, number)
        setattr(found, PLACE, getattr(number, PLACE, None))
        return found

    return broadcast


def _conversion(before: Callable[..., str]) -> Callable[..., str]:
    """Of whole numbers that fill several vectors torch's header makes floats on the stack, one by
    one: half the time of a product in vectors of 256 bits. Each vector has an instruction."""

    def expression(self: Any, x: Any, dtype: torch.dtype, old: torch.dtype, *others: Any) -> str:
        count = self._get_num_vectors(dtype)
        if not x.is_vec or count == 1 or (old, dtype) != (torch.int32, torch.float32):
            return before(self, x, dtype, old, *others)
        each = ", ".join(f"at::vec::convert<float>({x}[{at}])" for at in range(count))
        return f"{self._get_vec_type(dtype)}({each})"

    return expression
