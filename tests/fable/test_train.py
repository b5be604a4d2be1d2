"""A run is decided by its plan: the same batches, and, stopped and resumed, the same weights."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import refollama
from refollama.fable import train
from refollama.fable.evaluate import cases
from refollama.fable.net import CONTEXT, read, sizes, weights
from refollama.fable.train import DRILLS, NO_TARGET, Plan, Training, batch, parser, rate_at
from refollama.fable.vocabulary import ASSISTANT
from refollama.fable.world import NAMES
from tests.fable import reader

PLAN = Plan(rows=2, steps=8)


def test_a_batch_depends_on_seed_and_step_alone(words):
    one, again, other = (batch(PLAN, words, step) for step in (4, 4, 5))
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens, batch(replace(PLAN, seed=1), words, 4).tokens)
    assert one.tokens.shape == one.conversations.shape == one.targets.shape == (2, CONTEXT)


def test_a_batch_is_nearly_full_of_whole_conversations(words):
    full = []
    for step in range(DRILLS - 3, DRILLS + 3):
        given = batch(Plan(), words, step)
        full.append((given.conversations >= 0).float().mean().item())
        starts = given.tokens == words.bos_id
        counts = given.conversations.max(dim=1).values + 1
        assert torch.equal(starts.sum(1), counts)
    assert sum(full) / len(full) > 0.9


def test_answers_are_what_is_to_be_learned_and_their_ends(words):
    """From the mark of the assistant to the end of its turn, and nothing of the user's."""
    given = batch(PLAN, words, DRILLS)
    [begins] = words.encode(ASSISTANT, special=True)
    for tokens, targets in zip(given.tokens.tolist(), given.targets.tolist(), strict=True):
        answering, expected = False, []
        for id, following in itertools.pairwise([*tokens, 0]):
            answering = (answering and id not in words.eos_ids) or id == begins
            expected.append(following if answering else NO_TARGET)
        assert targets == expected


def test_of_the_user_words_that_decide_are_foretold_where_they_come_again(words):
    plain = batch(PLAN, words, DRILLS)
    names = dict.fromkeys(words.encode("".join(f" {name}" for name in NAMES)), 0)
    more = batch(PLAN, words, DRILLS, names)
    new = (more.targets != plain.targets).nonzero().tolist()
    assert new
    for row, at in new:
        id, same = more.targets[row, at].item(), plain.conversations[row, at]
        before = more.tokens[row, : at + 1][more.conversations[row, : at + 1] == same]
        assert plain.targets[row, at] == NO_TARGET
        assert id == more.tokens[row, at + 1] and id in names and id in before.tolist()


def test_what_a_story_brings_is_free_and_what_it_says_again_is_not():
    answer = [*range(100, 170), 100, 101]
    ids = [7, 120, 8, *answer, 9, 5, 6]
    targets = [NO_TARGET, NO_TARGET, *answer, 9, NO_TARGET, NO_TARGET, NO_TARGET]
    free = train.chosen(ids, targets)
    assert [id for id, is_free in zip(targets, free, strict=True) if is_free] == [
        id for id in [*range(100, 170), 9] if id != 120
    ]
    short = [7, 120, 8, 100, 101, 9]
    assert not any(train.chosen(short, [NO_TARGET, NO_TARGET, 100, 101, 9, NO_TARGET]))


def test_the_second_of_a_kind_is_not_free():
    """It must not be the first; a third may be what it likes, and so may a word of no kind."""
    answer = list(range(100, 170))
    kinds = {103: 0, 107: 1, 110: 0, 112: 0, 115: train.OTHER, 116: train.OTHER}
    free = train.chosen([8, *answer], [*answer, NO_TARGET], kinds)
    assert [id for id, is_free in zip(answer, free, strict=False) if not is_free] == [110]


def test_each_decisive_word_is_of_a_kind_in_every_spelling(words):
    found = train.kinds(words, train.worth(words, Training.decisive))
    of = {
        text: {found[id] for id in words.encode(text)} for text in (" LILY", " fox", " red", " 7")
    }
    assert of == {" LILY": {0}, " fox": {1}, " red": {2}, " 7": {train.OTHER}}


def test_first_come_drills_then_all_else(words):
    """In every conversation of the first batches there are beings to be told apart."""

    def told(step):
        given = batch(PLAN, words, step)
        for row, numbers in zip(given.tokens, given.conversations, strict=True):
            for number in range(numbers.max() + 1):
                yield bool(reader.beings(words.decode(row[numbers == number].tolist())))

    assert all(told(0)) and all(told(DRILLS - 1))
    assert not all(told(DRILLS))


def test_the_rate_rises_then_falls():
    rates = [rate_at(step, step / 1000) for step in range(1001)]
    assert max(rates) > 0.9
    assert rates[0] < 0.03
    assert rates == [*sorted(rates[:45]), *rates[45:]]
    assert rates[300:] == sorted(rates[300:], reverse=True)
    assert rates[-1] < 0.03


