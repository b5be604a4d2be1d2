"""docs/api.md tables the routes and fields that the code has: no more, and no fewer."""

import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from refollama import messages as records
from refollama.dialogue import gathered
from refollama.messages import Chunk, Embedded, InMemory, Piece, Progress, Stats, ToolCall
from refollama.server import wire
from refollama.server.app import create_app
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.show import show
from refollama.store import Store

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
PACKAGE = Path(__file__).parent.parent / "refollama"


def tables():
    """(heading, first cell of the header) → the names in the rows' first cells, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif match := re.fullmatch(r"\| ([a-z ]+) \| 2023 \| today \| here \|", line):
            rows = found.setdefault((heading, match[1]), [])
        elif match := re.match(r"\| `([^`]+)` \|( [^|]+ \|){3}$", line):
            rows.append(match[1])
        else:
            assert not line.startswith("| `"), f"this row has not four cells: {line}"
    return found


TABLES = tables()
ASKED = {heading: names for (heading, kind), names in TABLES.items() if kind == "field"}
ANSWERED = {heading: names for (heading, kind), names in TABLES.items() if kind == "in the answer"}

READERS = {
    "POST /api/generate": wire.read_generate,
    "POST /api/chat": wire.read_chat,
    "POST /api/embeddings": wire.read_embeddings,
    "POST /api/embed": wire.read_embed,
    "POST /api/show": wire.read_show,
    "POST /api/create": wire.read_create,
    "POST /api/pull": wire.read_pull,
    "POST /api/push": wire.read_push,
    "POST /api/copy": wire.read_copy,
    "DELETE /api/delete": wire.read_delete,
    "POST /api/tokenize": wire.read_tokenize,
    "POST /api/detokenize": wire.read_detokenize,
}


def test_the_routes_are_those_of_the_app(tmp_path):
    app = create_app(Service(Store(tmp_path), LoadedModels(), local_files=True))
    listed = set()
    for row in TABLES["Routes", "route"]:
        *methods, path = row.split()
        listed |= {(method, path) for method in methods}
    rules = app.url_map.iter_rules()
    assert listed == {
        (method, rule.rule)
        for rule in rules
        for method in rule.methods or ()
        if method != "OPTIONS"
    }


class Watched(dict[str, object]):
    """The fields of a body that notes which of them are looked up."""

    def __init__(self, fields, looked_up):
        super().__init__(fields)
        self.looked_up = looked_up

    def get(self, key, default=None):
        self.looked_up.add(key)
        return super().get(key, default)


@pytest.fixture
def looked_up(monkeypatch):
    """The names that are looked up in any body from now on."""
    names: set[str] = set()
    original = wire.Body.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._fields = Watched(self._fields, names)

    monkeypatch.setattr(wire.Body, "__init__", watched)
    return names


def test_every_body_has_its_table():
    readers = {value for name, value in vars(wire).items() if name.startswith("read_")}
    assert readers == set(READERS.values())
    assert ASKED.keys() == READERS.keys() | {"A message", "A call of a tool"}


@pytest.mark.parametrize("route", READERS)
def test_the_fields_of_a_body_are_those_that_are_looked_up(route, looked_up):
    READERS[route](b"{}")
    assert len(set(ASKED[route])) == len(ASKED[route])
    assert set(ASKED[route]) == looked_up


@pytest.mark.parametrize(
    ("heading", "body"),
    [
        ("A message", {"messages": [{}]}),
        ("A call of a tool", {"messages": [{"tool_calls": [{"function": {}}]}]}),
    ],
)
def test_the_fields_of_a_message_are_those_that_are_looked_up(heading, body, looked_up):
    outer: dict[str, object] = {"messages": [{}]} if "tool_calls" in str(body) else {}
    wire.read_chat(json.dumps(outer).encode())
    before = set(looked_up)
    looked_up.clear()
    wire.read_chat(json.dumps(body).encode())
    # Names that stand in both (such as `name`) are looked up for the outer object, too.
    assert looked_up - before <= set(ASKED[heading]) <= looked_up


ELSEWHERE = {  # fields of the records that have another name in a body
    "from_": "from",
    "licenses": "license",
    "debug_render_only": "_debug_render_only",
}


@pytest.mark.parametrize(
    ("record", "heading"),
    [
        ("Generate", "POST /api/generate"),
        ("Chat", "POST /api/chat"),
        ("Message", "A message"),
        ("ToolCall", "A call of a tool"),
        ("Embed", "POST /api/embed"),
        ("Tokenize", "POST /api/tokenize"),
        ("Detokenize", "POST /api/detokenize"),
        ("Create", "POST /api/create"),
        ("Show", "POST /api/show"),
        ("Pull", "POST /api/pull"),
        ("Push", "POST /api/push"),
    ],
)
def test_every_field_of_a_record_can_be_asked_for(record, heading):
    fields = {field.name for field in dataclasses.fields(getattr(records, record))}
    fields.discard("normalise")  # the route decides
    assert {ELSEWHERE.get(name, name) for name in fields} <= set(ASKED[heading])


# ── answers ───────────────────────────────────────────────────────────────────────────────────


def full(record, **more):
    """A record of which no field is empty: numbers are 1, texts "x"."""
    plain = {"int": 1, "str": "x", "bool": True, "float": 1.0}
    given = {f.name: plain[f.type] for f in dataclasses.fields(record) if f.type in plain}
    return record(**given | more)


def chunks():
    likely = full(records.TokenLogprob, bytes=b"x", top=())
    yield full(
        Chunk,
        stats=full(Stats),
        context=(1,),
        logprobs=(likely,),
        tool_calls=(ToolCall("f"),),
    )
    yield Chunk(done=True, rendered=records.Rendered("text", (1,)))
    yield Chunk(index=0, progress=full(records.Reached))
    yield Chunk(done=True, answers=(Chunk(index=0),))


def keys(*answers):
    return set().union(*answers)


def answers(tiny):
    """Heading → all keys that an answer can have."""
    generate, chat = records.Generate("m"), records.Chat("m")
    embed = records.Embed("m")
    vectors = Embedded(([1.0],), Stats(total_duration=1, load_duration=1, prompt_eval_count=1))
    tokens = wire.tokenize_record(records.Tokenize("m"), [Piece(1, b"x", 0, 1)])
    yield (
        "generate: a piece, and the last record",
        keys(*(wire.chunk_record(generate, one) for one in chunks())),
    )
    yield (
        "chat: a piece, and the last record",
        keys(*(wire.chat_record(chat, one) for one in chunks())),
    )
    yield "embed", keys(wire.embed_record(embed, vectors))
    yield "embeddings", keys(wire.embeddings_record(vectors))
    yield "tokenize", keys(tokens)
    yield "tokenize: a piece", keys(tokens["pieces"][0])
    yield "detokenize", keys(wire.detokenize_record(records.Detokenize("m"), "x"))
    yield "create, pull, push: a step", keys(wire.progress_record(full(Progress)))
    memory = full(InMemory, details={}, expires_at=datetime.now())
    yield "ps: a model", keys(wire.memory_record(memory))
    yield from stored(tiny)


def stored(tiny):
    """What is told of a model in the store."""
    service = Service(Store.default(), LoadedModels(), local_files=True)
    modelfile = f"FROM {tiny}\nSYSTEM x\nLICENSE x\nPARAMETER top_k 1\nMESSAGE user x\n"
    list(service.create(records.Create("m", modelfile)))
    yield "tags: a model", keys(wire.model_record(service.tags()[0]))
    shown = dataclasses.replace(show(service.store, records.Show("m")), projector={"x": 1})
    yield "show", keys(wire.show_record(shown))


def test_the_fields_of_every_answer_are_those_that_the_code_writes(tiny):
    found = dict(answers(tiny))
    assert found.keys() == ANSWERED.keys()
    for heading, names in found.items():
        assert set(ANSWERED[heading]) == names, heading
        assert len(ANSWERED[heading]) == len(names), heading


def test_a_message_of_a_chat_is_as_the_page_says():
    first, *_ = chunks()
    told = set(wire.chat_record(records.Chat("m"), first)["message"])
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith("| `message` |"))
    assert told == set(re.findall("`(.*?)`", row.split("|")[-2]))


def test_the_example_of_tokenize_is_what_comes(oracles):
    service = Service(Store.default(), LoadedModels(), local_files=True)
    ask = records.Tokenize(str(oracles / "stories260K.gguf"), "Hé!")
    found = wire.tokenize_record(ask, service.tokenize(ask)) | {"model": "storyteller"}
    shown = re.search(r'\{"model":"storyteller","tokens".*?\n```', PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert json.loads(shown[0].removesuffix("```")) == found


def shown(first):
    """The list that follows these words in one of the page's examples."""
    text = PAGE.read_text()
    assert text.count(first) == 1
    return json.JSONDecoder().raw_decode(text, text.index(first) + len(first) - 1)[0]


