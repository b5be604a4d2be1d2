"""How is fable made?  `python -m refollama.fable.train text`; with eyes: `… train vision`

    step ──► batch: conversations, packed into rows ──► the net ──► loss on the answers
      ▲                                                                 │
      └─────────── Muon, AdamW: weights a little better ◄───────────────┘

A batch is a function of seed and step alone, so a run that was stopped goes on as if it had not
been. At the end the weights are packed and written as a GGUF file, by which fable runs.

    what      weights   a step                              seconds on one core, in bfloat16
    text      1.8 M     8 rows of 512 tokens                0.6     (0.9 in float32)
    vision    1.8 M     24 rows of 160, with 26 drawings    0.5     (0.7)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, pairwise
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

import refollama
from refollama.fable.evaluate import Case, Model, cases, evaluate, totals
from refollama.fable.exchange import capital, strange
from refollama.fable.knowledge import BELOW_ZERO
from refollama.fable.lessons import conversation, drill, in_one_word
from refollama.fable.muon import Muon
from refollama.fable.net import CONTEXT, TABLES, new_net, packed, read, sizes, weights
from refollama.fable.vocabulary import ASSISTANT, TEMPLATE, WORLD, learn, spellings, written
from refollama.fable.world import ANIMALS, COLOURS, MOST, NAMES, NUMBERS, OPPOSITES, PEOPLE
from refollama.models.llama import Llama
from refollama.text.spm import SpmTokenizer
from refollama.weights.gguf import Typed, write_gguf

FULL = 0.96  # of a batch that conversations fill on average
WARM_UP = 50  # steps; the first gradients are the wildest
FLOOR = 0.02  # of the peak: the rate at the very end
SECOND_PEAK, LAST_PEAK = 0.5, 0.15
CLIP = 1.0  # no step follows a gradient longer than this
DECAY = 0.05  # of matrices, each step, times the rate
BETAS = (0.9, 0.95)
SAVED_EVERY = 120.0  # seconds
DECISIVE = 8.0  # what a name or a number counts for, beside other words
TOLD_EVERY = 20  # steps, of which the mean loss is kept
HISTORY = "training.json"
NO_TARGET = -100
STORY = 60  # tokens: no other answer is so long
# Which of two is which is found while the rate falls, and lost again where it is high (at 8e-3 it
# was). So drills come first, the rate falls over them, and never rises so high again.
DRILLS = 400  # steps, before anything else is learned
ONE_IN = 4  # conversations, that is a drill afterwards
# Of all answers those in one word are learned last, as nothing is said before it that could be
# looked at. So in the last part of the way drills ask for them, and come more often.
LAST = 0.93
ONE_IN_LAST = 3
HELD = 0.1
OTHER = -1
KINDS = (NAMES, ANIMALS + PEOPLE, COLOURS)  # of these two in a story are never the same
NOTHING: Mapping[int, int] = {}
NOTHING_HELD: Mapping[str, float] = {}
# What `begin_by_looking_up` laid out, so that it is there when a net begins to need it: how heads
# look back, which needs no learning, and what they look for, of which neither half may go before
# the other.
LAID_OUT: Mapping[str, float] = {"blk.0.attn": 0.0} | {
    f"blk.{block}.attn_{part}": HELD for block in (1, 2) for part in ("q", "k", "norm")
}
Q8_0_FILE = 7  # `general.file_type`
MODELFILE = (
    "FROM {file}\n"
    f'TEMPLATE """{TEMPLATE.replace("{", "{{").replace("}", "}}")}"""\n'
    "PARAMETER temperature {temperature}\n"
    "PARAMETER repeat_penalty 1\n"
    "PARAMETER num_ctx {row}\n"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides what is learned, apart from the code."""

    seed: int = 0
    steps: int = 12_900
    rows: int = 8  # in a batch
    rate: float = 6e-3  # of learning, at its peak


# ── data ──────────────────────────────────────────────────────────────────────────────────────


class Batch(NamedTuple):
    """(rows, CONTEXT) each: tokens, the number of each token's conversation, what comes next, and
    whether anything else would be as good.

    Next is NO_TARGET wherever the user speaks, but for decisive words that come again: fable
    learns to answer, not to ask.
    """

    tokens: Tensor
    conversations: Tensor
    targets: Tensor
    free: Tensor  # bool


