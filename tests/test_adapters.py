"""A model with adapters: made, loaded, and asked under different scales without loading anew."""

import json
import threading

import pytest
import torch

import refollama
from refollama.create import create
from refollama.errors import BadOption, BadRequest, NotFound
from refollama.loaded import load_file
from refollama.messages import Create, Generate
from refollama.options import Options
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Store
from refollama.store.name import Name
from tests import adapters
from tests.store.helpers import snapshot
from tests.tiny import metadata, shapes

SHAPES = shapes(metadata())
ASK = {"temperature": 0, "num_predict": 6, "seed": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two adapters: one as GGUF, one as PEFT has it."""
    folder = tmp_path_factory.mktemp("adapters")
    plain = adapters.write_plain(folder / "one.gguf", adapters.halves(SHAPES))
    return plain, adapters.write_peft(folder / "two", adapters.halves(SHAPES, seed=2))


def said(llm, **options):
    """The ids of an answer, and how many tokens of the prompt were known already."""
    _, record = llm.generate("The cat and the", ASK | options)
    return record.context, record.stats.prompt_cached_count


# ── in memory ─────────────────────────────────────────────────────────────────────────────────


def test_each_request_has_scales_of_its_own(tiny, files, measured):
    """And what was read under other scales is never used: not one token of it."""
    with refollama.load(tiny, adapter=files) as llm:
        for scales in ([1, 0], [0.0, 1.0], [0.5, -0.5], [0, 0]):
            with refollama.load(tiny, {"adapters": scales}, adapter=files) as alone:
                wanted, _ = said(alone)
            first = said(llm, adapters=scales)
            assert first == (wanted, 0)
            again, cached = said(llm, adapters=scales)
            assert again == wanted and cached > 0
    with refollama.load(tiny) as plain:
        assert said(plain)[0] == wanted  # the last scales were nought
    measured("options", "adapters", "definition", "equal", 4)


def test_answers_under_different_scales_side_by_side(tiny, files):
    with refollama.load(tiny, adapter=files, slots=2) as llm:
        scales = [[1, 0], [0, 1], [0.5, 0.5]]
        wanted = [said(llm, adapters=each)[0] for each in scales]
        assert len(set(wanted)) == len(scales)
        found: dict[int, object] = {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: said(llm, adapters=scales[n])[0]}))
            for n in range(len(scales))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[n] for n in range(len(scales))] == wanted


def test_all_at_their_full_scale_is_the_same_choice_as_none(tiny, files):
    with refollama.load(tiny, adapter=files) as llm:
        wanted, _ = said(llm)
        assert said(llm, adapters=[1, 1.0]) == (wanted, said(llm)[1])


def test_a_part_that_is_swapped_is_swapped_under_all_scales(tiny, files):
    with refollama.load(tiny, adapter=files[0]) as llm:
        before, _ = said(llm, adapters=[0.5])
        llm.net.blk[0].attn_q = torch.nn.Linear(64, 64, bias=False)
        assert said(llm, adapters=[0.5])[0] != before


def test_embeddings_and_scores_follow_the_scales(tiny, files):
    with refollama.load(tiny, adapter=files[0]) as llm, refollama.load(tiny) as plain:
        assert torch.equal(llm.embed("the", {"adapters": [0]}), plain.embed("the"))
        assert not torch.equal(llm.embed("the"), plain.embed("the"))
    with refollama.load(tiny, {"adapters": [0]}, adapter=files[0]) as off:
        assert torch.equal(off.score("the cat"), plain.score("the cat"))


@pytest.mark.parametrize("given", [[1], [1, 2, 3]])
def test_scales_must_be_as_many_as_adapters(tiny, files, given):
    sentence = f"adapters, 2 in all, not {len(given)}"
    with refollama.load(tiny, adapter=files) as llm, pytest.raises(BadOption, match=sentence):
        said(llm, adapters=given)
    with refollama.load(tiny) as plain, pytest.raises(BadOption, match="the model has no adapter"):
        said(plain, adapters=given)


def test_weights_are_in_memory_once(tiny, files):
    """An adapter costs its own few numbers; other scales cost a cache."""
    with refollama.load(tiny) as plain, refollama.load(tiny, adapter=files) as llm:
        before = llm.nbytes()[0]
        branches = 4 * 4 * 2 * sum(map(sum, (SHAPES[f"{n}.weight"] for n in adapters.LINEARS)))
        assert before == plain.nbytes()[0] + branches
        said(llm)
        one = llm.nbytes()[0]
        said(llm, adapters=[0.5, 0])
        assert llm.nbytes()[0] - one <= one - before


@pytest.mark.parametrize("options", [{"use_mmap": False}, {"use_mlock": True}])
def test_adapters_and_other_placements(tiny, files, options):
    wanted = load_file(tiny, adapters=files).logits([1, 5, 9])
    assert torch.equal(
        load_file(tiny, Options(**options), adapters=files).logits([1, 5, 9]), wanted
    )


# ── in the store ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


def made(store, local_files=True, **fields):
    return [step.status for step in create(store, Create("x", **fields), local_files=local_files)]


def answer(store, **options):
    with_all = Service(store, LoadedModels(), local_files=True)
    try:
        *_, last = with_all.generate(
            Generate("x", "The cat and the", raw=False, options=ASK | options)
        )
        return last.context
    finally:
        with_all.close()


def test_a_modelfile_with_two_adapters(store, tiny, files):
    """PEFT's folder becomes a file of the store; a child has both, and its own scales."""
    lines = f"FROM {tiny}\nADAPTER {files[0]}\nADAPTER {files[1]}\nTEMPLATE {{{{ .Prompt }}}}"
    statuses = made(store, modelfile=lines)
    assert statuses.count("creating adapter layer") and statuses.count("converting adapter")
    assert len(store.resolve(Name.parse("x")).adapters) == 2
    with refollama.load(tiny, adapter=files) as llm:
        assert answer(store) == said(llm)[0]
        assert answer(store, adapters=[0, 1]) == said(llm, adapters=[0, 1])[0]
        made(store, modelfile="FROM x\nPARAMETER adapters 0\nPARAMETER adapters 0.5")
        assert store.resolve(Name.parse("x")).parameters == {"adapters": [0, 0.5]}
        assert answer(store) == said(llm, adapters=[0, 0.5])[0]


def test_adapters_as_blobs(store, tiny, files):
    plain, folder = files
    sent = {
        name: store.blobs.add((folder / name).read_bytes())
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    blobs = {f"two/{name}": digest for name, digest in sent.items()}
    blobs["one.gguf"] = store.blobs.add(plain.read_bytes())
    model = {"m.gguf": store.blobs.add(tiny.read_bytes())}
    made(store, files=model, adapters=blobs, template="{{ .Prompt }}", local_files=False)
    with refollama.load(tiny, adapter=(folder, plain)) as llm:
        assert answer(store, adapters=[1, 0.5]) == said(llm, adapters=[1, 0.5])[0]


def test_a_modelfile_is_printed_so_that_it_makes_the_same(store, tiny, files):
    from refollama.messages import Show
    from refollama.show import show

    made(store, modelfile=f"FROM {tiny}\nADAPTER {files[1]}\nPARAMETER adapters 0.25")
    before = store.resolve(Name.parse("x")).digest
    made(store, modelfile=show(store, Show("x")).modelfile)
    assert store.resolve(Name.parse("x")).digest == before


@pytest.mark.parametrize("eager", [True, False])
def test_what_does_not_fit_is_refused_and_leaves_nothing(store, tiny, tmp_path, monkeypatch, eager):
    """At once; or, where the model is only made on the way, when it stands."""
    if not eager:
        monkeypatch.setattr("refollama.create._check_adapters", lambda *_: None)
    change = adapters.halves(SHAPES, ["blk.0.attn_q"])
    wide = {"blk.0.attn_q": (change["blk.0.attn_q"][0], change["blk.0.attn_q"][1][:8])}
    folder = adapters.write_peft(tmp_path / "p", {})
    plain = adapters.write_plain(tmp_path / "a.gguf", wide)
    before = snapshot(store.root)
    for path, sentence in ((plain, "8 × 64, but the model's .* has 64 × 64"), (folder, "nothing")):
        with pytest.raises(
            BadRequest if eager else refollama.errors.RefollamaError, match=sentence
        ) as caught:
            made(store, modelfile=f"FROM {tiny}\nADAPTER {path}")
        assert caught.value.status == 400
        assert "line 2" in str(caught.value) or not eager
    assert [name for name in snapshot(store.root) if "sha256" in name] == []
    assert not eager or snapshot(store.root) == before


def test_a_modelfile_names_two_blobs(store, tiny, files):
    """So says the command line to a server on another machine."""
    weights, settings = (
        store.blobs.add((files[1] / name).read_bytes())
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    model = store.blobs.add(tiny.read_bytes())
    lines = f"FROM @{model}\nADAPTER @{weights} @{settings}\nTEMPLATE {{{{ .Prompt }}}}"
    made(store, modelfile=lines, local_files=False)
    with refollama.load(tiny, adapter=files[1]) as llm:
        assert answer(store) == said(llm)[0]


def test_a_folder_needs_both_files(store, tiny, files):
    model = {"m.gguf": store.blobs.add(tiny.read_bytes())}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        blob = {name: store.blobs.add((files[1] / name).read_bytes())}
        with pytest.raises(BadRequest, match=f"{name} is there, but adapter_.* is missing"):
            made(store, files=model, adapters=blob)
    with pytest.raises(NotFound, match="upload it first"):
        made(store, modelfile=f"FROM @{model['m.gguf']}\nADAPTER @sha256:{'0' * 64} @{blob[name]}")


def test_nobody_far_away_names_a_folder(store, tiny, files):
    blob = store.blobs.add(tiny.read_bytes())
    with pytest.raises(BadRequest, match="only allowed from the machine"):
        made(store, modelfile=f"FROM @{blob}\nADAPTER {files[1]}", local_files=False)


def test_other_adapters_are_another_model_on_the_shelf(tiny, files):
    from refollama.shelf import Files

    both, one = Files(tiny, None, files), Files(tiny, None, files[:1])
    assert len({both.state, one.state, Files(tiny).state}) == 3


def test_options_from_json():
    assert Options().updated(json.loads('{"adapters": [1, 0.5]}')).adapters == (1.0, 0.5)