def answered(oracles, **fields):
    """What the storyteller answers, as it is sent when it is not streamed."""
    service = Service(Store.default(), LoadedModels(), local_files=True)
    ask = records.Generate(str(oracles / "stories260K.gguf"), stream=False, **fields)
    found = wire.chunk_record(ask, gathered(service.generate(ask)))
    service.close()
    return found


def test_the_example_of_several_answers_is_what_comes(oracles):
    options = {"seed": 5, "num_predict": 6}
    found = answered(oracles, prompt="Once upon a time there was a", n=2, options=options)
    assert shown('"answers":[') == found["answers"]


def test_the_example_of_named_tokens_is_what_comes(oracles):
    found = answered(
        oracles,
        prompt="One day, Lily went to the park.",
        options={"num_predict": 1},
        logprobs=True,
        logprob_tokens=(" She", " He"),
    )
    (place,) = found["logprobs"]
    for one in place["named"]:
        one["logprob"] = round(one["logprob"], 3)
    assert shown('"named":[') == place["named"]


def test_the_variables_are_those_that_the_help_names():
    from refollama.cli import ENVIRONMENT

    counts, idle = PAGE.read_text().split("## The environment")[1].split("no effect:")
    names = re.findall(r"`((?:REF)?OLLAMA_[A-Z_]+)`", counts)
    assert sorted(names) == sorted(ENVIRONMENT)
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    without = re.findall(r"`(OLLAMA_[A-Z_]+)`", idle)
    assert without and not [name for name in without if f'"{name}"' in source]
    assert all(f'"{name}"' in source for name in names)