def batch(
    plan: Plan, tokenizer: SpmTokenizer, step: int, decisive: Mapping[int, int] = NOTHING
) -> Batch:
    """The batch of this step: whole conversations, the longest placed first, where they fit.

    decisive: ids to be foretold from the user, too, where they come again, and their kinds.
    """
    rows: list[list[list[int]]] = [[] for _ in range(plan.rows)]
    room = [CONTEXT] * plan.rows
    for ids in sorted(_conversations(plan, tokenizer, step), key=len, reverse=True):
        fits = [row for row in range(plan.rows) if room[row] >= len(ids)]
        if not fits:
            continue
        row = min(fits, key=lambda at: room[at])
        rows[row].append(ids)
        room[row] -= len(ids)
    as_row = _row(tokenizer, decisive)
    return Batch(*(torch.stack(part) for part in zip(*map(as_row, rows), strict=True)))


def _conversations(plan: Plan, tokenizer: SpmTokenizer, step: int) -> Iterable[list[int]]:
    """As many as fill most of a batch.  A million numbers belong to each step."""
    left, index = FULL * plan.rows * CONTEXT, step * 1_000_000
    last = step >= LAST * plan.steps
    one_in = ONE_IN_LAST if last else ONE_IN
    while left > 0:
        if step < DRILLS or index % one_in == 0:
            talk = drill(plan.seed, index, step < DRILLS, in_one_word if last else None)
        else:
            talk = conversation(plan.seed, index)
        ids = tokenizer.encode(written(talk), bos=True, special=True)
        left, index = left - len(ids), index + 1
        if left >= 0 and len(ids) <= CONTEXT:
            yield ids


def _row(
    tokenizer: SpmTokenizer, decisive: Mapping[int, int]
) -> Callable[[list[list[int]]], tuple[Tensor, ...]]:
    [begins] = tokenizer.encode(ASSISTANT, special=True)

    def row(talks: list[list[int]]) -> tuple[Tensor, ...]:
        tokens, numbers, targets, free = [], [], [], []
        for number, ids in enumerate(talks):
            told = answers(ids, begins, tokenizer.eos_ids)
            tokens += ids
            numbers += [number] * len(ids)
            targets += said_again(ids, told, decisive)
            free += chosen(ids, told, decisive)
        empty = CONTEXT - len(tokens)
        return (
            torch.tensor(tokens + [0] * empty),
            torch.tensor(numbers + [-1] * empty),
            torch.tensor(targets + [NO_TARGET] * empty),
            torch.tensor(free + [False] * empty),
        )

    return row


def answers(ids: list[int], begins: int, ends: frozenset[int]) -> list[int]:
    """For each token the one after it, if that belongs to an answer or ends one."""
    targets, answering = [], False
    for id, following in zip(ids, [*ids[1:], NO_TARGET], strict=True):
        answering = id == begins or (answering and id not in ends)
        targets.append(following if answering else NO_TARGET)
    return targets


def said_again(ids: list[int], targets: list[int], decisive: Mapping[int, int]) -> list[int]:
    """The targets, with decisive tokens that come again in what the user says.

    Whoever can tell which of some names comes next has looked for them, and will find them when
    somebody asks: look-ups are learned a quarter sooner.
    """
    seen, found = set(), list(targets)
    for at, (id, following) in enumerate(pairwise(ids)):
        seen.add(id)
        if found[at] == NO_TARGET and following in decisive and following in seen:
            found[at] = following
    return found


def chosen(ids: list[int], targets: list[int], decisive: Mapping[int, int] = NOTHING) -> list[bool]:
    """Is a token one of a long answer, a story, that was not in the conversation before?

    The name of a hero is free; nothing is learned from which it is. The second of a kind is not:
    it must not be the first once more.
    """
    seen, found = set(), []
    for asked, answer in groupby(zip(ids, targets, strict=True), lambda pair: pair[1] != NO_TARGET):
        some = list(answer)
        told: dict[int, set[int]] = defaultdict(set)  # by kind
        for id, target in some:
            seen.add(id)
            kind = decisive.get(target, OTHER)
            second = kind != OTHER and len(told[kind] - {target}) == 1
            told[kind].add(target)
            found.append(asked and len(some) >= STORY and target not in seen and not second)
    return found


# ── learning ──────────────────────────────────────────────────────────────────────────────────


class Surprise(NamedTuple):
    """Of a batch, in nats a token: the mean, and that in which decisive tokens count for more."""

    plain: Tensor
    weighed: Tensor


