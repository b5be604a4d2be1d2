"""What no other server does: several answers, log-probabilities of named tokens, progress."""

import json
import math
import threading
import types
from typing import Any

import httpx
import ollama
import pytest

from refollama.loaded import load_file
from refollama.messages import Generate
from tests.exactness import alike
from tests.server.conftest import ENDLESS, GREEDY, endless, wait_until

HOT = {"temperature": 1.3, "seed": 7, "num_predict": 8}


@pytest.fixture
def talk(http):
    """POST a prompt to either route → its records, and the text of each of them."""

    def post(route, prompt="the", status=200, **body):
        turn = {"prompt": prompt} if route == "generate" else {"messages": [message(prompt)]}
        body = {"model": "tiny", "options": HOT} | (turn if prompt else {}) | body
        response = http.post(f"/api/{route}", json=body)
        assert response.status_code == status, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    return post


def message(text):
    return {"role": "user", "content": text}


def text(record):
    return record["response"] if "response" in record else record["message"]["content"]


ROUTES = pytest.mark.parametrize("route", ["generate", "chat"])

# ── n ─────────────────────────────────────────────────────────────────────────────────────────


@ROUTES
def test_answer_k_is_that_of_seed_plus_k_streamed_and_not(talk, route):
    single = [
        talk(route, options=HOT | {"seed": 7 + k}, stream=False, logprobs=True)[0] for k in range(3)
    ]
    (whole,) = talk(route, n=3, stream=False, logprobs=True)
    *pieces, end = talk(route, n=3, logprobs=True)
    assert [text(one) for one in whole["answers"]] == [text(one) for one in single]
    for k, (one, alone) in enumerate(zip(whole["answers"], single, strict=True)):
        its = [piece for piece in pieces if piece["index"] == k]
        assert "".join(map(text, its)) == text(alone)
        noted = [note for p in its for note in p.get("logprobs", [])]
        assert alike(one["logprobs"], noted) and alike(one["logprobs"], alone["logprobs"])
        assert one["index"] == k and one["eval_count"] == alone["eval_count"]
        assert one["done_reason"] == its[-1]["done_reason"] == alone["done_reason"]
        assert not any("done_reason" in piece for piece in its[:-1])
    assert text(whole) == text(single[0]) and text(end) == ""
    assert [piece["done"] for piece in (*pieces, end)] == [False] * len(pieces) + [True]
    assert "index" not in end and "index" not in whole
    for last in (whole, end):
        assert last["eval_count"] == sum(one["eval_count"] for one in single)
        assert last["prompt_eval_count"] == single[0]["prompt_eval_count"]
        assert last.get("context") == single[0].get("context")


@ROUTES
@pytest.mark.parametrize("stream", [True, False])
def test_one_answer_is_told_as_ever(talk, route, stream):
    def bare(records):
        return [{k: v for k, v in one.items() if k[-3:] not in ("_at", "ion")} for one in records]

    talk(route, stream=stream)  # so that the prompt is cached for both
    assert bare(talk(route, n=1, stream=stream)) == bare(talk(route, stream=stream))


@ROUTES
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 0}, "n must be between 1 and 16, not 0"),
        ({"n": 17}, "n must be between 1 and 16, not 17"),
        ({"n": True}, "n must be an integer"),
        ({"n": "2"}, "n must be an integer"),
        ({"progress": 1}, "progress must be true or false"),
        ({"logprob_tokens": ["a"]}, 'logprob_tokens needs "logprobs": true'),
        ({"logprobs": True, "logprob_tokens": "a"}, "a list of strings and integers"),
        ({"logprobs": True, "logprob_tokens": [True]}, "a list of strings and integers"),
        ({"logprobs": True, "logprob_tokens": ["a"] * 21}, "20 tokens at most"),
        ({"logprobs": True, "logprob_tokens": [999]}, "logprob_tokens: token id 999 is not in"),
        ({"logprobs": True, "logprob_tokens": [-1]}, "logprob_tokens: token id -1 is not in"),
        ({"logprobs": True, "logprob_tokens": ["her"]}, "'her' is not one token, but these:"),
        ({"logprobs": True, "logprob_tokens": [""]}, "'' is not one token, but these: none"),
        ({"logprobs": True, "logprob_tokens": ["q" * 10**6]}, "'q' 'q' 'q' …"),
    ],
)
def test_what_cannot_be_asked(talk, route, body, said):
    (answer,) = talk(route, status=400, **body)
    assert set(answer) == {"error"} and said in answer["error"] and len(answer["error"]) < 200


