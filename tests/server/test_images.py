"""A picture in a request becomes rows among the rows of text.

Judges: the textbook loop with the same ids; another picture; the official client's own ways of
sending pictures; for hostile ones, that the server says which.
"""

import base64
import hashlib
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import ollama
import pytest
from PIL import Image

from refollama import load
from refollama.engine.generate import generate
from refollama.engine.sequence import Extras, Marks
from refollama.errors import Abandoned, BadRequest
from refollama.messages import Create, Generate
from refollama.models.llava import Llava, Picture
from refollama.models.load import load_eyes, load_net
from refollama.options import Options
from refollama.service import Service
from tests.server.conftest import GREEDY, unchanged
from tests.tiny import TOKENS, write_model
from tests.tiny_llava import N_ROWS, ROWS, encoded, png, write_eyes

RED, BLUE = png((200, 30, 30)), png((30, 30, 200), size=(20, 50))
TEMPLATE = "{{ if .System }}<{{ .System }}>{{ end }}{{ .Prompt }}:"


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    return write_eyes(tmp_path_factory.mktemp("eyes") / "eyes.gguf", seed=4)


@pytest.fixture
def sighted(service, tiny, eyes):
    """`llava` in the store: the tiny model, and eyes."""
    modelfile = f'FROM {tiny}\nFROM {eyes}\nTEMPLATE """{TEMPLATE}"""\nPARAMETER temperature 0\n'
    list(service.create(Create("llava", modelfile)))
    return service


def b64(data):
    return base64.b64encode(data).decode()


@pytest.fixture
def post(http, sighted):
    def send(route, status=200, **body):
        more = {"model": "llava", "stream": False, "options": GREEDY} | body
        response = http.post(f"/api/{route}", content=json.dumps(more))
        assert response.status_code == status, response.text
        return response.json()

    return send


@pytest.fixture
def rendered(post):
    """What the model would see: (text, ids, number of images)."""

    def ask(route, **body):
        info = post(route, _debug_render_only=True, **body)["_debug_info"]
        return info["rendered_template"], info["prompt_ids"], info["image_count"]

    return ask


def rows(first, times=1):
    return list(range(first, first + N_ROWS * times))


def first_of(ids):
    return next(id for id in ids if id >= vocabulary())


def vocabulary():
    return len(TOKENS)


# ── what is seen ──────────────────────────────────────────────────────────────────────────────


def test_an_answer_is_that_of_the_textbook_loop(post, tiny, eyes):
    net = load_net(tiny, eyes=load_eyes(eyes))
    assert isinstance(net, Llava)
    for picture in (RED, BLUE):
        seen = net.picture(picture)
        net.look(seen)
        words = load(tiny).tokenizer
        prompt = [words.bos_id, *seen.ids, *words.encode("what is it:")]
        options = Options(temperature=0, repeat_penalty=1, num_predict=12)
        expected = words.decode(generate(net, prompt, options, Marks(words.eos_ids)))
        asked = post("generate", prompt="what is it", images=[b64(picture)])
        assert asked["response"].strip() == expected.strip()
        assert asked["prompt_eval_count"] == len(prompt)


def test_another_picture_gets_another_answer(post):
    def answer(picture, message):
        said = {"role": "user", "content": message, "images": [b64(picture)]}
        return post("chat", messages=[said])["message"]["content"]

    questions = ["what is it", "which colour", "a", "where is the cat"]
    assert [answer(RED, q) for q in questions] == [answer(RED, q) for q in questions]
    assert any(answer(RED, q) != answer(BLUE, q) for q in questions)


def test_a_picture_stands_in_front_of_its_message(rendered):
    text, ids, count = rendered("generate", prompt="Describe this image", images=[b64(RED)])
    assert (text, count) == ("[img-0]Describe this image:", 1)
    first = first_of(ids)
    assert ids[: 1 + N_ROWS] == [1, *rows(first)] and max(ids[1 + N_ROWS :]) < vocabulary()


