"""Compiled blocks against those that they stand for: the same sums, and when they are taken."""

import copy
import os
import re
import shutil
import zipfile
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import refollama
from refollama.cli import cli
from refollama.fast import CompiledBlock, exactly, hasten, warm
from refollama.fast.compiled import join, path_of, shape_of
from refollama.fast.recorded import MOST, Recorded
from refollama.fast.routines import folder, forget, maker
from refollama.fast.step import BlockStep
from refollama.models.layers import Linear
from refollama.models.llama import Step
from refollama.models.load import load_net
from refollama.options import Options
from tests.exactness import same
from tests.models.test_llama import some_tokens
from tests.tiny import write_model

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def slow(test: Any) -> Any:
    """Compiling takes a minute or two, on some machines more."""
    return pytest.mark.slow(pytest.mark.timeout(600)(test))


WIDE: Any = {
    "embedding_length": 256,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
KINDS = {"small": "Q8_0", "lanes": "Q4_K", "float16": "F16"}


def net_of(path) -> Any:
    net = load_net(path)
    hasten(net)
    return net


def choose(patch, kind, place):
    """Of nets that are small, and of those that count as large; what is kept lies in this place."""
    patch.setenv("XDG_CACHE_HOME", str(place))
    if kind != "small":
        patch.setattr("refollama.fast.choice.SMALL", -1)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A model whose blocks were compiled: kind, folder, path."""
    place = tmp_path_factory.mktemp("warm")
    path = write_model(place / "m.gguf", type=KINDS[request.param], **WIDE)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, request.param, place)
        told: list[tuple[int, int]] = []
        net = net_of(path)
        assert not any(isinstance(block, CompiledBlock) for block in net.blk)
        assert warm(net, told=lambda *done: told.append(done)) == len(net.blk)
        # Three products of a type in lanes, three of rows as they lie, four of prompts by such,
        # where their height is a multiple of 16; two of a block.
        total = {"lanes": 3 + 3 + 2, "float16": 3 + 4 + 2, "small": 2}[request.param]
        assert told[0] == (0, total)
        assert told[-1] == (total, total)
        assert sorted(told) == told
        assert [one.suffix for one in folder().iterdir()] == [".pt2"] * total
    return request.param, place, path


@pytest.fixture
def warmed(made, monkeypatch):
    """Its path."""
    kind, place, path = made
    choose(monkeypatch, kind, place)
    return path


def shape(block, *dtype) -> Any:
    return shape_of(block, *dtype)


def counted(net):
    """How often routines are called from now on: one item for each time."""
    calls: list[int] = []
    for block in net.blk:
        for key, routine in block.routines.items():

            def run(given, routine=routine, layer=block.layer):
                calls.append(layer)
                return routine(given)

            block.routines[key] = run
    return calls


def as_it_was(net):
    """The same blocks, without their routines."""
    return copy.deepcopy(net)


@torch.no_grad()
def written(net, ids, *, slots=1, dtype=torch.float16):
    """Logits after each token, one step a token, in so many slots side by side."""
    cache = net.new_cache(slots, dtype)
    rows = list(range(slots))
    return torch.stack(
        [
            net(
                (torch.tensor(rows) + id)[:, None] % net.n_vocab,
                torch.tensor([at]).expand(slots, -1),  # one number, seen several times
                cache.rows(rows, at + 1),
            )
            for at, id in enumerate(ids)
        ]
    )


@compiler
@slow
def test_a_compiled_block_computes_what_the_block_does(warmed, measured):
    net = net_of(warmed)
    assert all(type(block) is CompiledBlock for block in net.blk)
    ids = some_tokens(300).tolist()  # the cache grows on the way
    ours, theirs = (written(one, ids).double().log_softmax(-1) for one in (net, as_it_was(net)))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert 0 <= kl < 1e-4
    measured("fast parts", f"compiled: {net.blk[0].shape.kinds[0]}", "plain path, KL", kl, len(ids))


@compiler
@slow
def test_side_by_side_they_compute_what_each_would_alone(warmed):
    net, ids = net_of(warmed), some_tokens(12).tolist()
    together = written(net, ids, slots=20)
    for row in (0, 7, 19):
        alone = written(net, [id + row for id in ids])
        assert same(together[:, row], alone[:, 0])


@compiler
@slow
def test_threads_share_out_rows_and_no_sum(warmed):
    """A routine gives the same with however many: none of its sums is cut for them."""
    net = net_of(warmed)
    x, calls, found = torch.randn(9, 1, net.config.d_model), counted(net), []
    before = torch.get_num_threads()
    try:
        for threads, rows in ((1, 1), (2, 1), (1, 9), (2, 9)):
            torch.set_num_threads(threads)
            cache = net.new_cache(rows, torch.float16).rows(list(range(rows)), 1)
            step = Step(net.rope, torch.zeros(rows, 1, dtype=torch.long), cache, net.config.window)
            with torch.no_grad():
                found.append(net.blk[0](x[:rows], step))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2 + 2 * 2
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    assert torch.equal(found[2], found[3])


@compiler
@slow
def test_what_a_block_gave_stays_and_what_its_loops_hand_on_makes_no_tensors(warmed):
    net = net_of(warmed)
    x, (block, *_) = torch.randn(2, 1, 1, net.config.d_model), net.blk
    cache = net.new_cache(1, torch.float16).rows([0], 1)
    step = Step(net.rope, torch.zeros(1, 1, dtype=torch.long), cache, net.config.window)
    with torch.no_grad():
        one = block(x[0], step)
        kept = one.clone()
        assert not torch.equal(block(x[1], step), kept)
    assert torch.equal(one, kept)
    # Of its sizes only the number of places is not known: scores, and what is hidden of them.
    with zipfile.ZipFile(path_of(block.shape)) as file:
        [name] = [name for name in file.namelist() if name.endswith("wrapper.cpp")]
        assert file.read(name).count(b"aoti_torch_empty_strided(") < 5


@compiler
@slow
def test_whoever_looks_inside_finds_the_blocks_as_they_were(warmed):
    net, ids = net_of(warmed), some_tokens(4).tolist()
    plain, seen = as_it_was(net), []
    calls = counted(net)
    written(net, ids)
    assert calls == list(range(len(net.blk))) * len(ids)
    with exactly():
        assert torch.equal(written(net, ids), written(plain, ids))
    hooks = [
        block.ffn_up.register_forward_hook(lambda *passed: seen.append(passed[2].shape))
        for block in net.blk
    ]
    assert torch.equal(written(net, ids), written(plain, ids))
    assert len(calls) == len(seen) == len(ids) * len(net.blk)
    for hook in hooks:
        hook.remove()
    written(net, ids)
    assert len(calls) == 2 * len(seen)


@compiler
@slow
def test_a_part_that_was_swapped_is_used_and_a_weight_that_was_written(warmed):
    net, ids = net_of(warmed), some_tokens(4).tolist()
    before = written(net, ids)
    part = net.blk[1].ffn_down
    net.blk[1].ffn_down = Linear(part.weight, lambda packed: part.unpack(packed) * 0)
    swapped = written(net, ids)
    assert not torch.allclose(swapped, before, atol=1e-3)
    net.blk[1].ffn_down = part
    assert torch.equal(written(net, ids), before)
    net.blk[0].attn_norm.weight.mul_(2)
    part.weight.zero_()
    torch.testing.assert_close(
        written(net, ids), written(as_it_was(net), ids), atol=0.01, rtol=0.01
    )
    assert not torch.allclose(written(net, ids), before, atol=1e-2)


@compiler
@slow
@pytest.mark.parametrize("name", ["attend", "swiglu"])
def test_another_way_to_attend_or_to_gate_is_taken(warmed, name):
    net, ids = net_of(warmed), some_tokens(4).tolist()
    before, block = written(net, ids), net.blk[1]
    way = getattr(block, name)
    setattr(block, name, lambda *given: 0 * way(*given))
    changed = written(net, ids)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(changed, written(as_it_was(net), ids), atol=0.01, rtol=0.01)
    setattr(block, name, way)
    assert torch.equal(written(net, ids), before)


@compiler
@slow
def test_what_somebody_changes_of_a_step_reaches_the_blocks_behind(warmed):
    """Each sees the token itself, and nothing before it, from the second block on."""

    def narrow(block, given):
        step = given[1]
        step.visible = step.visible & (torch.arange(step.visible.shape[2]) == step.positions[0, 0])

    net, ids = net_of(warmed), some_tokens(6).tolist()
    plain, before = as_it_was(net), written(net, ids)
    for one in (net, plain):
        one.blk[1].register_forward_pre_hook(narrow)
    found = written(net, ids)
    torch.testing.assert_close(found, written(plain, ids), atol=0.02, rtol=0.02)
    assert not torch.allclose(found, before, atol=0.02)


@compiler
@slow
def test_gradients_pass_and_another_cache_has_no_routine(warmed):
    net = net_of(warmed)
    x = torch.randn(1, 1, net.config.d_model, requires_grad=True)
    net.token_embd.register_forward_hook(lambda *passed: x)
    cache = net.new_cache(dtype=torch.float32)
    net(torch.tensor([[3]]), torch.tensor([[0]]), cache.rows([0], 1)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    other, ids = net_of(warmed), some_tokens(4).tolist()
    calls = counted(other)
    written(other, ids, dtype=torch.float32)
    assert not calls


@compiler
@slow
def test_what_is_too_large_for_16_bits_is_not_for_a_routine(warmed):
    net = net_of(warmed)
    calls = counted(net)
    for block in net.blk:
        block.ffn_norm.weight.mul_(1e4)
    ids = some_tokens(3).tolist()
    ours, theirs = written(net, ids), written(as_it_was(net), ids)
    assert calls
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


@compiler
@slow
def test_an_answer_from_warm_blocks_is_the_same_however_its_prompt_was_divided(warmed):
    prompt, found = some_tokens(30).tolist(), []
    for batch in (512, 7, 1):
        llm = refollama.load(warmed)
        assert type(llm.net.blk[0]) is CompiledBlock
        options = {"temperature": 0, "num_predict": 12, "num_batch": batch}
        with llm.start(prompt, Options().updated(options)) as ids:
            found.append(list(ids))
        llm.close()
    assert found[0] == found[1] == found[2]


# ── files that are no good ────────────────────────────────────────────────────────────────────


@pytest.fixture
def cold(tmp_path):
    return write_model(tmp_path / "m.gguf", type="Q8_0")


def test_without_a_routine_every_block_stays(cold):
    net = net_of(cold)
    assert join(net) == 0
    assert not folder().exists()


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_is_no_routine_is_told_of_and_left_alone(cold, caplog, size):
    net = net_of(cold)
    kept = path_of(shape(net.blk[0]))
    folder().mkdir(parents=True)
    kept.write_bytes(os.urandom(size))
    kept.chmod(0o600)
    forget()
    assert join(net) == 0
    assert "no routine" in caplog.text
    assert kept.exists()


def test_what_is_compiled_later_is_found_by_who_has_looked_before(monkeypatch, tmp_path):
    """As when `refollama warm` runs beside a server."""
    from refollama.fast import routines

    monkeypatch.setattr(routines, "_opened", lambda path, device: lambda given: given)
    path = tmp_path / "later.pt2"
    assert routines.loaded(path) is None
    path.write_bytes(b"")
    assert (found := routines.loaded(path)) is not None
    path.unlink()
    assert routines.loaded(path) is found
    forget()
    assert routines.loaded(path) is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="knows owners of files")
def test_a_file_that_others_may_write_is_not_run(cold, caplog):
    net = net_of(cold)
    kept = path_of(shape(net.blk[0]))
    folder().mkdir(parents=True)
    kept.write_bytes(b"PK")
    kept.chmod(0o666)
    forget()
    assert join(net) == 0
    assert "others than its user" in caplog.text


def test_another_shape_another_torch_and_another_processor_have_files_of_their_own(
    cold, tmp_path, monkeypatch
):
    from refollama.fast import routines

    block = net_of(cold).blk[0]
    one, full = shape(block), shape(block, torch.float32)
    other = shape(net_of(write_model(tmp_path / "w.gguf", type="Q8_0", **WIDE)).blk[0])
    paths = {path_of(one), path_of(full), path_of(other)}
    assert len(paths) == 3
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        lambda: monkeypatch.setattr(routines, "CPUINFO", tmp_path / "cpuinfo"),
    ):
        (tmp_path / "cpuinfo").write_text("flags : fpu sse9\n")
        change()
        maker.cache_clear()
        assert path_of(one) not in paths
        paths.add(path_of(one))
    maker.cache_clear()


@torch.no_grad()
def test_a_weight_of_another_size_ends_the_routine(cold):
    net = net_of(cold)
    block, calls = net.blk[0], []
    refuse: Any = {(torch.float16, 1): lambda given: calls.append(given)}
    net.blk[0] = warmed = CompiledBlock(block, shape(block), refuse)
    part = warmed.ffn_gate
    fewer = len(part.weight) // 2
    part.weight, net.blk[0].ffn_up.weight = part.weight[:fewer], part.weight[fewer:]
    down = warmed.ffn_down
    warmed.ffn_down = Linear(down.weight, lambda packed: down.unpack(packed)[:, :fewer])
    warmed._gather()
    assert not warmed.routines
    written(net, some_tokens(3).tolist())
    assert not calls


def routine_of(its):
    """A routine that is not compiled."""

    def run(given):
        products, rest = [], list(given[10:])
        for count in its.tensors:
            products.append(rest[:count])
            del rest[:count]
        return [BlockStep(its)(*given[:10], products)]

    return run


def test_a_step_of_tensors_is_the_step_of_the_block(cold):
    """What is compiled, uncompiled: the same as `Block.forward`."""
    net = net_of(cold)
    ids = some_tokens(20).tolist()
    theirs = written(net, ids, dtype=torch.float32)
    for index, block in enumerate(net.blk):
        its = shape(block, torch.float32)
        net.blk[index] = CompiledBlock(block, its, {(torch.float32, 1): routine_of(its)})
    torch.testing.assert_close(written(net, ids, dtype=torch.float32), theirs, atol=1e-5, rtol=1e-5)


# ── for GPUs, here on the CPU ─────────────────────────────────────────────────────────────────


@pytest.fixture
def packed(monkeypatch, tmp_path) -> Any:
    """A net whose matrices stay packed, as on a GPU."""
    monkeypatch.setattr("refollama.fast.compiled.PACKED_ON", ("cpu",))
    return load_net(write_model(tmp_path / "m.gguf", type="Q4_0", **WIDE))


def with_routines(net, around):
    """The same, each block with what is compiled, uncompiled."""
    net = copy.deepcopy(net)
    for index, block in enumerate(net.blk):
        its = shape(block, torch.float32)
        assert set(its.kinds) == {"packed Q4_0"}
        ways = {(torch.float32, count): around(routine_of(its)) for count in (1, 8)}
        net.blk[index] = CompiledBlock(block, its, ways)
    return net


def played(run):
    """What a recording does, done again for every time."""
    result = run()

    def play():
        for place, one in zip(result, run(), strict=True):
            place.copy_(one)

    return play, result


def test_a_step_of_packed_rows_is_the_step_of_the_block(packed):
    ids = some_tokens(20).tolist()
    ours = written(with_routines(packed, lambda run: run), ids, dtype=torch.float32)
    theirs = written(packed, ids, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_recorded_step_is_the_step(packed):
    """Over a cache that grows, for several numbers of rows, and in another cache."""
    runs: list[Any] = []

    def record(run):
        runs.append(run)
        return played(run)

    net = with_routines(packed, lambda run: Recorded(run, record))
    plain = with_routines(packed, lambda run: run)
    ids = some_tokens(600).tolist()
    assert torch.equal(
        written(net, ids, dtype=torch.float32), written(plain, ids, dtype=torch.float32)
    )
    assert len(runs) == 3 * len(net.blk)  # one for each length of the cache that is looked at
    for slots in (3, 1):
        some = written(net, ids[:5], slots=slots, dtype=torch.float32)
        assert torch.equal(some, written(plain, ids[:5], slots=slots, dtype=torch.float32))


def test_recordings_are_few_and_give_tensors_of_their_own():
    routine = Recorded(lambda given: [given[0] * given[-1]], played)
    weight, rest = torch.tensor(2.0), [torch.zeros(1)] * 5
    first = routine([torch.ones(1), *rest, weight])
    second = routine([torch.ones(1) * 3, *rest, weight])
    assert (first[0].item(), second[0].item()) == (2, 6)
    weight.fill_(5)
    assert routine([torch.ones(1), *rest, weight])[0].item() == 5
    assert routine([torch.ones(1), *rest, torch.tensor(7.0)])[0].item() == 7
    for size in range(40):
        assert len(routine([torch.ones(size), *rest, weight])[0]) == size
    assert len(routine._kept) <= MOST


@compiler
@slow
def test_a_block_of_packed_rows_can_be_compiled(packed, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert warm(packed) == len(packed.blk)
    ids = some_tokens(40).tolist()
    ours, theirs = (written(one, ids) for one in (packed, as_it_was(packed)))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"])
def test_on_a_gpu_a_block_is_compiled_and_recorded(monkeypatch, tmp_path, type):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    net: Any = load_net(write_model(tmp_path / "m.gguf", type=type, **WIDE))
    ids = some_tokens(300).tolist()
    theirs = written(net, ids)
    for block in net.blk:
        block.to("cuda")
    assert warm(net) == len(net.blk)
    kl = theirs.double().log_softmax(-1)
    ours = written(net, ids).double().log_softmax(-1)
    assert (kl.exp() * (kl - ours)).sum(-1).mean() < 1e-4


# ── the command ───────────────────────────────────────────────────────────────────────────────


def test_without_a_compiler_it_says_what_is_missing(cold):
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):  # as if CXX said so
        said = CliRunner().invoke(cli, ["warm", str(cold)])
    assert said.exit_code == 1
    assert "there is no C++ compiler" in said.output
    assert not list(folder().glob("*"))


def test_a_model_with_nothing_to_compile_is_refused(cold, monkeypatch):
    monkeypatch.setattr("refollama.fast.choice.SMALL", -1)
    path = write_model(cold.parent / "f32.gguf", type="F32")
    said = CliRunner().invoke(cli, ["warm", str(path)])
    assert said.exit_code == 1
    assert "has nothing that can be compiled" in said.output


@compiler
@slow
def test_the_command_makes_a_model_faster_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = CliRunner().invoke(cli, ["warm", "fable"])
    assert said.exit_code == 0, said.output
    assert "6 of 6 blocks are compiled" in said.output
    now, before = map(int, re.findall(r"(\d+) tokens/s; before, (\d+)", said.output)[0])
    assert now > before
    again = CliRunner().invoke(cli, ["warm", "fable"])
    assert "is ready" in again.output
