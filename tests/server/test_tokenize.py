"""POST /api/tokenize and /api/detokenize: text ↔ ids, and where each token stands in the text."""

import pytest

import refollama
from tests.server.process import running
from tests.tiny import TOKENS, write_model


@pytest.fixture
def call(http):
    def post(path, status=200, **body):
        response = http.post(f"/api/{path}", json={"model": "tiny"} | body)
        assert response.status_code == status, response.text
        return response.json()

    return post


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["the rest", "é<s>the</s>", "  a\n▁ 🙂", "", "<s>"])
def test_ids_are_the_tokenizers_and_the_way_back_is_the_text(call, tiny, text, special):
    words = refollama.load_tokenizer(tiny)
    answer = call("tokenize", text=text, special=special)
    assert answer["model"] == "tiny"
    assert answer["tokens"] == words.encode(text, special=special)
    back = call("detokenize", tokens=answer["tokens"], special=special)
    assert back == {"model": "tiny", "text": text.replace("▁", " ")}


def test_each_piece_says_where_it_stands(call):
    text = "the é"
    pieces = call("tokenize", text=text)["pieces"]
    raw = text.encode()
    assert [(p["token"], raw[p["start"] : p["end"]]) for p in pieces] == [
        (" the", b"the"),
        (" ", b" "),
        ("\ufffd", b"\xc3"),
        ("\ufffd", b"\xa9"),
    ]
    assert [bytes(p["bytes"]) for p in pieces] == [b" the", b" ", b"\xc3", b"\xa9"]
    assert [p["id"] for p in pieces] == [TOKENS.index("▁the"), TOKENS.index("▁"), 198, 172]


def test_control_tokens_are_text_unless_they_are_meant(call):
    assert 1 not in call("tokenize", text="<s>a")["tokens"]
    first, *_ = call("tokenize", text="<s>a", special=True)["pieces"]
    assert first == {"id": 1, "token": "<s>", "bytes": [60, 115, 62], "start": 0, "end": 3}


def test_bos_has_no_width_and_is_not_taken_for_the_text_that_spells_it(call):
    pieces = call("tokenize", text="<s>a", special=True, bos=True)["pieces"]
    assert [(p["id"], p["start"], p["end"]) for p in pieces][:2] == [(1, 0, 0), (1, 0, 3)]
    (alone,) = call("tokenize", bos=True)["pieces"]
    assert (alone["id"], alone["start"], alone["end"]) == (1, 0, 0)


@pytest.mark.parametrize("text", ["the <s> rest", "<s>", "", "é"])
def test_special_with_bos_is_what_a_raw_prompt_becomes(call, tiny, text):
    with refollama.load(tiny) as llm:
        assert call("tokenize", text=text, special=True, bos=True)["tokens"] == llm.tokens(text)


def test_end_tokens_that_the_model_wants_stand_behind(http, tmp_path):
    path = write_model(tmp_path / "m.gguf", keys={"tokenizer.ggml.add_eos_token": True})
    body = {"model": str(path), "text": "the", "bos": True}
    first, text, last = http.post("/api/tokenize", json=body).json()["pieces"]
    assert (first["id"], last["id"]) == (1, 2) and (last["start"], last["end"]) == (3, 3)
    assert (text["start"], text["end"]) == (0, 3)


def test_the_weights_are_not_loaded(call, monkeypatch):
    monkeypatch.setattr("refollama.shelf.load_file", lambda *_, **__: pytest.fail("loaded"))
    call("tokenize", text="the")
    call("detokenize", tokens=[5])


def test_a_file_with_a_vocabulary_alone_is_enough(http, tmp_path):
    from refollama.weights.gguf import write_gguf
    from tests.tiny import metadata

    write_gguf(tmp_path / "vocab.gguf", metadata(), {})
    body = {"model": str(tmp_path / "vocab.gguf"), "text": "the"}
    assert http.post("/api/tokenize", json=body).json()["tokens"] == [TOKENS.index("▁the")]


def test_a_file_that_was_replaced_has_its_own_tokenizer(http, tmp_path):
    from refollama.weights.gguf import write_gguf
    from tests.tiny import metadata

    path, body = tmp_path / "m.gguf", {"text": "the"}
    keys = metadata()
    write_gguf(path, keys, {})
    before = http.post("/api/tokenize", json=body | {"model": str(path)}).json()["tokens"]
    path.unlink()
    swapped = [{"▁the": "▁xyz"}.get(token, token) for token in TOKENS]
    write_gguf(path, keys | {"tokenizer.ggml.tokens": swapped}, {})
    after = http.post("/api/tokenize", json=body | {"model": str(path)}).json()["tokens"]
    assert len(after) > len(before) == 1


@pytest.mark.parametrize("path", ["tokenize", "detokenize"])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": ""}, 400, "model is required"),
        ({"model": "nope"}, 404, "try pulling it first"),
        ({"special": "yes"}, 400, "special must be true or false"),
    ],
)
def test_errors_of_both(call, path, body, status, said):
    assert said in call(path, status, **body)["error"]


@pytest.mark.parametrize("bad", ["5", [5.5], [None], [True], 5])
def test_tokens_of_another_kind(call, bad):
    assert "tokens must be a list of integers" in call("detokenize", 400, tokens=bad)["error"]


@pytest.mark.parametrize("bad", [-1, len(TOKENS), 10**30])
@pytest.mark.parametrize("special", [False, True])
def test_ids_that_nobody_has(call, bad, special):
    assert "vocabulary" in call("detokenize", 400, tokens=[bad], special=special)["error"]


def test_an_endless_text_is_refused(call):
    assert "characters" in call("tokenize", 400, text="a" * 2_000_000)["error"]


def test_our_client(tmp_path, tiny):
    with (
        running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, _),
        refollama.Client(url) as client,
    ):
        found = client.tokenize(str(tiny), "the rest", bos=True)
        assert found["tokens"][0] == 1
        assert client.detokenize(str(tiny), found["tokens"]) == "the rest"