def test_closing_the_response_cancels_all(app, service, tmp_path):
    path = endless(tmp_path)
    body = {"model": str(path), "prompt": "a", "options": ENDLESS, "n": 5, "progress": True}
    response = app.test_client().post("/api/generate", json=body)
    lines = (json.loads(line) for line in response.response)
    assert next(line for line in lines if line["response"])["index"] == 0
    with service.loaded.lease(path) as model:
        assert model.active == 5
        response.close()
        wait_until(lambda: model.active == 0)


def test_the_official_client_is_not_troubled(app):
    """It reads every line into records of its own, which know none of these fields."""
    client = ollama.Client("http://localhost", transport=httpx.WSGITransport(app))
    ask = {"model": "tiny", "options": HOT, "n": 2, "logprobs": True, "logprob_tokens": ["a"]}
    turns: list[tuple[Any, str, dict[str, object]]] = [
        (ollama.GenerateResponse, "/api/generate", {"prompt": "the"}),
        (ollama.ChatResponse, "/api/chat", {"messages": [message("the")]}),
    ]
    for kind, route, turn in turns:
        body = ask | turn | {"progress": True}
        *pieces, end = client._request(kind, "POST", route, json=body, stream=True)
        whole = client._request(kind, "POST", route, json=body | {"stream": False})
        assert len(pieces) > 2 and end.done and whole.done
        assert whole.eval_count == end.eval_count and whole.logprobs


# ── log-probabilities of named tokens ─────────────────────────────────────────────────────────


@ROUTES
def test_named_tokens_are_scored_in_each_place(talk, route, service):
    """Judge: the plain path, over all the vocabulary."""
    named = ["a", "e", 5, "a"]
    exact = GREEDY | {"f16_kv": False}
    (whole,) = talk(route, stream=False, logprobs=True, logprob_tokens=named, options=exact)
    with service.loaded.lease(service.find("tiny").weights) as model:
        ids = model.tokens("the")
        for one in whole["logprobs"]:
            likely = model.logits(ids, -1)[0].double().log_softmax(0)
            words = model.tokenizer
            wanted = [words.encode("a", continues=True)[0], words.encode("e", continues=True)[0], 5]
            wanted.append(wanted[0])
            assert [each["id"] for each in one["named"]] == wanted
            for each in one["named"]:
                assert each["logprob"] == pytest.approx(float(likely[each["id"]]), abs=1e-4)
                assert set(each) == {"token", "logprob", "bytes", "id"}
            ids.append(one["id"])
    assert len(whole["logprobs"]) >= whole["eval_count"] == 12


def test_one_token_is_enough_to_choose_among_words(talk):
    """The page's example: none but the named ones count."""
    ask = {"logprobs": True, "logprob_tokens": ["in", "er", "an"], "stream": False}
    (record,) = talk("generate", options={"num_predict": 1}, **ask)
    (place,) = record["logprobs"]
    assert [one["token"] for one in place["named"]] == ["in", "er", "an"]
    shares = [math.exp(one["logprob"]) for one in place["named"]]
    assert all(0 < share < 1 for share in shares) and sum(shares) < 1


# ── progress ──────────────────────────────────────────────────────────────────────────────────


def stages(records):
    found: dict[str, list[tuple[int, int]]] = {}
    for record in records:
        if at := record.get("progress"):
            assert text(record) == "" and record["done"] is False
            found.setdefault(at["stage"], []).append((at["completed"], at["total"]))
    return found