def test_the_rate_may_rise_once_more():
    rates = [rate_at(step, step / 1000, again=0.6) for step in range(1001)]
    assert rates[100:600] == sorted(rates[100:600], reverse=True)
    assert rates[600] == pytest.approx(train.SECOND_PEAK)
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert max(rates[595:600]) < 0.03 > rates[-1]


def test_the_last_round_is_a_small_one():
    rates = [rate_at(step + 50, step / 1000, again=0.5, last=0.9) for step in range(1001)]
    assert rates[900] == pytest.approx(train.LAST_PEAK)
    assert rates[899] < 0.03 > rates[-1]
    assert rates[900:] == sorted(rates[900:], reverse=True)
    assert rates[500:900] == sorted(rates[500:900], reverse=True)


def test_in_the_last_round_drills_are_for_one_word(words):
    plan = Plan(steps=1000)
    asked = {
        step: [words.decode(ids) for ids in train._conversations(plan, words, step)]
        for step in (400, 929, 930, 999)
    }
    one_word = re.compile("one word|single word", re.I)

    def all_are(step, one_in):
        return all(one_word.search(text) for text in asked[step][::one_in])

    assert all_are(930, train.ONE_IN_LAST) and all_are(999, train.ONE_IN_LAST)
    assert not (all_are(400, train.ONE_IN) or all_are(929, train.ONE_IN))


def test_a_run_that_is_not_late_follows_its_steps_alone(monkeypatch, tmp_path):
    """However long the first one compiles.  One that is late ends in time."""
    now, told = [0.0], []

    class Clocked:
        name, plan, step, seconds, row, losses = "it", Plan(steps=100), 0, 0.0, 1, [1.0]

        def __init__(self, first, each):
            self.took = first, each

        def advance(self, progress):
            told.append(progress)
            now[0] += self.took[self.step > 0]
            self.step += 1

        def save(self, path): ...

        def write(self, folder): ...

        def history(self):
            return {}

    monkeypatch.setattr("refollama.fable.train.time.monotonic", lambda: now[0])
    train.run(Clocked(60.0, 1.0), minutes=3, folder=tmp_path)  # type: ignore[arg-type]
    assert told == [step / 100 for step in range(100)]
    told.clear()
    train.run(Clocked(60.0, 4.0), minutes=3, folder=tmp_path)  # type: ignore[arg-type]
    assert told == pytest.approx([0, 0.01, *(step / 30 for step in range(1, 30))])


def test_the_help_says_what_the_options_do():
    text = parser().format_help()
    options = "--seed --minutes --resume --out --compile --bfloat16 --device --watch"
    assert all(option in text for option in options.split())


def test_decisive_words_count_for_more_in_every_spelling(words):
    found = train.worth(words, Training.decisive)
    texts = (" Lily", "Lily", " LILY", " 7", "red")
    of = {text: found[words.encode(text)].tolist() for text in texts}
    assert all(set(weights) == {train.DECISIVE} for weights in of.values())
    assert found[words.encode(" is called.")].tolist() == [1.0] * len(words.encode(" is called."))


def test_what_is_spelled_counts_for_more_in_each_piece(words):
    found = train.worth(words, (), ["Droowilenka"])
    forms = (" Droowilenka", "Droowilenka", " DROOWILENKA", "DROOWILENKA")
    ids = [id for form in forms for id in words.encode(form)]
    assert len(ids) > 2
    assert found[ids].tolist() == [train.DECISIVE] * len(ids)
    assert found.sum() == len(found) + (train.DECISIVE - 1) * len(set(ids))


@pytest.mark.slow
def test_the_loss_is_a_mean_in_which_some_tokens_count_for_more(small):
    """Against a loop over tokens; what is told is the plain mean.  Free ones count for one,
    others for what they are, or for what they end."""
    run = Training(PLAN)
    tokens, conversations, targets, free = given = batch(PLAN, run.tokenizer, DRILLS, run.looked_up)
    logits = run.net.output(read(run.net, tokens, conversations)).log_softmax(-1)
    worth, after, own = run.worth.tolist(), run.worth_after.tolist(), tokens.tolist()
    pairs = [
        (-logits[row, at, id].item(), 1.0 if free[row, at] else max(worth[id], after[own[row][at]]))
        for row, ids in enumerate(targets.tolist())
        for at, id in enumerate(ids)
        if id != NO_TARGET
    ]
    plain, weighed = run.loss(given)
    assert plain.item() == pytest.approx(sum(nats for nats, _ in pairs) / len(pairs), rel=1e-4)
    whole = sum(worth for _, worth in pairs)
    expected = sum(nats * worth for nats, worth in pairs) / whole
    assert weighed.item() == pytest.approx(expected, rel=1e-4)
    assert whole > 1.5 * len(pairs)