def test_generate_renders_as_chat_does(rendered):
    """Case 50 of Ollama's tests."""
    images = [b64(RED), b64(BLUE)]
    chat = {"role": "user", "content": "compare", "images": images}
    asked = rendered("generate", prompt="compare", images=images)
    assert asked == rendered("chat", messages=[chat])
    assert asked[0] == "[img-0][img-1]compare:" and asked[2] == 2


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("is [img-1] like [img-0]?", "is [img-1] like [img-0]?:"),
        ("is [img-1] so?", "[img-0]is [img-1] so?:"),
        ("[img] and [img] and [img]", "[img-0] and [img-1] and [img]:"),
        ("[img-1] then [img]", "[img-1] then [img-0]:"),
        ("[img-0] twice [img-0]", "[img-1][img-0] twice [img-0]:"),
        ("[IMG-0] [img-]", "[img-0][img-1][IMG-0] [img-]:"),
    ],
)
def test_marks_say_where_pictures_stand(rendered, prompt, text):
    red, blue = (rows(first_of(rendered("generate", prompt="a", images=[b64(p)])[1]))
                 for p in (RED, BLUE))  # fmt: skip
    shown, ids, _ = rendered("generate", prompt=prompt, images=[b64(RED), b64(BLUE)])
    assert shown == text
    runs, expected = [], []
    for place in range(len(ids)):
        runs += [b for b in (red, blue) if ids[place : place + N_ROWS] == b]
    at = sorted(
        (i, n) for n in (0, 1) for i in range(len(text)) if text.startswith(f"[img-{n}]", i)
    )
    expected = [(red, blue)[n] for _, n in at]
    assert runs == expected


def test_pictures_of_the_whole_conversation_are_seen(rendered):
    """Each message counts its own; the prompt counts them all."""
    talk = [
        {"role": "user", "content": "one", "images": [b64(RED)]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "[img-0] or [img-1]?", "images": [b64(BLUE), b64(RED)]},
    ]
    text, ids, count = rendered("chat", messages=talk)
    assert text == "[img-0]one:red[img-1] or [img-2]?:" and count == 3
    assert len([id for id in ids if id >= vocabulary()]) == 3 * N_ROWS
    red = rows(first_of(ids))
    runs = [at for at in range(len(ids)) if ids[at : at + N_ROWS] == red]
    assert len(runs) == 2  # the same picture has the same ids


TODAY = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}:"
JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}:"


@pytest.mark.parametrize("kind", ["go", "jinja"])
def test_every_kind_of_template_shows_pictures(kind, rendered, sighted, eyes, tmp_path):
    keys = {"tokenizer.chat_template": JINJA} if kind == "jinja" else {}
    model = write_model(tmp_path / "m.gguf", keys=keys)
    template = f'TEMPLATE """{TODAY}"""' if kind == "go" else ""
    list(sighted.create(Create("other", f"FROM {model}\nFROM {eyes}\n{template}")))
    said = [
        {"role": "user", "content": "a", "images": [b64(RED)]},
        {"role": "user", "content": "b [img-0] c", "images": [b64(BLUE)]},
    ]
    text, ids, count = rendered("chat", model="other", messages=said)
    assert (text, count) == ("<user>[img-0]a\n\nb [img-1] c:", 2)
    assert len([id for id in ids if id >= vocabulary()]) == 2 * N_ROWS


def test_raw_prompts_have_pictures_too(rendered):
    text, ids, count = rendered("generate", prompt="a [img-0] b", raw=True, images=[b64(RED)])
    assert (text, count) == ("a [img-0] b", 1)
    _, plain, _ = rendered("generate", prompt="a ", raw=True)
    assert ids[: len(plain) + N_ROWS] == [*plain, *rows(first_of(ids))]


