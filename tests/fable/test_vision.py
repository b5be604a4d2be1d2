"""What is trained is what runs, with eyes too; and evaluation knows what it sees."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch

import refollama
from refollama.dialogue import chat_prompt
from refollama.fable import vision
from refollama.fable.drawings import (
    PLACES,
    SIDE,
    Drawing,
    Thing,
    covers,
    drawing,
    middle,
    png,
)
from refollama.fable.evaluate import Case, Score, cases_of_pictures, confusions, taken_for, told
from refollama.fable.exchange import Exchange
from refollama.fable.net import SHARED, read, weights
from refollama.fable.seeing import Viewing, viewing
from refollama.fable.train import NO_TARGET, Plan
from refollama.fable.vision import CONTEXT, LONG, PATCH, PATCHES, ROW, Seeing, views
from refollama.messages import Chat, Create
from refollama.models.llava import Llava
from refollama.options import Options
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Store
from refollama.weights import open_gguf

PLAN = Plan(rows=1, steps=8)


@pytest.fixture(scope="module")
def small():
    """A run of a small net, that has made a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "SAMPLE", 80)
        patch.setattr(vision, "PIECES", 700)
        patch.setattr(vision, "LANGUAGE", {**vision.LANGUAGE, "block_count": 1})
        patch.setattr(vision, "TOWER", {**vision.TOWER, "block_count": 1})
        run = Seeing(PLAN)
        run.advance(0)
        yield run


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fable-vision")
    small.write(folder)
    return folder


@pytest.fixture(scope="module")
def llm(written):
    names = written / "fable-vision.gguf", written / "fable-vision-mmproj.gguf"
    return refollama.load(names[0], projector=names[1])


def together():
    """A conversation whose questions see each other."""
    return next(talk for talk in (viewing(5, i) for i in range(50)) if len(talk.drawings) == 2)


def row(small, talk):
    drawings: list[Drawing] = []
    ids, numbers, targets = vision.row(talk, small.tokenizer, drawings)
    return ids[None], numbers[None], targets[None], drawings


def test_a_prompt_is_what_training_wrote(small, llm):
    """The same ids, each picture at its place, as chat sends them to the model."""
    talk = together()
    turns = max(talk.drawings) + 1
    ids, *_ = row(small, talk)
    prompt = chat_prompt(llm.script, Chat("", tuple(talk.messages(turns))), llm.reader(Options()))
    assert len(prompt.pictures) == 2
    assert prompt.tokens == ids[0, : len(prompt.tokens)].tolist()


def test_the_projector_is_an_mlp(written):
    """Two matrices, as LLaVA 1.5 has them; one alone would run, and be no MLP."""
    with open_gguf(written / "fable-vision-mmproj.gguf") as file:
        assert {"mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"} <= set(file.tensors)
        assert file.metadata["clip.projector_type"] == "mlp"


@pytest.mark.parametrize("seed", range(40))
def test_the_middle_of_a_thing_is_in_one_patch(seed):
    """It is one that shows the thing, but for rings, which have nothing there."""
    one = drawing(Random(seed))
    patches = covers(one, PATCH)
    middles = {thing: middle(one, thing, PATCH) for thing in one.things}
    assert len(set(middles.values())) == len(one.things)
    for thing, at in middles.items():
        assert patches[at] == thing or thing.shape == "ring"


@torch.no_grad()
def test_the_files_that_are_written_answer_as_the_net_that_learned(small, llm):
    """Logits of every token that follows a picture, up to what packing costs."""
    net, talk = llm.net, together()
    assert isinstance(net, Llava)
    ids, numbers, _, drawings = row(small, talk)
    given = torch.from_numpy(vision.stacked(drawings))
    small.net.token_embd.rows = small.net.mm(small.net.v(given)).flatten(0, 1)
    ours = small.net.output(read(small.net, ids, numbers))
    pictures = [net.picture(png(one)) for one in drawings]
    for picture in pictures:
        net.look(picture)
    theirs_ids = ids.clone()
    for at, picture in enumerate(pictures):
        first = net.n_vocab + at * PATCHES
        theirs_ids[(ids >= first) & (ids < first + PATCHES)] = torch.tensor(list(picture.ids))
    positions = torch.arange(ids.shape[1])[None]
    cache = net.new_cache().rows([0], ids.shape[1])
    theirs = net.output(net.hidden(theirs_ids, positions, cache))
    assert (ours - theirs).abs().max() < 0.05
    assert ours.std() > 0.2


def test_every_weight_learns(small):
    small.surprise(vision.LOOKING).weighed.backward()
    idle = [name for name, w in weights(small.net).items() if w.grad is None or not w.grad.any()]
    for weight in weights(small.net).values():
        weight.grad = None
    assert idle == []


def test_a_batch_depends_on_seed_and_step_alone(small):
    one, again, other = (views(PLAN, small.tokenizer, step) for step in (4, 4, 5))
    assert all(map(torch.equal, one.text, again.text))
    assert torch.equal(one.pixels, again.pixels)
    assert not torch.equal(one.text.tokens, other.text.tokens)
    seed = views(replace(PLAN, seed=1), small.tokenizer, 4)
    assert not torch.equal(one.text.tokens, seed.text.tokens)


def test_each_patch_of_each_drawing_stands_in_a_row_once(small):
    given = views(replace(PLAN, rows=12), small.tokenizer, 0)
    ids = given.text.tokens[given.text.tokens >= small.tokenizer.vocab_size]
    first = small.tokenizer.vocab_size
    assert ids.tolist() == list(range(first, first + len(given.pixels) * PATCHES))


def test_some_steps_have_long_rows(small):
    plan = replace(PLAN, rows=2)
    shapes = [tuple(views(plan, small.tokenizer, at).text.tokens.shape) for at in range(LONG)]
    assert shapes == [(2, ROW)] * (LONG - 1) + [(1, CONTEXT)]