@pytest.fixture
def small(monkeypatch):
    """Runs of a net that takes no time."""
    little = sizes(block_count=1, embedding_length=64, feed_forward_length=64)
    little |= {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    little |= {"llama.rope.dimension_count": 16}
    monkeypatch.setattr(train, "sizes", lambda: little)


@pytest.mark.slow
def test_what_was_laid_out_is_held(small, monkeypatch):
    """The heads that look back stay as they are; a weight that is held takes smaller steps."""
    monkeypatch.setattr(train.Training, "held", {"blk.0.attn": 0.0, "blk.0.ffn_up": 0.1})
    run = Training(PLAN)
    before = {name: weight.detach().clone() for name, weight in weights(run.net).items()}
    steps(run, 2)
    moved = {name: (w - before[name]).norm().item() for name, w in weights(run.net).items()}
    assert {name for name, far in moved.items() if far == 0} == {
        f"blk.0.attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")
    }
    assert moved["blk.0.ffn_up.weight"] < 0.2 * moved["blk.0.ffn_gate.weight"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_compiled_it_learns_the_same(small):
    plain, compiled = Training(PLAN), Training(PLAN, compiled=True)
    steps(plain, 3)
    steps(compiled, 3)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.slow
def test_in_bfloat16_it_learns_nearly_the_same(small):
    exact, rounded = Training(PLAN), Training(PLAN, bfloat16=True)
    steps(exact, 3)
    steps(rounded, 3)
    assert rounded.losses == pytest.approx(exact.losses, rel=1e-2)
    assert rounded.losses != exact.losses


def steps(run, count):
    for _ in range(count):
        run.advance(run.step / run.plan.steps)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, small):
    whole, first, second = Training(PLAN), Training(PLAN), Training(PLAN)
    steps(whole, 6)
    steps(first, 3)
    first.save(tmp_path / "stopped")
    second.resume(tmp_path / "stopped")
    steps(second, 3)
    assert second.losses == whole.losses
    theirs = weights(second.net)
    assert all(torch.equal(w, theirs[name]) for name, w in weights(whole.net).items())
    with pytest.raises(ValueError, match="another plan"):
        Training(replace(PLAN, steps=9)).resume(tmp_path / "stopped")
    state = torch.load(tmp_path / "stopped", weights_only=True)
    torch.save(state | {"words": state["words"][::-1]}, tmp_path / "stopped")
    with pytest.raises(ValueError, match="another vocabulary"):
        second.resume(tmp_path / "stopped")


@pytest.mark.slow
def test_it_learns_and_what_it_wrote_can_be_talked_to(tmp_path, small):
    run = Training(replace(PLAN, steps=60, rate=4e-2))
    train.run(run, minutes=1, folder=tmp_path)
    assert sum(run.losses[-5:]) < 0.9 * sum(run.losses[:5])
    llm = refollama.load(tmp_path / "fable.gguf")
    answer, record = llm.chat([{"role": "user", "content": "Hello!"}], {"num_predict": 8})
    assert isinstance(answer, str)
    assert record.done_reason in ("stop", "length")
    assert "FROM ./fable.gguf" in (tmp_path / "Modelfile").read_text()
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["plan"]["steps"] == 60
    assert told["losses"] == [
        pytest.approx(sum(run.losses[at : at + 20]) / 20, abs=1e-4) for at in (0, 20, 40)
    ]


@pytest.mark.slow
def test_while_it_learns_it_can_be_watched(tmp_path, small, monkeypatch):
    run = Training(PLAN)
    monkeypatch.setattr(run, "questions", lambda: cases(each=1)[:3])
    run.advance(0)
    before = {name: weight.clone() for name, weight in weights(run.net).items()}
    line = train.progress(run, tmp_path, 1.5)
    assert run.marks[0]["step"] == run.history()["marks"][0]["step"] == 1
    assert re.fullmatch(r"0 min  step 1  loss 1.500  (\w+ \d+ %,? ?)+", line)
    assert all(torch.equal(w, before[name]) for name, w in weights(run.net).items())


def test_it_is_time_again_when_so_many_seconds_are_over(monkeypatch):
    now = iter((0, 5, 9, 10, 15, 21))
    clock = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr("refollama.fable.train.time", clock)
    every = train._Every(10)
    assert [every.is_due() for _ in range(2)] == [False, False]
    assert every.is_due()


def test_never_is_never():
    assert not train._Every(0).is_due()


@pytest.mark.slow
def test_the_command_trains_and_resumes(tmp_path):
    command = [sys.executable, "-m", "refollama.fable.train", "text", "--threads", "1"]
    command += ["--out", str(tmp_path), "--steps"]
    subprocess.run([*command, "1"], check=True, capture_output=True)
    before = torch.load(tmp_path / "fable.checkpoint", weights_only=True)
    subprocess.run([*command, "1", "--resume"], check=True, capture_output=True)
    after = torch.load(tmp_path / "fable.checkpoint", weights_only=True)
    assert before["losses"] == after["losses"]
    assert (tmp_path / "fable.gguf").stat().st_size < 4_500_000