def worth(tokenizer: SpmTokenizer, decisive: Iterable[str], spelled: Iterable[str] = ()) -> Tensor:
    """What each token counts for when it is asked for: (V,) float32.

    Few tokens of an answer decide whether it is right: a name, a number, a colour. All others are
    soon known, and what remains of their loss is the free choice of stories, in whose noise the
    decisive ones are learned ten times slower. So do all pieces of words that have to be spelled.
    """
    found = torch.ones(tokenizer.vocab_size)
    for form in chain(decisive, chain.from_iterable(map(spellings, decisive))):
        ids = tokenizer.encode(form)
        if len(ids) == 1:
            found[ids] = DECISIVE
    for word in chain.from_iterable((word, word.upper()) for word in spelled):
        found[[*tokenizer.encode(word), *tokenizer.encode(f" {word}")]] = DECISIVE
    return found


def kinds(tokenizer: SpmTokenizer, worth: Tensor) -> dict[int, int]:
    """All decisive ids: of which of KINDS each is, or OTHER."""
    found = dict.fromkeys((worth > 1).nonzero().flatten().tolist(), OTHER)
    for kind, table in enumerate(KINDS):
        for form in chain.from_iterable(map(spellings, table)):
            if len(ids := tokenizer.encode(form)) == 1:
                found[ids[0]] = kind
    return found


def names_of_nobody(count: int) -> Iterator[str]:
    """So many names as only users have."""
    rng = Random("names of nobody")
    return (capital(strange(rng)) for _ in range(count))


class Training:
    """A run: the net, its optimiser, and how far it has come.

    What is fable's alone are the methods that `vision.Seeing` replaces.
    """

    name = "fable"
    usual = Plan()
    row = CONTEXT  # tokens
    temperature = 0.5  # it chooses freely then, so that two in a story have two names
    last = LAST  # the part of the way after which the rate rises for the last time
    again = 0.05  # of the way until then, that after which it rises once more: that of drills
    calm = 0.5  # the rate of tables, norms and biases, as a part of that of matrices
    held: Mapping[str, float] = LAID_OUT  # the rates of some weights, as parts of it
    decisive: Sequence[str] = (
        *WORLD,
        *NUMBERS,
        *map(str, range(MOST + 1)),
        *OPPOSITES,
        BELOW_ZERO,
        "null",
        "Yes",
        "No",
    )
    spelled = 1000  # names of nobody: their pieces are decisive, and so is where they end

    def __init__(
        self, plan: Plan, *, compiled: bool = False, bfloat16: bool = False, device: str = "cpu"
    ) -> None:
        self.plan, self.device, self.bfloat16 = plan, device, bfloat16
        self.metadata = self.described()
        self.tokenizer = SpmTokenizer.from_metadata(_plain(self.metadata))
        self.net = self.first()
        self.optimizers = _optimizers(self.net, plan.rate, self.calm, self.held)
        self.worth_after = worth(self.tokenizer, (), names_of_nobody(self.spelled)).to(device)
        decisive = worth(self.tokenizer, self.decisive).to(device)
        self.worth = torch.maximum(decisive, self.worth_after)
        self.looked_up = kinds(self.tokenizer, self.worth)
        self.read = torch.compile(read) if compiled else read
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.marks: list[dict[str, Any]] = []  # of kept-out questions, along the way

    def described(self) -> dict[str, Any]:
        """The metadata of the file: sizes and vocabulary."""
        return {"general.architecture": "llama", **sizes(), **learn(self.plan.seed)}

    def first(self) -> Llama:
        """The net that knows nothing yet."""
        n_vocab = self.tokenizer.vocab_size
        return new_net(self.metadata, n_vocab, seed=self.plan.seed, device=self.device)

    def advance(self, progress: float) -> float:
        """One step, at this part of the way (0 to 1).  → its loss, in nats a token"""
        for group in chain.from_iterable(one.param_groups for one in self.optimizers):
            now = rate_at(self.step, progress, self.again * self.last, self.last)
            group["lr"] = self.plan.rate * group["part"] * now
        with _same_order(strict=self.device == "cpu"):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
                surprise = self.surprise(self.step)
            torch.autograd.backward(surprise.weighed)
        torch.nn.utils.clip_grad_norm_(weights(self.net).values(), CLIP)
        for one in self.optimizers:
            one.step()
            one.zero_grad()
        self.step += 1
        self.losses.append(round(surprise.plain.item(), 4))
        return self.losses[-1]

    def surprise(self, step: int) -> Surprise:
        """The loss of a step's batch."""
        return self.loss(batch(self.plan, self.tokenizer, step, self.looked_up))

    def loss(self, given: Batch) -> Surprise:
        """How surprising the answers are; logits of nothing else are computed."""
        tokens, conversations, targets, free = (part.to(self.device) for part in given)
        asked = targets != NO_TARGET
        hidden = self.read(self.net, tokens, conversations)[asked]  # (n, d_model)
        nats = functional.cross_entropy(
            self.net.output(hidden).float(), targets[asked], reduction="none"
        )
        worth = torch.maximum(self.worth[targets[asked]], self.worth_after[tokens[asked]])
        worth = worth.masked_fill(free[asked], 1.0)
        return Surprise(nats.detach().mean(), (nats * worth).sum() / worth.sum())

    def save(self, path: Path) -> None:
        """All that going on needs; the old file stays until the new one is whole."""
        state = {
            "plan": asdict(self.plan),
            "words": self.tokenizer.vocabulary.tokens,
            "weights": {name: w.detach() for name, w in weights(self.net).items()},
            "optimizers": [one.state_dict() for one in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "marks": self.marks,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Go on from a file of `save`.  Raises: ValueError if another plan or code made it."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["plan"] != asdict(self.plan):
            raise ValueError(f"{path} was made by another plan: {state['plan']}")
        words = self.tokenizer.vocabulary.tokens
        if state.get("words", words) != words:
            raise ValueError(f"{path} has another vocabulary: the lessons were others then")
        with torch.no_grad():
            for name, weight in weights(self.net).items():
                weight.copy_(state["weights"][name])
        for one, its in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(its)
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.marks = state["losses"], state["marks"]

    def loaded(self, folder: Path) -> Model:
        """What `write` has written, as users have it."""
        return refollama.load(folder / f"{self.name}.gguf")

    def questions(self) -> list[Case]:
        """Some, of each lesson, that training never shows."""
        return cases(each=2)

    def write(self, folder: Path) -> None:
        """The model as a GGUF file, matrices packed as Q8_0, and a Modelfile."""
        write_gguf(folder / f"{self.name}.gguf", self.metadata | about(self.name), packed(self.net))
        file = f"./{self.name}.gguf"
        text = MODELFILE.format(file=file, row=self.row, temperature=self.temperature)
        (folder / "Modelfile").write_text(text)

    def history(self) -> dict[str, Any]:
        """How it went, for plots: the plan, minutes, threads, mean losses, marks."""
        starts = range(0, len(self.losses), TOLD_EVERY)
        means = [mean(self.losses[start : start + TOLD_EVERY]) for start in starts]
        return {
            "plan": asdict(self.plan),
            "minutes": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "every": TOLD_EVERY,
            "losses": [round(loss, 4) for loss in means],
            "marks": self.marks,
        }


def about(name: str) -> dict[str, Any]:
    """What a file says of itself."""
    return {"general.name": name, "general.license": "mit", "general.file_type": Q8_0_FILE}


@contextmanager
def _same_order(*, strict: bool) -> Iterator[None]:
    """Threads add up the gradients of an embedding in any order, unless they are told not to."""
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def rate_at(step: int, progress: float, again: float = 1.0, last: float = 1.0) -> float:
    """The rate, as a part of its peak: up in a line, then down along half a cosine.

    again: the part of the way after which it goes down once more, from half of the peak. What was
    not found in the first round, some way of comparing for one, often is in the second.
    last: that after which it does so for the last time, from a smaller one.
    Source: Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    """
    rounds = [(0.0, 1.0), (again, SECOND_PEAK), (last, LAST_PEAK)]
    start, peak = max(one for one in rounds if one[0] <= progress and one[0] < 1)
    end = min((one for one, _ in rounds if one > start), default=1.0)
    way = min((progress - start) / (end - start), 1.0)
    down = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * way)) / 2
    return min(1.0, (step + 1) / WARM_UP) * peak * down


