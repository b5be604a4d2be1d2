"""The official npm client drives a real server: every method, streamed and not, errors, abort.

The script prints what the client gave it as one JSON object; the tests say what must be in it.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess

import pytest

from refollama.client import Client
from refollama.version import __version__
from tests.registry.fake import FakeRegistry
from tests.server.conftest import TEMPLATE, endless
from tests.server.process import running

pytestmark = pytest.mark.slow

VERSION = "0.6.4"
INSTALL = (
    "npm install --no-audit --no-fund --ignore-scripts --fetch-retries=0 --fetch-timeout=30000"
)
SCRIPT = """
import { Ollama } from "ollama";

// Digests of two files that were sent before; where a registry listens.
const [host, tiny, eternal, registry] = process.argv.slice(2);
const ollama = new Ollama({ host });
const options = { temperature: 0, repeat_penalty: 1, num_predict: 12 };
const messages = [{ role: "user", content: "the" }];
const model = "tiny";
const found = {};

const all = async (stream) => {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
};
const refusal = async (promise) => {
  try {
    const answer = await promise;
    if (answer[Symbol.asyncIterator]) await all(answer);
    return null;
  } catch (error) {
    return { name: error.name, status: error.status_code ?? null, text: error.message };
  }
};

found.version = await ollama.version();
found.none = await ollama.list();
const files = { "tiny.gguf": tiny };
found.create = await all(ollama.create({ model, files, stream: true }));
found.made = await ollama.create({
  model: "shy", from: model, template: process.env.TEMPLATE, system: "be brief",
  parameters: { num_predict: 3, stop: ["x", "y"] },
});
found.copy = await ollama.copy({ source: "tiny", destination: "twin" });
found.list = await ollama.list();
found.show = await ollama.show({ model: "shy" });
found.delete = await ollama.delete({ model: "twin" });
found.left = await ollama.list();

const there = { model: `${registry}/me/tale`, insecure: true };
await ollama.copy({ source: model, destination: there.model });
found.push = await all(ollama.push({ ...there, stream: true }));
found.pushed = await ollama.push(there);
await ollama.delete(there);
found.pull = await all(ollama.pull({ ...there, stream: true }));
found.pulled = await ollama.pull(there);
found.fetched = await ollama.list();
await ollama.delete(there);
const lost = { ...there, model: `${registry}/me/nothing` };
found.lost = [
  await refusal(ollama.pull(lost)), await refusal(ollama.pull({ ...lost, stream: true })),
];

found.generate = await ollama.generate({ model, prompt: "the", options });
found.generated = await all(ollama.generate({ model, prompt: "the", options, stream: true }));
found.goes_on = await ollama.generate(
  { model, prompt: "e", context: found.generate.context, options });
const format = { type: "object", properties: { a: { enum: [1] } }, required: ["a"] };
found.formatted = await ollama.generate(
  { model, prompt: "the", format, options: { ...options, num_predict: 60 } });
found.chat = await ollama.chat({ model, messages, options });
found.chatted = await all(ollama.chat({ model, messages, options, stream: true }));
found.logprobs = await ollama.chat({ model, messages, options, logprobs: true, top_logprobs: 2 });

found.embed = await ollama.embed({ model, input: ["the", "sand"] });
found.short = await ollama.embed({ model, input: "the", dimensions: 8 });
found.embeddings = await ollama.embeddings({ model, prompt: "the" });
found.ps = await ollama.ps();
await ollama.create({ model: "endless", files: { "endless.gguf": eternal }, stream: false });
found.preload = await ollama.generate({ model: "endless", prompt: "", keep_alive: "10m" });
found.loaded = await ollama.ps();
found.unload = await ollama.chat({ model, messages: [], keep_alive: 0 });
found.after = await ollama.ps();

const missing = { model: "nope", messages, prompt: "hi", input: "hi" };
const wrong = { model, messages, prompt: "hi", options: { num_ctx: "x" } };
found.refused = {
  generate: await refusal(ollama.generate(missing)),
  generate_streamed: await refusal(ollama.generate({ ...missing, stream: true })),
  chat: await refusal(ollama.chat(missing)),
  chat_streamed: await refusal(ollama.chat({ ...missing, stream: true })),
  embed: await refusal(ollama.embed(missing)),
  embeddings: await refusal(ollama.embeddings(missing)),
  show: await refusal(ollama.show(missing)),
  delete: await refusal(ollama.delete(missing)),
  copy: await refusal(ollama.copy({ source: "nope", destination: "other" })),
};
found.wrong = {
  generate: await refusal(ollama.generate(wrong)),
  chat: await refusal(ollama.chat({ ...wrong, stream: true })),
  create: await refusal(ollama.create({ model: "a b", from: model })),
};