def test_each_patch_is_named_by_what_it_shows_and_where(small):
    thing = Thing("star", "red", "big", 4, 0.5, 0.5, 0.3)
    ids = vision.shown(Drawing("white", (thing,), 1, 1, 0), small.tokenizer)
    words = [[small.tokenizer.piece(id).decode() for id in row] for row in ids.tolist()]
    side = SIDE // PATCH
    middle = [" red", " star", " big", " middle", " middle", " one"]
    assert words[(side // 2) * side + side // 2] == middle
    ground = [" white", " background", " background"]
    assert words[0] == [*ground, " top", " left", " no"]
    assert words[side - 1] == [*ground, " top", " right", " no"]
    assert words[side * (side // 2)] == [*ground, " middle", " left", " no"]


@pytest.mark.parametrize("place", range(9))
def test_the_two_words_for_a_place_say_where_it_is(place):
    said = PLACES[place].split()
    row, column = vision.spot(place)
    assert {row, column} - {"middle"} == {"top", "bottom", "left", "right"} & set(said)


@torch.no_grad()
def test_naming_counts_all_things_as_much_as_all_ground(small):
    """Against a loop over patches."""
    thing = Thing("star", "red", "big", 4, 0.5, 0.5, 0.3)
    one = Drawing("white", (thing,), 1, 1, 0)
    rows = small.seen(torch.from_numpy(vision.stacked([one])))
    found: dict[bool, list[float]] = {True: [], False: []}
    for row, ids in zip(rows, vision.shown(one, small.tokenizer).tolist(), strict=True):
        likely = small.net.output(small.net.output_norm(row)).log_softmax(-1)
        found[ids[1] == ids[2]].append(-sum(likely[id].item() for id in ids) / len(ids))
    means = [sum(some) / len(some) for some in found.values()]
    assert small.naming(rows, [one]).item() == pytest.approx(sum(means) / 2, rel=1e-4)
    assert len(found[True]) > 2 * len(found[False]) > 10


def test_at_first_it_only_looks(small, monkeypatch):
    def answered(given):
        raise InterruptedError

    monkeypatch.setattr(small, "loss", answered)
    assert small.surprise(vision.LOOKING - 1).plain > 0
    with pytest.raises(InterruptedError):
        small.surprise(vision.LOOKING)


def test_questions_that_are_apart_see_the_picture_and_not_each_other(small):
    talk = next(talk for talk in (viewing(5, i) for i in range(50)) if talk.apart)
    ids, numbers, targets, _ = row(small, talk)
    seen = ids[0] >= small.tokenizer.vocab_size
    assert set(numbers[0][seen].tolist()) == {SHARED}
    assert numbers[0].max() > 5
    assert NO_TARGET in targets[0][numbers[0] == 2].tolist()
    assert (targets[0][seen] == NO_TARGET).all()
    sees_all = row(small, together())[1]
    assert set(sees_all[0].tolist()) <= {0, -1}


def test_both_files_become_one_model_that_sees(written):
    service = Service(Store.default(), LoadedModels(), local_files=True)
    list(service.create(Create("seer", path=str(written / "Modelfile"))))
    [entry] = service.tags()
    service.close()
    assert "vision" in entry.capabilities
    assert entry.details["families"] == ["llama", "clip"]


def test_an_answer_about_a_picture_comes(llm):
    message = together().messages(1)[0]
    answer, record = llm.chat([message], {"num_predict": 4, "temperature": 0})
    assert isinstance(answer, str)
    assert record.stats.prompt_eval_count > PATCHES


@pytest.mark.slow
def test_all_files_together_are_small(tmp_path):
    Seeing(PLAN).write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3_000_000


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole, first, second = (Seeing(PLAN) for _ in range(3))
    for run, count in ((whole, 4), (first, 2)):
        for _ in range(count):
            run.advance(0)
    first.save(tmp_path / "stopped")
    second.resume(tmp_path / "stopped")
    for _ in range(2):
        second.advance(0)
    assert second.losses == whole.losses
    theirs = weights(second.net)
    assert all(torch.equal(w, theirs[name]) for name, w in weights(whole.net).items())


# ── evaluation ────────────────────────────────────────────────────────────────────────────────


def test_what_was_taken_for_what():
    found = list(taken_for("I see two red stars and a ring.", "I see two red crosses and a ring."))
    assert ("shape", "star", "cross") in found
    assert ("shape", "ring", "ring") in found
    assert ("colour", "red", "red") in found
    assert list(taken_for("The star is red.", "It is nice.")) == [
        ("shape", "star", "?"),
        ("colour", "red", "?"),
    ]


def test_confusions_add_up_over_lessons():
    scores = {"colour": Score("vision"), "what": Score("vision"), "numbers": Score("questions")}
    said = Exchange("colour", "…", "The star is red.")
    for lesson, answer in (("colour", "The star is pink."), ("what", "The star is red.")):
        case = Case("vision", lesson, [], said)
        scores[lesson].add(case, answer, answer == said.answer)
    found = confusions(scores)
    assert found["colour"] == Counter({("red", "pink"): 1, ("red", "red"): 1})
    assert found["shape"] == Counter({("star", "star"): 2})
    assert told(scores)["marks"] == {"vision": 50.0}


def test_pictures_that_are_asked_about_are_all_kept_out():
    asked = cases_of_pictures(each=1)
    assert len({case.lesson for case in asked}) > 13
    assert all(case.mark == "vision" for case in asked)
    assert sum(bool(message.images) for case in asked for message in case.messages) > 12


def test_a_viewing_without_turns_has_no_messages():
    assert Viewing().messages() == []