@ROUTES
def test_progress_comes_first_and_changes_nothing(talk, service, route, tiny):
    plain = "".join(map(text, talk(route)))
    service.loaded.unload(tiny)
    service.loaded.unload(service.find("tiny").weights)
    records = talk(route, progress=True)
    told = [record for record in records if "progress" in record]
    assert records[: len(told)] == told and "".join(map(text, records)) == plain
    assert list(stages(records)) == ["load", "prompt"]
    for reached in stages(records).values():
        done, totals = zip(*reached, strict=True)
        assert list(done) == sorted(done) and len(set(totals)) == 1
        assert done[0] == 0 and done[-1] == totals[0] and done.count(totals[0]) == 1
    assert stages(records)["prompt"][-1] == (2, 2)
    again = talk(route, "the the", progress=True)  # the model is there, and the prompt's beginning
    assert list(stages(again)) == ["prompt"] and stages(again)["prompt"][0] == (2, 3)


@ROUTES
def test_progress_is_for_streams_alone(talk, route):
    (whole,) = talk(route, progress=True, stream=False)
    assert "progress" not in whole and whole["done"]


@ROUTES
def test_loading_alone_can_be_watched(talk, route):
    *told, end = talk(route, "", progress=True)
    assert list(stages(told)) == ["load"] and end["done_reason"] == "load" and end["done"]
    assert talk(route, "", progress=True)[0].keys() == end.keys()  # it is there: nothing to watch


def test_lines_do_not_come_faster_than_ten_a_second(talk, monkeypatch):
    """Each of the hundred blocks of this prompt takes a moment; some ten of them are told."""
    now = [100.0]

    def later():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr("refollama.watched.time", types.SimpleNamespace(monotonic=later))
    options = HOT | {"num_batch": 1}
    found = stages(talk("generate", "q" * 99, progress=True, options=options))["prompt"]
    assert 8 <= len(found) <= 14 and found[0][0] == 0 and found[-1][0] == found[-1][1] == 101


def test_a_load_that_fails_has_its_status_or_is_the_last_line(http, tmp_path, tiny):
    body = {"model": str(tmp_path / "none.gguf"), "prompt": "a", "progress": True}
    assert http.post("/api/generate", json=body).status_code == 404
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_pu.weight"))
    response = http.post("/api/generate", json=body | {"model": str(damaged)})
    *told, end = map(json.loads, response.text.splitlines())
    assert list(stages(told)) == ["load"]
    assert "blk.1.ffn_up.weight is missing" in end["error"]


def test_who_hangs_up_while_a_model_loads_leaves_nothing_behind(service, tiny, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(path, options, **how):
        how["told"](0, 2)
        begun.set()
        assert go_on.wait(5)
        return load_file(path, options, **how)

    monkeypatch.setattr("refollama.shelf.load_file", slow)
    chunks = service.generate(Generate(str(tiny), "a", progress=True))
    assert next(chunks).progress is not None
    assert begun.wait(5)
    threading.Timer(0.05, go_on.set).start()
    chunks.close()
    with service.loaded.lease(tiny) as model:
        assert model.active == 0
    (entry,) = service.loaded._entries.values()
    assert entry.users == 0 and not entry._watchers


def test_who_waits_for_anothers_load_sees_it_too(service, tiny, monkeypatch):
    first_waits, second_waits = threading.Event(), threading.Event()
    told: list[list[tuple[int, int]]] = [[], []]

    def slow(path, options, **how):
        first_waits.set()
        assert second_waits.wait(5)
        return load_file(path, options, **how)

    def use(index):
        with service.loaded.lease(tiny, told=lambda *at: told[index].append(at)):
            pass

    monkeypatch.setattr("refollama.shelf.load_file", slow)
    threads = [threading.Thread(target=use, args=(index,)) for index in range(2)]
    threads[0].start()
    assert first_waits.wait(5)
    threads[1].start()
    wait_until(lambda: sum(len(e._watchers) for e in service.loaded._entries.values()) == 2)
    second_waits.set()
    for thread in threads:
        thread.join()
    assert told[0] == told[1] and told[0][-1][0] == told[0][-1][1] > 0
