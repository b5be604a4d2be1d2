"""POST /api/generate: what is streamed, what is counted, what is refused."""

import json
import re

import pytest

from tests.exactness import alike
from tests.server.conftest import ENDLESS, GREEDY, endless, wait_until


def text_of(records):
    return "".join(record["response"] for record in records)


def test_pieces_joined_equal_the_whole(ask):
    streamed = ask(model="tiny", prompt="the", options=GREEDY)
    (whole,) = ask(model="tiny", prompt="the", options=GREEDY, stream=False)
    assert text_of(streamed) == whole["response"] != ""
    assert [r["done"] for r in streamed] == [False] * (len(streamed) - 1) + [True]
    assert streamed[-1]["context"] == whole["context"]


def test_the_stream_is_lines_of_ascii_json(http):
    body = {"model": "tiny", "prompt": "é", "options": GREEDY | {"num_predict": 40}}
    response = http.post("/api/generate", json=body)
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert response.content.isascii() and response.content.endswith(b"\n")
    assert all(json.loads(line) for line in response.content[:-1].split(b"\n"))


def test_the_final_record_has_every_count_and_duration(ask):
    *pieces, end = ask(model="tiny", prompt="the", options=GREEDY)
    assert end["done_reason"] in ("length", "stop") and end["response"] == ""
    assert end["eval_count"] <= 12 and end["prompt_eval_count"] == 2
    assert len(end["context"]) == end["prompt_eval_count"] + end["eval_count"]
    durations = [end[f"{of}_duration"] for of in ("load", "prompt_eval", "eval")]
    assert all(isinstance(d, int) and d > 0 for d in durations)
    assert end["total_duration"] >= sum(durations)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", end["created_at"])
    assert all(set(p) == {"model", "created_at", "response", "done"} for p in pieces)
    assert all(p["model"] == "tiny" for p in pieces)


def test_raw_has_no_template_and_no_context(ask):
    (raw,) = ask(model="shy", prompt="the", raw=True, stream=False, options=GREEDY)
    (plain,) = ask(model="tiny", prompt="the", stream=False, options=GREEDY)
    assert raw["response"] == plain["response"] and "context" not in raw


def test_template_and_system_make_the_prompt(ask):
    """What the template renders, sent raw, gives the same answer."""

    def answer(prompt, **more):
        options = GREEDY | {"num_predict": 8}
        return ask(model="shy", prompt=prompt, stream=False, options=options, **more)[0]["response"]

    assert answer("hi") == answer("<be brief>hi", raw=True)
    assert answer("hi", system="sing") == answer("<sing>hi", raw=True)
    assert answer("hi", template="[{{ .Prompt }}]") == answer("[hi]", raw=True)