def test_what_users_write_without_pictures_is_text(rendered, post):
    """Nobody can spell a picture that is not there, not even with halves of characters."""
    for text in ("[img-0] and [img]", "\udbfd[img-0]"):
        _, ids, count = rendered("generate", prompt=text)
        assert count == 0 and max(ids) < vocabulary()
        said = [
            {"role": "user", "content": "a", "images": [b64(RED)]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]
        assert rendered("chat", messages=said)[2] == 1


def test_the_oldest_pictures_go_with_their_messages(post, rendered):
    talk = [
        {"role": "user", "content": "one", "images": [b64(RED)]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "two", "images": [b64(BLUE)]},
    ]
    small = GREEDY | {"num_ctx": 30}
    text, ids, count = rendered("chat", messages=talk, options=small)
    assert (text, count) == ("[img-1]two:", 1) and len(ids) <= 30
    answer = post("chat", messages=talk, options=small)
    assert answer["messages_truncated"] == 2 and answer["prompt_eval_count"] == len(ids)


# ── what is counted, remembered, returned ─────────────────────────────────────────────────────


def test_a_picture_is_looked_at_once_and_read_once(post, sighted, monkeypatch):
    said = {"role": "user", "content": "what is it", "images": [b64(RED)]}
    first = post("chat", messages=[said])
    looks = []
    with sighted.loaded.lease(*leased(sighted)) as model:
        assert isinstance(model.net, Llava)
        tower, original = model.net.v, model.net.v.forward

        def counted(pixels):
            looks.append(1)
            return original(pixels)

        monkeypatch.setattr(tower, "forward", counted)
    more = [said, first["message"], {"role": "user", "content": "sure"}]
    second = post("chat", messages=more)
    assert looks == []  # its rows were there
    assert second["prompt_cached_count"] >= first["prompt_eval_count"] - 1 > N_ROWS
    again = post("chat", messages=[said])
    assert again["message"] == first["message"]


def leased(service):
    from refollama.shelf import Files

    files = service.find("llava")
    return (Files(files.weights, files.projector),)


def test_context_is_text_alone(post):
    first = post("generate", prompt="what is it", images=[b64(RED)])
    assert max(first["context"]) < vocabulary()
    assert len(first["context"]) == first["prompt_eval_count"] - N_ROWS + first["eval_count"]
    second = post("generate", prompt="so", images=[b64(BLUE)], context=first["context"])
    assert second["context"][: len(first["context"])] == first["context"]


def test_a_foreign_id_of_a_picture_is_refused(post):
    post("generate", prompt="a", images=[b64(RED)])
    error = post("generate", 400, prompt="a", context=[1, vocabulary() + 3])["error"]
    assert "not in the vocabulary" in error


def test_penalties_never_see_a_picture(post):
    options = GREEDY | {"repeat_penalty": 1.5, "repeat_last_n": -1, "presence_penalty": 0.5}
    assert post("generate", prompt="a", images=[b64(RED)], options=options)["response"]


def test_every_way_of_answering_works_with_a_picture(post):
    said = [{"role": "user", "content": "a", "images": [b64(RED)]}]
    formed = post("chat", messages=said, format="json", options=GREEDY | {"num_predict": 40})
    assert formed["message"]["content"].startswith("{")
    noted = post("chat", messages=said, logprobs=True, top_logprobs=2)
    assert len(noted["logprobs"]) == noted["eval_count"]
    both = post("chat", messages=said, n=2, options=GREEDY | {"temperature": 1, "seed": 3})
    assert len(both["answers"]) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"rope_frequency_base": 5000},
        {"f16_kv": False},
        {"use_mmap": False},
        {"num_batch": 3},
        {"num_keep": 5, "num_ctx": 24},
    ],
    ids=str,
)
def test_options_of_the_model_hold_with_a_picture(post, more):
    options = GREEDY | more
    answer = post("generate", prompt="what is it", images=[b64(RED)], options=options)
    assert answer["prompt_eval_count"] > 0 and answer["eval_count"] == 12


def test_requests_side_by_side_get_what_they_get_alone(sighted, app):
    """Each with a picture of its own; the model remembers fewer than there are."""
    pictures = [png((10 * n, 200 - 9 * n, 7 * n)) for n in range(12)]

    def ask(picture):
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://localhost") as one:
            body = {"model": "llava", "prompt": "what is it", "images": [b64(picture)]}
            answer = one.post("/api/generate", json=body | {"stream": False, "options": GREEDY})
            return answer.json()["response"]

    with sighted.loaded.lease(*leased(sighted)) as model:
        assert isinstance(model.net, Llava)
        model.net.gallery.most = 3
        alone = [ask(picture) for picture in pictures]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, pictures * 3)) == alone * 3
        assert len(model.net.gallery.memory()) <= 3
    assert len(set(alone)) > 1


def test_nobody_looks_at_pictures_for_one_who_has_gone(sighted, monkeypatch):
    looks: list[Picture] = []
    monkeypatch.setattr(Llava, "look", lambda net, picture: looks.append(picture))
    pictures = tuple(png((n, 0, 0)) for n in range(5))
    ask = Generate("llava", "a", images=pictures, options=GREEDY)
    with pytest.raises(Abandoned):
        list(sighted.generate(ask, gone=lambda: len(looks) == 2))
    assert len(looks) == 2