def _optimizers(
    net: Llama, rate: float, calm: float, held: Mapping[str, float] = NOTHING_HELD
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for matrices and for windows, which are matrices; AdamW for tables, norms and biases.

    What is multiplied by decays; what is looked up or added does not.
    """
    hidden: dict[float, list[Tensor]] = defaultdict(list)
    other: dict[float, list[Tensor]] = defaultdict(list)
    for name, weight in weights(net).items():
        multiplied = weight.dim() > 1 and name != "token_embd.weight" and name not in TABLES
        part = next((part for start, part in held.items() if name.startswith(start)), 1.0)
        (hidden if multiplied else other)[part].append(weight)
    return (
        Muon(
            [{"params": some, "part": part} for part, some in hidden.items()],
            lr=rate,
            weight_decay=DECAY,
        ),
        torch.optim.AdamW(
            [{"params": some, "part": calm * part} for part, some in other.items()],
            lr=rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
        ),
    )


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Values as a reader of the file would find them."""
    return {key: v.value if isinstance(v, Typed) else v for key, v in metadata.items()}


# ── the command ───────────────────────────────────────────────────────────────────────────────


def run(training: Training, minutes: float, folder: Path, watch: float = 0) -> None:
    """Learn until the plan's steps or the minutes are over, then write the model and its history.

    watch: minutes of learning after which it is asked some questions; 0: never.
    """
    plan, limit = training.plan, minutes * 60
    with _bar() as bar:
        task = bar.add_task(training.name, total=plan.steps, loss=math.nan, speed=0.0)
        saves, looks = _Every(SAVED_EVERY), _Every(watch * 60)
        first = 0.0  # step, in which all is compiled: what it takes says nothing of those to come
        while training.step < plan.steps and training.seconds < limit:
            start = time.monotonic()
            late = (training.seconds - first) / max(limit - first, 1.0)
            training.advance(max(training.step / plan.steps, late))
            took = time.monotonic() - start
            training.seconds += took
            first = first or took
            speed = training.step * plan.rows * training.row * FULL / training.seconds
            loss = mean(training.losses[-50:])
            bar.update(task, completed=training.step, loss=loss, speed=speed)
            if saves.is_due():
                training.save(checkpoint_of(training, folder))
            if looks.is_due():
                bar.console.print(progress(training, folder, loss), highlight=False)
    training.save(checkpoint_of(training, folder))
    training.write(folder)
    (folder / HISTORY).write_text(json.dumps(training.history()) + "\n")


class _Every:
    """Is it time again?  At most once in so many seconds; 0: never."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def is_due(self) -> bool:
        if not self.seconds or time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def progress(training: Training, folder: Path, loss: float) -> str:
    """One line: how far it is, and how many of some fifty kept-out questions it gets right."""
    training.write(folder)
    with torch.no_grad():
        marks = totals(evaluate(training.loaded(folder), training.questions(), quiet=True))
    training.marks.append({"step": training.step, **marks})
    right = ", ".join(f"{mark} {percent:.0f} %" for mark, percent in marks.items())
    return f"{training.seconds / 60:.0f} min  step {training.step}  loss {loss:.3f}  {right}"


def checkpoint_of(training: Training, folder: Path) -> Path:
    """Where a run is saved."""
    return folder / f"{training.name}.checkpoint"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def parser() -> argparse.ArgumentParser:
    """The options; their help is a lesson in what they do."""
    found = argparse.ArgumentParser(
        prog="python -m refollama.fable.train",
        description="Train fable from nothing: make its conversations from a seed, learn a "
        "vocabulary and then the answers, and write a GGUF file that refollama runs.",
        epilog="Stopped with Ctrl-C or by a power cut, it goes on with --resume where it was last "
        "saved, and ends in the same weights.",
    )
    found.add_argument(
        "what",
        choices=["text", "vision"],
        help="text: fable, which talks; vision: fable-vision, which looks at pictures",
    )
    found.add_argument("--seed", type=int, default=0, help="of data and first weights (0)")
    found.add_argument("--steps", type=int, help="batches to learn from (as many as it needs)")
    found.add_argument("--rate", type=float, help="of learning, at its peak (as it was tuned)")
    found.add_argument(
        "--minutes",
        type=float,
        default=90.0,
        help="the most it may take (90): the rate of learning falls so that it ends in time; if "
        "the steps end first, which they should, time does not matter and the run is exact",
    )
    found.add_argument("--out", type=Path, default=Path("fable"), help="folder to write into")
    found.add_argument(
        "--watch",
        type=float,
        default=0,
        metavar="MINUTES",
        help="after each so many minutes ask some kept-out questions, and tell how many are right",
    )
    found.add_argument("--resume", action="store_true", help="go on where a run was last saved")
    found.add_argument("--compile", action="store_true", help="by torch.compile: needs a compiler")
    found.add_argument(
        "--bfloat16",
        action="store_true",
        help="products in bfloat16: half the time where a CPU has units for it; weights stay exact",
    )
    found.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch chooses")
    found.add_argument("--device", default="cpu", help='"cuda" for a GPU (cpu)')
    return found


def _kind(what: str) -> type[Training]:
    if what == "text":
        return Training
    from refollama.fable.vision import Seeing  # which builds on this page

    return Seeing


def main() -> None:
    """The command."""
    given = parser().parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    kind = _kind(given.what)
    plan = replace(kind.usual, seed=given.seed)
    plan = replace(plan, steps=given.steps or plan.steps, rate=given.rate or plan.rate)
    training = kind(plan, compiled=given.compile, bfloat16=given.bfloat16, device=given.device)
    if given.resume:
        training.resume(checkpoint_of(training, given.out))
    run(training, given.minutes, given.out, given.watch)


if __name__ == "__main__":
    main()