def test_the_models_parameters_hold_until_the_request_says_otherwise(ask):
    (by_model,) = ask(model="shy", prompt="the", stream=False)
    (by_request,) = ask(model="shy", prompt="the", stream=False, options={"num_predict": 5})
    assert (by_model["eval_count"], by_request["eval_count"]) == (3, 5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_num_predict_is_exact(ask, count):
    (answer,) = ask(
        model="tiny", prompt="the", stream=False, options=GREEDY | {"num_predict": count}
    )
    assert answer.get("eval_count", 0) == count and answer["done_reason"] == "length"


def test_the_template_knows_the_first_turn(ask):
    """Counted in tokens: the word is one letter longer in the first turn."""
    turn = {
        "model": "tiny",
        "prompt": "q",
        "template": "{{ if .First }}xyz{{ end }}{{ .Prompt }}",
        "options": GREEDY | {"num_predict": 1},
        "stream": False,
    }
    (first,) = ask(**turn)
    (second,) = ask(**turn, context=first["context"])
    assert second["prompt_eval_count"] - len(first["context"]) == 1  # "q"
    assert first["prompt_eval_count"] == 1 + 1 + 4  # BOS, the space in front, "xyzq"


def test_the_same_seed_gives_the_same_text(ask):
    def answer(seed):
        options = {"seed": seed, "num_predict": 20, "temperature": 1.5}
        return ask(model="tiny", prompt="the", options=options, stream=False)[0]["response"]

    assert answer(1) == answer(1) != answer(2)


def test_a_stop_string_ends_the_answer_before_it(ask):
    (full,) = ask(model="tiny", prompt="the", options=GREEDY, stream=False)
    stop = full["response"][3:5]
    cut = full["response"][: full["response"].index(stop)]
    records = ask(model="tiny", prompt="the", options=GREEDY | {"stop": [stop, ""]})
    assert text_of(records) == cut and records[-1]["done_reason"] == "stop"


def test_context_continues_exactly(ask):
    """An answer in two halves, joined by its context, is the answer in one."""
    (whole,) = ask(model="tiny", prompt="the", options=GREEDY, stream=False)
    (half,) = ask(model="tiny", prompt="the", options=GREEDY | {"num_predict": 5}, stream=False)
    assert whole["context"][: len(half["context"])] == half["context"]
    (rest,) = ask(model="tiny", prompt="e", context=half["context"], options=GREEDY, stream=False)
    assert rest["context"][: len(half["context"])] == half["context"]
    assert rest["prompt_eval_count"] == len(half["context"]) + 1  # no second BOS, no space


def test_an_empty_prompt_loads_the_model_and_says_so_in_one_object(http):
    for body in ({"model": "tiny"}, {"model": "tiny", "prompt": "", "stream": True}):
        response = http.post("/api/generate", json=body)
        assert response.headers["Content-Type"] == "application/json; charset=utf-8"
        record = response.json()
        assert (record["done"], record["done_reason"], record["response"]) == (True, "load", "")
        assert not response.content.endswith(b"\n")


def test_a_file_runs_where_it_lies(ask, tiny, service):
    (by_path,) = ask(model=str(tiny), prompt="the", stream=False, options=GREEDY)
    (by_name,) = ask(model="tiny", prompt="the", stream=False, options=GREEDY)
    assert by_path["response"] == by_name["response"] and by_path["model"] == str(tiny)


REFUSED = {
    "no body": (b"", 400, "missing request body"),
    "white space": (b" \n", 400, "missing request body"),
    "not json": (b"hello", 400, "not JSON"),
    "cut json": (b'{"model": "ti', 400, "not JSON"),
    "not utf-8": (b'{"model": "\xff"}', 400, "not UTF-8"),
    "deep json": (b'{"options":' + b"[" * 100_000, 400, "nested too deeply"),
    "a list": (b"[]", 400, "must be a JSON object"),
    "no model": (b"{}", 400, "model is required"),
    "too few logprobs": (b'{"model": "tiny", "prompt": "a", "top_logprobs": -1}', 400, "between 0"),
    "too many": (b'{"model": "tiny", "prompt": "a", "top_logprobs": 21}', 400, "between 0 and 20"),
    "a number as model": (b'{"model": 1}', 400, "model must be a string"),
    "a list as prompt": (b'{"model": "tiny", "prompt": []}', 400, "prompt must be a string"),
    "a text as stream": (b'{"model": "tiny", "stream": "no"}', 400, "stream must be true or"),
    "a list as options": (b'{"model": "tiny", "options": [1]}', 400, "options must be an object"),
    "texts as context": (b'{"model": "tiny", "context": ["a"]}', 400, "list of integers"),
    "true as context": (b'{"model": "tiny", "context": [true]}', 400, "list of integers"),
    "ids of another": (b'{"model": "tiny", "prompt": "a", "context": [9999]}', 400, "9999"),
    "negative ids": (b'{"model": "tiny", "prompt": "a", "context": [-1]}', 400, "-1"),
    "unknown model": (b'{"model": "nope", "options": {"bad": 1}}', 404, "model 'nope"),
    "a missing file": (b'{"model": "/no/such.gguf", "prompt": "a"}', 404, "/no/such.gguf"),
    "no name": (b'{"model": "a/b/c/d/e", "prompt": "a"}', 400, "a/b/c/d/e"),
    "climbing": (b'{"model": "x/../y", "prompt": "a"}', 400, ".."),
    "option type": (b'{"model": "tiny", "prompt": "a", "options": {"num_ctx": "x"}}', 400, "num_"),
    "option bool": (b'{"model": "tiny", "prompt": "a", "options": {"num_ctx": true}}', 400, "num"),
    "option range": (b'{"model": "tiny", "prompt": "a", "options": {"top_p": 2}}', 400, "0 and 1"),
    "NaN": (b'{"model": "tiny", "options": {"top_p": NaN}}', 400, "NaN"),
    "infinity": (b'{"model": "tiny", "prompt": "a", "options": {"x": 1e999}}', 400, "too large"),
    "minus infinity": (b'{"model": "tiny", "prompt": "a", "x": [-1e999]}', 400, "too large"),
    "strict": (b'{"model": "tiny", "prompt": "a", "strict": true, "options": {"x": 1}}', 400, "x"),
    "raw and system": (b'{"model": "tiny", "raw": true, "system": "s"}', 400, "raw mode does not"),
    "bad template": (b'{"model": "tiny", "prompt": "a", "template": "{{ if"}', 400, "line 1"),
    "images": (b'{"model": "tiny", "prompt": "a", "images": ["aGk="]}', 400, "images"),
    "format": (b'{"model": "tiny", "prompt": "a", "format": "yaml"}', 400, "format must be json"),
    "a long name": (b'{"model": "/' + b"a" * 5000 + b'", "prompt": "a"}', 404, "no GGUF file"),
    "no file": (b'{"model": "/etc/passwd", "prompt": "a"}', 404, "no GGUF file that can be read"),
    "a long template": (
        b'{"model": "tiny", "prompt": "a", "template": "' + b"t" * 70_000 + b'"}',
        400,
        "longer than 65536",
    ),
    "a long stop": (
        b'{"model": "tiny", "prompt": "a", "options": {"stop": ["' + b"s" * 2000 + b'"]}}',
        400,
        "1000 characters",
    ),
    "a flood": (b'{"model": "tiny", "prompt": "' + b"q" * 5_000_000 + b'"}', 400, "at least"),
    "too long": (
        b'{"model": "tiny", "prompt": "' + b"q" * 500 + b'", "truncate": false}',
        400,
        "num_ctx",
    ),
}


@pytest.mark.parametrize("stream", [b"", b', "stream": false'])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_get_one_clear_sentence(http, case, stream):
    body, status, said = REFUSED[case]
    if body.endswith(b"}") and b": " in body and b"stream" not in body:
        body = body[:-1] + stream + b"}"
    response = http.post("/api/generate", content=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and said in response.json()["error"]
    assert len(response.json()["error"]) < 600 or (
        case == "a long name" and "\n" not in response.json()["error"]
    )


def test_leniency_of_the_wire(http, ask):
    (plain,) = ask(model="tiny", prompt="the", options=GREEDY, stream=False)
    lenient = json.dumps(
        {
            "NAME": "tiny",
            "Prompt": "the",
            "OPTIONS": GREEDY | {"seed": None},
            "stream": False,
            "system": None,
            "images": [],
            "format": "",
            "unheard_of": {},
        }
    )
    response = http.post(
        "/api/generate",
        content="\ufeff" + lenient + " trailing",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert response.json()["response"] == plain["response"]


def test_an_error_in_mid_stream_is_the_last_line(ask, service, tiny, monkeypatch):
    from refollama.errors import RefollamaError
    from refollama.messages import Chunk

    def breaks(self, tokens, options, extras):
        yield Chunk("a")
        raise RefollamaError("the disk is on fire")

    monkeypatch.setattr("refollama.loaded.LoadedModel.answer", breaks)
    records = ask(model="tiny", prompt="the")
    assert [r.get("response", r.get("error")) for r in records] == ["a", "the disk is on fire"]


def test_closing_the_response_stops_the_engine(app, service, tiny, tmp_path):
    """What a WSGI server does when the client is gone. The model could go on for very long."""
    path = endless(tmp_path)
    body = {"model": str(path), "prompt": "a", "options": ENDLESS}
    response = app.test_client().post("/api/generate", json=body)
    next(response.response)
    response.close()
    with service.loaded.lease(path) as model:
        wait_until(lambda: model.active == 0)


def test_a_client_that_is_gone_is_noticed_while_it_waits(service, tmp_path):
    """In the queue, and before the first token: no write fails there."""
    from refollama.errors import Abandoned
    from refollama.messages import Generate

    path = endless(tmp_path)
    first = service.generate(Generate(str(path), "a", options=ENDLESS))
    next(first)
    second = service.generate(Generate(str(path), "a", options=ENDLESS), gone=lambda: True)
    with pytest.raises(Abandoned):
        next(second)
    first.close()
    with service.loaded.lease(path) as model:
        wait_until(lambda: model.active == 0)


def test_more_than_max_queue_are_told_so_and_places_come_back(service, tmp_path):
    from refollama.errors import ServerBusy
    from refollama.messages import Generate
    from refollama.service import Service

    small = Service(service.store, service.loaded, local_files=True, max_queue=2)
    path = endless(tmp_path)
    ask = Generate(str(path), "a", options=ENDLESS)
    one, two = small.generate(ask), small.generate(Generate(str(path)))
    next(one)
    next(two)
    with pytest.raises(ServerBusy, match="2 requests"):
        next(small.generate(ask))
    two.close()
    assert next(small.generate(Generate(str(path)))).done_reason == "load"
    one.close()


def test_logprobs_on_each_piece_and_together(ask):
    asked = {"model": "tiny", "prompt": "the", "options": GREEDY, "logprobs": True}
    *pieces, end = ask(**asked, top_logprobs=2)
    (whole,) = ask(**asked, top_logprobs=2, stream=False)
    noted = [one for piece in (*pieces, end) for one in piece.get("logprobs", [])]
    assert alike(noted, whole["logprobs"]) and len(noted) >= whole["eval_count"]
    for one in noted:
        assert set(one) == {"token", "logprob", "bytes", "id", "top_logprobs"}
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
        best = [top["logprob"] for top in one["top_logprobs"]]
        assert len(best) == 2 and best == sorted(best, reverse=True) and one["logprob"] <= 0
        assert best[0] == one["logprob"]  # greedy, and without penalties
    (plain,) = ask(**asked, stream=False)
    assert all("top_logprobs" not in one for one in plain["logprobs"])
    assert "logprobs" not in ask(model="tiny", prompt="the", options=GREEDY, stream=False)[0]


def test_a_prompt_that_is_cut_says_so(ask):
    (end,) = ask(model="tiny", prompt="q" * 500, options=GREEDY, stream=False)
    assert end["prompt_truncated"] + end["prompt_eval_count"] == 502
    assert end["prompt_eval_count"] <= 128
    (end,) = ask(model="tiny", prompt="q", options=GREEDY, stream=False)
    assert "prompt_truncated" not in end


def test_the_next_turn_reads_only_what_is_new(ask):
    (first,) = ask(model="tiny", prompt="the rest", options=GREEDY, stream=False)
    assert "prompt_cached_count" not in first
    more = {"prompt": " and then", "context": first["context"]}
    (second,) = ask(model="tiny", options=GREEDY, stream=False, **more)
    known = len(first["context"])
    assert second["prompt_cached_count"] == known - 1  # the last one drawn was never read
    assert second["prompt_eval_count"] == known + 5  # ▁a nd ▁t he n


def test_without_shift_an_answer_ends_with_the_context(ask):
    asked = {"model": "tiny", "prompt": "the", "stream": False}
    options = GREEDY | {"num_predict": 30, "num_ctx": 16}
    (ended,) = ask(**asked, options=options, shift=False)
    (went_on,) = ask(**asked, options=options)
    assert (ended["eval_count"], ended["done_reason"]) == (15, "length")
    assert went_on["eval_count"] == 30 and went_on["response"].startswith(ended["response"])


def test_a_control_token_in_a_users_text_is_text(ask):
    """The template's own is meant; with `raw` the whole prompt is the user's own business."""

    def count(**asked):
        options = GREEDY | {"num_predict": 1}
        return ask(model="tiny", stream=False, options=options, **asked)[0]["prompt_eval_count"]

    spelled = count(prompt="</s>", template="[{{ .Prompt }}]")
    assert spelled == count(prompt="[<", raw=True) + 3 + 1
    assert count(prompt="a", template="</s>{{ .Prompt }}") == count(prompt="</s>a", raw=True)
    assert count(prompt="</s>", raw=True) == count(prompt="</s>", template="{{ .Prompt }}") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu": 1, "main_gpu": 0, "low_vram": True},
        {"use_mmap": False},
        {"use_mlock": True},
        {"numa": True},
        {"num_thread": 3},
        {"num_gqa": 2},
        {"num_batch": 1},
    ],
)
def test_where_and_how_it_is_computed_changes_no_answer(ask, options, measured):
    asked = {"model": "tiny", "prompt": "the rest", "stream": False}
    (expected,) = ask(**asked, options=GREEDY)
    (found,) = ask(**asked, options=GREEDY | options)
    assert found["response"] == expected["response"]
    for name in options:
        measured("options", name, "itself", "equal")


@pytest.mark.parametrize("options", [{"rope_frequency_base": 200.0}, {"rope_frequency_scale": 0.5}])
def test_rotation_by_request_changes_the_answer_and_only_that_one(ask, options):
    asked = {"model": "tiny", "prompt": "the rest and the", "stream": False}
    (plain,) = ask(**asked, options=GREEDY)
    (turned,) = ask(**asked, options=GREEDY | options)
    (again,) = ask(**asked, options=GREEDY)
    assert turned["response"] != plain["response"] == again["response"]


def test_the_example_that_sets_every_option(ask):
    """The API document's own, with its numbers."""
    options = {
        "num_keep": 5,
        "seed": 42,
        "num_predict": 100,
        "top_k": 20,
        "top_p": 0.9,
        "tfs_z": 0.5,
        "typical_p": 0.7,
        "repeat_last_n": 33,
        "temperature": 0.8,
        "repeat_penalty": 1.2,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "mirostat": 1,
        "mirostat_tau": 0.8,
        "mirostat_eta": 0.6,
        "penalize_newline": True,
        "stop": ["\n", "user:"],
        "numa": False,
        "num_ctx": 1024,
        "num_batch": 2,
        "num_gqa": 1,
        "num_gpu": 1,
        "main_gpu": 0,
        "low_vram": False,
        "f16_kv": True,
        "logits_all": False,
        "vocab_only": False,
        "use_mmap": True,
        "use_mlock": False,
        "embedding_only": False,
        "rope_frequency_base": 1.1,
        "rope_frequency_scale": 0.8,
        "num_thread": 8,
    }
    asked = {"model": "tiny", "prompt": "Why is the sky blue?", "stream": False}
    (first,) = ask(**asked, options=options)
    (second,) = ask(**asked, options=options, strict=True)
    assert first["response"] == second["response"] and first["eval_count"] <= 100