@pytest.mark.parametrize("keep", [0, 5, 18])
def test_a_long_answer_moves_on_over_the_picture(keep, tiny, eyes):
    """The context is full: part of it goes, half of the picture first. As in the textbook loop."""
    options = {"temperature": 0, "repeat_penalty": 1, "num_ctx": 40, "num_predict": 90}
    options |= {"num_keep": keep}
    with load(tiny, options, projector=eyes) as llm:
        assert isinstance(llm.net, Llava)
        seen = llm.net.picture(RED)
        prompt = [1, *seen.ids, *llm.tokenizer.encode("what is", special=True)]
        with pytest.raises(BadRequest, match="not in the vocabulary"):  # nobody shows the picture
            llm.start(prompt, llm.defaults)
        found = list(llm.start(prompt, llm.defaults, Extras(pictures=(seen,))))
        expected = list(generate(llm.net, prompt, llm.defaults, Marks(llm.tokenizer.eos_ids, 1)))
    assert found == expected and len(found) > 40 - len(prompt)


@pytest.fixture
def looks(monkeypatch):
    """The pictures that are looked at."""
    found: list[Picture] = []
    look = Llava.look

    def noted(net, picture):
        found.append(picture)
        look(net, picture)

    monkeypatch.setattr(Llava, "look", noted)
    return found


def test_what_is_cut_away_or_refused_is_not_looked_at(post, looks):
    many = [b64(png((40 * n, 9, 9))) for n in range(6)]
    small = GREEDY | {"num_ctx": 40}
    body = {"prompt": "a", "images": many, "options": small}
    post("generate", 400, truncate=False, **body)
    post("generate", **body | {"options": small | {"num_predict": 0}})
    assert looks == []
    assert post("generate", **body)["prompt_eval_count"] <= 40
    assert 1 <= len(looks) <= 3


def test_pictures_that_are_looked_at_are_told(http, sighted):
    ask = {"model": "llava", "prompt": "a", "progress": True, "options": GREEDY, "n": 2}

    def told(*pictures):
        body = ask | {"images": [b64(picture) for picture in pictures]}
        lines = http.post("/api/generate", content=json.dumps(body)).text.splitlines()
        records = [record for line in lines if (record := json.loads(line).get("progress"))]
        found: dict[str, list[tuple[int, int]]] = {}
        for one in records:
            found.setdefault(one["stage"], []).append((one["completed"], one["total"]))
        return found

    first = told(RED, BLUE)
    assert list(first) == ["load", "images", "prompt"]
    assert first["images"] in ([(0, 2), (2, 2)], [(0, 2), (1, 2), (2, 2)])
    assert list(told(RED, BLUE)) == ["prompt"]
    assert told(RED, png((1, 2, 3)))["images"] == [(0, 1), (1, 1)]


def test_looking_is_part_of_reading(post, monkeypatch):
    look = Llava.look

    def slow(*args):
        time.sleep(0.3)
        look(*args)

    monkeypatch.setattr(Llava, "look", slow)
    first = post("generate", prompt="a", images=[b64(RED)])
    assert 0.3e9 <= first["prompt_eval_duration"] <= first["total_duration"]
    second = post("generate", prompt="a", images=[b64(RED)])
    assert second["prompt_eval_duration"] < first["prompt_eval_duration"]


def test_nobody_decodes_pictures_for_one_who_has_gone(sighted, monkeypatch):
    opened: list[bytes] = []

    def pixels(file, *_):
        opened.append(file)
        return np.zeros((3, 24, 24), np.float32)

    monkeypatch.setattr("refollama.models.llava.pixels", pixels)
    ask = Generate("llava", "a", images=tuple(png((n, 0, 0)) for n in range(5)))
    with pytest.raises(Abandoned):
        list(sighted.generate(ask, gone=lambda: len(opened) == 2))
    assert len(opened) == 2


def test_eyes_may_see_as_those_of_llama_cpp(tiny, eyes, monkeypatch):
    def blocks(word):
        monkeypatch.setenv("REFOLLAMA_VISION", word)
        service = Service.default(local_files=True)
        list(service.create(Create("llava", f"FROM {tiny}\nFROM {eyes}")))
        with service.loaded.lease(*leased(service)) as model:
            assert isinstance(model.net, Llava)
            found = len(model.net.v.blk)
        service.close()
        return found

    assert (blocks(""), blocks("llama.cpp")) == (2, 1)
    net = load(tiny, projector=eyes, vision_blocks=-1).net
    assert isinstance(net, Llava) and len(net.v.blk) == 1
    with pytest.raises(BadRequest, match="REFOLLAMA_VISION must be empty or 'llama.cpp', not '1'"):
        blocks("1")