const endless = { num_predict: -1, num_ctx: 0, temperature: 0, repeat_penalty: 1 };
const forever = { model: "endless", prompt: "a", options: endless, messages, stream: true };
found.aborted = [];
for (const ask of ["generate", "chat"]) {
  for (const stop of [(stream) => stream.abort(), () => ollama.abort()]) {
    const stream = await ollama[ask](forever);
    try {
      for await (const part of stream) stop(stream);
    } catch (error) {
      found.aborted.push(error.name);
    }
  }
}
found.next = await ollama.generate(
  { model: "endless", prompt: "a", options: { ...endless, num_predict: 1 } });
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script, in a folder where the client is installed."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"private": true}')
    command = [*INSTALL.split(), f"ollama@{VERSION}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.skip(f"npm cannot install ollama@{VERSION}: {done.stderr.strip()[-300:]}")
    path = folder / "drive.mjs"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def found(script, tiny, tmp_path_factory):
    """What the client got, by the names that the script gives."""
    folder = tmp_path_factory.mktemp("npm-store")
    limits = {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_MAX_LOADED_MODELS": "2"}
    server = running(OLLAMA_MODELS=str(folder / "store"), **limits)
    with FakeRegistry() as registry, server as (url, _):
        sent = [send(url, tiny), send(url, endless(folder))]
        done = subprocess.run(
            ["node", str(script), url, *sent, registry.host],
            env=os.environ | {"TEMPLATE": TEMPLATE},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def send(url, path):
    """A file into the store of the server, as the client itself cannot; → its digest."""
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    with Client(url) as client:
        client.send_blob(digest, [path.read_bytes()])
    return digest


def names(answer):
    return {model["name"] for model in answer["models"]}


def test_models_are_made_listed_shown_copied_and_deleted(found):
    assert found["version"] == {"version": __version__}
    assert found["none"] == {"models": []}
    assert found["create"][-1] == found["made"] == {"status": "success"}
    assert len(found["create"]) > 1
    assert found["copy"] == found["delete"] == {"status": "success"}
    assert names(found["list"]) == {"tiny:latest", "shy:latest", "twin:latest"}
    assert names(found["left"]) == {"tiny:latest", "shy:latest"}
    digests = {model["name"]: model["digest"] for model in found["list"]["models"]}
    assert digests["tiny:latest"] == digests["twin:latest"] != digests["shy:latest"]


def test_models_go_to_a_registry_and_come_back(found):
    assert found["pushed"] == found["pulled"] == {"status": "success"}
    for parts, first in (
        (found["push"], "retrieving manifest"),
        (found["pull"], "pulling manifest"),
    ):
        assert parts[0] == {"status": first} and parts[-1] == {"status": "success"}
        bars = [part for part in parts if "digest" in part]
        assert any(bar.get("completed") == bar["total"] for bar in bars)  # 0 is left out
    digests = {model["name"]: model["digest"] for model in found["fetched"]["models"]}
    (there,) = digests.keys() - {"tiny:latest", "shy:latest"}
    assert there.endswith("/me/tale:latest")
    whole, streamed = found["lost"]
    assert whole["status"] == 500 and streamed["status"] is None
    assert whole["text"] == streamed["text"] == "pull model manifest: file does not exist"


def test_a_shown_model_is_what_was_made(found):
    shown = found["show"]
    assert shown["template"] == TEMPLATE and shown["system"] == "be brief"
    parameters = {tuple(line.split()) for line in shown["parameters"].splitlines()}
    assert parameters == {("num_predict", "3"), ("stop", '"x"'), ("stop", '"y"')}
    assert shown["details"]["family"] == "llama"
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["capabilities"] == ["completion"]


@pytest.mark.parametrize(
    ("one", "many", "text"),
    [
        ("generate", "generated", lambda part: part["response"]),
        ("chat", "chatted", lambda part: part["message"]["content"]),
    ],
)
def test_a_stream_is_the_whole_answer_in_pieces(found, one, many, text):
    whole, parts = found[one], found[many]
    assert "".join(map(text, parts)) == text(whole) != ""
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 2
    for last in (whole, parts[-1]):
        assert last["done_reason"] == "length" and last["eval_count"] == 12
        assert last["total_duration"] >= last["eval_duration"] > 0
    assert parts[-1]["prompt_eval_count"] >= 1


def test_a_context_goes_on(found):
    before = found["generate"]["context"]
    assert len(before) > 12 and found["goes_on"]["context"][: len(before)] == before


def test_a_schema_is_obeyed(found):
    answer = found["formatted"]
    assert answer["done_reason"] == "length" or json.loads(answer["response"]) == {"a": 1}


def test_logprobs_tell_of_every_token(found):
    """Chosen greedily, each token is the first of its own candidates."""
    tokens = found["logprobs"]["logprobs"]
    assert len(tokens) == 12
    for one in tokens:
        assert len(one["top_logprobs"]) == 2
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0


def test_embeddings(found):
    """Today's rows have length one; the older vector points the same way."""
    first, second = found["embed"]["embeddings"]
    assert math.hypot(*first) == pytest.approx(1, abs=1e-5) and first != second
    vector = found["embeddings"]["embedding"]
    assert first == pytest.approx([x / math.hypot(*vector) for x in vector], abs=1e-5)
    (short,) = found["short"]["embeddings"]
    assert short == pytest.approx([x / math.hypot(*first[:8]) for x in first[:8]], abs=1e-5)


def test_models_are_loaded_and_unloaded(found):
    assert names(found["ps"]) == {"tiny:latest"}
    assert found["preload"]["done_reason"] == "load"
    assert names(found["loaded"]) == {"tiny:latest", "endless:latest"}
    assert found["unload"]["done_reason"] == "unload"
    assert names(found["after"]) == {"endless:latest"}
    assert all(model["expires_at"] and model["size"] > 0 for model in found["loaded"]["models"])


def test_errors_have_their_status_and_a_sentence(found):
    for error in found["refused"].values():
        assert error["name"] == "ResponseError" and error["status"] == 404
        assert "nope" in error["text"] and "not found" in error["text"]
    for error in found["wrong"].values():
        assert error["name"] == "ResponseError" and error["status"] == 400
    assert "num_ctx" in found["wrong"]["chat"]["text"]


def test_an_aborted_stream_frees_the_model_for_the_next(found):
    """With one slot, the last answer could not come while an endless one is written."""
    assert found["aborted"] == ["AbortError"] * 4
    assert found["next"]["eval_count"] == 1