def test_who_changes_the_eyes_sees_anew(sighted, post):
    before = post("generate", prompt="a", images=[b64(RED)])["response"]
    with sighted.loaded.lease(*leased(sighted)) as model:
        old = model.net.mm.get_submodule("2").weight.clone()
        model.net.mm.get_submodule("2").weight.zero_()
        changed = post("generate", prompt="a", images=[b64(RED)])
        assert changed["response"] == post("generate", prompt="a", images=[b64(BLUE)])["response"]
        model.net.mm.get_submodule("2").weight.copy_(old)
    assert post("generate", prompt="a", images=[b64(RED)])["response"] == before


# ── what is refused ───────────────────────────────────────────────────────────────────────────


def bomb():
    data = zlib.compress(bytes(10_000), 9)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)

    def chunk(name, body):
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


CUT = encoded(Image.effect_noise((99, 99), 90).convert("RGB"), "JPEG")[:2000]


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ([b64(RED), "a!"], "images[1] is not base64"),
        ([b64(RED), "data:image/png;base64," + b64(RED)], "images[1] is not base64"),
        ([b64(RED), 5], "images[1] must be a string in base64"),
        ("x", "images must be a list of strings in base64"),
        ([b64(RED), b64(b"hello")], "images[1]: no picture that can be read: those are PNG, JPEG"),
        ([""], "images[0]: no picture"),
        ([b64(RED), b64(bomb())], "images[1]: more than 67108864 pixels"),
        ([b64(CUT)], "images[0]: this JPEG picture is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_which_picture_is_wrong_is_said(post, images, error):
    assert post("generate", 400, prompt="a", images=images)["error"].startswith(error)
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "images": images}]
    told = post("chat", 400, messages=said)["error"]
    assert told.startswith(f"messages[1].{error}")
    assert post("generate", prompt="a", images=[b64(RED)])["done"]  # the server goes on


def test_base64_may_stand_in_lines(post):
    lines = base64.encodebytes(RED).decode()
    assert lines.count("\n") > 1
    for text in (lines, lines.replace("\n", "\r\n")):
        seen = post("generate", prompt="a", images=[text])
        assert seen["response"] == post("generate", prompt="a", images=[b64(RED)])["response"]
    for text in (lines.replace("\n", " "), lines.replace("\n", "").rstrip("=")[:-1]):
        assert post("generate", 400, prompt="a", images=[text])


def test_a_mark_without_a_picture_is_refused(post):
    error = "[img-2] stands for no picture: there are 2, from 0 on"
    images = [b64(RED), b64(BLUE)]
    assert post("generate", 400, prompt="is [img-2] it?", images=images)["error"] == error
    said = {"role": "user", "content": "[img-2]", "images": images}
    assert post("chat", 400, messages=[said])["error"] == f"messages[0]: {error}"


def test_more_pictures_than_anybody_shows_are_refused(post):
    said = [{"role": "user", "content": "a", "images": [b64(RED)] * 65}] * 2
    assert post("chat", 400, messages=said)["error"].startswith("130 images: at most 128")


def test_a_model_without_eyes_says_so_before_it_is_loaded(post, monkeypatch):
    monkeypatch.setattr("refollama.shelf.load_file", lambda *_, **__: pytest.fail("loaded"))
    said = [{"role": "user", "content": "a", "images": [b64(RED)]}]
    for body in ({"prompt": "a", "images": [b64(RED)]}, {"messages": said}):
        route = "chat" if "messages" in body else "generate"
        error = post(route, 400, model="tiny", **body)["error"]
        assert error == "this model cannot look at images"


# ── a model of two files ──────────────────────────────────────────────────────────────────────


def blob(http, path):
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert http.post(f"/api/blobs/{digest}", content=path.read_bytes()).status_code in (200, 201)
    return digest


def made(http, **body):
    """The last record of a create request, and what `show` tells then."""
    answer = http.post("/api/create", json={"model": "new", "stream": False, **body})
    return answer.status_code, answer.json(), http.post("/api/show", json={"model": "new"}).json()


@pytest.mark.parametrize("way", ["twice", "eyes first", "files", "from and files", "child"])
def test_a_model_is_made_of_a_language_model_and_eyes(way, http, sighted, tiny, eyes, post):
    digests = {"model.gguf": blob(http, tiny), "mmproj.gguf": blob(http, eyes)}
    ways: dict[str, dict[str, object]] = {
        "twice": {"modelfile": f"FROM {tiny}\nFROM {eyes}"},
        "eyes first": {"modelfile": f"FROM {eyes}\nFROM {tiny}"},
        "files": {"files": digests},
        "from and files": {"from": "tiny", "files": {"mmproj.gguf": digests["mmproj.gguf"]}},
        "child": {"from": "llava", "system": "be brief"},
    }
    status, record, shown = made(http, **ways[way])
    assert (status, record) == (200, {"status": "success"})
    assert shown["details"]["family"] == "llama"
    assert shown["details"]["families"] == ["llama", "clip"]
    assert shown["capabilities"] == ["completion", "vision"]
    assert shown["projector_info"]["clip.vision.block_count"] == 2
    answer = post("generate", model="new", prompt="a", images=[b64(RED)])
    assert answer["prompt_eval_count"] > N_ROWS


@pytest.mark.parametrize("kind", ["mlp", "mlp_norm", "linear", "ldp", "ldpv2"])
@pytest.mark.parametrize("way", ["modelfile", "files", "from"])
def test_eyes_of_another_model_are_refused_when_they_meet(kind, way, http, sighted, tiny, tmp_path):
    wide = write_eyes(tmp_path / "wide.gguf", kind, width=96)
    ways: dict[str, dict[str, object]] = {
        "modelfile": {"modelfile": f"FROM {tiny}\nFROM {wide}"},
        "files": {"files": {"m": blob(http, tiny), "p": blob(http, wide)}},
        "from": {"from": "llava", "files": {"p": blob(http, wide)}},
    }
    with unchanged(sighted.store):
        status, record, _ = made(http, **ways[way])
    assert status == 400
    assert "96 numbers, but the language model reads 64" in record["error"]


def test_the_same_weights_with_other_eyes_are_another_model(sighted, tiny, post, tmp_path):
    others = write_eyes(tmp_path / "other.gguf", "ldp", seed=9)
    modelfile = f'FROM {tiny}\nFROM {others}\nTEMPLATE """{TEMPLATE}"""'
    list(sighted.create(Create("other", modelfile)))
    counts = [
        post("generate", model=name, prompt="a", images=[b64(RED)])["prompt_eval_count"]
        for name in ("llava", "other", "llava")
    ]
    assert counts[0] - counts[1] == N_ROWS - ROWS["ldp"] and counts[0] == counts[2]
    assert post("generate", 400, model="tiny", prompt="a", images=[b64(RED)])


# ── the official client, and Python ───────────────────────────────────────────────────────────


@pytest.fixture
def client(app, sighted):
    return ollama.Client(transport=httpx.WSGITransport(app))


def test_the_official_client_shows_pictures_in_all_its_ways(client, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    ways = [str(path), path, RED, b64(RED), ollama.Image(value=path), ollama.Image(value=RED)]
    answers = set()
    for picture in ways:
        said = {"role": "user", "content": "what is it", "images": [picture]}
        answers.add(client.chat("llava", [said], options=GREEDY).message.content)
        asked = client.generate("llava", "what is it", images=[picture], options=GREEDY)
        answers.add(asked.response)
    assert len(answers) == 1
    assert "vision" in client.show("llava").capabilities


def test_python_shows_pictures_by_path_or_bytes(tiny, eyes, tmp_path, post):
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    llm = load(tiny, {"temperature": 0, "repeat_penalty": 1, "num_predict": 12}, projector=eyes)
    found = {
        llm.chat([{"role": "user", "content": "a", "images": [picture]}]).text
        for picture in (path, str(path), RED)
    }
    found |= {llm.generate("a", images=[picture]).text for picture in (path, str(path), RED)}
    found |= {"".join(llm.stream("a", images=[RED]))}
    bare = post("generate", prompt="a", images=[b64(RED)], template="{{ .Prompt }}")
    assert found == {bare["response"]}


def test_a_model_by_name_has_its_eyes(sighted):
    with load("llava") as llm:
        assert llm.chat([{"role": "user", "content": "a", "images": [RED]}]).text
